"""A row a metric in pytest-benchmark's JSON, so that `pytest-benchmark compare` shows them like any other.

A row is called `<benchmark>:<figure>`, and its group says unit and direction: `ttft (s, lower is better)`. Its min, max
and mean are in that unit. pytest-benchmark marks the lowest as the best everywhere but in its OPS column, so where
higher is better that column repeats the value: compare such rows with `--columns ops` or `--between ops`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pytest_benchmark.stats import Stats

from bench import baselines, load
from edgecloud_sd.measure.summary import METRICS, Metric

PER_CLIP_METRICS = {
    "ttft": "ttft",
    "e2e": "e2e",
}  # figures that are means over clips -> what the results file calls a clip's


def metric_rows(benchmark: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows beside one benchmark of the JSON, of captions, a load or peers; none for a figure that is null.

    `total` has none: it is the benchmark's own row.
    """
    for kind, known in (("load", load.LOAD_METRICS), ("peers", baselines.BASELINE_METRICS)):
        found = benchmark["extra_info"].get(kind)
        if found is not None:
            return [_row(benchmark, name, known[name], value) for name, value in found["figures"].items()]
    found = benchmark["extra_info"].get("results")
    if found is None:
        return []
    figures = found["metrics"]["figures"]
    return [
        _row(benchmark, name, figure, figures[name], found["detailed_results"])
        for name, figure in METRICS.items()
        if name != "total" and figures[name] is not None
    ]


def row_metric(name: str) -> str | None:
    """The figure that a row of this name is about, as written or as shown; None for a benchmark's own row."""
    found = re.search(r"\]:(\w+)( \(|$)", name)
    return found[1] if found else None


def _row(
    benchmark: dict[str, Any], name: str, figure: Metric, value: float, clips: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    series = PER_CLIP_METRICS.get(name) if clips else None
    values = [clip[series] for clip in clips if clip[series] is not None] if series else [value]
    stats = Stats()
    for each in values:
        stats.update(each)
    direction = f"{figure.better} is better" if figure.better else "neither direction is better"
    shown = stats.as_dict() | {"iterations": 1}
    if figure.better == "higher":
        shown["ops"] = value
    return {
        "group": f"{name} ({figure.unit}, {direction})",
        "name": f"{benchmark['name']}:{name}",
        "fullname": f"{benchmark['fullname']}:{name}",
        "params": benchmark["params"],
        "param": benchmark["param"],
        "extra_info": {"meaning": figure.meaning},
        "options": benchmark["options"],
        "stats": shown,
    }
