"""Comparisons of two cells by their results files. Clips are paired by file_id, never by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.measure import intervals, metrics, quality
from edgecloud_sd.measure.intervals import Interval

Document = dict[str, Any]  # the results of a cell, as edgecloud_sd/measure/results.schema.json; traces may be absent
ClipRecord = dict[str, Any]


def clips_by_id(document: Document) -> dict[str, ClipRecord]:
    """Return the clips of a cell by file_id, in their order."""
    return {clip["file_id"]: clip for clip in document["detailed_results"]}


def pair_clips(base: Document, ours: Document) -> list[tuple[ClipRecord, ClipRecord]]:
    """Return the clips that both cells have, in the order of `base`."""
    others = clips_by_id(ours)
    return [(clip, others[file_id]) for file_id, clip in clips_by_id(base).items() if file_id in others]


def caption_speedup(base: Document, ours: Document) -> Interval | None:
    """Return the ratio of seconds per caption, base / ours, over the common clips. Above 1, `ours` is faster."""
    pairs = pair_clips(base, ours)
    return intervals.speedup([b["total_time"] for b, _ in pairs], [o["total_time"] for _, o in pairs])


def typical_caption_speedup(base: Document, ours: Document) -> Interval | None:
    """Return the geometric mean over the common clips of the ratio of seconds per caption, base / ours."""
    pairs = pair_clips(base, ours)
    return intervals.typical_speedup([b["total_time"] for b, _ in pairs], [o["total_time"] for _, o in pairs])


def token_speedup(base: Document, ours: Document) -> Interval | None:
    """Return the ratio of seconds per token after the first chunk, over the common clips that have such tokens."""
    pairs = [(b["after_first_chunk"], o["after_first_chunk"]) for b, o in pair_clips(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return intervals.length_matched_speedup([b for b, _ in both], [o for _, o in both])


def score_difference(base: Document, ours: Document, metric: str) -> Interval | None:
    """Return the mean of ours - base over the common clips that have such a score."""
    pairs = [(b["scores"].get(metric), o["scores"].get(metric)) for b, o in pair_clips(base, ours)]
    both = [(b, o) for b, o in pairs if b is not None and o is not None]
    return intervals.difference([b for b, _ in both], [o for _, o in both])


def clip_bleu_counts(document: Document, clips: Sequence[ClipRecord]) -> NDArray[np.float64]:
    """Return `quality.bleu_counts` of clips of a cell."""
    captions, references = [clip["generated_text"] for clip in clips], [clip["reference_captions"] for clip in clips]
    language, normalisation = document["experiment_config"]["language"], document["metrics"]["score_normalisation"]
    return quality.bleu_counts(captions, references, language, normalisation)


def corpus_bleu_difference(base: NDArray[np.float64], ours: NDArray[np.float64], n: int) -> Interval | None:
    """Return corpus BLEU-n of ours - base from the counts of each clip. Clips differ in their n-gram matches."""
    return intervals.corpus_difference(base, ours, partial(quality.bleu_of_counts, n=n), rarest=n - 1)


def bleu_difference(base: Document, ours: Document, n: int = 4) -> tuple[Interval | None, float | None]:
    """Return corpus BLEU-n of ours - base over the common clips, and the p of `intervals.permutation_p`.

    Both are None without common clips.
    """
    pairs = pair_clips(base, ours)
    base_counts = clip_bleu_counts(base, [clip for clip, _ in pairs])
    our_counts = clip_bleu_counts(ours, [clip for _, clip in pairs])
    p = intervals.permutation_p(base_counts, our_counts, partial(quality.bleu_of_counts, n=n))
    return corpus_bleu_difference(base_counts, our_counts, n), p


def quality_difference(base: Document, ours: Document, metric: str) -> tuple[Interval | None, float | None]:
    """Return ours - base of a metric of `quality.QUALITY_METRICS`, and for BLEU the p of `bleu_difference`."""
    if metric in quality.BLEU:
        return bleu_difference(base, ours, quality.BLEU.index(metric) + 1)
    return score_difference(base, ours, metric), None


def quality_gap_closed(ours: Document, edge: Document | None, cloud: Document | None, metric: str) -> float | None:
    """Return `metrics.gap_closed` of the mean score over the common clips of all three cells.

    The noise is half the width of the interval of the difference between edge and cloud. Return None if a cell is
    missing, or if a clip has no such score.
    """
    if edge is None or cloud is None:
        return None
    cells = [clips_by_id(document) for document in (ours, edge, cloud)]
    common = [file_id for file_id in cells[0] if all(file_id in clips for clips in cells)]
    scores = [[clips[file_id]["scores"].get(metric) for file_id in common] for clips in cells]
    if not common or any(score is None for cell_scores in scores for score in cell_scores):
        return None
    gap = intervals.difference(scores[1], scores[2])
    if gap is None or gap.low is None or gap.high is None:
        return None
    our_mean, edge_mean, cloud_mean = (sum(cell_scores) / len(cell_scores) for cell_scores in scores)
    return metrics.gap_closed(our_mean, edge_mean, cloud_mean, (gap.high - gap.low) / 2)


def metric_value(document: Document, name: str) -> float | None:
    """Return a metric of a cell by its name in `summary.METRICS`."""
    value: float | None = document["metrics"]["figures"].get(name)
    return value


def find_baseline(ours: Document, mode: str, cells: Iterable[Document]) -> Document | None:
    """Return the cell of `mode` with the same pair, language, prompt, clock and profile.

    The cloud alone must have the same link, and the edge alone the same limits. Files of other runs
    may hold several such cells, and the first of those with the most common clips is taken.
    """
    same_keys = ["pair", "language", "prompt_digest", "with_transcription", "clock", "profile"] + (
        ["link"] if mode == "cloud" else ["max_cpu_cores", "max_memory_gb"]
    )
    own = ours["experiment_config"]

    def is_comparable(experiment: dict[str, Any]) -> bool:
        return experiment["strategy"]["mode"] == mode and all(experiment.get(key) == own.get(key) for key in same_keys)

    baselines = [document for document in cells if is_comparable(document["experiment_config"])]
    return max(baselines, key=lambda document: len(pair_clips(document, ours)), default=None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (latency, quality) points that no other point dominates, from fast to good.

    A point dominates another if it is not worse in either value and better in one. Equal points are on the front
    together.
    """

    def is_dominated(x: float, y: float) -> bool:
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    return sorted((i for i, point in enumerate(points) if not is_dominated(*point)), key=lambda i: points[i])
