"""Does a strategy pay? It does if whole captions, prefill included, take less time at equal quality.

The rival is the better of edge and cloud alone: the faster one of those whose quality is the best up to its noise. If
the quality of a strategy is below that of such a baseline, beyond the noise, the sentence says so instead. The terminal
and the report show the same table and the same sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import comparison
from bench.comparison import Document
from bench.report.page import DASH
from edgecloud_sd.measure.intervals import Interval

BASELINES = ("edge", "cloud")
# The columns of the table: what each speed-up is of
SPEEDUPS = {
    "whole captions": "sum of seconds of the baseline / of the strategy, over the clips that both have",
    "typical caption": "geometric mean over clips of seconds of the baseline / of the strategy",
    "per token": "the same for seconds per token after the first chunk: shorter captions give no advantage",
    "forecast per token": "what the cost model predicts for the time per token after prefill",
}


@dataclass(frozen=True)
class Payoff:
    """One strategy against one baseline, on the clips that both have."""

    baseline: str  # a name of BASELINES
    clips: int
    captions: Interval | None
    typical: Interval | None
    per_token: Interval | None
    base_quality: float | None
    quality: float | None
    difference: Interval | None
    p: float | None  # the permutation test of BLEU; None for another metric
    differing: int  # clips whose captions differ
    is_lesser: bool = False  # the quality of the baseline is below that of the other one, beyond the noise

    @property
    def is_worse(self) -> bool | None:
        """True if the strategy's quality is below the baseline's, beyond the noise. None: it was not measured."""
        if not self.differing:
            return False
        return None if self.difference is None else is_below(self.difference)

    @property
    def is_faster(self) -> bool | None:
        """True or False if the whole interval of the captions is on one side of 1, else None."""
        if self.captions is None or self.captions.low is None or self.captions.high is None:
            return None
        if self.captions.low > 1:
            return True
        return False if self.captions.high < 1 else None


def payoffs(ours: Document, cells: Iterable[Document], metric: str) -> list[Payoff]:
    """Return a strategy against each baseline among the cells that has clips in common with it."""
    documents = list(cells)
    baselines = {name: comparison.find_baseline(ours, name, documents) for name in BASELINES}
    common = {name: base for name, base in baselines.items() if base and comparison.pair_clips(base, ours)}
    rows = []
    for name, base in common.items():
        others = [other for other in common.values() if other is not base]
        is_lesser = any(is_below(comparison.quality_difference(other, base, metric)[0]) for other in others)
        rows.append(replace(compare_cells(name, base, ours, metric), is_lesser=is_lesser))
    return rows


def is_below(difference: Interval | None) -> bool:
    """Return True if the whole interval of a difference in quality is below 0."""
    return difference is not None and difference.high is not None and difference.high < 0


def compare_cells(name: str, base: Document, ours: Document, metric: str) -> Payoff:
    """Return the comparison of two cells. `metric` is a name of `quality.QUALITY_METRICS`."""
    difference, p = comparison.quality_difference(base, ours, metric)
    return Payoff(
        name,
        len(comparison.pair_clips(base, ours)),
        comparison.caption_speedup(base, ours),
        comparison.typical_caption_speedup(base, ours),
        comparison.token_speedup(base, ours),
        comparison.metric_value(base, metric),
        comparison.metric_value(ours, metric),
        difference,
        p,
        sum(b["generated_text"] != o["generated_text"] for b, o in comparison.pair_clips(base, ours)),
    )


def payoff_sentence(rows: Iterable[Payoff], metric_name: str) -> str:
    """Return in words if a strategy pays: against the better of both baselines first, then against the other one."""
    ordered = sorted((row for row in rows if row.captions), key=lambda row: row.captions.value)  # type: ignore[union-attr]
    if not ordered:
        return "Not decided: neither the edge alone nor the cloud alone captioned these clips; run them too."
    rivals = [row for row in ordered if not row.is_lesser] or ordered
    rival = next((row for row in rivals if row.is_worse), rivals[0])
    sentences = [f"{_headline(rival, rivals)} the {_rank(rival, ordered)}: {_clause(rival, metric_name)}."]
    sentences += [f"Against the {row.baseline} alone: {_clause(row, metric_name)}." for row in ordered if row != rival]
    missing = [name for name in BASELINES if name not in [row.baseline for row in ordered]]
    sentences += [f"The {name} alone did not run." for name in missing]
    return " ".join(sentences)


def _rank(rival: Payoff, ordered: Sequence[Payoff]) -> str:
    """Return the name of the rival, and in which way it is the better baseline. `ordered` begins with the fastest."""
    name = f"{rival.baseline} alone"
    if len(ordered) == 1:
        return name
    if any(row.is_lesser for row in ordered):
        return f"{name}, the baseline of higher quality"
    return f"{name}, the faster baseline" if rival == ordered[0] else name


def _headline(rival: Payoff, rivals: Iterable[Payoff]) -> str:
    """Return the answer of a strategy against its rival, without the rival's name."""
    if rival.is_worse:
        return "Not compared at equal quality with"
    if any(row.is_worse is None for row in rivals):
        return "Not decided without a measured quality against"
    return {True: "Pays", False: "Does not pay", None: "Not decided"}[rival.is_faster] + " against"


def _clause(row: Payoff, metric_name: str) -> str:
    """Return the speed-up of whole captions and the quality of both sides."""
    clause = f"{row.captions} times as fast per caption, {_quality(row, metric_name)}"
    typical = row.typical
    if row.captions is None or typical is None or typical.low is None or typical.high is None:
        return clause
    if typical.low <= row.captions.value <= typical.high:
        return clause
    return f"{clause}; a few long captions carry this ratio, which is {typical} for the typical caption"


def _quality(row: Payoff, metric_name: str) -> str:
    if row.base_quality is None or row.quality is None or row.difference is None:
        return f"{metric_name} not measured"
    if row.differing == 0:
        return f"the same captions ({metric_name} {row.quality:.3f})"
    test = "" if row.p is None else f", p {row.p:.2g}"
    difference = row.difference.shown("+.3f")
    return f"{metric_name} {row.quality:.3f} against {row.base_quality:.3f} (difference {difference}{test})"


def payoff_rows(rows: Iterable[Payoff], forecast: Mapping[str, Any] | None) -> list[list[str]]:
    """Return the cells of the table for each baseline: its name, then the columns of `SPEEDUPS`.

    `forecast` has the fields of a `Forecast`, or is None.
    """
    return [
        [f"{row.baseline} alone"]
        + [DASH if interval is None else str(interval) for interval in (row.captions, row.typical, row.per_token)]
        + [f"{forecast[f'over_{row.baseline}']:.2f}" if forecast else DASH]
        for row in rows
    ]
