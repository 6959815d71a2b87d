"""The figures of ways to decode the same clips: costs, and the share of the quality gap that they close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from bench.held_out import HeldOutClip
from bench.ways import CLOUD, EDGE, ParetoWay
from edgecloud_sd.events import Trace
from edgecloud_sd.measure import intervals, metrics, quality
from edgecloud_sd.measure.intervals import Interval, Statistic
from edgecloud_sd.pocket.evaluate import share_of_attributes_named

SCORES: dict[str, Statistic] = {  # computed from the means of `quality_columns`
    "bleu1": partial(quality.bleu_of_counts, n=1),
    "bleu4": partial(quality.bleu_of_counts, n=4),
    "cider": lambda means: means[..., 0],
    "attributes": lambda means: means[..., 0],
}
GAP_NAMES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "cider": "CIDEr", "attributes": "attributes"}


@dataclass(frozen=True)
class Gap:
    """A score, and the share of the gap between edge and cloud that it closes, or the reason why there is none."""

    score: float | None
    closed: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class ParetoPoint:
    """A way to decode with its costs, means over clips. `speedup` is over mode cloud, `gaps` by metric."""

    way: ParetoWay
    calls: float
    positions: float
    seconds: float
    speedup: Interval | None
    gaps: dict[str, Gap]


def compare_ways(
    clips: Sequence[HeldOutClip],
    traces: Mapping[ParetoWay, Sequence[Trace]],
    decode: metrics.DecodeText,
    normalisation: str,
) -> list[ParetoPoint]:
    """Return the point of each way. Modes edge and cloud must be among them."""
    captions = {way: [decode(trace.tokens) for trace in decoded] for way, decoded in traces.items()}
    gaps = {name: measure_gaps(name, clips, captions, normalisation) for name in SCORES}
    cloud_seconds = [trace.seconds for trace in traces[CLOUD]]
    return [
        ParetoPoint(
            way,
            calls=fmean(metrics.caption_calls(metrics.counts(trace)) for trace in decoded),
            positions=fmean(metrics.counts(trace).cloud_positions for trace in decoded),
            seconds=fmean(trace.seconds for trace in decoded),
            speedup=intervals.speedup(cloud_seconds, [trace.seconds for trace in decoded]),
            gaps={name: by_way[way] for name, by_way in gaps.items()},
        )
        for way, decoded in traces.items()
    ]


def measure_gaps(
    name: str, clips: Sequence[HeldOutClip], captions: Mapping[ParetoWay, Sequence[str]], normalisation: str
) -> dict[ParetoWay, Gap]:
    """Return the score of each way in a metric of `SCORES`, and the share of the gap that it closes."""
    try:
        columns = {way: quality_columns(name, clips, texts, normalisation) for way, texts in captions.items()}
    except quality.NotMeasured as error:
        return dict.fromkeys(captions, Gap(None, None, str(error)))
    gaps = {}
    for way, own in columns.items():
        closed = intervals.gap_interval(columns[EDGE], columns[CLOUD], own, SCORES[name])
        reason = "" if closed else f"{GAP_NAMES[name]}: the cloud scores no higher than the edge"
        gaps[way] = Gap(float(SCORES[name](own.mean(0))), closed, reason)
    return gaps


def quality_columns(
    name: str, clips: Sequence[HeldOutClip], captions: Sequence[str], normalisation: str
) -> NDArray[np.float64]:
    """Return what the score of a metric is computed from [clips, columns]. Raise NotMeasured with the reason."""
    language, references = clips[0].language, [clip.references for clip in clips]
    if name == "cider":
        return quality.cider_scores(captions, references, language, normalisation)[:, None]
    if name != "attributes":
        return quality.bleu_counts(captions, references, language, normalisation)
    shares = [
        share_of_attributes_named([text], [clip.attributes], [language])
        for text, clip in zip(captions, clips, strict=True)
        if clip.attributes
    ]
    if not shares:
        raise quality.NotMeasured("no reference names all attributes of a pocket clip")
    return np.array(shares)[:, None]
