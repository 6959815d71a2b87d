"""What stands in a report, as plain data: `render` makes HTML and Markdown of it. Text is text, not markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bench.comparison import Document
from bench.report.differences import TextPart
from edgecloud_sd.measure.summary import METRICS

DASH = "-"


@dataclass(frozen=True)
class Heading:
    """Of a column. `meaning` is shown where the pointer rests on it; `words`: the column is not of numbers."""

    text: str
    meaning: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the rows. `folded`: the line that opens a table that is not shown at once."""

    kind: ClassVar[str] = "table"
    headings: Sequence[Heading]
    rows: Sequence[Sequence[str]]
    folded: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a `warning` is one that must not be overlooked."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Points:
    """A list of (what, what is said of it); the first may be empty. `folded` as of a table."""

    kind: ClassVar[str] = "points"
    items: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG, what it shows in words, and the numbers that it is drawn from."""

    kind: ClassVar[str] = "picture"
    svg: str
    says: str
    numbers: Table


@dataclass(frozen=True)
class Caption:
    """A caption, who wrote it, and who wrote the same. `note`: what is said of it in a few words."""

    who: str
    parts: Sequence[TextPart]
    note: str = ""
    same: Sequence[str] = ()


@dataclass(frozen=True)
class Captions:
    """The captions of one clip, to be read side by side."""

    kind: ClassVar[str] = "captions"
    clip: str
    captions: Sequence[Caption]
    lang: str  # as in HTML


Block = Table | Paragraph | Points | Picture | Captions


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[Section]


METRIC_HEADINGS = {
    "ttft": "TTFT",
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
    "cloud_call_rate": "cloud calls",
    "gate_auroc": "gate AUROC",
}
# unit of a figure -> the unit it is shown in, factor, format
SHOWN = {
    "s": ("ms", 1e3, ".1f"),
    "tokens/s": ("tokens/s", 1, ".1f"),
    "%": ("%", 1, ".0f"),
    "MB": ("MB", 1, ".0f"),
    "0 to 10": ("", 1, ".2f"),
    "tokens": ("", 1, ".2f"),
    "bytes": ("bytes", 1, ".0f"),
}
SHARE = ("", 1, ".3f")  # of every other unit


def name(figure: str) -> str:
    """What a figure is called."""
    return METRIC_HEADINGS.get(figure, figure.replace("_", " "))


def heading(figure: str) -> Heading:
    """A column of one figure: what it is called, in which unit, and what it means."""
    about = METRICS[figure]
    better = f" ({about.better} is better)" if about.better else ""
    return Heading(f"{name(figure)} {SHOWN.get(about.unit, SHARE)[0]}".strip(), f"{about.meaning}{better}")


def shown(figure: str, value: float | None) -> str:
    """A figure's value in the unit of its heading."""
    _, factor, form = SHOWN.get(METRICS[figure].unit, SHARE)
    return DASH if value is None else format(value * factor, form)


def change(figure: str, before: float | None, after: float | None) -> str:
    """`before → after`, and by how much: in % for amounts, as a difference for shares and scores."""
    both = f"{shown(figure, before)} → {shown(figure, after)}"
    if before is None or after is None:
        return both if before != after else DASH
    _, factor, form = SHOWN.get(METRICS[figure].unit, SHARE)
    if METRICS[figure].unit in ("s", "tokens/s", "MB", "bytes"):
        return f"{both} ({(after / before - 1) * 100:+.1f}%)" if before else both
    return f"{both} ({(after - before) * factor:+{form}})"


def missing(figures: Sequence[str], documents: Iterable[Document]) -> list[tuple[str, str]]:
    """Why figures have a dash: (their names, the reason), one for each reason."""
    found: dict[str, dict[str, None]] = {}
    for document in documents:
        metrics = document["metrics"]
        for figure in figures:
            if metrics["figures"].get(figure) is None:
                found.setdefault(metrics["reasons"].get(figure, "no reason is given"), {})[name(figure)] = None
    return [(", ".join(names), reason) for reason, names in found.items()]
