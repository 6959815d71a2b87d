"""A page as one HTML file that needs no other file, and as Markdown. All text of the page is escaped in both."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from bench.report.page import Page

_MARKDOWN_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


def to_html(page: Page) -> str:
    """Return the page as HTML, with its style and its pictures inside."""
    return _render(page, "report.html.jinja", autoescape=True)


def to_markdown(page: Page) -> str:
    """Return the page as Markdown, with the numbers of each picture in place of the picture."""
    return _render(page, "report.md.jinja", autoescape=False)


def escape_markdown(text: str) -> str:
    """Return Markdown on one line that shows exactly `text`, also in a table."""
    return _MARKDOWN_MARKUP.sub(r"\\\1", html.escape(re.sub(r"\s+", " ", text), quote=False))


def escape_markdown_line(text: str) -> str:
    """Return the same for text that begins a line, where it could begin a list."""
    return re.sub(r"^(\d*)([-+.)])(?= |$)", r"\1\\\2", escape_markdown(text).lstrip())


def encode_svg(svg: str) -> str:
    """Return the address of an image that contains the SVG."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def _render(page: Page, template: str, autoescape: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape_markdown, "md_line": escape_markdown_line, "svg_address": encode_svg}
    return environment.get_template(template).render(page=page, tags={"inserted": "ins", "deleted": "del"})
