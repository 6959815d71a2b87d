"""Results files of recorded runs: valid, marked, scored anew, and null with a reason where nothing was recorded."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import comparison
from bench.report.__main__ import main as report
from bench.report.runs import read_run
from edgecloud_sd.data.published import read_recorded_runs
from edgecloud_sd.forecast.recorded import forecast_from_results
from edgecloud_sd.measure import imported, meteor, quality, results
from edgecloud_sd.measure.summary import METRICS
from edgecloud_sd.timing.profile import load_profile
from tests.support.recorded import CLIPS, RECORDED_LINES, write_lines, write_published

Document = dict[str, Any]


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave METEOR out, because Java takes a second to start."""

    def refuse(language: str) -> meteor.Meteor:
        raise meteor.MeteorUnavailable("no Java")

    monkeypatch.setattr(meteor, "get_meteor", refuse)


def import_one(path: Path) -> Document:
    (run,) = read_recorded_runs(path)
    return imported.recorded_document(run)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Document]:
    """Return the documents of the recorded lines by mode, read back from their files."""
    written = imported.import_files([write_lines(tmp_path / "zh.jsonl", RECORDED_LINES)], tmp_path / "out")
    documents = [results.read_results(path) for path, _ in written]
    return {document["experiment_config"]["strategy"]["mode"]: document for document in documents}


@pytest.mark.parametrize("generation", CLIPS)
def test_every_generation_gives_a_valid_file_with_a_reason_for_each_null(tmp_path: Path, generation: str) -> None:
    document = import_one(write_published(tmp_path / "edge.json", generation))
    results.validate_results(json.loads(json.dumps(document, allow_nan=False)))
    assert document["origin"]["recorded"] == "elsewhere"
    figures, reasons = document["metrics"]["figures"], document["metrics"]["reasons"]
    assert list(figures) == list(METRICS)
    assert {name for name, value in figures.items() if value is None} <= reasons.keys()
    (clip,) = document["detailed_results"]
    uses = ("cpu_percent", "ram_mb", "ram_peak_mb", "gpu_util", "gpu_memory_mb")
    assert len(clip["not_measured"]) == [clip[name] for name in uses].count(None)


def test_no_rate_of_a_file_becomes_a_metric_and_none_is_lost(tmp_path: Path) -> None:
    document = import_one(write_published(tmp_path / "hybrid.json", "counts"))
    figures = document["metrics"]["figures"]
    unknown = ("acceptance_rate", "mean_acceptance_length", "cloud_call_rate", "local_share", "covered_share", "waste")
    assert [figures[name] for name in unknown] == [None] * 6
    assert (figures["correction_rate"], figures["useless_escalations"]) == (0.5, 0.5)
    assert figures["cloud_calls_per_token"] == 2 / 15
    assert document["origin"]["metrics"] == {"metrics": {"avg_bleu": 0.5, "avg_acceptance_rate": 1.0}}
    assert document["detailed_results"][0]["recorded"] == CLIPS["counts"]
    counts = document["metrics"]["speculative_decoding_metrics"]
    assert {name: value for name, value in counts.items() if value is not None} == {
        "tokens": 15, "drafted": 17, "cloud_calls": 2, "correction": 1,
    }  # fmt: skip


def test_settings_that_the_file_names_are_kept_and_the_others_are_null(tmp_path: Path) -> None:
    experiment = import_one(write_published(tmp_path / "hybrid.json", "counts"))["experiment_config"]
    assert experiment["strategy"] == {
        "mode": "speculative", "gate": "entropy", "threshold": 4.0, "send_above": None, "opinion_risk": None,
        "rule": None, "k": 5, "draft_stop": None, "draft_ahead": None, "prefill": None,
        "revise": None, "look_back": None, "drafter": None,
    }  # fmt: skip
    assert (experiment["max_cpu_cores"], experiment["max_memory_gb"]) == (2, 16.0)
    assert (experiment["pair"], experiment["link"], experiment["profile"], experiment["output"]) == (None,) * 4
    older = import_one(write_published(tmp_path / "sc.json", "rounds"))["experiment_config"]
    assert (older["strategy"]["gate"], older["strategy"]["k"], older["max_new_tokens"]) == (None, 7, 100)


def test_times_are_ratios_of_sums_and_say_where_they_are_approximate(runs: dict[str, Document]) -> None:
    metrics = runs["edge"]["metrics"]
    assert (metrics["figures"]["tpot"], metrics["figures"]["otps"]) == (1 / 8, 8)
    assert metrics["figures"]["e2e_tps"] == 9 / 2
    assert metrics["reasons"]["tpot"].startswith("measured in part: the file has the end of the request")
    assert metrics["reasons"]["gpu_percent"] == "the file does not record it"


def test_only_a_side_that_decodes_alone_has_tokens_after_the_first(runs: dict[str, Document]) -> None:
    after = {mode: document["detailed_results"][0]["after_first_chunk"] for mode, document in runs.items()}
    assert after == {"edge": [8, 1.0], "cloud": [8, 0.5], "speculative": None}


def test_captions_are_scored_anew(runs: dict[str, Document]) -> None:
    scores = quality.score(["他悲伤"] * 2, [["他很悲伤"]] * 2, "chinese").corpus
    figures = runs["speculative"]["metrics"]["figures"]
    assert {name: figures[name] for name in scores} == scores
    assert runs["cloud"]["metrics"]["figures"]["bleu1"] == 1
    assert runs["cloud"]["experiment_config"]["language"] == "chinese"
    assert "language" in runs["cloud"]["origin"]["not_recorded"]


def test_an_edge_under_other_limits_is_no_baseline_of_a_limited_hybrid(tmp_path: Path) -> None:
    limited = write_published(tmp_path / "hybrid.json", "counts")
    free = write_published(tmp_path / "edge.json", "streamed")
    cloud = write_published(tmp_path / "cloud.json", "streamed")
    (_, hybrid), *others = imported.import_files([limited, free, cloud], tmp_path / "out")
    documents = [document for _, document in others]
    assert comparison.find_baseline(hybrid, "edge", documents) is None
    assert comparison.find_baseline(hybrid, "cloud", documents) is documents[1]
    same = documents[0]["experiment_config"] | {"max_cpu_cores": 2, "max_memory_gb": 16.0}
    twin = documents[0] | {"experiment_config": same}
    assert comparison.find_baseline(hybrid, "edge", [*documents, twin]) is twin


def test_the_baseline_of_several_is_the_one_with_the_most_common_clips(runs: dict[str, Document]) -> None:
    edge = runs["edge"]
    short = edge | {"detailed_results": edge["detailed_results"][:1]}
    assert comparison.find_baseline(runs["speculative"], "edge", [short, edge, copy.deepcopy(edge)]) is edge


def test_the_normalisation_before_scoring_can_be_chosen(tmp_path: Path) -> None:
    line = RECORDED_LINES[0] | {"reference": "\u5979\uff0c\u4ed6", "caption": "\u5979,\u4ed6"}  # a wide comma
    source, scores = write_lines(tmp_path / "zh.jsonl", [line]), {}
    for name in ("none", "nfc"):
        imported.main([str(source), "--output-dir", str(tmp_path / name), "--score-normalisation", name])
        metrics = results.read_results(tmp_path / name / "zh-edge.json")["metrics"]
        scores[metrics["score_normalisation"]] = metrics["figures"]["bleu1"]
    assert scores == {"none": pytest.approx(2 / 3), "nfc": 1.0}


def test_imported_runs_are_compared_clip_by_clip(runs: dict[str, Document]) -> None:
    assert len(comparison.pair_clips(runs["edge"], runs["speculative"])) == 2
    assert comparison.find_baseline(runs["speculative"], "edge", runs.values()) is runs["edge"]
    speedup = comparison.caption_speedup(runs["edge"], runs["speculative"])
    assert speedup is not None
    assert speedup.value == 2 / 3


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["latency", "counts"])
def test_an_imported_run_has_a_report(tmp_path: Path, generation: str) -> None:
    source = write_published(tmp_path / "edge_zh.json", generation)
    ((path, _),) = imported.import_files([source], tmp_path / "out")
    report([str(path), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| recorded-edge\\_zh | " in text
    assert "GPU | none" not in text


def test_the_report_of_an_imported_hybrid_forecasts_it_from_its_counts(tmp_path: Path) -> None:
    source = write_published(tmp_path / "hybrid.json", "counts")
    ((path, document),) = imported.import_files([source], tmp_path / "out")
    answer = read_run(path).forecasts["recorded-hybrid"]
    assert answer["forecast"] == asdict(forecast_from_results(document, load_profile("published-as-run")))
    assert answer["sentence"].startswith(
        "With the costs of the profile published-as-run, from the counts of the file: "
    )
    sources = [write_published(tmp_path / "sc.json", "rounds"), write_published(tmp_path / "edge.json", "streamed")]
    older, edge = [read_run(path).forecasts for path, _ in imported.import_files(sources, tmp_path / "out")]
    assert edge == {}
    assert older["recorded-sc"]["sentence"].startswith("no forecast: the file does not have the count drafted and ")


def test_a_file_that_this_package_measured_may_lack_nothing(runs: dict[str, Document]) -> None:
    document = copy.deepcopy(runs["edge"])
    del document["origin"]
    with pytest.raises(ValueError, match="None is not of type"):
        results.validate_results(document)


def test_files_with_equal_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_published(tmp_path / folder / "edge.json", "streamed")
    with pytest.raises(SystemExit, match=r"two/edge\.json: its run edge has the name of one from another file"):
        imported.main([*map(str, tmp_path.glob("*/edge.json")), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["edge.json", "in/edge.json"])
def test_the_command_overwrites_imported_runs_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    source, path = write_published(tmp_path / name, "streamed"), tmp_path / "edge.json"
    if source != path:
        path.write_text('{"experiment_config": {}}', encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"edge\.json: would be overwritten, and is no imported run"):
        imported.main([str(source), "--output-dir", str(tmp_path)])
    assert path.read_bytes() == before
    for _ in range(2):
        imported.main([str(source), "--output-dir", str(tmp_path / "out")])


def test_the_command_writes_a_file_for_each_run_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [CLIPS["streamed"], CLIPS["streamed"] | {"file_id": "b", "success": False}]
    path = write_published(tmp_path / "edge.json", "streamed", clips)
    imported.main([str(path), "--output-dir", str(tmp_path / "out")])
    assert os.listdir(tmp_path / "out") == ["edge.json"]
    assert capsys.readouterr().out == f"1 clips in {tmp_path / 'out' / 'edge.json'}, 1 skipped\n"
    with pytest.raises(SystemExit, match=r"^error: .*No such file"):
        imported.main([str(tmp_path / "missing.json")])


def test_references_in_no_known_script_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [RECORDED_LINES[0] | {"reference": "123"}])
    with pytest.raises(SystemExit, match=r"^error: x\.jsonl: the texts are in none of chinese, english"):
        imported.main([str(path), "--output-dir", str(tmp_path / "out")])
