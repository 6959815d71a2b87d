"""How two cells compare, from what their results files hold. Clips are paired by file_id, never by their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.metrics import Interval

Document = dict[str, Any]  # a cell's results, as edgecloud_sd/results.schema.json has them; the traces may be absent
ClipRecord = dict[str, Any]


def clips_by_id(document: Document) -> dict[str, ClipRecord]:
    """A cell's clips by file_id, in their order."""
    return {clip["file_id"]: clip for clip in document["detailed_results"]}


def paired(base: Document, ours: Document) -> list[tuple[ClipRecord, ClipRecord]]:
    """The clips that both cells have, in the order of `base`."""
    others = clips_by_id(ours)
    return [(clip, others[name]) for name, clip in clips_by_id(base).items() if name in others]


def caption_speedup(base: Document, ours: Document) -> Interval | None:
    """By seconds a caption, over the clips that both have: above 1, `ours` is faster."""
    pairs = paired(base, ours)
    return metrics.speedup([b["total_time"] for b, _ in pairs], [o["total_time"] for _, o in pairs])


def token_speedup(base: Document, ours: Document) -> Interval | None:
    """By seconds a token after the first chunk, over the clips in which both have such tokens."""
    pairs = [(b["after_first_chunk"], o["after_first_chunk"]) for b, o in paired(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return metrics.length_matched_speedup([b for b, _ in both], [o for _, o in both])


def score_difference(base: Document, ours: Document, quality: str) -> Interval | None:
    """Mean over the clips that both have, and that have such a score, of ours - base."""
    pairs = [(b["scores"].get(quality), o["scores"].get(quality)) for b, o in paired(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return metrics.difference([b for b, _ in both], [o for _, o in both])


def quality_gap_closed(ours: Document, edge: Document | None, cloud: Document | None, quality: str) -> float | None:
    """`metrics.gap_closed` of the mean score over the clips that all three have; None where clips have no such score.

    The noise is half the width of the interval of that mean's difference between edge and cloud.
    """
    if edge is None or cloud is None:
        return None
    all_three = [clips_by_id(each) for each in (ours, edge, cloud)]
    names = [name for name in all_three[0] if all(name in each for each in all_three)]
    scores = [[each[name]["scores"].get(quality) for name in names] for each in all_three]
    if not names or any(score is None for each in scores for score in each):
        return None
    spread = metrics.difference(scores[1], scores[2])
    if spread is None or spread.low is None or spread.high is None:
        return None
    own, low, high = (sum(each) / len(each) for each in scores)
    return metrics.gap_closed(own, low, high, (spread.high - spread.low) / 2)


def metric_value(document: Document, name: str) -> float | None:
    """A cell's figure, by its name in summary.FIGURES."""
    found: float | None = document["metrics"]["figures"].get(name)
    return found


def find_baseline(ours: Document, mode: str, cells: Iterable[Document]) -> Document | None:
    """The cell of `mode` alone to compare `ours` with: same pair, language and clock, and the cloud's link."""
    alike = ["pair", "language", "clock", "profile"] + (["link"] if mode == "cloud" else [])
    said = ours["experiment_config"]
    for each in cells:
        other = each["experiment_config"]
        if other["mode"] == mode and all(other[name] == said[name] for name in alike):
            return each
    return None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (latency, quality), the places of those that no other beats: the Pareto front, from fast to good.

    A point is beaten by one that is not worse in either and better in one, so equal points are on it together.
    """

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])
