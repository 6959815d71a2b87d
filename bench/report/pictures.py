"""The pictures of a report, drawn by matplotlib as SVG on a light background of their own.

A picture is drawn for a page that is `WIDE` or `NARROW`. Text stays text in the SVG. The same numbers give the same
bytes with one version of matplotlib.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.intervals import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, SOFT, PAPER = "#1c1e21", "#62676e", "#ffffff"
# Edge blue, cloud orange, link green, faults red: the colours of Okabe and Ito, and shades of them
PART_COLOURS = {
    "features": "#b8dcf2",
    "edge_prefill": "#56b4e9",
    "cloud_prefill": "#f0b429",
    "draft": "#0072b2",
    "gate": "#cc79a7",
    "uplink": "#009e73",
    "network": "#4db38f",
    "cloud_queue": "#7a3d00",
    "verify": "#d55e00",
    "cloud_decode": "#a03c00",
    "downlink": "#7fd1b9",
    "faults": "#c62f4b",
    "rollback": "#8a63a8",
    "other": "#8c8c8c",
}
MODE_MARKERS = {"edge": ("^", "#56b4e9"), "cloud": ("s", "#d55e00"), "speculative": ("o", "#009e73")}
SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vP*X"
FRONT_STYLE: dict[str, Any] = {"color": INK, "alpha": 0.7, "linewidth": 1.1, "linestyle": DASHES[1]}
NUMBER_STYLE: dict[str, Any] = {"zorder": 4, "bbox": {"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 0.5}}
MAX_LINEAR_RATIO = 10  # the largest end of an interval to the smallest; above it, the axis is logarithmic
WIDE, NARROW = 9.0, 4.6  # inches of a picture on a desk, and on a phone
STYLE: dict[Any, Any] = {  # the releases of matplotlib differ in the type of a key
    "svg.hashsalt": "edgecloud_sd",  # ids would be random without a salt
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may contain a dollar sign
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": SOFT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": PAPER,
    "hatch.linewidth": 1.2,
}


@dataclass(frozen=True)
class Bar:
    """A cell's mean seconds per caption by part. `discarded` seconds of `draft` went into discarded tokens."""

    label: str
    parts: Mapping[str, float]
    discarded: float


@dataclass(frozen=True)
class Point:
    """A cell's mean seconds per caption and its quality. Only a speculative cell has a cloud call rate."""

    label: str
    mode: str
    seconds: float
    quality: float
    cloud_call_rate: float | None


@dataclass(frozen=True)
class LengthCounts:
    """A cell's verifications by the number of draft tokens that they accepted, and its mean acceptance length."""

    label: str
    counts: Sequence[int]
    mean: float | None


@dataclass(frozen=True)
class Line:
    """A cell's acceptance rate by position in the draft, and its strategy."""

    label: str
    values: Sequence[float]
    gate: str
    rule: str
    k: str


def draw_breakdown(bars: Sequence[Bar], width: float = WIDE) -> str:
    """Return stacked bars of ms per caption by part, with discarded draft hatched, without parts that are 0."""
    from matplotlib.patches import Patch

    columns, row, thickness = (6, 0.34, 0.72) if width == WIDE else (2, 0.5, 0.45)
    with open_figure(1.2 + row * len(bars) + 0.2 * (6 - columns), width) as (figure, axes):
        longest = max(1e3 * sum(bar.parts.values()) for bar in bars) or 1.0
        for y, bar in enumerate(bars):
            left = 0.0
            for part, ms, is_discarded in list_segments(bar):
                axes.barh(y, ms, thickness, left, linewidth=0.5, **_segment_style(part, is_discarded))
                text = f"{ms:.0f}"
                if not is_discarded and ms > 0.1 / width * (len(text) + 1) * longest:  # the text fits
                    colour = "#ffffff" if _is_dark(PART_COLOURS[part]) else "#000000"
                    axes.text(left + ms / 2, y, text, ha="center", va="center", color=colour, size=8)
                left += ms
            axes.text(left + 0.008 * longest, y, f"{left:.0f}", va="center", size=9, weight="bold")
        _label_rows(axes, [bar.label for bar in bars], "ms per caption, mean over clips", width)
        axes.set_xlim(0, (1 + 0.63 / width) * longest)
        handles = [
            Patch(label=f"{part.replace('_', ' ')}{', discarded' * is_discarded}", **_segment_style(part, is_discarded))
            for part in PARTS
            for is_discarded in (False, True)
            if any(segment[::2] == (part, is_discarded) for bar in bars for segment in list_segments(bar))
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.6)
        return to_svg(figure)


def list_segments(bar: Bar) -> list[tuple[str, float, bool]]:
    """Return (part, ms, whether it is discarded) for the segments of a bar from left to right, without empty ones."""
    segments = []
    for part in PARTS:
        discarded = bar.discarded if part == "draft" else 0.0
        segments += [(part, 1e3 * (bar.parts[part] - discarded), False), (part, 1e3 * discarded, True)]
    return [segment for segment in segments if segment[1] > 0]


def _segment_style(part: str, is_discarded: bool) -> dict[str, Any]:
    return {"facecolor": PART_COLOURS[part], "edgecolor": PAPER, "hatch": "////" if is_discarded else None}


def _is_dark(colour: str) -> bool:
    """Return whether white text is easier to read on the colour than black, by its luminance at a gamma of 2."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red * red + 0.7152 * green * green + 0.0722 * blue * blue < 0.18


def draw_latency_quality(points: Sequence[Point], front: Sequence[int], quality: str, width: float = WIDE) -> str:
    """Return numbered points of quality over seconds per caption, with the Pareto front as steps.

    A legend to the right or below names the numbers. The area of a circle shows the cloud call rate.
    """
    height = max(4.4, 1.6 + 0.19 * len(points)) if width == WIDE else 4.6 + 0.2 * len(points)
    with open_figure(height, width) as (figure, axes):
        for point in points:
            look = _point_style(point.mode) | {"s": _marker_area(point.cloud_call_rate), "edgecolor": PAPER}
            axes.scatter(point.seconds, point.quality, linewidth=0.8, zorder=3, **look)
        left, right = _padded_range([point.seconds for point in points])
        bottom, top = _padded_range([point.quality for point in points])
        axes.set(xlim=(left, right), ylim=(bottom, top), ylabel=f"{quality}; up is better")
        axes.set_xlabel("s per caption (total), mean over clips; left is better")
        axes.grid()
        steps = [(points[i].seconds, points[i].quality) for i in front] + [(right, points[front[-1]].quality)]
        axes.step(*zip(*steps, strict=True), where="post", zorder=2, **FRONT_STYLE)
        places = [((p.seconds - left) / (right - left), (p.quality - bottom) / (top - bottom)) for p in points]
        for (x, y), numbers in group_numbers(places).items():
            label = "\n".join(map(str, numbers))
            axes.annotate(label, (x, y), (0, 10), "axes fraction", "offset points", ha="center", size=9, **NUMBER_STYLE)
        _add_point_legends(figure, points, width)
        return to_svg(figure)


def _add_point_legends(figure: Figure, points: Sequence[Point], width: float) -> None:
    """Explain the markers above the axes, and the numbers and the areas of the circles beside and below them."""
    modes = [mode for mode in MODE_MARKERS if any(point.mode == mode for point in points)]
    keys = [*(legend_key(mode, **_point_style(mode)) for mode in modes), legend_key("Pareto front", **FRONT_STYLE)]
    figure.legend(handles=keys, loc="outside upper left", ncols=len(keys) if width == WIDE else 2)
    names = [
        legend_key(f"{number}  {point.label}", **_point_style(point.mode)) for number, point in enumerate(points, 1)
    ]
    circles = []
    if any(point.cloud_call_rate is not None for point in points):
        sizes = {f"{rate:.0%}": _marker_area(rate) ** 0.5 for rate in (0, 0.5, 1)}
        circles = [legend_key("rounds that went to the cloud:")]
        circles += [legend_key(label, marker="o", color=SOFT, markersize=size) for label, size in sizes.items()]
    if width != WIDE:
        figure.legend(handles=[*names, *circles], loc="outside lower left", handletextpad=0.5)
        return
    figure.legend(handles=names, loc="outside right center", handletextpad=0.3)
    if circles:
        figure.legend(handles=circles, loc="outside lower left", ncols=4, handletextpad=0.4)


def _point_style(mode: str) -> dict[str, Any]:
    marker, colour = MODE_MARKERS[mode]
    return {"marker": marker, "color": colour}


def group_numbers(places: Sequence[tuple[float, float]]) -> dict[tuple[float, float], list[int]]:
    """Return the numbers of the points, counted from 1, by the place of their common label.

    Points whose labels would cover each other share the label of the first one.
    """
    numbers: dict[tuple[float, float], list[int]] = {}
    for number, (x, y) in enumerate(places, 1):
        near = next((place for place in numbers if abs(place[0] - x) < 0.035 and abs(place[1] - y) < 0.035), (x, y))
        numbers.setdefault(near, []).append(number)
    return numbers


def _marker_area(cloud_call_rate: float | None) -> float:
    """Return the area in square points."""
    return 75.0 if cloud_call_rate is None else 30 + 230 * cloud_call_rate


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis with room around the values, also if all values are equal."""
    low, high = min(values), max(values)
    padding = 0.15 * (high - low) or 0.1 * (abs(high) or 1.0)
    return low - padding, high + padding


def draw_acceptance(lines: Sequence[Line], width: float = WIDE) -> str:
    """Return the acceptance rate over the position in the draft: colour by gate, dashes by rule, marker by k."""
    same: dict[tuple[float, ...], list[Line]] = {}
    for line in lines:  # cells that differ only in the link have equal lines
        same.setdefault(tuple(line.values), []).append(line)
    colours = _assign(SERIES_COLOURS, [line.gate for line in lines])
    dashes = _assign(DASHES, [line.rule for line in lines])
    markers = _assign(MARKERS, [line.k for line in lines])
    height = max(3.4, 1.0 + 0.2 * len(same)) if width == WIDE else 3.2 + 0.2 * len(same)
    with open_figure(height, width) as (figure, axes):
        for values, (line, *others) in same.items():
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=colours[line.gate],
                linestyle=dashes[line.rule],
                marker=markers[line.k],
                markeredgecolor=PAPER,
                label=f"{line.label} (and {len(others)} more)" if others else line.label,
                clip_on=False,
                zorder=3,
            )
        axes.set_xticks(range(1, max(map(len, same)) + 1))
        axes.set(ylim=(0, 1.02), xlabel="position in the draft", ylabel="share accepted")
        axes.grid()
        figure.legend(loc="outside right upper" if width == WIDE else "outside lower left", handlelength=3.2)
        return to_svg(figure)


def draw_accepted_lengths(cells: Sequence[LengthCounts], width: float = WIDE) -> str:
    """Return one histogram per cell: its verifications by the number of draft tokens that they accepted."""
    with open_figure(0.7 + (0.65 if width == WIDE else 0.8) * len(cells), width) as (figure, axes):
        for y, cell in enumerate(cells):
            shares = [count / sum(cell.counts) for count in cell.counts]
            heights = [-0.55 * share / max(shares) for share in shares]  # the axis points down
            axes.bar(range(len(shares)), heights, 0.8, y + 0.45, color=MODE_MARKERS["speculative"][1])
            for x, (share, height) in enumerate(zip(shares, heights, strict=True)):
                axes.text(x, y + 0.43 + height, f"{share:.0%}", ha="center", size=8)
        means = ["" if cell.mean is None else f"mean length {cell.mean:.2f}" for cell in cells]
        labels = [
            (f"{cell.label}\n{mean}" if width == WIDE else f"{cell.label}, {mean}").strip("\n, ")
            for cell, mean in zip(cells, means, strict=True)
        ]
        axes.set_xticks(range(max(len(cell.counts) for cell in cells)))
        _label_rows(axes, labels, "draft tokens that a verification accepted; % of the cell's verifications", width)
        axes.grid(False)
        return to_svg(figure)


def _assign(looks: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a look for each name, in turn."""
    return dict(zip(dict.fromkeys(names), itertools.cycle(looks), strict=False))


def draw_speedups(rows: Sequence[tuple[str, Mapping[str, Interval | None]]], width: float = WIDE) -> str:
    """Return intervals of speed-ups, from (label, interval by name of the speed-up), one row per cell."""
    names = list(dict.fromkeys(name for _, intervals in rows for name in intervals))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": marker}
        for name, colour, marker in zip(names, itertools.cycle(SERIES_COLOURS), itertools.cycle(MARKERS), strict=False)
    }
    label_room = 0.0 if width == WIDE else 0.22
    with open_figure(1.1 + len(rows) * (0.16 + label_room + 0.1 * len(names)), width) as (figure, axes):
        ends: list[float] = []
        for y, (_, intervals) in enumerate(rows):
            for name, interval in intervals.items():
                if interval is None:
                    continue
                low = interval.value if interval.low is None else interval.low
                high = interval.value if interval.high is None else interval.high
                offset = label_room + (names.index(name) - (len(names) - 1) / 2) * (0.55 - label_room) / len(names)
                error = [[interval.value - low], [high - interval.value]]
                axes.errorbar(interval.value, y + offset, xerr=error, capsize=3, **styles[name])
                ends += [low, high]
        axes.axvline(1, color=INK, linewidth=1)
        if ends and min(ends) > 0 and max(ends) > MAX_LINEAR_RATIO * min(ends):
            _scale_by_ratio(axes, max(ends) / min(ends))
        _label_rows(axes, [label for label, _ in rows], "times as fast, 95% interval; right of 1 is faster", width)
        keys = [legend_key(name, linestyle="-", **style) for name, style in styles.items()]
        figure.legend(handles=keys, loc="outside upper left", ncols=len(keys))
        return to_svg(figure)


def _scale_by_ratio(axes: Axes, ratio: float) -> None:
    """Make the horizontal axis logarithmic with plain numbers, so that 0.1 and 10 are equally far from 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 100 else (1.0,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_rows(axes: Axes, labels: Sequence[str], xlabel: str, width: float) -> None:
    """Label one row per cell, from top to bottom: at its left, or above it in a narrow picture."""
    axes.set_yticks(range(len(labels)), labels if width == WIDE else [""] * len(labels))
    if width != WIDE:
        for y, label in enumerate(labels):
            axes.text(0, y - 0.48, label, transform=axes.get_yaxis_transform(), va="top", size=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(xlabel, wrap=True)
    axes.grid(axis="x")


def legend_key(label: str, **style: Any) -> Line2D:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"linestyle": "", "markersize": 7, **style})


@contextmanager
def open_figure(height: float, width: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield an empty picture of this size in inches, in the style of the report and not of the user's matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the browser shows the text in its own fonts, so a glyph that matplotlib lacks does no harm
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # one pixel per point
        yield figure, figure.add_subplot()


def to_svg(figure: Figure) -> str:
    """Return the picture as SVG."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
