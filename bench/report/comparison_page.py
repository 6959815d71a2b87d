"""The report of two files, A before and B after. Cells are paired by case id, and their clips by file_id."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from bench import comparison
from bench.comparison import Document
from bench.report import pictures
from bench.report.captions import list_different_captions
from bench.report.cells import MACHINE_KEYS, ReportCell, group_by_language, list_facts, share_virtual_clock
from bench.report.label_words import list_label_words
from bench.report.metric_text import (
    MAIN_METRICS,
    format_change,
    format_interval,
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
from bench.report.run_page import show_breakdown
from bench.report.runs import Run, UnusableFile

IGNORED_SETTINGS = ("output_name",)  # does not change what a cell does
MAX_CPU_CHANGE = 0.1  # larger relative changes of CPU % are reported

CellPair = tuple[ReportCell, ReportCell]  # the same cell in A and in B


def build_comparison_page(a: Run, b: Run, quality: str, max_clips: int) -> Page:
    """Return the comparison of two runs, with its sections once per language."""
    documents = pair_documents(a, b)
    groups = group_by_language(before for before, _ in documents.values())
    words = list_label_words(cell for cells in groups.values() for cell in cells)
    sections = [Section("What is compared", [*describe_runs(a, b, documents), *words])]
    for language, cells in groups.items():
        pairs = [(cell, replace(cell, document=documents[cell.case_id][1])) for cell in cells]
        labelled = [
            replace(cell, label=f"{cell.label} {letter}")
            for pair in pairs
            for letter, cell in zip("AB", pair, strict=True)
        ]
        sections += list_sections(
            {
                "Is B faster, and as good?": show_changes(pairs, quality),
                "Metrics": compare_metrics(pairs),
                "Where the time goes": show_breakdown(labelled),
                "Captions that differ": list_different_captions(pairs, max_clips),
            },
            f" ({language})" if len(groups) > 1 else "",
        )
    return Page(f"edgecloud_sd: {a.name} (A) and {b.name} (B)", sections)


def pair_documents(a: Run, b: Run) -> dict[str, tuple[Document, Document]]:
    """Return the results of the cells in both files by case id."""
    return {case: (document, b.cells[case]) for case, document in a.cells.items() if case in b.cells}


def check_machines(a: Run, b: Run) -> None:
    """Raise UnusableFile if different machines timed a cell of both files."""
    differences = _list_machine_differences(pair_documents(a, b).values())
    if differences:
        raise UnusableFile(
            f"A ({a.name}) and B ({b.name}) are from different machines ({'; '.join(differences)}), so their times do "
            "not compare; use --different-machines to compare them all the same"
        )


def describe_runs(a: Run, b: Run, pairs: Mapping[str, tuple[Document, Document]]) -> list[Block]:
    """Return the facts of both runs, the differences between them, and what only one of them has."""
    facts_a, facts_b = (
        {"file": run.name} | list_facts([run.cells[case] for case in pairs]) | {"saved": run.saved or DASH}
        for run in (a, b)
    )
    rows = [
        [name, value, facts_b[name], "differs" if value != facts_b[name] and name not in ("file", "saved") else ""]
        for name, value in facts_a.items()
        if (value, facts_b[name]) != (DASH, DASH)
    ]
    columns = [Column("fact"), *(Column(heading, is_text=True) for heading in ("A (before)", "B (after)", ""))]
    return [
        Table(columns, rows),
        *_warn_about_differences(list(pairs.values())),
        *_list_unpaired_clips(pairs),
        Paragraph(f"{_count_cells(len(pairs))} in both files."),
        *_list_unpaired_cells(f"A ({a.name})", [case for case in a.cells if case not in pairs]),
        *_list_unpaired_cells(f"B ({b.name})", [case for case in b.cells if case not in pairs]),
    ]


def _warn_about_differences(pairs: Sequence[tuple[Document, Document]]) -> list[Block]:
    """Return the differences between A and B that may explain different results."""
    clip_pairs = [clips for pair in pairs for clips in comparison.pair_clips(*pair)]
    references = dict.fromkeys(
        a["file_id"] for a, b in clip_pairs if a["reference_captions"] != b["reference_captions"]
    )
    software = _list_differences(pairs, "environment", ignored=MACHINE_KEYS) + _list_differences(pairs, "in_force")
    blocks: list[Block] = []
    for text, differences, is_warning in (
        ("Different machines: times on the real clock do not compare.", _list_machine_differences(pairs), True),
        (
            "Different settings in the same cell:",
            _list_differences(pairs, "experiment_config", ignored=IGNORED_SETTINGS),
            True,
        ),
        ("Clips with other references in A than in B, so that their scores do not compare:", list(references), True),
        ("Different software or limits, which may explain different metrics:", software, False),
    ):
        if differences:
            blocks += [Paragraph(text, is_warning), BulletList([("", difference) for difference in differences])]
    return blocks


def _list_machine_differences(pairs: Iterable[tuple[Document, Document]]) -> list[str]:
    """Return how the machines differ, without the cells that the same cost profile timed in both files."""
    timed = [pair for pair in pairs if not share_virtual_clock(*pair)]
    return _list_differences(timed, "environment", MACHINE_KEYS)


def _list_differences(
    pairs: Sequence[tuple[Document, Document]], part: str, keys: Sequence[str] = (), ignored: Collection[str] = ()
) -> list[str]:
    """Return `key: value in A and value in B` for each of the keys, by default all, that differs in a pair."""
    differences: dict[str, None] = {}
    for a, b in pairs:
        for key in keys or a[part] | b[part]:
            before, after = ("none" if document[part].get(key) is None else document[part][key] for document in (a, b))
            if before != after and key not in ignored:
                differences[f"{key}: {before} and {after}"] = None
    return list(differences)


def _list_unpaired_clips(pairs: Mapping[str, tuple[Document, Document]]) -> list[Block]:
    """Return the clips that a cell has in one file only, grouped by the cells with the same clips."""
    cases_by_clips: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for case, pair in pairs.items():
        clips_a, clips_b = map(comparison.clips_by_id, pair)
        for letter, clips, others in (("A", clips_a, clips_b), ("B", clips_b, clips_a)):
            unpaired = tuple(file_id for file_id in clips if file_id not in others)
            if unpaired:
                cases_by_clips.setdefault((letter, unpaired), []).append(case)
    items = [
        (f"in {letter} only, {len(clips)}", f"{_list_some(clips, 10)} (in {_list_some(cases)})")
        for (letter, clips), cases in cases_by_clips.items()
    ]
    title = "Clips in one file only, left out of paired comparisons:"
    return [Paragraph(title, is_warning=True), BulletList(items)] if items else []


def _list_unpaired_cells(file: str, cases: Sequence[str]) -> list[Block]:
    title = f"{_count_cells(len(cases))} in {file} only"
    return [BulletList([("", case) for case in cases], fold_title=title)] if cases else []


def _count_cells(count: int) -> str:
    return "1 cell is" if count == 1 else f"{count} cells are"


def _list_some(names: Collection[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join([*names][:limit]) + more


def show_changes(pairs: Sequence[CellPair], quality: str) -> list[Block]:
    """Return for each cell the speed-up of B over A, the change of quality, and whether the captions are the same."""
    rows, ranges, clip_counts = [], [], []
    for a, b in pairs:
        clips = comparison.pair_clips(a.document, b.document)
        speedup = comparison.caption_speedup(a.document, b.document)
        per_token = comparison.token_speedup(a.document, b.document)
        score = comparison.score_difference(a.document, b.document, quality)
        different = sum(before["generated_text"] != after["generated_text"] for before, after in clips)
        rows.append(
            [
                a.label,
                str(len(clips)),
                format_interval(speedup),
                format_interval(per_token),
                DASH if score is None else score.shown("+.3f"),
                DASH if not clips else f"{different} of {len(clips)} differ" if different else "all the same",
            ]
        )
        ranges.append((a.label, {"B over A": speedup, "B over A, per token": per_token}))
        clip_counts.append(len(clips))
    columns = [
        Column("cell"),
        Column("clips in both"),
        Column("B, times as fast", "A's seconds per caption / B's, summed over the clips in both files"),
        Column("per token", "by seconds per token after the first chunk, so that shorter captions give no advantage"),
        Column(f"{metric_name(quality)} B - A", "mean over the clips in both files, with 95% interval"),
        Column("captions", is_text=True),
    ]
    table = Table(columns, rows)
    blocks: list[Block] = [table]
    if any(clip_counts):
        description = (
            "Speed-up of B over A: above 1, B is faster. 95% intervals are over clips. "
            f"{interval_limits(min(filter(None, clip_counts)))}"
        )
        blocks = [make_picture(pictures.draw_speedups, ranges, description=description, numbers=table)]
    return [*blocks, *_warn_about_cpu(pairs)]


def _warn_about_cpu(pairs: Sequence[CellPair]) -> list[Block]:
    """Return a warning that names the cells whose CPU usage differs between A and B."""
    changes = [
        f"{a.label} {before:.0f}% and {after:.0f}%"
        for a, b in pairs
        if (before := a.metric("cpu_percent")) is not None
        and (after := b.metric("cpu_percent")) is not None
        and abs(before - after) > MAX_CPU_CHANGE * max(before, after)
    ]
    text = f"The CPU usage of the process differs between A and B, which may explain the times: {', '.join(changes)}."
    return [Paragraph(text, is_warning=True)] if changes else []


def compare_metrics(pairs: Sequence[CellPair]) -> list[Block]:
    """Return the main metrics in A and in B."""
    used = [
        metric for metric in MAIN_METRICS if any(cell.metric(metric) is not None for pair in pairs for cell in pair)
    ]
    rows = [
        [a.label, *(format_change(metric, a.metric(metric), b.metric(metric)) for metric in used)] for a, b in pairs
    ]
    text = "A → B, each over all clips of its own file. If the files have different clips, the values do not compare."
    return [Paragraph(text), Table([Column("cell"), *map(metric_column, used)], rows)]
