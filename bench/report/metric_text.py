"""Names, units and formats of the metrics in a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.reasons import explain_dashes
from bench.report.cells import ReportCell
from bench.report.page import DASH, Column
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.summary import METRICS

MAIN_METRICS = (
    "ttft", "ttft_final", "otps", "total", "bleu4", "cider", "meteor", "bertscore_f1", "acceptance_rate",
    "cloud_call_rate", "cloud_calls", "written_share", "cloud_positions_per_token", "covered_share",
    "useless_escalations", "missed_corrections", "cpu_percent", "rss_peak",
)  # fmt: skip
METRIC_NAMES = {
    "ttft": "TTFT",
    "ttft_final": "final TTFT",
    "tpot": "TPOT",
    "otps": "OTPS",
    "e2e": "E2E",
    "e2e_tps": "E2E throughput",
    "itl_per_chunk": "ITL per chunk",
    "itl_per_token": "ITL per token",
    "cpu_percent": "CPU",
    "gpu_percent": "GPU",
    "rss_peak": "peak RSS",
    "rss_mean": "mean RSS",
    "gpu_memory": "GPU memory",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "bertscore_precision": "BERTScore P",
    "bertscore_recall": "BERTScore R",
    "bertscore_f1": "BERTScore F1",
    "acceptance_rate": "acceptance",
    "cloud_call_rate": "escalated rounds",
    "cloud_calls": "cloud calls",
    "written_share": "written by cloud",
    "cloud_positions_per_token": "cloud positions per token",
    "covered_share": "covered by cloud",
    "gate_auroc": "gate AUROC",
}  # every other metric is called by its key, with spaces
# unit of a metric -> unit of its column, factor, format
DISPLAY_UNITS = {
    "s": ("ms", 1e3, ".1f"),
    "tokens/s": ("tokens/s", 1, ".1f"),
    "%": ("%", 1, ".0f"),
    "MB": ("MB", 1, ".0f"),
    "0 to 10": ("", 1, ".2f"),
    "tokens": ("", 1, ".2f"),
    "bytes": ("bytes", 1, ".0f"),
}
SHARE_UNIT = ("", 1, ".3f")  # for every other unit
AMOUNT_UNITS = ("s", "tokens/s", "MB", "bytes")  # a change is given in percent


def metric_name(metric: str) -> str:
    """Return the name of a metric in text and headings."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def metric_column(metric: str) -> Column:
    """Return the column of a metric, with its unit in the heading and its meaning as the tooltip."""
    unit, better, meaning = METRICS[metric].unit, METRICS[metric].better, METRICS[metric].meaning
    heading = f"{metric_name(metric)} {DISPLAY_UNITS.get(unit, SHARE_UNIT)[0]}".strip()
    return Column(heading, f"{meaning} ({better} is better)" if better else meaning)


def format_metric(metric: str, value: float | None) -> str:
    """Return the value in the unit of its column, or a dash for None."""
    _, factor, number_format = DISPLAY_UNITS.get(METRICS[metric].unit, SHARE_UNIT)
    return DASH if value is None else format(value * factor, number_format)


def format_change(metric: str, before: float | None, after: float | None) -> str:
    """Return `before → after` and the change: in percent for amounts, as a difference for shares and scores."""
    both = f"{format_metric(metric, before)} → {format_metric(metric, after)}"
    if before is None or after is None:
        return both if before != after else DASH
    _, factor, number_format = DISPLAY_UNITS.get(METRICS[metric].unit, SHARE_UNIT)
    if METRICS[metric].unit in AMOUNT_UNITS:
        return f"{both} ({(after / before - 1) * 100:+.1f}%)" if before else both
    return f"{both} ({(after - before) * factor:+{number_format}})"


def format_interval(interval: Interval | None) -> str:
    """Return `1.23 [1.10, 1.40]`, or a dash for None."""
    return DASH if interval is None else str(interval)


def interval_limits(clip_count: int) -> str:
    """Return a sentence on the variation that intervals over so many clips do not cover.

    The share is the rule of three (Hanley and Lippman-Hand 1983): clips that are more rare may be missing from the run.
    """
    share = clip_count // 3
    kinds = f"that are fewer than 1 in {share}" if share > 1 else "that are not among these few"
    return (
        "The intervals cover the variation from clip to clip. They do not cover the variation of the machine between "
        f"runs, nor kinds of clips {kinds}."
    )


def explain_missing(metrics: Sequence[str], cells: Iterable[ReportCell]) -> list[tuple[str, str]]:
    """Return (names of metrics with their cells, reason) for each reason why a cell lacks a value."""
    figures = {cell.label: (cell.document["metrics"]["figures"], cell.document["metrics"]["reasons"]) for cell in cells}
    return explain_dashes({metric: metric_name(metric) for metric in metrics}, figures)
