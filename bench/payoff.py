"""Does a strategy pay? Its speed-ups over the edge alone and over the cloud alone, with the quality beside them.

The terminal and the report show the same table and the same sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import comparison
from bench.comparison import Document
from bench.report.page import DASH
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.quality import BLEU

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
    return [
        compare_cells(name, base, ours, metric)
        for name, base in baselines.items()
        if base and comparison.pair_clips(base, ours)
    ]


def compare_cells(name: str, base: Document, ours: Document, metric: str) -> Payoff:
    """Return the comparison of two cells. `metric` is a name of `quality.QUALITY_METRICS`."""
    if metric in BLEU:
        difference, p = comparison.bleu_difference(base, ours, BLEU.index(metric) + 1)
    else:
        difference, p = comparison.score_difference(base, ours, metric), None
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
    """Return in words if a strategy pays: against the faster of both baselines first, then against the other one."""
    ordered = sorted((row for row in rows if row.captions), key=lambda row: row.captions.value)  # type: ignore[union-attr]
    if not ordered:
        return "Not decided: neither the edge alone nor the cloud alone captioned these clips; run them too."
    headline = {True: "Pays", False: "Does not pay", None: "Not decided"}[ordered[0].is_faster]
    faster = ", the faster baseline" if len(ordered) > 1 else ""
    sentences = [f"{headline} against the {ordered[0].baseline} alone{faster}: {_clause(ordered[0], metric_name)}."]
    sentences += [f"Against the {row.baseline} alone: {_clause(row, metric_name)}." for row in ordered[1:]]
    missing = [name for name in BASELINES if name not in [row.baseline for row in ordered]]
    sentences += [f"The {name} alone did not run." for name in missing]
    return " ".join(sentences)


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
