"""Quality against costs of many ways to decode, on clips that the pair has not seen: one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.cases import dataset_name
from bench.decode_ways import VirtualBench, decode_all
from bench.gaps import ParetoPoint, compare_ways
from bench.held_out import iterate_held_out
from bench.report.pareto_page import build_pareto_page, list_points
from bench.report.render import to_html
from bench.ways import list_ways
from edgecloud_sd.config import Settings
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy


def run_pareto(
    pipeline: Pipeline, settings: Settings, count: int, output: Path, given: Sequence[Strategy] = ()
) -> list[Path]:
    """Decode up to `count` clips a language in every way, print the table, and write the files. Return their paths."""
    bench = VirtualBench.of(pipeline, settings)
    clips = {language: list(iterate_held_out(pipeline, settings, language, count)) for language in settings.language}
    points = {}
    for language, language_clips in clips.items():
        traces = decode_all(bench, language_clips, list_ways(given))
        points[language] = compare_ways(language_clips, traces, pipeline.text, settings.score_normalisation)
    table = list_points(points)
    print(tabulate(table.rows, [column.heading for column in table.columns], "pipe", disable_numparse=True))
    run = describe_tuning(settings, {language: len(language_clips) for language, language_clips in clips.items()})
    texts = {
        output: to_html(build_pareto_page(points, run)),
        output.with_suffix(".json"): json.dumps(run | points_to_json(points), ensure_ascii=False, indent=1),
    }
    for path, text in texts.items():
        write_whole(path, text)
    return list(texts)


def describe_tuning(settings: Settings, clips: Mapping[str, int]) -> dict[str, Any]:
    """Return plain values that say what was run, with the number of clips by language."""
    return {
        "pair": settings.run_pair.name,
        "edge_dtype": settings.edge_dtype,
        "cloud_dtype": settings.cloud_dtype,
        "dataset": dataset_name(settings),
        "clips": dict(clips),
        "profile": settings.profile_name,
        "link": settings.link[0],
    }


def points_to_json(points: Mapping[str, Sequence[ParetoPoint]]) -> dict[str, Any]:
    """Return plain values of all that the table and the picture show."""
    return {
        "ways": [
            {
                "language": language,
                "line": point.way.line,
                "label": point.way.label,
                "mark": point.way.mark or None,
                "strategy": None if point.way.make_gate else point.way.strategy.to_json(),
                "cloud_calls": point.calls,
                "cloud_positions": point.positions,
                "seconds": point.seconds,
                "speedup_over_cloud": point.speedup and asdict(point.speedup),
                "quality": {name: asdict(gap) for name, gap in point.gaps.items()},
            }
            for language, language_points in points.items()
            for point in language_points
        ],
    }
