"""The report of one file: what was run, what it took, how good it is, and what every clip became."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from bench import comparison
from bench.cases import LANGUAGE_CODES
from bench.comparison import Document
from bench.report import pictures
from bench.report.cells import (
    MAIN,
    OUTPUT,
    Cells,
    ReportOptions,
    caveat,
    experiment,
    facts,
    interval,
    labelled,
    languages,
)
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
    heading,
    missing,
    name,
    shown,
)
from bench.report.runs import Run
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.summary import METRICS


def run_page(run: Run, options: ReportOptions) -> Page:
    """The whole report. A section a language, where there are two."""
    sections = [Section("What was run", what_was_run(run))]
    for language, suffix in languages(run.cells.values()):
        cells = labelled(run.cells.values(), language)
        sections += [
            Section(f"{title}{suffix}", blocks)
            for title, blocks in (
                ("Summary", summary_section(cells)),
                ("Where the time goes", [breakdown_picture(f"{language}-breakdown", cells)]),
                ("Latency against quality", latency_quality_section(f"{language}-front", cells, options.quality)),
                ("Acceptance by position", acceptance_section(f"{language}-acceptance", cells)),
                ("Does it pay?", forecast_section(f"{language}-speedup", cells, run.answers, options.quality)),
                ("Captions side by side", caption_section(cells, options)),
            )
            if blocks
        ]
    return Page(f"edgecloud_sd: {run.name}", sections)


def what_was_run(run: Run) -> list[Block]:
    """The run as a whole, and the ids of its cells."""
    documents = run.cells.values()
    rows = []
    for language, _ in languages(documents):
        for text, document in labelled(documents, language).items():
            rows.append([text, experiment(document)["case"], language, str(len(document["detailed_results"]))])
    headings = [Heading("cell"), Heading("id", words=True), Heading("language", words=True), Heading("clips")]
    blocks: list[Block] = [
        Table(
            [Heading("what"), Heading("value", words=True)],
            [[what, value] for what, value in facts(run) if value != DASH],
        ),
        Table(headings, rows, folded="The cells and their ids"),
    ]
    skipped = {clip["file_id"]: clip["reason"] for document in documents for clip in document["skipped_clips"]}
    if skipped:
        blocks += [Paragraph("Clips left out, as they cannot be used:", warning=True), Points([*skipped.items()])]
    return blocks


def summary_section(cells: Cells) -> list[Block]:
    """The main figures, a row a cell; then all of them, a row a figure."""
    main = [
        figure for figure in MAIN if any(comparison.metric_value(each, figure) is not None for each in cells.values())
    ]
    table = Table(
        [Heading("cell"), Heading("output", OUTPUT, words=True), *map(heading, main)],
        [
            [
                text,
                experiment(each)["output"] or DASH,
                *(shown(figure, comparison.metric_value(each, figure)) for figure in main),
            ]
            for text, each in cells.items()
        ],
    )
    everything = Table(
        [Heading("figure"), Heading("better", words=True), *map(Heading, cells)],
        [
            [
                heading(figure).text,
                about.better or DASH,
                *(shown(figure, comparison.metric_value(each, figure)) for each in cells.values()),
            ]
            for figure, about in METRICS.items()
        ],
        folded="Every figure",
    )
    blocks: list[Block] = [table]
    dashes = missing(MAIN, cells.values())
    if dashes:
        blocks += [Paragraph("Why there is a dash, or no column:"), Points(dashes)]
    blocks.append(everything)
    others = missing([figure for figure in METRICS if figure not in MAIN], cells.values())
    if others:
        blocks.append(Points(others, folded="Why there are dashes in it"))
    meanings = [(name(figure), about.meaning) for figure, about in METRICS.items()]
    return [*blocks, Points(meanings, folded="What each figure means")]


def breakdown_picture(picture: str, cells: Cells) -> Picture:
    """Where a caption's time goes in each cell."""
    used = [part for part in PARTS if any(each["metrics"]["latency_breakdown"][part] for each in cells.values())]
    rows, bars = [], []
    for text, document in cells.items():
        parts, closure = document["metrics"]["latency_breakdown"], document["metrics"]["breakdown_closure"]
        discarded = comparison.metric_value(document, "discarded_draft") or 0.0
        bars.append(pictures.Bar(text, parts, discarded))
        rows.append(
            [
                text,
                *(f"{1e3 * parts[part]:.1f}" for part in used),
                f"{1e3 * discarded:.1f}",
                *(DASH if closure[kind] is None else f"{closure[kind]:.2%}" for kind in ("median", "worst")),
            ]
        )
    known = [each["metrics"]["breakdown_closure"] for each in cells.values()]
    median, worst = (
        max(
            (each[kind] for each in known if each[kind] is not None), key=lambda closure: abs(closure - 1), default=None
        )
        for kind in ("median", "worst")
    )
    says = "Mean ms a caption by part, a bar a cell. Hatched: draft tokens that were thrown away."
    if median is not None and worst is not None:
        says += f" Sum of the parts / wall time: {median:.2%} in the median clip of the worst cell, {worst:.2%} in the"
        says += " worst clip."
    headings = [
        Heading("ms a caption"),
        *(Heading(part.replace("_", " "), PARTS[part]) for part in used),
        Heading("discarded draft", METRICS["discarded_draft"].meaning),
        Heading("sum / wall", "sum of the parts / wall time by another clock, median over clips"),
        Heading("worst clip", "the same, of the clip that is furthest from 100%"),
    ]
    return Picture(pictures.draw_breakdown(picture, bars), says, Table(headings, rows, folded="The numbers"))


def latency_quality_section(picture: str, cells: Cells, quality: str) -> list[Block]:
    """Seconds a caption against one figure of quality, with the Pareto front."""
    points = [
        pictures.Point(text, experiment(each)["mode"], each["metrics"]["figures"]["total"], value, _calls(each))
        for text, each in cells.items()
        if (value := comparison.metric_value(each, quality)) is not None
    ]
    if not points:
        reasons = missing([quality], cells.values())
        return [Paragraph(f"No cell has {name(quality)} (--quality chooses another):"), Points(reasons)]
    front = comparison.pareto_front([(point.seconds, point.quality) for point in points])
    others = "Every other cell is neither faster nor better than one of these. " if len(front) < len(points) else ""
    says = (
        f"{name(quality)} against seconds a caption. On the Pareto front, from fast to good: "
        f"{', '.join(points[i].label for i in front)}. {others}The larger a circle, the more of its rounds went to the "
        "cloud."
    )
    rows = [
        [
            str(i + 1),
            point.label,
            f"{point.seconds:.3f}",
            shown(quality, point.quality),
            shown("cloud_call_rate", point.calls),
            "yes" if i in front else "no",
        ]
        for i, point in enumerate(points)
    ]
    headings = [
        Heading("no."),
        Heading("cell", words=True),
        Heading("s a caption", METRICS["total"].meaning),
        Heading(name(quality), METRICS[quality].meaning),
        Heading("cloud calls", METRICS["cloud_call_rate"].meaning),
        Heading("on the front", words=True),
    ]
    table = Table(headings, rows, folded="The numbers")
    return [Picture(pictures.draw_latency_quality(picture, points, front, name(quality)), says, table)]


def _calls(document: Document) -> float | None:
    """The share of its rounds that went to the cloud, for a cell in which any could."""
    return (
        comparison.metric_value(document, "cloud_call_rate") if experiment(document)["mode"] == "speculative" else None
    )


def acceptance_section(picture: str, cells: Cells) -> list[Block]:
    """The share of draft tokens that the cloud accepted, by their place in the draft; nothing without a draft."""
    found = {
        text: each["metrics"]["speculative_decoding_metrics"]["acceptance_by_position"] for text, each in cells.items()
    }
    found = {text: values for text, values in found.items() if values}
    if not found:
        return []
    lines = []
    for text, values in found.items():
        cell = experiment(cells[text])
        lines.append(pictures.Line(text, values, str(cell["gate"]), str(cell["rule"]), str(cell["k"])))
    longest = max(map(len, found.values()))
    rows = [
        [text, *(f"{value:.3f}" for value in values), *[DASH] * (longest - len(values))]
        for text, values in found.items()
    ]
    table = Table([Heading("cell"), *(Heading(str(i + 1)) for i in range(longest))], rows, folded="The numbers")
    says = (
        "Of the drafts sent for verification that had a token at a position, the share in which the cloud accepted it "
        "(and so all before it). Colour: gate; dashes: rule; marker: k."
    )
    return [Picture(pictures.draw_acceptance(picture, lines), says, table)]


def forecast_section(picture: str, cells: Cells, answers: Mapping[str, str], quality: str) -> list[Block]:
    """Each speculative cell against the edge and the cloud alone, and the oracle's sentence for each."""
    ours = {text: each for text, each in cells.items() if experiment(each)["mode"] == "speculative"}
    if not ours:
        return []
    rows, intervals, fewest = [], [], []
    for text, document in ours.items():
        edge, cloud = (comparison.find_baseline(document, mode, cells.values()) for mode in ("edge", "cloud"))
        row, found = [text], []
        for mode, base in (("edge", edge), ("cloud", cloud)):
            whole = comparison.caption_speedup(base, document) if base else None
            token = comparison.token_speedup(base, document) if base else None
            row += [interval(whole), interval(token)]
            found.append((f"over {mode}", whole))
            if base and (pairs := comparison.paired(base, document)):
                fewest.append(len(pairs))
        closed = comparison.quality_gap_closed(document, edge, cloud, quality)
        rows.append([*row, DASH if closed is None else f"{closed:.2f}", experiment(document)["output"] or DASH])
        intervals.append((text, found))
    blocks: list[Block] = []
    if fewest:
        each = "seconds a token after what came first: not better for shorter captions"
        table = Table(
            [
                Heading("times as fast as"),
                Heading("edge", "seconds a caption, summed over the clips that both have"),
                Heading("edge, per token", each),
                Heading("cloud", "the same, over the same link"),
                Heading("cloud, per token", each),
                Heading(f"{name(quality)} gap closed", "(ours - edge) / (cloud - edge)"),
                Heading("output", OUTPUT, words=True),
            ],
            rows,
            folded="The numbers",
        )
        says = (
            "How many times as fast as the edge alone and as the cloud alone, by seconds a caption over the same "
            f"clips, with 95% intervals (paired bootstrap over clips). {caveat(min(fewest))}"
        )
        blocks.append(Picture(pictures.draw_speedups(picture, intervals), says, table))
        if any(row[5] == DASH for row in rows):
            gap = f"No {name(quality)} gap closed: edge or cloud is missing, or their gap is not larger than its noise."
            blocks.append(Paragraph(gap))
    else:
        blocks.append(
            Paragraph("Neither the edge nor the cloud alone captioned these clips: there is nothing to compare with.")
        )
    sentences = [
        (text, answers.get(experiment(each)["case"], "the file holds no answer of the oracle"))
        for text, each in ours.items()
    ]
    oracle = (
        "The oracle's answers, from the costs that this run shows. They are of a token, once both sides are open: "
        "hold them against the speed-ups per token."
    )
    return [*blocks, Paragraph(oracle), Points(sentences)]


def caption_section(cells: Cells, options: ReportOptions) -> list[Block]:
    """Clip by clip what each cell wrote, its differences from the cloud's caption marked; most different first."""
    cloud = next((each for each in cells.values() if experiment(each)["mode"] == "cloud"), None)
    whose = "the cloud's" if cloud else "the first reference, as no cell is the cloud alone"
    language = experiment(next(iter(cells.values())))["language"]
    wrote = {text: comparison.clips_by_id(each) for text, each in cells.items()}
    own = comparison.clips_by_id(cloud) if cloud else {}
    base: dict[str, str] = {}  # by clip, what its captions are compared with
    for clip, found in ((clip, found) for each in wrote.values() for clip, found in each.items()):
        base.setdefault(clip, own[clip]["generated_text"] if clip in own else found["reference_captions"][0])

    def apart(clip: str) -> float:
        texts = [each[clip]["generated_text"] for each in wrote.values() if clip in each]
        return fmean(distance(base[clip], text, language) for text in texts)

    chosen = sorted(base, key=apart, reverse=True)[: options.clips]
    which = "All" if len(chosen) == len(base) else f"The first {len(chosen)} of"
    intro = (
        f"{which} {len(base)} clips, those first whose captions differ most from {whose}, on average. Underlined: not "
        f"in that one; struck out: only there. In brackets: the clip's {name(options.quality)}, if it has one."
    )
    return [
        Paragraph(intro),
        *(
            _clip(
                clip,
                {text: each[clip] for text, each in wrote.items() if clip in each},
                base[clip],
                language,
                options.quality,
            )
            for clip in chosen
        ),
    ]


def _clip(clip: str, found: Mapping[str, Document], base: str, language: str, quality: str) -> Captions:
    """References, then each text once, with all the cells that wrote it; first the one that is compared with."""
    texts: dict[str, list[str]] = {}
    for text, each in found.items():
        texts.setdefault(each["generated_text"], []).append(text)
    references = next(iter(found.values()))["reference_captions"]
    rows = [Caption("reference", [TextPart("same", reference)]) for reference in references]
    for own in sorted(texts, key=lambda own: own != base):
        who, *same = texts[own] if len(texts) > 1 or len(found) == 1 else ["every cell"]
        score = found[texts[own][0]]["scores"].get(quality)
        note = "" if score is None else f"[{shown(quality, score)}]"
        rows.append(Caption(who, marked(base, own, language), note, same))
    return Captions(clip, rows, LANGUAGE_CODES[language])
