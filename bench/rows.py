"""One row per metric in pytest-benchmark's JSON, so that `pytest-benchmark compare` shows metrics like any benchmark.

A row is called `<benchmark>:<metric>`, and its group gives unit and direction: `ttft (s, lower is better)`. Its min,
max and mean are in that unit. pytest-benchmark marks the lowest value as the best, except in its OPS column.
If higher is better, the OPS column repeats the value: compare such rows with `--columns ops` or `--between ops`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pytest_benchmark.stats import Stats

from bench import baselines, load
from edgecloud_sd.measure.summary import METRICS, Metric

PER_CLIP_METRICS = ("ttft", "ttft_final", "e2e")  # means over clips, and also keys in the record of a clip


def metric_rows(benchmark: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metric rows of one benchmark of captions, a load or baselines, without metrics that are null.

    `total` has no metric row, because it is the benchmark's own row.
    """
    for kind, known_metrics in (("load", load.LOAD_METRICS), ("baselines", baselines.BASELINE_METRICS)):
        measured = benchmark["extra_info"].get(kind)
        if measured is not None:
            return [_row(benchmark, name, known_metrics[name], value) for name, value in measured["figures"].items()]
    results = benchmark["extra_info"].get("results")
    if results is None:
        return []
    values = results["metrics"]["figures"]
    return [
        _row(benchmark, name, metric, values[name], results["detailed_results"])
        for name, metric in METRICS.items()
        if name != "total" and values[name] is not None
    ]


def row_metric(name: str) -> str | None:
    """Return the metric of a row by the row's name, as written or as shown; None for a benchmark's own row."""
    match = re.search(r"\]:(\w+)( \(|$)", name)
    return match[1] if match else None


def _row(
    benchmark: dict[str, Any], name: str, metric: Metric, value: float, clips: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    per_clip = [clip[name] for clip in clips if clip[name] is not None] if name in PER_CLIP_METRICS else []
    stats = Stats()
    for sample in per_clip or [value]:
        stats.update(sample)
    direction = f"{metric.better} is better" if metric.better else "neither direction is better"
    columns = stats.as_dict() | {"iterations": 1}
    if metric.better == "higher":
        columns["ops"] = value
    return {
        "group": f"{name} ({metric.unit}, {direction})",
        "name": f"{benchmark['name']}:{name}",
        "fullname": f"{benchmark['fullname']}:{name}",
        "params": benchmark["params"],
        "param": benchmark["param"],
        "extra_info": {"meaning": metric.meaning},
        "options": benchmark["options"],
        "stats": columns,
    }
