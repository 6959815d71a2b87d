"""A report of saved benchmarks: one HTML file that needs nothing else, and the same as Markdown.

Of one file: a summary, where the time goes, latency against quality, acceptance by position, speed-ups and the oracle's
answers, and the captions side by side. Of two, A before and B after: how much faster B is and whether it is as good,
with 95% intervals over the clips that both have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import pair, runs, single
from bench.report.cells import ReportOptions
from bench.report.page import Page
from bench.report.render import as_html, as_markdown
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.measure import quality


def main(arguments: Sequence[str] | None = None) -> None:
    options = report_parser().parse_args(arguments)
    try:
        page = make_page(options)
        texts = {options.output: as_html(page), options.output.with_suffix(".md"): as_markdown(page)}
        for path, text in texts.items():
            write_whole(path, text)
    except (runs.Unusable, OSError) as error:
        sys.exit(f"error: {error}")
    for path in texts:
        print(f"wrote {path}")


def make_page(options: argparse.Namespace) -> Page:
    """The page that the command line asks for. Raises Unusable."""
    wanted = ReportOptions(options.quality, options.clips)
    before = runs.read_run(options.before)
    if options.after is None:
        return single.run_page(before, wanted)
    after = runs.read_run(options.after)
    if not options.different_machines:
        pair.check_machines(before, after)
    return pair.comparison_page(before, after, wanted)


def report_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "before",
        metavar="A.json",
        type=Path,
        help="what --benchmark-save or --benchmark-json of pytest wrote (.benchmarks/*/0001_name.json), or the results "
        "file of one cell",
    )
    made.add_argument("after", metavar="B.json", type=Path, nargs="?", help="another such file, to compare A with")
    made.add_argument(
        "--output",
        metavar="FILE.html",
        type=_html,
        default=Path("results/report.html"),
        help="where the report goes; the Markdown goes beside it, as FILE.md (default: %(default)s)",
    )
    made.add_argument(
        "--quality",
        choices=quality.QUALITY_METRICS,
        default=ReportOptions.quality,
        metavar="NAME",
        help="the quality that is set against latency: %(choices)s (default: %(default)s)",
    )
    made.add_argument(
        "--clips",
        metavar="N",
        type=_count,
        default=ReportOptions.clips,
        help="show the captions of so many clips at most (default: %(default)s)",
    )
    made.add_argument(
        "--different-machines",
        action="store_true",
        help="compare two files although they were timed on different machines",
    )
    return made


def _html(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .html")
    return path


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    main()
