"""Recorded runs of other software: each generation of keys, and the errors of files that cannot be read."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.data import published
from edgecloud_sd.data.dataset import BadClip, SkippedClip
from edgecloud_sd.data.published import RecordedRun, read_recorded_runs
from tests.support.recorded import CLIPS, CONFIGS, RECORDED_LINES, write_lines, write_published

COUNTS = ("tokens", "prompt_tokens", "rounds", "cloud_calls", "drafted", "corrections")


def read_one(path: Path) -> RecordedRun:
    (run,) = read_recorded_runs(path)
    return run


@pytest.mark.parametrize(
    ("generation", "name", "mode", "times", "counts"),
    [
        ("baseline", "edge_only", "edge", (1.5, None, None), (20, None, None, None, None, None)),
        ("latency", "cloud_zh", "cloud", (2.0, None, None), (None,) * 6),
        ("at once", "edge_en", "edge", (2.5, None, 2.25), (8, 165, None, None, None, None)),
        ("evaluated", "cloud_optimized", "cloud", (2.5, 0.5, 2.25), (8, 165, None, None, None, None)),
        ("streamed", "cloud_zh", "cloud", (2.5, 0.5, 2.25), (8, 165, None, None, None, None)),
        ("rounds", "sc_zh", "speculative", (14.5, None, 14.25), (22, None, 5, None, None, None)),
        ("counts", "hybrid", "speculative", (24.5, 20.0, 24.25), (15, 821, None, 2, 17, 1)),
    ],
)
def test_each_generation_of_keys_gives_times_and_counts(
    tmp_path: Path, generation: str, name: str, mode: str, times: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    run = read_one(write_published(tmp_path / f"{name}.json", generation))
    clip = run.clips[0]
    assert (run.file, run.name, run.mode) == (f"{name}.json", name, mode)
    assert (clip.file_id, clip.reference, clip.caption) == ("a", "他很悲伤", "悲伤，低沉。")
    assert (clip.total, clip.ttft, clip.output_end) == times
    assert tuple(getattr(clip, field) for field in COUNTS) == counts
    assert clip.record.keys() == CLIPS[generation].keys()
    assert "/home" not in str(clip.record)


def test_memory_and_cpu_are_read_only_where_the_keys_name_the_aggregation(tmp_path: Path) -> None:
    monitored = read_one(write_published(tmp_path / "hybrid.json", "counts")).clips[0]
    assert (monitored.cpu_percent, monitored.rss_mean_mb, monitored.rss_peak_mb) == (190.0, 2147.483648, 3221.225472)
    sampled = read_one(write_published(tmp_path / "cloud.json", "streamed")).clips[0]
    assert (sampled.cpu_percent, sampled.rss_mean_mb, sampled.rss_peak_mb) == (None, None, None)


def test_settings_are_found_at_every_level_and_keep_no_folder(tmp_path: Path) -> None:
    run = read_one(write_published(tmp_path / "hybrid.json", "counts"))
    assert (run.setting("entropy_threshold"), run.setting("k"), run.setting("max_cpu_cores")) == (4.0, 5, 2)
    assert run.setting("missing") is None
    assert run.settings["dataset_path"] == "manifest.json"
    assert CONFIGS["counts"]["dataset_path"] == "/home/someone/manifest.json"


def test_a_file_with_a_caption_a_line_gives_a_run_for_each_mode(tmp_path: Path) -> None:
    runs = read_recorded_runs(write_lines(tmp_path / "zh.JSONL", RECORDED_LINES))
    assert [(run.name, run.mode, len(run.clips)) for run in runs] == [
        ("zh-edge", "edge", 2),
        ("zh-cloud", "cloud", 2),
        ("zh-speculative", "speculative", 2),
    ]
    hybrid = runs[2].clips[0]
    assert (hybrid.total, hybrid.ttft, hybrid.tokens) == (3.0, 1.0, 9)
    assert (hybrid.cloud_calls, hybrid.drafted, hybrid.corrections) == (2, 12, 1)


def test_not_a_number_is_null_and_a_failed_caption_is_skipped(tmp_path: Path) -> None:
    clips = [
        CLIPS["streamed"] | {"bertscore_recall": float("nan")},
        CLIPS["streamed"] | {"file_id": "b", "success": False, "error": "no audio"},
        CLIPS["streamed"] | {"file_id": "c", "reference_caption": "\u200b"},
    ]
    run = read_one(write_published(tmp_path / "edge.json", "streamed", clips))
    assert run.clips[0].record["bertscore_recall"] is None
    assert run.skipped == [
        SkippedClip("b", "the file says that it failed (no audio)"),
        SkippedClip("c", "the file has no reference with visible text for it"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emotion": 1}, "caption 1: has the key 'emotion', and no known generation of published files has it; "),
        ({"latency_metrics": {"tpot": 1}}, "caption 1: has the key 'latency_metrics.tpot', and no known "),
        ({"latency_metrics": []}, ", caption 1, latency_metrics: must be an object, not list"),
        ({"latency_metrics": {"total_time": -1}}, ", a, latency_metrics.total_time: must be a number of at least 0"),
        ({"latency_metrics": {"total_time": "2 s"}}, ", a, latency_metrics.total_time: must be a number of at least 0"),
        ({"latency_metrics": {"output_tokens": 1.5}}, "output_tokens: must be a whole number, not 1.5"),
        ({"latency_metrics": {"cloud_calls": 1, "total_corrections": 2}}, ", a: has 2 corrections and 1 cloud calls;"),
        ({"generated_text": None}, ", a: must have a text under generated_text or prediction or caption, not None"),
        ({"file_id": ""}, ", caption 1, file_id: must be an id that no other caption has, not ''"),
    ],
)
def test_a_bad_caption_is_refused_with_its_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_published(tmp_path / "edge.json", "streamed", [CLIPS["streamed"] | change])
    with pytest.raises(BadClip, match=re.escape(message)) as error:
        read_recorded_runs(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], ": must be an object, not list"),
        ({"runs": []}, ": has the key 'runs', and no known generation "),
        (
            {"experiment_config": [], "detailed_results": []},
            ", experiment_config: must be an object, not list",
        ),
        ({"detailed_results": 3}, ", detailed_results: must be the list of captions, not int"),
        ({"detailed_results": []}, ": contains no caption with a reference"),
        ({"detailed_results": [3]}, ", caption 1: must be an object, not int"),
        (
            {"detailed_results": [{"file_id": "a", "reference": "他", "generated_text": "她"}]},
            ", caption 1: has no key that tells a known generation (",
        ),
        (
            {"detailed_results": [CLIPS["streamed"]] * 2},
            ", caption 2, file_id: must be an id that no other caption has, not 'a'",
        ),
        (
            {"experiment_config": {"language": "dutch"}, "detailed_results": [CLIPS["streamed"]]},
            ", language: must be one of chinese, english, not 'dutch'",
        ),
    ],
)
def test_a_file_of_no_known_generation_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "edge.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadClip, match=re.escape(f"{path}{message}")):
        read_recorded_runs(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": contains no caption"),
        ("{", ", line 1: is not JSON"),
        ('\n{"mode": "edge", "mode": "cloud"}', ", line 2: names the key 'mode' twice; remove one"),
        ('{"file_id": "a"}', ", line 1, mode: must be one of edge, cloud, speculative, not None"),
        ('{"mode": "both"}', ", line 1, mode: must be one of edge, cloud, speculative, not 'both'"),
        ("[1]", ", line 1, mode: must be one of edge, cloud, speculative, not None"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadClip, match=re.escape(f"{path}{message}")):
        read_recorded_runs(path)


def test_the_module_names_the_command_that_imports() -> None:
    with pytest.raises(SystemExit, match=r"run python -m edgecloud_sd\.measure\.imported FILE"):
        runpy.run_path(published.__file__, run_name="__main__")


def test_a_file_that_does_not_say_its_mode_needs_the_option(tmp_path: Path) -> None:
    path = write_published(tmp_path / "test7.json", "streamed")
    with pytest.raises(BadClip, match="does not say which mode it is of; give --mode edge or cloud or speculative"):
        read_recorded_runs(path)
    assert [run.mode for run in read_recorded_runs(path, "cloud")] == ["cloud"]
    named = write_published(tmp_path / "edge_test7.json", "streamed")
    with pytest.raises(BadClip, match="is of mode edge; leave out --mode cloud"):
        read_recorded_runs(named, "cloud")
    lines = write_lines(tmp_path / "zh.jsonl", RECORDED_LINES)
    with pytest.raises(BadClip, match="names the mode of every caption; leave out --mode edge"):
        read_recorded_runs(lines, "edge")
