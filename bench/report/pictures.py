"""The pictures of a report, as SVG to stand inside HTML: no font, script or address of anything outside.

Text stays text, and has the colours of the page around it, in the dark too. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.report.labels import Box, place
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.metrics import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the page, which the SVG names by these stand-ins
INK, SOFT, PAPER = "#010203", "#040506", "#070809"
HATCH = "#ffffff"
PAGE = {INK: "currentColor", SOFT: "var(--soft)", PAPER: "var(--paper)"}
# By place: the edge blue, the cloud orange, the link green, faults red; Okabe and Ito's colours, and shades of them
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
DIRECT = 8  # points that are named where they are; more are numbered
MAX_NAMED_LINES = 16  # lines that are named one by one, at most
PICTURE_WIDTH = 9.0  # inches
STYLE: dict[Any, Any] = {  # of matplotlib, whose releases differ in the type of a name
    "svg.hashsalt": "edgecloud_sd",  # else the ids within are drawn by chance
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar is a dollar
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": SOFT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": HATCH,
    "hatch.linewidth": 1.2,
}


@dataclass(frozen=True)
class Bar:
    """A cell's mean seconds by part, and those of `draft` that were thrown away."""

    label: str
    parts: Mapping[str, float]
    discarded: float


@dataclass(frozen=True)
class Point:
    """A cell between latency and quality. `calls`: share of its rounds that went to the cloud, where it has rounds."""

    label: str
    mode: str
    seconds: float
    quality: float
    calls: float | None


@dataclass(frozen=True)
class Line:
    """A cell's acceptance by position, and what its gate, rule and k are called."""

    label: str
    values: Sequence[float]
    gate: str
    rule: str
    k: str


def draw_breakdown(name: str, bars: Sequence[Bar]) -> str:
    """Stacked bars, ms a caption by part, one a cell; discarded draft hatched; parts that are 0 everywhere left out."""
    from matplotlib.patches import Patch, Rectangle

    used = [part for part in PARTS if any(bar.parts[part] for bar in bars)]
    with _figure(1.2 + 0.34 * len(bars)) as (figure, axes):
        longest = max(1e3 * sum(bar.parts.values()) for bar in bars) or 1.0
        for y, bar in enumerate(bars):
            left = 0.0
            for part, ms, discarded in segments(bar):
                look = _look(part, discarded)
                axes.add_patch(Rectangle((left, y - 0.36), ms, 0.72, linewidth=0.5, **look))
                text = f"{ms:.0f}"
                if not discarded and ms > 0.011 * (len(text) + 1) * longest:  # it fits
                    ink = "#ffffff" if _dark(PART_COLOURS[part]) else "#000000"
                    axes.text(left + ms / 2, y, text, ha="center", va="center", color=ink, size=8)
                left += ms
            axes.text(left + 0.008 * longest, y, f"{left:.0f}", va="center", size=9, weight="bold")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.07 * longest)
        axes.set_xlabel("ms a caption, mean over clips")
        axes.grid(axis="x")
        handles = [Patch(label=part.replace("_", " "), **_look(part, False)) for part in used]
        if any(bar.discarded for bar in bars):
            lost = Patch(label="draft, discarded", **_look("draft", True))
            handles.insert(used.index("draft") + 1, lost)
        figure.legend(handles=handles, loc="outside upper left", ncols=6, columnspacing=1.2, handlelength=1.6)
        return _svg(figure, name)


def _look(part: str, discarded: bool) -> dict[str, Any]:
    """Of a part's bar, and of its place in the legend."""
    if discarded:
        return {"facecolor": PART_COLOURS[part], "edgecolor": HATCH, "hatch": "////"}
    return {"facecolor": PART_COLOURS[part], "edgecolor": PAPER}


def segments(bar: Bar) -> list[tuple[str, float, bool]]:
    """(part, ms, whether thrown away) of a bar, from left to right; none of no length."""
    found = []
    for part in PARTS:
        lost = bar.discarded if part == "draft" else 0.0
        found += [(part, 1e3 * (bar.parts[part] - lost), False), (part, 1e3 * lost, True)]
    return [each for each in found if each[1] > 0]


def draw_latency_quality(name: str, points: Sequence[Point], front: Sequence[int], quality: str) -> str:
    """Quality over seconds a caption, the Pareto front as steps, the share of rounds with a cloud call as size."""
    from matplotlib.lines import Line2D

    numbered = len(points) > DIRECT
    with _figure(max(4.4, 1.6 + 0.19 * len(points) if numbered else 0)) as (figure, axes):
        for point in points:
            marker, colour = MODE_MARKERS[point.mode]
            axes.scatter(
                point.seconds,
                point.quality,
                s=_area(point.calls),
                marker=marker,
                color=colour,
                edgecolor=PAPER,
                linewidth=0.8,
                alpha=0.85,
                zorder=3,
            )
        _widen(axes, [point.seconds for point in points], [point.quality for point in points])
        best = [points[i] for i in front]
        right = axes.get_xlim()[1]
        axes.step(
            [*(point.seconds for point in best), right],
            [*(point.quality for point in best), best[-1].quality],
            where="post",
            color=INK,
            linewidth=1.1,
            linestyle=(0, (5, 2)),
            alpha=0.7,
            zorder=2,
        )
        axes.set_xlabel("s a caption (total), mean over clips; left is better")
        axes.set_ylabel(f"{quality}; up is better")
        axes.grid()
        keys = [
            Line2D([], [], linestyle="", marker=marker, markersize=8, color=colour, label=mode)
            for mode, (marker, colour) in MODE_MARKERS.items()
            if any(point.mode == mode for point in points)
        ]
        keys.append(Line2D([], [], color=INK, linestyle=(0, (5, 2)), alpha=0.7, label="Pareto front"))
        figure.legend(handles=keys, loc="outside upper left", ncols=len(keys))
        if any(point.calls is not None for point in points):
            sizes = [
                Line2D([], [], linestyle="", marker="o", markersize=_area(rate) ** 0.5, color=SOFT, label=f"{rate:.0%}")
                for rate in (0.0, 0.5, 1.0)
            ]
            title = Line2D([], [], linestyle="", label="rounds that went to the cloud:")
            figure.legend(handles=[title, *sizes], loc="outside lower left", ncols=4, handletextpad=0.4)
        labels = [str(i + 1) for i in range(len(points))] if numbered else [point.label for point in points]
        if numbered:
            listed = [
                Line2D(
                    [],
                    [],
                    linestyle="",
                    marker=MODE_MARKERS[point.mode][0],
                    color=MODE_MARKERS[point.mode][1],
                    label=text,
                )
                for point, text in zip(points, (f"{i + 1}  {p.label}" for i, p in enumerate(points)), strict=True)
            ]
            figure.legend(handles=listed, loc="outside right center", handletextpad=0.3)
        _label(figure, axes, points, labels)
        return _svg(figure, name)


def draw_acceptance(name: str, lines: Sequence[Line]) -> str:
    """The share accepted over the position in the draft: colour by gate, dashes by rule, marker by k.

    The legend names the lines, or, where there are many, what their looks mean.
    """
    from matplotlib.lines import Line2D

    same: dict[tuple[float, ...], list[Line]] = {}
    for line in lines:  # cells that differ in the link alone have one line
        same.setdefault(tuple(line.values), []).append(line)
    looks = {
        "color": _looks(SERIES_COLOURS, [line.gate for line in lines]),
        "linestyle": _looks(DASHES, [line.rule for line in lines]),
        "marker": _looks(MARKERS, [f"k={line.k}" for line in lines]),
    }
    named = len(same) <= MAX_NAMED_LINES
    with _figure(max(3.4, 1.0 + 0.2 * (len(same) if named else sum(map(len, looks.values()))))) as (figure, axes):
        for values, alike in same.items():
            more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=looks["color"][alike[0].gate],
                linestyle=looks["linestyle"][alike[0].rule],
                marker=looks["marker"][f"k={alike[0].k}"],
                markersize=6,
                markeredgecolor=PAPER,
                linewidth=1.8,
                label=f"{alike[0].label}{more}",
                clip_on=False,
                zorder=3,
            )
        axes.set_xticks(range(1, max(map(len, same)) + 1))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("position in the draft")
        axes.set_ylabel("share accepted")
        axes.grid()
        keys = [
            Line2D([], [], **({"color": SOFT, "linestyle": "" if of == "marker" else "-"} | {of: look}), label=text)
            for of, looking in looks.items()
            for text, look in looking.items()
        ]
        figure.legend(handles=None if named else keys, loc="outside right upper", handlelength=3.2)
        return _svg(figure, name)


def _looks(series: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Of each name what it looks like, in turn."""
    return dict(zip(dict.fromkeys(names), itertools.cycle(series), strict=False))


def draw_speedups(name: str, rows: Sequence[tuple[str, Sequence[tuple[str, Interval | None]]]]) -> str:
    """Intervals of how many times as fast, a row a cell: (label, [(over what, interval)])."""
    kinds = [*dict.fromkeys(kind for _, found in rows for kind, _ in found)]
    with _figure(1.1 + len(rows) * (0.16 + 0.1 * len(kinds))) as (figure, axes):
        for y, (_, found) in enumerate(rows):
            for kind, interval in found:
                if interval is None:
                    continue
                i = kinds.index(kind)
                low = interval.value if interval.low is None else interval.low
                high = interval.value if interval.high is None else interval.high
                axes.errorbar(
                    interval.value,
                    y + (i - (len(kinds) - 1) / 2) * 0.55 / len(kinds),
                    xerr=[[interval.value - low], [high - interval.value]],
                    color=SERIES_COLOURS[i % len(SERIES_COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=6,
                    capsize=3,
                    linewidth=1.6,
                )
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("times as fast, 95% interval; right of 1 is faster")
        axes.grid(axis="x")
        _speedup_legend(figure, kinds)
        return _svg(figure, name)


def _speedup_legend(figure: Figure, kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=SERIES_COLOURS[i % len(SERIES_COLOURS)], label=kind)
        for i, kind in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(kinds))


def _label(figure: Figure, axes: Axes, points: Sequence[Point], labels: Sequence[str]) -> None:
    """Name the points where they are; a line leads to a label that stands far off."""
    figure.draw_without_rendering()  # now the layout is known
    figure.set_layout_engine("none")
    markers, sizes = [], []
    for point, text in zip(points, labels, strict=True):
        x, y = axes.transData.transform((point.seconds, point.quality))
        half = _area(point.calls) ** 0.5 / 2 + 1
        markers.append(Box(x - half, y - half, x + half, y + half))
        trial = figure.text(0, 0, text, size=9)
        extent = trial.get_window_extent()
        sizes.append((extent.width + 4, extent.height + 2))
        trial.remove()
    frame = axes.get_window_extent()
    area = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    for marker, text, box in zip(markers, labels, place(markers, sizes, area), strict=True):
        far = max(box.left - marker.right, marker.left - box.right, box.bottom - marker.top, marker.bottom - box.top)
        axes.annotate(
            text,
            marker.centre,
            xytext=box.centre,
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            size=9,
            zorder=5,
            bbox={"facecolor": PAPER, "alpha": 0.8, "linewidth": 0, "pad": 1},
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.7} if far > 6 else None,
        )


def _area(calls: float | None) -> float:
    """A marker's, in square points; a cell without rounds has a size of its own."""
    return 75.0 if calls is None else 30 + 230 * calls


def _widen(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Room around the points, and some where they are all alike."""
    for values, setter, share in ((xs, axes.set_xlim, 0.1), (ys, axes.set_ylim, 0.18)):
        low, high = min(values), max(values)
        room = share * (high - low) or 0.1 * (abs(high) or 1.0)
        setter(low - room, high + room)


def _dark(colour: str) -> bool:
    """Whether white is easier to read on it than black (its luminance, with a gamma of 2)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red * red + 0.7152 * green * green + 0.0722 * blue * blue < 0.18


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty picture in the style of the report, whatever the user's own settings of matplotlib are."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the browser's fonts show the text, not those that matplotlib measures it with
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(PICTURE_WIDTH, height), dpi=72, layout="constrained")  # a pixel is a point
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """To stand in HTML among others: ids of its own, colours of the page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    text = file.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    # the metadata have the date, and the style would be the whole page's
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.S)
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", text)
    for stand_in, colour in PAGE.items():
        text = text.replace(stand_in, colour)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
