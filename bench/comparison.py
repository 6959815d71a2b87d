"""How two cells compare, from what their results files hold. Clips are paired by file_id, never by their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgecloud_sd import metrics
from edgecloud_sd.metrics import Interval

Document = dict[str, Any]  # a cell's results, as edgecloud_sd/results.schema.json has them; the traces may be absent
Clip = dict[str, Any]


def clips(document: Document) -> dict[str, Clip]:
    """A cell's clips by file_id, in their order."""
    return {clip["file_id"]: clip for clip in document["detailed_results"]}


def paired(base: Document, ours: Document) -> list[tuple[Clip, Clip]]:
    """The clips that both cells have, in the order of `base`."""
    others = clips(ours)
    return [(clip, others[name]) for name, clip in clips(base).items() if name in others]


def speedup(base: Document, ours: Document) -> Interval | None:
    """By seconds a caption, over the clips that both have: above 1, `ours` is faster."""
    pairs = paired(base, ours)
    return metrics.speedup([b["total_time"] for b, _ in pairs], [o["total_time"] for _, o in pairs])


def length_matched(base: Document, ours: Document) -> Interval | None:
    """By seconds a token after the first, over the clips in which both have such tokens."""
    pairs = [(_after_first(b), _after_first(o)) for b, o in paired(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return metrics.tpot_speedup([b for b, _ in both], [o for _, o in both])


def _after_first(clip: Clip) -> tuple[int, float] | None:
    """(tokens, s) after the first token with text; None for a caption that came at one moment."""
    if clip["otps"] is None or clip["ttft"] is None or clip["e2e"] is None:
        return None
    return len(clip["token_ids"]) - 1, clip["e2e"] - clip["ttft"]


def score_difference(base: Document, ours: Document, quality: str) -> Interval | None:
    """Mean over the clips that both have, and that have such a score, of ours - base."""
    pairs = [(b["scores"].get(quality), o["scores"].get(quality)) for b, o in paired(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return metrics.difference([b for b, _ in both], [o for _, o in both])


def gap_closed(ours: Document, edge: Document | None, cloud: Document | None, quality: str) -> float | None:
    """`metrics.gap_closed` of the cells' figures.

    The noise is half the width of the interval of the clips' differences between edge and cloud.
    """
    if edge is None or cloud is None:
        return None
    spread = score_difference(edge, cloud, quality)
    noise = (spread.high - spread.low) / 2 if spread else 0.0
    return metrics.gap_closed(figure(ours, quality), figure(edge, quality), figure(cloud, quality), noise)


def figure(document: Document, name: str) -> float | None:
    """A cell's figure, by its name in summary.FIGURES."""
    found: float | None = document["metrics"]["figures"].get(name)
    return found


def baseline(ours: Document, mode: str, cells: Iterable[Document]) -> Document | None:
    """The cell of `mode` alone to compare `ours` with: same pair, language and clock, and the cloud's link."""
    alike = ["pair", "language", "clock", "profile"] + (["link"] if mode == "cloud" else [])
    said = ours["experiment_config"]
    for each in cells:
        other = each["experiment_config"]
        if other["mode"] == mode and all(other[name] == said[name] for name in alike):
            return each
    return None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (latency, quality), the places of those that no other beats: the Pareto front, from fast to good.

    A point is beaten by one that is not worse in either and better in one, so equal points are on it together.
    """

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(*point)), key=lambda i: points[i])
