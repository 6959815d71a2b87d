"""Write a report of saved benchmarks: one HTML file that needs no other file, and the same text as Markdown.

The report of one file shows a summary, the latency breakdown, latency against quality, acceptance by position,
speed-ups, forecasts, and the captions side by side. The report of two files, A before and B after, shows how much
faster B is and whether its captions are as good. Its 95% intervals are over the clips that both files have.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.report.comparison_page import build_comparison_page, check_machines
from bench.report.page import Page
from bench.report.render import to_html, to_markdown
from bench.report.run_page import build_run_page
from bench.report.runs import read_run
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.measure import quality


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for, or exit with one line that says why not."""
    options = create_parser().parse_args(arguments)
    with errors_to_exit():
        page = build_page(options)
        texts = {options.output: to_html(page), options.output.with_suffix(".md"): to_markdown(page)}
        for path, text in texts.items():
            write_whole(path, text)
        for path in texts:
            print(f"wrote {path}")


def build_page(options: argparse.Namespace) -> Page:
    """Return the page that the command line asks for. Raise UnusableFile for a file that cannot be reported."""
    before = read_run(options.before)
    if options.after is None:
        return build_run_page(before, options.quality, options.clips)
    after = read_run(options.after)
    if not options.different_machines:
        check_machines(before, after)
    return build_comparison_page(before, after, options.quality, options.clips)


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs = parser.add_argument_group("input")
    inputs.add_argument(
        "before",
        metavar="A.json",
        type=Path,
        help="a file that pytest wrote with --benchmark-save (.benchmarks/*/0001_name.json) or --benchmark-json, or "
        "the results file of one cell",
    )
    inputs.add_argument("after", metavar="B.json", type=Path, nargs="?", help="a second file, to compare with A")
    inputs.add_argument(
        "--different-machines",
        action="store_true",
        help="compare two files although they were timed on different machines",
    )
    content = parser.add_argument_group("content")
    content.add_argument(
        "--quality",
        choices=quality.QUALITY_METRICS,
        default="bleu4",
        help="the quality metric that is compared with latency (default: %(default)s)",
    )
    content.add_argument(
        "--clips",
        metavar="N",
        type=_parse_count,
        default=20,
        help="show the captions of at most N clips (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="FILE.html",
        type=_parse_html_path,
        default=Path("results/report.html"),
        help="the HTML file to write; the Markdown file FILE.md is written beside it (default: %(default)s)",
    )
    return parser


def _parse_html_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .html; give the name of an HTML file")
    return path


def _parse_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    main()
