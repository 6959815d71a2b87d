"""The content of a report as plain records of text without markup. `render` turns them into HTML and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bench.report import pictures
from bench.report.differences import TextPart

DASH = "-"


@dataclass(frozen=True)
class Column:
    """A table's column. HTML shows `meaning` as a tooltip; a text column is aligned to the left."""

    heading: str
    meaning: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. A table with a `fold_title` is folded under that line."""

    kind: ClassVar[str] = "table"
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    fold_title: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text; a warning stands out from the others."""

    kind: ClassVar[str] = "paragraph"
    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class BulletList:
    """A list of (term, text), where the term may be empty. A list with a `fold_title` is folded under that line."""

    kind: ClassVar[str] = "list"
    items: Sequence[tuple[str, str]]
    fold_title: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG picture, the same one for a phone, its description, and the numbers that it shows."""

    kind: ClassVar[str] = "picture"
    svg: str
    narrow_svg: str
    description: str
    numbers: Table


@dataclass(frozen=True)
class CaptionLine:
    """A caption with everyone who wrote exactly this text, and a short note."""

    writers: Sequence[str]
    parts: Sequence[TextPart]
    note: str = ""


@dataclass(frozen=True)
class ClipCaptions:
    """The captions of one clip, side by side. `language_code` is the value of HTML's `lang` attribute."""

    kind: ClassVar[str] = "captions"
    title: str
    captions: Sequence[CaptionLine]
    language_code: str


def make_picture(draw: Callable[..., str], *arguments: Any, description: str, numbers: Table) -> Picture:
    """Return the picture that a function of `pictures` draws, in both widths."""
    return Picture(draw(*arguments, pictures.WIDE), draw(*arguments, pictures.NARROW), description, numbers)


Block = Table | Paragraph | BulletList | Picture | ClipCaptions


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    sections: Sequence[Section]


def list_sections(blocks_by_title: Mapping[str, Sequence[Block]], title_suffix: str) -> list[Section]:
    """Return a section per title, without those that have no block."""
    return [Section(title + title_suffix, blocks) for title, blocks in blocks_by_title.items() if blocks]
