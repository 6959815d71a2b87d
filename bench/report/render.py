"""A page as one HTML file that needs nothing else, and as Markdown. All text of the page is escaped in both."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from bench.report.differences import TextPart
from bench.report.page import Block, Captions, Page, Paragraph, Picture, Points, Table

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TAGS = {"inserted": "ins", "deleted": "del"}
EMPTY = "(empty)"
_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


def as_html(page: Page) -> str:
    """The page, with its style and pictures inside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, tags=TAGS, empty=EMPTY) + "\n"


def as_markdown(page: Page) -> str:
    """The page for places that show no HTML file: the numbers of each picture instead of the picture."""
    lines = [f"# {escaped(page.title)}"]
    for section in page.sections:
        lines += ["", f"## {escaped(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """`text` as Markdown that shows just that, on one line, also in a cell of a table."""
    return _MARKUP.sub(r"\\\1", html.escape(re.sub(r"\s+", " ", text), quote=False))


def _paragraph(text: str) -> str:
    """The same where a line begins with it, and so could begin a list."""
    return re.sub(r"^(\d*)([-+.)])(?= |$)", r"\1\\\2", escaped(text).lstrip())


def _block(block: Block) -> list[str]:
    if isinstance(block, Table):
        return [*_unfolded(block.folded), *_table(block)]
    if isinstance(block, Paragraph):
        return [f"**{escaped(block.text)}**" if block.warning else _paragraph(block.text)]
    if isinstance(block, Points):
        return [*_unfolded(block.folded), *(_point(*item) for item in block.items)]
    if isinstance(block, Picture):
        return [_paragraph(block.says), "", *_table(block.numbers)]
    return _captions(block)


def _unfolded(line: str) -> list[str]:
    return [f"{escaped(line)}:", ""] if line else []


def _point(what: str, text: str) -> str:
    return f"- **{escaped(what)}**: {escaped(text)}" if what else f"- {_paragraph(text)}"


def _table(table: Table) -> list[str]:
    rule = [":--" if heading.words or not i else "--:" for i, heading in enumerate(table.headings)]
    rows = [[escaped(heading.text) for heading in table.headings], rule]
    rows += [[escaped(each) for each in row] for row in table.rows]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _captions(block: Captions) -> list[str]:
    rows = [["**" + escaped(block.clip) + "**", "", ""], ["---"] * 3]
    for each in block.captions:
        rows.append([", ".join(map(escaped, [each.who, *each.same])), _marked(each.parts), escaped(each.note)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _marked(parts: Sequence[TextPart]) -> str:
    """With tags: asterisks beside Chinese punctuation would not mark anything."""
    shown = []
    for part in parts:
        text = escaped(part.text)
        shown.append(text if part.kind == "same" else f"<{TAGS[part.kind]}>{text}</{TAGS[part.kind]}>")
    return "".join(shown) or EMPTY
