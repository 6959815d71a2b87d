"""The report of one file: what was run, how long it took, how good the captions are, and the captions themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import comparison, payoff
from bench.budget import budget_notes
from bench.comparison import Document
from bench.report import pictures
from bench.report.captions import list_captions
from bench.report.cells import MACHINE_KEYS, OUTPUT_MEANING, ReportCell, group_by_language, list_facts
from bench.report.label_words import list_label_words
from bench.report.metric_text import (
    MAIN_METRICS,
    explain_missing,
    format_metric,
    interval_limits,
    metric_column,
    metric_name,
)
from bench.report.page import (
    DASH,
    Block,
    BulletList,
    Column,
    Page,
    Paragraph,
    Section,
    Table,
    list_sections,
    make_picture,
)
from bench.report.runs import Run
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.summary import METRICS


def build_run_page(run: Run, quality: str, max_clips: int) -> Page:
    """Return the report of one run, with its sections once per language."""
    groups = group_by_language(run.cells.values())
    sections = [Section("What was run", describe_run(run, groups))]
    for language, cells in groups.items():
        sections += list_sections(
            {
                "Summary": [*summarise_metrics(cells), *list_budgets(cells)],
                "Where the time goes": show_breakdown(cells),
                "Latency against quality": compare_latency_and_quality(cells, quality),
                "Acceptance by position": [*show_acceptance(cells), *show_accepted_lengths(cells)],
                "Does it pay?": [*show_payoff(cells, run.forecasts, quality), *list_forecasts(cells, run.forecasts)],
                "Captions side by side": list_captions(cells, quality, max_clips),
            },
            f" ({language})" if len(groups) > 1 else "",
        )
    return Page(f"edgecloud_sd: {run.name}", sections)


def describe_run(run: Run, groups: Mapping[str, Sequence[ReportCell]]) -> list[Block]:
    """Return the facts of the run, the ids of its cells, and the clips that were skipped."""
    documents = list(run.cells.values())
    facts = list_facts(documents) | {"saved": run.saved or DASH}
    rows = [
        [cell.label, cell.case_id, language, str(len(cell.clips))]
        for language, cells in groups.items()
        for cell in cells
    ]
    columns = [Column("cell"), Column("id", is_text=True), Column("language", is_text=True), Column("clips")]
    blocks: list[Block] = [
        Table(
            [Column("fact"), Column("value", is_text=True)],
            [[name, value] for name, value in facts.items() if value != DASH],
        ),
        Table(columns, rows, fold_title="The cells and their ids"),
        *list_label_words(cell for cells in groups.values() for cell in cells),
    ]
    warnings = [warning for cells in groups.values() for warning in _list_joining_differences(cells)]
    blocks += [Paragraph(warning, is_warning=True) for warning in dict.fromkeys(warnings)]
    skipped = {clip["file_id"]: clip["reason"] for document in documents for clip in document["skipped_clips"]}
    if skipped:
        blocks += [Paragraph("Clips that were skipped:", is_warning=True), BulletList(list(skipped.items()))]
    return blocks


def _list_joining_differences(cells: Sequence[ReportCell]) -> list[str]:
    """Return what keeps the cells of joined files from being compared."""
    warnings = []
    documents = [cell.document for cell in cells]
    clips = [set(cell.clips) for cell in cells]
    common, every = set.intersection(*clips), set.union(*clips)
    if common != every:
        warnings.append(
            f"{len(common)} of {len(every)} clips are in every cell. Speed-ups and differences use the clips that both "
            "cells have; the other metrics are of all clips of a cell."
        )
    facts = {
        "machines": [[document["environment"].get(key) for key in MACHINE_KEYS] for document in documents],
        "score normalisations": [document["metrics"].get("score_normalisation") for document in documents],
    }
    for name, values in facts.items():
        if any(value != values[0] for value in values):
            warnings.append(f"The cells have different {name}, so compare them with care.")
    return warnings


def summarise_metrics(cells: Sequence[ReportCell]) -> list[Block]:
    """Return the main metrics with a row per cell, then every metric with a row per metric."""
    main = [metric for metric in MAIN_METRICS if any(cell.metric(metric) is not None for cell in cells)]
    main_table = Table(
        [Column("cell"), Column("output", OUTPUT_MEANING, is_text=True), *map(metric_column, main)],
        [[cell.label, cell.output, *(format_metric(metric, cell.metric(metric)) for metric in main)] for cell in cells],
    )
    full_table = Table(
        [Column("metric"), Column("better", is_text=True), *(Column(cell.label) for cell in cells)],
        [
            [
                metric_column(metric).heading,
                METRICS[metric].better or DASH,
                *(format_metric(metric, cell.metric(metric)) for cell in cells),
            ]
            for metric in METRICS
        ],
        fold_title="Every metric",
    )
    main_reasons = explain_missing(MAIN_METRICS, cells)
    other_reasons = explain_missing([metric for metric in METRICS if metric not in MAIN_METRICS], cells)
    meanings = [(metric_name(name), metric.meaning) for name, metric in METRICS.items()]
    blocks: list[Block] = [main_table]
    if main_reasons:
        blocks += [Paragraph("Reasons for a dash or a missing column:"), BulletList(main_reasons)]
    blocks.append(full_table)
    if other_reasons:
        blocks.append(BulletList(other_reasons, fold_title="Reasons for the other dashes"))
    return [*blocks, BulletList(meanings, fold_title="Meaning of each metric")]


def list_budgets(cells: Sequence[ReportCell]) -> list[Block]:
    """Return what the budget, the promise and the audit of each cell say."""
    notes = [(cell.label, note) for cell in cells for note in budget_notes(cell.document["metrics"])]
    return [Paragraph("Budgets, promises and audits:"), BulletList(notes)] if notes else []


def show_breakdown(cells: Sequence[ReportCell]) -> list[Block]:
    """Return the latency breakdown of each cell that has one. An imported run has none."""
    cells = [cell for cell in cells if cell.document["metrics"]["latency_breakdown"]]
    if not cells:
        return []
    breakdowns = [cell.document["metrics"]["latency_breakdown"] for cell in cells]
    closures = [cell.document["metrics"]["breakdown_closure"] for cell in cells]
    parts = [part for part in PARTS if any(breakdown[part] for breakdown in breakdowns)]
    bars, rows = [], []
    for cell, breakdown, closure in zip(cells, breakdowns, closures, strict=True):
        discarded = cell.metric("discarded_draft") or 0.0
        bars.append(pictures.Bar(cell.label, breakdown, discarded))
        milliseconds = [f"{1e3 * seconds:.1f}" for seconds in (*(breakdown[part] for part in parts), discarded)]
        shares = [DASH if closure[kind] is None else f"{closure[kind]:.2%}" for kind in ("median", "worst")]
        rows.append([cell.label, *milliseconds, *shares])
    median, worst = (
        max(
            (closure[kind] for closure in closures if closure[kind] is not None),
            key=lambda share: abs(share - 1),
            default=None,
        )
        for kind in ("median", "worst")
    )
    description = "Latency breakdown: mean ms per caption by part, one bar per cell. Hatched: discarded draft tokens."
    if median is not None and worst is not None:
        description += (
            f" The sum of the parts is {median:.2%} of the wall time in the median clip of the worst cell, and "
            f"{worst:.2%} in the worst clip."
        )
    columns = [
        Column("ms per caption"),
        *(Column(part.replace("_", " "), PARTS[part]) for part in parts),
        Column("discarded draft", METRICS["discarded_draft"].meaning),
        Column("sum / wall", "sum of the parts / wall time by another clock; median over clips"),
        Column("worst clip", "the same ratio in the clip where it is furthest from 100%"),
    ]
    numbers = Table(columns, rows, fold_title="The numbers")
    return [make_picture(pictures.draw_breakdown, bars, description=description, numbers=numbers)]


def compare_latency_and_quality(cells: Sequence[ReportCell], quality: str) -> list[Block]:
    """Return seconds per caption against one quality metric, with the Pareto front."""
    points = [
        pictures.Point(
            cell.label,
            cell.mode,
            cell.document["metrics"]["figures"]["total"],
            value,
            cell.metric("cloud_call_rate") if cell.mode == "speculative" else None,
        )
        for cell in cells
        if (value := cell.metric(quality)) is not None and cell.metric("total") is not None
    ]
    if not points:
        reasons = explain_missing([quality], cells)
        return [Paragraph(f"No cell has {metric_name(quality)} (--quality selects another):"), BulletList(reasons)]
    front = comparison.pareto_front([(point.seconds, point.quality) for point in points])
    description = (
        f"{metric_name(quality)} against seconds per caption. The Pareto front, from fast to good, is "
        f"{', '.join(points[i].label for i in front)}. A larger circle sends more of its rounds to the cloud."
    )
    rows = [
        [
            str(i + 1),
            point.label,
            f"{point.seconds:.3f}",
            format_metric(quality, point.quality),
            format_metric("cloud_call_rate", point.cloud_call_rate),
            "yes" if i in front else "no",
        ]
        for i, point in enumerate(points)
    ]
    columns = [
        Column("number"),
        Column("cell", is_text=True),
        Column("s per caption", METRICS["total"].meaning),
        Column(metric_name(quality), METRICS[quality].meaning),
        Column(metric_name("cloud_call_rate"), METRICS["cloud_call_rate"].meaning),
        Column("on the front", "no other cell is as fast and as good, and better in one of the two", is_text=True),
    ]
    numbers = Table(columns, rows, fold_title="The numbers")
    drawn = (pictures.draw_latency_quality, points, front, metric_name(quality))
    return [make_picture(*drawn, description=description, numbers=numbers)]


def _acceptance_line(cell: ReportCell, values: Sequence[float]) -> pictures.Line:
    """Return the line of a speculative cell, with its gate, rule and k."""
    gate, k, rule, *_ = cell.strategy.details
    return pictures.Line(cell.label, values, gate, rule, k.removeprefix("k"))


def show_acceptance(cells: Sequence[ReportCell]) -> list[Block]:
    """Return the share of accepted draft tokens by position in the draft, or nothing if no cell verified a draft."""
    lines = [
        _acceptance_line(cell, values)
        for cell in cells
        if (values := cell.document["metrics"]["speculative_decoding_metrics"]["acceptance_by_position"])
    ]
    if not lines:
        return []
    longest = max(len(line.values) for line in lines)
    rows = [
        [line.label, *(f"{value:.3f}" for value in line.values), *[DASH] * (longest - len(line.values))]
        for line in lines
    ]
    columns = [Column("cell"), *(Column(str(position)) for position in range(1, longest + 1))]
    description = (
        "Share of the verified drafts with a token at this position in which the cloud accepted that token, and so all "
        "tokens before it. Colour: gate; dashes: rule; marker: k."
    )
    numbers = Table(columns, rows, fold_title="The numbers")
    return [make_picture(pictures.draw_acceptance, lines, description=description, numbers=numbers)]


def show_accepted_lengths(cells: Sequence[ReportCell]) -> list[Block]:
    """Return a histogram of accepted lengths for each cell that has them. An imported run has none."""
    shown = [
        pictures.LengthCounts(cell.label, counts, cell.metric("mean_acceptance_length"))
        for cell in cells
        if sum(counts := cell.document["metrics"]["speculative_decoding_metrics"]["accepted_lengths"] or [])
    ]
    if not shown:
        return []
    longest = max(len(cell.counts) for cell in shown)
    rows = [
        [
            cell.label,
            format_metric("mean_acceptance_length", cell.mean),
            str(sum(cell.counts)),
            *(f"{count} ({count / sum(cell.counts):.0%})" for count in cell.counts),
            *[DASH] * (longest - len(cell.counts)),
        ]
        for cell in shown
    ]
    columns = [
        Column("cell"),
        Column("mean length", METRICS["mean_acceptance_length"].meaning),
        Column("verifications", "answered verifications of a draft"),
        *(Column(f"{length} accepted") for length in range(longest)),
    ]
    description = (
        "Accepted lengths: how many verifications of a cell accepted 0, 1, 2, ... draft tokens. The mean acceptance "
        "length also counts the cloud's own token after the accepted ones, so it is up to 1 larger."
    )
    numbers = Table(columns, rows, fold_title="The numbers")
    return [make_picture(pictures.draw_accepted_lengths, shown, description=description, numbers=numbers)]


def show_payoff(cells: Sequence[ReportCell], forecasts: Mapping[str, Mapping[str, Any]], quality: str) -> list[Block]:
    """Return if each speculative cell pays: sentences, a picture of the speed-ups, and the table behind it."""
    documents = [cell.document for cell in cells]
    rows, ranges, sentences, clip_counts = [], [], [], []
    for cell in cells:
        if cell.mode != "speculative":
            continue
        compared = payoff.payoffs(cell.document, documents, quality)
        gap = _gap_closed(cell, documents, quality)
        answer = forecasts.get(cell.case_id, {})
        rows += [[cell.label, *row, gap, cell.output] for row in payoff.payoff_rows(compared, answer.get("forecast"))]
        ranges.append((cell.label, {f"over {row.baseline}": row.captions for row in compared}))
        sentences.append((cell.label, payoff.payoff_sentence(compared, metric_name(quality))))
        clip_counts += [row.clips for row in compared]
    if not sentences:
        return []
    if not rows:
        return [BulletList(sentences)]
    columns = [
        Column("cell"),
        Column("times as fast as", is_text=True),
        *(Column(name, meaning) for name, meaning in payoff.SPEEDUPS.items()),
        Column(f"{metric_name(quality)} gap closed", "(strategy - edge) / (cloud - edge)"),
        Column("output", OUTPUT_MEANING, is_text=True),
    ]
    description = (
        "Speed-up of whole captions over the edge alone and over the cloud alone: seconds summed over the same clips, "
        f"with 95% intervals. {interval_limits(min(clip_counts))}"
    )
    blocks: list[Block] = [
        BulletList(sentences),
        make_picture(pictures.draw_speedups, ranges, description=description, numbers=Table(columns, rows)),
    ]
    if any(row[-2] == DASH for row in rows):
        reason = "edge or cloud is missing, or the gap between them is not larger than its noise."
        blocks.append(Paragraph(f"Reason for a dash under {metric_name(quality)} gap closed: {reason}"))
    return blocks


def _gap_closed(cell: ReportCell, documents: Sequence[Document], quality: str) -> str:
    edge, cloud = (comparison.find_baseline(cell.document, mode, documents) for mode in payoff.BASELINES)
    gap = comparison.quality_gap_closed(cell.document, edge, cloud, quality)
    return DASH if gap is None else f"{gap:.2f}"


def list_forecasts(cells: Sequence[ReportCell], forecasts: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Return the forecast of each speculative cell."""
    items = [
        (cell.label, forecasts.get(cell.case_id, {}).get("sentence", "the file has no forecast"))
        for cell in cells
        if cell.mode == "speculative"
    ]
    intro = (
        "Forecasts of the cost model, from the costs of this run unless a forecast names others. A strategy pays for "
        "whole captions, at equal quality. Their speed-ups are per token after prefill."
    )
    return [Paragraph(intro), BulletList(items)] if items else []
