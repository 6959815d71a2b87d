"""Write a report of saved benchmarks: one HTML file that needs no other file, and the same text as Markdown.

The report of one file, or of several files joined by clip, shows a summary, the latency breakdown, latency against
quality, acceptance, speed-ups, forecasts, and the captions side by side. The report of two files with a cell in common,
A before and B after, shows how much faster B is and whether its captions are as good. Its 95% intervals are over the
clips that both files have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.regression import RULE_HELP, FailRule, find_regressions, parse_fail_rule
from bench.report.comparison_page import build_comparison_page, check_machines
from bench.report.page import Page
from bench.report.render import to_html, to_markdown
from bench.report.run_page import build_run_page
from bench.report.runs import Run, UnusableFile, join_runs, read_run
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure import quality


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for, or exit with one line that says why not."""
    options = create_parser().parse_args(hyphenate(arguments))
    with errors_to_exit():
        runs = [read_run(path) for path in options.files]
        page = build_page(runs, options)
        texts = {options.output: to_html(page), options.output.with_suffix(".md"): to_markdown(page)}
        for path, text in texts.items():
            write_whole(path, text)
        for path in texts:
            print(f"wrote {path}")
        regressions = [*find_regressions(runs[0].cells, runs[-1].cells, options.fail_if)] if options.fail_if else []
    if regressions:
        sys.exit("\n".join(["--fail-if: the later run is worse, or cannot be checked:", *regressions]))


def build_page(runs: Sequence[Run], options: argparse.Namespace) -> Page:
    """Return the page that the command line asks for. Raise UnusableFile for files that do not go together."""
    if len(runs) == 2 and set(runs[0].cells) & set(runs[1].cells) and not options.join:
        if not options.different_machines:
            check_machines(runs[0], runs[1])
        return build_comparison_page(runs[0], runs[1], options.quality, options.clips)
    if options.fail_if:
        raise UnusableFile("--fail-if compares two files that have a cell in common: an earlier and a later run")
    return build_run_page(join_runs(runs), options.quality, options.clips)


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs = parser.add_argument_group("input")
    inputs.add_argument(
        "files",
        metavar="FILE.json",
        type=Path,
        nargs="+",
        help="a file that pytest wrote with --benchmark-save (.benchmarks/*/0001_name.json) or --benchmark-json, the "
        "results file of one cell, or an imported run; two files with a cell in common are compared, and other files "
        "are joined by clip",
    )
    inputs.add_argument("--join", action="store_true", help="join two files that would be compared")
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
    parser.add_argument_group("check").add_argument(
        "--fail-if", metavar="METRIC:LIMIT", type=_parse_fail_rule, action="append", default=[], help=RULE_HELP
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


def _parse_fail_rule(text: str) -> FailRule:
    try:
        return parse_fail_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
