"""The page of `bench.tune --pareto`: its table, and a picture for each quality metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from bench.gaps import GAP_NAMES, Gap, ParetoPoint
from bench.report.page import DASH, Block, BulletList, Column, Page, Paragraph, Section, Table, make_picture
from bench.report.pareto_picture import CostLine, CostPanels, CostPoint, draw_gap_closed
from bench.ways import EDGE, GIVEN, PERFECT, RANDOM

Points = Mapping[str, Sequence[ParetoPoint]]  # keys are languages
COSTS = {
    "cloud calls": "cloud calls per caption, mean over clips; mode cloud has one request, which streams",
    "positions": "positions per caption that the cloud computed after its prefill, mean over clips",
    "s": "seconds per caption on the virtual clock, mean over clips",
}
READING = (
    "Up is better, left is cheaper. 0 is the edge alone and 1 the cloud alone. A line "
    "joins ways that differ in one value, and a bar is a 95% interval over clips, paired with edge and cloud. The grey "
    "area lies between a gate that escalates at random and one that knows which drafts the cloud would correct, the "
    "first few or all of them. A way far on its left mends "
    "more than one place with a verdict."
)


def build_pareto_page(points: Points, run: Mapping[str, Any]) -> Page:
    """Return the page. `run` describes the run with plain values."""
    clips = ", ".join(f"{count} {language}" for language, count in run["clips"].items())
    facts = [(name.replace("_", " "), str(value)) for name, value in {**run, "clips": clips}.items()]
    pictures = [_picture(points, metric) for metric in GAP_NAMES]
    sections = [
        Section(f"Share of the {GAP_NAMES[metric]} gap closed", blocks)
        for metric, blocks in zip(GAP_NAMES, pictures, strict=True)
    ]
    return Page(
        "Quality against costs",
        [Section("What was run", [BulletList(facts)]), *sections, Section("Every way", [list_points(points)])],
    )


def list_points(points: Points) -> Table:
    """Return the table of all ways, costs and metrics."""
    columns = [
        Column("language", is_text=True),
        Column("line", "ways that differ in one value", is_text=True),
        Column("way", "the value, and the name of a way that the picture marks", is_text=True),
        *(Column(heading, meaning) for heading, meaning in COSTS.items()),
        Column("times as fast as cloud", "seconds of mode cloud / seconds of this way, whole captions, 95% interval"),
        *(Column(name, "share of the gap between edge and cloud, 95% interval") for name in GAP_NAMES.values()),
    ]
    rows = [
        [
            language,
            point.way.line,
            point.way.name,
            f"{point.calls:.2f}",
            f"{point.positions:.1f}",
            f"{point.seconds:.3f}",
            point.speedup.shown(".2f") if point.speedup else DASH,
            *(_show_gap(gap) for gap in point.gaps.values()),
        ]
        for language, point in _each(points)
    ]
    return Table(columns, rows)


def _picture(points: Points, metric: str) -> list[Block]:
    """Return the picture of a metric, or the reason why no language has one."""
    name = GAP_NAMES[metric]
    gaps = {language: [point.gaps[metric] for point in language_points] for language, language_points in points.items()}
    missing: list[Block] = [
        Paragraph(f"{language}: {language_gaps[0].reason}")
        for language, language_gaps in gaps.items()
        if not any(gap.closed for gap in language_gaps)
    ]
    rows = [
        CostPanels(language, list(_lines(language_points, metric)))
        for language, language_points in points.items()
        if any(gap.closed for gap in gaps[language])
    ]
    if not rows:
        return missing
    table = list_points(points)
    chosen = [*range(6), 7 + list(GAP_NAMES).index(metric)]
    numbers = Table([table.columns[i] for i in chosen], [[row[i] for i in chosen] for row in table.rows], "The numbers")
    axes = ["cloud calls per caption", "positions computed by the cloud", "s per caption"]
    return [make_picture(draw_gap_closed, rows, axes, name, description=READING, numbers=numbers), *missing]


def _lines(points: Sequence[ParetoPoint], metric: str) -> Iterator[CostLine]:
    """Yield the lines of a language. Those of the bounds begin at the edge alone."""
    edge = next(point for point in points if point.way == EDGE)
    for line, members in groupby(points, lambda point: point.way.line):
        is_bound = line in (PERFECT, RANDOM)
        drawn = [_cost_point(point, metric) for point in (*[edge] * is_bound, *members)]
        yield CostLine(line, [way for way in drawn if way], is_bound, line != GIVEN)


def _cost_point(point: ParetoPoint, metric: str) -> CostPoint | None:
    closed = point.gaps[metric].closed
    if closed is None:
        return None
    costs = (point.calls, point.positions, point.seconds)
    return CostPoint(costs, closed.value, closed.low, closed.high, point.way.mark)


def _each(points: Points) -> Iterator[tuple[str, ParetoPoint]]:
    return ((language, point) for language, language_points in points.items() for point in language_points)


def _show_gap(gap: Gap) -> str:
    return gap.closed.shown(".2f") if gap.closed else DASH
