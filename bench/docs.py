"""Write bench/OPTIONS.md and bench/METRICS.md from the code: `python -m bench.docs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bench.baselines import BASELINE_METRICS
from bench.load import LOAD_METRICS
from bench.tables import SUMMARY_COLUMNS
from edgecloud_sd import config
from edgecloud_sd.config import Option
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.published_metrics import CLIP_METRICS, RUN_METRICS, PublishedMetric
from edgecloud_sd.measure.summary import METRICS, Metric

GENERATED = "<!-- `python -m bench.docs` writes this file. Do not edit it. -->"
OPTIONS_INTRODUCTION = """\
An option marked `list` accepts several values, separated by commas. Several values make a grid, and the suite runs
equivalent cells of the grid once. [configs/default.yaml](configs/default.yaml) has the defaults. A file given with
`--config` overrides the defaults, and the command line overrides both. `pytest --help` also lists `--config`,
`--extra`, `--resume`, `--fail-if` and `--require`, which control the run. The default `none` of an option without a
value of that name means that the option is not set."""
METRICS_INTRODUCTION = """\
N counts generated token ids. A rate over several clips is a ratio of sums. An undefined metric is null in the results
file, which gives the reason."""
COLUMNS_INTRODUCTION = """\
A run prints some of these metrics in the table "captions", times in ms:"""
COLUMNS_NOTES = """\
Below this table, "accepted lengths" gives the share of the verifications that accepted 0, 1, 2 ... draft tokens,
without the numbers that no verification accepted.

The table "where the time goes" has the parts below that are not 0. Beside them, `discarded draft` is the part of
`draft` that went into discarded tokens. `round trip exposed` and `hidden` are columns if the edge drafts ahead.
`sum / wall` is the sum of the parts divided by the time of another clock: the median over clips, and the worst clip.
The table "does it pay?" divides times of a baseline by those of the strategy: above 1, the strategy is faster."""


PUBLISHED_INTRODUCTION = """\
The section `published` of a results file has the metrics of the published project by its own names, nested as in its
files. They are computed by its definitions, for which "theirs" names what cannot be the same. Our metrics above are
defined otherwise: read the acceptance rate there, because the published one counts tokens that nobody verified."""


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table. A vertical bar in a cell is escaped."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options_page() -> str:
    """Return the text of bench/OPTIONS.md."""
    sections = [
        f"## {group.capitalize()}\n\n{_options_table(option for option in config.OPTIONS if option.group == group)}"
        for group in config.GROUPS
    ]
    return "\n\n".join(["# Options", GENERATED, OPTIONS_INTRODUCTION, *sections]) + "\n"


def metrics_page() -> str:
    """Return the text of bench/METRICS.md."""
    parts = markdown_table(("part", "time spent on"), ((f"`{name}`", meaning) for name, meaning in PARTS.items()))
    sections = (
        "# Metrics",
        GENERATED,
        METRICS_INTRODUCTION,
        f"## Captions\n\n{_metrics_table(METRICS)}",
        f"## Columns of the printed tables\n\n{COLUMNS_INTRODUCTION}\n\n{_headings_table()}\n\n{COLUMNS_NOTES}",
        f"## Parts of the latency breakdown\n\nThe parts add up to `total`.\n\n{parts}",
        f"## Load on the service (`bench/test_load.py`)\n\n{_metrics_table(LOAD_METRICS)}",
        f"## Baselines (`bench/test_baselines.py`)\n\n{_metrics_table(BASELINE_METRICS)}",
        f"## Published names\n\n{PUBLISHED_INTRODUCTION}\n\n{_published_table(RUN_METRICS)}",
        f"### Of a clip\n\n{_published_table(CLIP_METRICS)}",
    )
    return "\n\n".join(sections) + "\n"


def _options_table(options: Iterable[Option]) -> str:
    rows = ((f"`--{option.name}`", option.default_text, _list_mark(option), option.meaning) for option in options)
    return markdown_table(("option", "default", "list", "meaning"), rows)


def _list_mark(option: Option) -> str:
    return "yes" if option.many else ""


def _metrics_table(metrics: Mapping[str, Metric]) -> str:
    rows = ((f"`{name}`", metric.unit, metric.better or "", metric.meaning) for name, metric in metrics.items())
    return markdown_table(("metric", "unit", "better", "meaning"), rows)


def _headings_table() -> str:
    rows = ((heading, f"`{metric}`") for heading, (metric, _, _) in SUMMARY_COLUMNS.items())
    return markdown_table(("column", "metric"), rows)


def _published_table(metrics: Mapping[str, PublishedMetric]) -> str:
    rows = (
        (f"`{name}`", metric.unit, metric.definition, f"`{metric.ours}`" if metric.ours else "")
        for name, metric in metrics.items()
    )
    return markdown_table(("metric", "unit", "definition", "our nearest metric"), rows)


PAGES: dict[str, Callable[[], str]] = {"OPTIONS.md": options_page, "METRICS.md": metrics_page}


def main() -> None:
    """Write every generated page into the folder of this module."""
    for name, page in PAGES.items():
        Path(__file__).with_name(name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
