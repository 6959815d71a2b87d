"""The report of two files, A before and B after: cells are paired by id, and their clips by file_id."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from bench import comparison
from bench.cases import LANGUAGE_CODES
from bench.comparison import Document
from bench.report import pictures
from bench.report.cells import MAIN, ReportOptions, caveat, experiment, facts, interval, labelled, languages
from bench.report.differences import TextPart, distance, marked
from bench.report.page import (
    DASH,
    Block,
    Caption,
    Captions,
    Heading,
    Page,
    Paragraph,
    Picture,
    Points,
    Section,
    Table,
    change,
    heading,
    name,
)
from bench.report.runs import Run, Unusable
from bench.report.single import breakdown_picture
from edgecloud_sd.host.limits import InForce

MACHINE = ("system", "machine", "cpu", "cores", "gpu")  # of the environment: what makes two runs comparable in time
COMPARED_SECTIONS = ("environment", "experiment_config")
ASIDE = ("output_name",)  # of what a cell was: says nothing of what it did
CPU_APART = 0.1  # CPU % that differ by more than this share are pointed out

Pairs = Mapping[str, tuple[Document, Document]]  # by id, the cell in A and in B


def shared(a: Run, b: Run) -> dict[str, tuple[Document, Document]]:
    """The cells that both files hold, by id. Raises Unusable where there is none."""
    found = {case: (document, b.cells[case]) for case, document in a.cells.items() if case in b.cells}
    if not found:
        raise Unusable(
            f"A ({a.name}) has {_some(a.cells)}, B ({b.name}) has {_some(b.cells)}: they have no cell in common; give "
            "two runs with the same options"
        )
    return found


def check_machines(a: Run, b: Run) -> None:
    """Unusable where a cell that both files hold was timed on different machines."""
    found = _machines(shared(a, b))
    if found:
        raise Unusable(
            f"A ({a.name}) and B ({b.name}) are of different machines ({'; '.join(found)}), so their times do not "
            "compare; --different-machines compares them all the same"
        )


def _machines(pairs: Pairs) -> list[str]:
    """How the machines of cells differ, but for cells that a virtual clock timed by the same profile in both files."""

    def virtual(a: Document, b: Document) -> bool:
        return {experiment(a)["clock"], experiment(b)["clock"]} == {"virtual"} and experiment(a)[
            "profile_costs"
        ] == experiment(b)["profile_costs"]

    return _differences([pair for pair in pairs.values() if not virtual(*pair)], "environment", MACHINE)


def _differences(pairs: Sequence[tuple[Document, Document]], part: str, keys: Sequence[str]) -> list[str]:
    """`key: value in A and value in B` for each of the keys of a part that differs in a pair."""
    found: dict[str, None] = {}
    for a, b in pairs:
        for key in keys:
            before, after = a[part].get(key), b[part].get(key)
            if before != after:
                text = f"{key}: {'none' if before is None else before} and {'none' if after is None else after}"
                found[text] = None
    return list(found)


def _some(names: Collection[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join([*names][:most]) + more


def comparison_page(a: Run, b: Run, options: ReportOptions) -> Page:
    """The whole comparison. A section a language, where there are two."""
    pairs = shared(a, b)
    sections = [Section("What is compared", what_is_compared(a, b, pairs))]
    before = [document for document, _ in pairs.values()]
    for language, suffix in languages(before):
        chosen = {text: pairs[experiment(each)["case"]] for text, each in labelled(before, language).items()}
        sections += [
            Section(f"{title}{suffix}", blocks)
            for title, blocks in (
                ("Is B faster, and as good?", speedup_section(f"{language}-speedup", chosen, options.quality)),
                ("Figures", metric_changes(chosen)),
                ("Where the time goes", [_breakdown_picture(f"{language}-breakdown", chosen)]),
                ("Captions that differ", differing_captions(chosen, options)),
            )
        ]
    return Page(f"edgecloud_sd: {a.name} (A) and {b.name} (B)", sections)


def what_is_compared(a: Run, b: Run, pairs: Pairs) -> list[Block]:
    """Both runs side by side, what differs between them, and what only one of them holds."""
    alike = [facts(replace(run, cells={case: run.cells[case] for case in pairs})) for run in (a, b)]
    rows = [["file", a.name, b.name, ""]]
    for (what, ours), (_, theirs) in zip(*alike, strict=True):
        if (ours, theirs) != (DASH, DASH):
            rows.append([what, ours, theirs, "differs" if ours != theirs and what != "saved" else ""])
    headings = [Heading("what"), *(Heading(text, words=True) for text in ("A (before)", "B (after)", ""))]
    blocks: list[Block] = [Table(headings, rows)]
    cells = list(pairs.values())
    environment, settings = (
        {key: None for pair in cells for each in pair for key in each[part]} for part in COMPARED_SECTIONS
    )
    clips = [found for pair in cells for found in comparison.paired(*pair)]
    references = {x["file_id"]: None for x, y in clips if x["reference_captions"] != y["reference_captions"]}
    for warning, found in (
        ("Different machines: no time on the real clock compares.", _machines(pairs)),
        (
            "Different settings in the same cell:",
            _differences(cells, "experiment_config", [key for key in settings if key not in ASIDE]),
        ),
        ("Clips with other references in A than in B, so that their scores do not compare:", [*references]),
    ):
        if found:
            blocks += [Paragraph(warning, warning=True), Points([("", each) for each in found])]
    software = _differences(cells, "environment", [key for key in environment if key not in MACHINE])
    software += _differences(cells, "in_force", list(InForce.__dataclass_fields__))
    if software:
        note = "Different software or limits, which may be why figures differ:"
        blocks += [Paragraph(note), Points([("", each) for each in software])]
    blocks += _clips_apart(pairs)
    blocks.append(Paragraph(f"{_cells(len(pairs))} in both files."))
    for own, other, letter in ((a, b, "A"), (b, a, "B")):
        alone = [("", case) for case in own.cells if case not in other.cells]
        if alone:
            blocks.append(Points(alone, folded=f"{_cells(len(alone))} in {letter} ({own.name}) only"))
    return blocks


def _cells(n: int) -> str:
    return f"{n} cell is" if n == 1 else f"{n} cells are"


def _clips_apart(pairs: Pairs, most: int = 10) -> list[Block]:
    """The clips that a cell has in one file only, cells with the same ones together."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for case, (a, b) in pairs.items():
        ours, theirs = comparison.clips_by_id(a), comparison.clips_by_id(b)
        for letter, own, other in (("A", ours, theirs), ("B", theirs, ours)):
            alone = tuple(clip for clip in own if clip not in other)
            if alone:
                found.setdefault((letter, alone), []).append(case)
    items = [
        (f"in {letter} only, {len(alone)}", f"{_some(alone, most)} (in {_some(cells)})")
        for (letter, alone), cells in found.items()
    ]
    return (
        [Paragraph("Clips in one file only, left out of what is paired:", warning=True), Points(items)] if items else []
    )


def speedup_section(picture: str, pairs: Pairs, quality: str) -> list[Block]:
    """For each cell how many times as fast B is, what its quality changed by, and whether it writes the same."""
    rows, intervals, counts = [], [], []  # counts: of the clips in both
    for text, (a, b) in pairs.items():
        both = comparison.paired(a, b)
        whole, token = comparison.caption_speedup(a, b), comparison.token_speedup(a, b)
        differ = sum(x["generated_text"] != y["generated_text"] for x, y in both)
        scores = comparison.score_difference(a, b, quality)
        by_score = DASH if scores is None else scores.shown("+.3f")
        same = "all the same" if both and not differ else f"{differ} of {len(both)} differ" if both else DASH
        rows.append([text, str(len(both)), interval(whole), interval(token), by_score, same])
        intervals.append((text, [("B over A", whole), ("B over A, per token", token)]))
        counts.append(len(both))
    headings = [
        Heading("cell"),
        Heading("clips in both"),
        Heading("B, times as fast", "A's seconds a caption / B's, summed over the clips in both"),
        Heading("per token", "the same by seconds a token after what came first: not better for shorter captions"),
        Heading(f"{name(quality)} B - A", "mean over the clips in both of the clip's own score, with 95% interval"),
        Heading("captions", words=True),
    ]
    table = Table(headings, rows)
    blocks: list[Block] = [table]
    if any(counts):
        says = (
            "How many times as fast B is as A: above 1, B is faster. 95% intervals are paired bootstraps over clips. "
            f"{caveat(min(filter(None, counts)))}"
        )
        blocks = [Picture(pictures.draw_speedups(picture, intervals), says, table)]
    busy = [
        f"{text} {a:.0f}% and {b:.0f}%"
        for text, pair in pairs.items()
        for a, b in [[comparison.metric_value(document, "cpu_percent") for document in pair]]
        if a is not None and b is not None and abs(a - b) > CPU_APART * max(a, b)
    ]
    if busy:
        text = "The process had another share of the CPU in A than in B, which may be why times differ:"
        blocks.append(Paragraph(f"{text} {', '.join(busy)}.", warning=True))
    return blocks


def metric_changes(pairs: Pairs) -> list[Block]:
    """The main figures, A to B."""

    def known(figure: str) -> bool:
        return any(
            comparison.metric_value(document, figure) is not None for pair in pairs.values() for document in pair
        )

    used = [figure for figure in MAIN if known(figure)]
    rows = [
        [
            text,
            *(
                change(figure, comparison.metric_value(a, figure), comparison.metric_value(b, figure))
                for figure in used
            ),
        ]
        for text, (a, b) in pairs.items()
    ]
    says = "A → B, each over all the clips that its own file has: where these differ, it is not of the same clips."
    return [Paragraph(says), Table([Heading("cell"), *map(heading, used)], rows)]


def _breakdown_picture(picture: str, pairs: Pairs) -> Picture:
    return breakdown_picture(
        picture,
        {f"{text} {letter}": each for text, pair in pairs.items() for letter, each in zip("AB", pair, strict=True)},
    )


def differing_captions(pairs: Pairs, options: ReportOptions) -> list[Block]:
    """The captions of B that are not A's, with their differences; the most different first."""
    found: dict[tuple[str, str, str], list[str]] = {}  # clip, A's, B's -> cells
    clips: dict[str, Document] = {}
    for text, (a, b) in pairs.items():
        for x, y in comparison.paired(a, b):
            if x["generated_text"] != y["generated_text"]:
                found.setdefault((x["file_id"], x["generated_text"], y["generated_text"]), []).append(text)
                clips[x["file_id"]] = x
    if not found:
        return [Paragraph("None: in every cell that both files hold, every clip that both hold has the same caption.")]
    language = experiment(next(iter(pairs.values()))[0])["language"]
    order = sorted(found, key=lambda key: distance(key[1], key[2], language), reverse=True)[: options.clips]
    which = "All" if len(order) == len(found) else f"The first {len(order)} of"
    intro = (
        f"{which} {len(found)} pairs of captions, the most different first. In B's, underlined: not in A's; "
        "struck out: only in A's."
    )
    blocks: list[Block] = [Paragraph(intro)]
    for clip, before, after in order:
        rows = [Caption("reference", [TextPart("same", each)]) for each in clips[clip]["reference_captions"]]
        rows += [Caption("A", [TextPart("same", before)]), Caption("B", marked(before, after, language))]
        blocks.append(Captions(f"{clip} ({', '.join(found[clip, before, after])})", rows, LANGUAGE_CODES[language]))
    return blocks
