"""The picture of `bench.tune --pareto`: the share of the quality gap closed against costs, a panel for each cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.report.pictures import (
    DASHES,
    INK,
    MARKERS,
    MODE_MARKERS,
    PAPER,
    SERIES_COLOURS,
    SOFT,
    WIDE,
    legend_key,
    open_figure,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CALL_TICKS = (0, 1, 2, 3, 5, 10, 20, 40)
MARK_STYLES: dict[str, dict[str, Any]] = {
    "edge": {"marker": MODE_MARKERS["edge"][0], "color": MODE_MARKERS["edge"][1], "markersize": 9},
    "cloud": {"marker": MODE_MARKERS["cloud"][0], "color": MODE_MARKERS["cloud"][1], "markersize": 8},
    "published": {"marker": "*", "color": "#c62f4b", "markersize": 13},
    "lossless, k 4": {"marker": "D", "color": SERIES_COLOURS[4], "markersize": 7},
    "revise": {"marker": "P", "color": "#8a63a8", "markersize": 10},
    "revise-lossless": {"marker": "X", "color": "#8a63a8", "markersize": 9},
}
BOUND_STYLE: dict[str, Any] = {"color": SOFT, "linewidth": 1.2, "markersize": 3.5}
LINE_COLOURS = SERIES_COLOURS[:6]  # a bound has the grey
LINE_STYLE: dict[str, Any] = {"markersize": 5, "markeredgewidth": 0.8, "linewidth": 1.3}
BAR_STYLE: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.3, "zorder": 1}


@dataclass(frozen=True)
class CostPoint:
    """A way to decode: its costs in the order of the panels, and the share of the gap closed with its interval."""

    costs: Sequence[float]
    closed: float
    low: float | None
    high: float | None
    mark: str = ""


@dataclass(frozen=True)
class CostLine:
    """Ways to decode. Those that differ in one value are joined."""

    name: str
    points: Sequence[CostPoint]
    is_bound: bool = False
    is_joined: bool = True


@dataclass(frozen=True)
class CostPanels:
    """The lines of one row of panels, with its title."""

    title: str
    lines: Sequence[CostLine]


def draw_gap_closed(rows: Sequence[CostPanels], costs: Sequence[str], quality: str, width: float = WIDE) -> str:
    """Return a row of panels for each of `rows`, one for each of `costs`, the first of which are cloud calls.

    A narrow picture has them below each other.
    """
    is_wide = width == WIDE
    columns = len(costs) if is_wide else 1
    height = 2.6 * len(rows) * len(costs) / columns
    styles = _line_styles([line for row in rows for line in row.lines])
    with open_figure(height + (1.2 if is_wide else 3.2), width) as (figure, single):
        single.remove()
        panels = figure.subplots(len(rows) * len(costs) // columns, columns, sharey=True, squeeze=False)
        for axes, (row, place) in zip(panels.flat, itertools.product(rows, range(len(costs))), strict=True):
            _draw_panel(axes, row.lines, place, styles)
            axes.set_xlabel(costs[place])
            if not is_wide or place == 0:
                axes.set_ylabel(f"share of the {quality} gap closed")
                axes.set_title(row.title, loc="left", size=10, weight="bold")
        marks = dict.fromkeys(point.mark for row in rows for line in row.lines for point in line.points if point.mark)
        keys = [legend_key(mark, **MARK_STYLES[mark]) for mark in marks]
        keys += [legend_key(name, **style) for name, style in styles.items()]
        figure.legend(handles=keys, loc="outside lower left", ncols=4 if is_wide else 1)
        return to_svg(figure)


def _line_styles(lines: Sequence[CostLine]) -> dict[str, dict[str, Any]]:
    """Return a look for each line with a point that has no mark: filled markers first, then open ones."""
    looks = itertools.product((None, PAPER), zip(LINE_COLOURS, MARKERS, strict=False))
    styles: dict[str, dict[str, Any]] = {}
    bounds = iter(DASHES[1:])
    for line in lines:
        if line.name in styles or all(point.mark for point in line.points):
            continue
        if line.is_bound:
            styles[line.name] = BOUND_STYLE | {"linestyle": next(bounds), "marker": "o"}
        else:
            fill, (colour, marker) = next(looks)
            styles[line.name] = {
                "color": colour,
                "marker": marker,
                "markerfacecolor": fill or colour,
                "markeredgecolor": colour if fill else PAPER,
                **LINE_STYLE,
                "linestyle": "-" if line.is_joined else "",
            }
    return styles


def _draw_panel(axes: Axes, lines: Sequence[CostLine], place: int, styles: dict[str, dict[str, Any]]) -> None:
    """Draw the lines over the cost at `place`, with the intervals behind them and the marked ways in front.

    Long intervals are cut off, so that few clips leave the lines readable.
    """
    for line in lines:
        ways = sorted(line.points, key=lambda way: way.costs[place])
        x, y = [way.costs[place] for way in ways], [way.closed for way in ways]
        style = styles.get(line.name)
        if style:
            axes.plot(x, y, zorder=2 if line.is_bound else 3, **style)
        for way in ways:
            if style and not line.is_bound and way.low is not None and way.high is not None:
                axes.vlines(way.costs[place], way.low, way.high, color=style["color"], **BAR_STYLE)
            if way.mark:
                look = MARK_STYLES[way.mark]
                axes.plot(way.costs[place], way.closed, markeredgecolor=INK, linestyle="", zorder=5, **look)
    for level in (0, 1):
        axes.axhline(level, color=INK, linewidth=0.7, alpha=0.6, zorder=0)
    shares = [way.closed for line in lines for way in line.points]
    axes.set_ylim(min(*shares, 0) - 0.08, max(*shares, 1) + 0.12)
    axes.grid()
    if place == 0:
        _fill_between_bounds(axes, lines)
        axes.set_xscale("symlog", linthresh=1, linscale=0.6)
        axes.set_xticks(CALL_TICKS, [str(tick) for tick in CALL_TICKS])
        axes.minorticks_off()
        axes.set_xlim(-0.15, 1.15 * max(way.costs[0] for line in lines for way in line.points))


def _fill_between_bounds(axes: Axes, lines: Sequence[CostLine]) -> None:
    """Fill the area between the two bounds over cloud calls. Over another cost they bound nothing."""
    bounds = [sorted((way.costs[0], way.closed) for way in line.points) for line in lines if line.is_bound]
    if len(bounds) == 2:
        axes.fill(*zip(*bounds[0], *bounds[1][::-1], strict=True), color=SOFT, alpha=0.12, linewidth=0, zorder=0)
