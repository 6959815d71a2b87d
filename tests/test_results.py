"""The results file of two clips, compared with figures counted by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgecloud_sd.acceptance import Rank
from edgecloud_sd.data.dataset import SkippedClip
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Prepared,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.gate import entropy_gate
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import metrics, quality, results
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.results import results_document
from edgecloud_sd.measure.summary import METRICS, ClipResult, Summary, clip_result, summarise
from edgecloud_sd.strategy import Strategy
from tests.support.results import decode, make_clip

Spoil = Callable[[dict[str, Any]], None]


def decode_to_nothing(ids: Sequence[int]) -> str:
    return ""


# 3 rounds: a draft of 2 accepted whole, one of 2 committed locally, one of 2 rejected at once
LONG = Trace(
    (
        (0.10, Prepared(5)),
        (0.25, Opened("edge")),
        (0.50, Opened("cloud")),
        (0.60, Drafted(Draft((2, 3)), passes=(1, 1))),
        (0.60, Escalated(Draft((2, 3)), 1)),
        (0.80, Verified(Draft((2, 3)), Verdict(2, 4))),
        (0.80, Committed((2, 3), "accepted")),
        (0.80, Committed((4,), "bonus")),
        (0.90, Drafted(Draft((5, 6)), passes=(3, 1))),
        (0.90, Committed((5, 6), "local")),
        (1.00, Drafted(Draft((7, 8)), passes=(1, 1))),
        (1.00, Escalated(Draft((7, 8)), 3)),
        (1.50, Verified(Draft((7, 8)), Verdict(0, 0))),
        (1.50, Committed((0,), "correction")),
        (1.60, Finished("length")),
    ),
    (
        *(Span("features", 0.0, 0.1), Span("edge_prefill", 0.1, 0.25), Span("cloud_prefill", 0.25, 0.5)),
        *(Span("draft", 0.5, 0.55), Span("draft", 0.55, 0.6), Span("verify", 0.6, 0.8)),
        *(Span("draft", 0.8, 0.85), Span("draft", 0.85, 0.9)),
        *(Span("draft", 0.9, 0.95), Span("draft", 0.95, 1.0), Span("verify", 1.0, 1.5)),
    ),
)
# 2 rounds: a draft of 1 accepted, then one of 1 committed locally
SHORT = Trace(
    (
        (0.20, Prepared(5)),
        (0.40, Opened("edge")),
        (0.50, Opened("cloud")),
        (0.60, Drafted(Draft((1,)), passes=(1,))),
        (0.60, Escalated(Draft((1,)), 1)),
        (1.00, Verified(Draft((1,)), Verdict(1, 3))),
        (1.00, Committed((1,), "accepted")),
        (1.00, Committed((3,), "bonus")),
        (1.10, Drafted(Draft((8,)), passes=(2,))),
        (1.20, Committed((8,), "local")),
        (1.20, Finished("eos")),
    ),
    (
        *(Span("features", 0.0, 0.2), Span("edge_prefill", 0.2, 0.4), Span("cloud_prefill", 0.4, 0.5)),
        *(Span("draft", 0.5, 0.6), Span("verify", 0.6, 1.0), Span("draft", 1.0, 1.1)),
    ),
)
EDGE = Trace(
    (
        (0.1, Prepared(5)),
        (0.2, Opened("edge")),
        (0.3, Drafted(Draft((2,)))),
        (0.3, Committed((2,), "local")),
        (0.3, Finished("eos")),
    )
)
# the cloud is dead: its one call, beside which the edge drafted ahead, gets no answer
DEAD = Trace(
    (
        (0.1, Prepared(5)),
        (0.2, Opened("edge")),
        (0.3, Drafted(Draft((2,)))),
        (0.3, Escalated(Draft((2,)), 1)),
        (0.4, Ahead((3,), 1)),
        (2.3, Degraded("the cloud failed once")),
        (2.3, Committed((2,), "local")),
        (2.4, Drafted(Draft((3,)), 1)),
        (2.4, Committed((3,), "local")),
        (2.4, Finished("eos")),
    ),
    (Span("uplink", 0.0, 0.0), Span("faults", 0.4, 2.3)),
)
CLOUD = Trace(((0.1, Prepared(5)), (0.2, Opened("cloud")), (0.4, Committed((2,), "cloud")), (0.4, Finished("length"))))

NO_GPU = {"gpu_percent": "no GPU", "gpu_memory_mb": "no GPU"}
USED = Utilization(wall=2.0, cpu=1.0, rss_mean_mb=350.0, rss_peak_mb=400.0, reasons=NO_GPU)
BUSY = Utilization(wall=1.0, cpu=2.0, rss_mean_mb=250.0, rss_peak_mb=300.0, gpu_percent=40.0, gpu_memory_mb=900.0)
EXPERIMENT = {
    "case": "speculative-pocket-H1.5-k2-rank20-zh",
    "pair": "pocket",
    "strategy": Strategy("speculative", entropy_gate(1.5), Rank(20), 2).to_json(),
    "link": "none",
    "cloud_url": None,
    "max_cpu_cores": 2,
    "max_memory_gb": None,
    "clock": "real",
    "profile": None,
    "output": "lossy",
    "language": "chinese",
    "caption_type": "audio_only",
    "prompt_type": "default",
    "max_new_tokens": 6,
}


ENVIRONMENT = (
    "python", "torch", "transformers", "tokenizers", "numpy", "soundfile", "soxr", "edgecloud_sd", "commit", "system",
    "machine", "cpu", "cores", "gpu",
)  # fmt: skip


IN_FORCE = LimitsInForce(cores=(0, 1), torch_threads=1, memory_bytes=None)


@pytest.fixture
def both() -> list[ClipResult]:
    long = clip_result(make_clip("long", "他很高兴又。"), LONG, USED, decode)
    return [long, clip_result(make_clip("short", "她很悲伤", "她很伤"), SHORT, BUSY, decode)]


@pytest.fixture
def document(both: list[ClipResult], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a whole document without importing torch for its version."""
    monkeypatch.setattr(results, "environment", lambda: dict.fromkeys(ENVIRONMENT, "1.0") | {"cores": 2})
    skipped = [SkippedClip("bad", "bad.wav: holds no audio")]
    return results_document(copy.deepcopy(EXPERIMENT), both, *summarise(both, "chinese"), IN_FORCE, skipped)


def summary_of(*traces: Trace, text: metrics.DecodeText = decode) -> Summary:
    return summarise([clip_result(make_clip("a", "他很高兴"), trace, USED, text) for trace in traces], "chinese")[0]


def test_a_clip_result_has_caption_times_and_counts(both: list[ClipResult]) -> None:
    long, short = both
    assert (long.caption, short.caption) == ("他很高兴又。", "她很伤")
    assert (long.ttft, long.e2e, long.otps) == pytest.approx((0.8, 1.5, 5 / 0.7))
    assert (short.ttft, short.e2e, short.otps) == pytest.approx((1.0, 1.2, 2 / 0.2))
    assert (long.counts.tokens, long.counts.rounds, short.counts.tokens, short.counts.rounds) == (6, 3, 3, 2)


def test_times_are_means_over_clips(both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    assert summary.clips == 2
    assert summary.figures["ttft"] == pytest.approx((0.8 + 1.0) / 2)
    assert summary.figures["total"] == pytest.approx((1.6 + 1.2) / 2)


def test_throughput_is_a_ratio_of_sums(both: list[ClipResult]) -> None:
    figures = summarise(both, "chinese")[0].figures
    assert figures["otps"] == pytest.approx((5 + 2) / (0.7 + 0.2))
    assert figures["tpot"] == pytest.approx((0.7 + 0.2) / (5 + 2))
    assert figures["e2e_tps"] == pytest.approx((6 + 3) / (1.5 + 1.2))


def test_gaps_between_visible_tokens_are_means_over_all_gaps(both: list[ClipResult]) -> None:
    figures = summarise(both, "chinese")[0].figures
    assert figures["itl_per_chunk"] == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert figures["itl_per_token"] == pytest.approx((0.1 / 2 + 0.6 / 1 + 0.2 / 1) / 3)


def test_rates_are_ratios_of_sums(both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    assert summary.figures["acceptance_rate"] == pytest.approx((2 + 1) / (4 + 1))
    assert summary.figures["cloud_call_rate"] == pytest.approx((2 + 1) / (3 + 2))
    assert summary.figures["correction_rate"] == pytest.approx((1 + 0) / (2 + 1))
    assert summary.acceptance_by_position == pytest.approx((2 / 3, 1 / 2))


def test_cpu_is_a_ratio_of_sums_and_peak_memory_a_maximum(both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    assert summary.figures["cpu_percent"] == pytest.approx(100 * (1.0 + 2.0) / (2.0 + 1.0))
    assert summary.figures["rss_peak"] == 400
    assert summary.figures["rss_mean"] == 300


def test_gpu_utilisation_is_the_mean_over_measured_clips(both: list[ClipResult]) -> None:
    assert summarise(both, "chinese")[0].figures["gpu_percent"] == 40


def test_quality_comes_from_the_captions_and_references(both: list[ClipResult]) -> None:
    summary, scores = summarise(both, "chinese")
    assert scores == quality.score(["他很高兴又。", "她很伤"], [["他很高兴又。"], ["她很悲伤", "她很伤"]], "chinese")
    assert {name: summary.figures[name] for name in quality.QUALITY_METRICS} == scores.corpus
    assert (summary.tokenizer, summary.empty_captions) == ("characters", 0)


def test_edge_mode_has_no_verification_rates_but_reasons() -> None:
    summary = summary_of(EDGE, EDGE)
    assert (summary.figures["acceptance_rate"], summary.figures["correction_rate"]) == (None, None)
    assert summary.figures["cloud_call_rate"] == 0
    assert summary.acceptance_by_position == ()
    assert summary.reasons["acceptance_rate"] == "no draft with a token was verified"
    assert summary.reasons["correction_rate"] == "no draft was verified"


UNANSWERED = ("acceptance_rate", "mean_acceptance_length", "correction_rate", "useless_escalations", "never_sent",
              "round_trip_exposed", "round_trip_hidden")  # fmt: skip


def test_a_dead_cloud_gives_no_rates_but_reasons() -> None:
    summary = summary_of(DEAD, DEAD)
    assert {name: summary.figures[name] for name in UNANSWERED} == dict.fromkeys(UNANSWERED)
    reasons = {summary.reasons[name] for name in UNANSWERED}
    assert reasons == {"the cloud failed before it had verified a draft"}
    assert (summary.figures["unanswered_calls"], summary.figures["degraded"], summary.figures["waste"]) == (1, 1, 0)
    assert (summary.counts.cloud_calls, summary.counts.unanswered_calls) == (2, 2)


def test_an_unanswered_call_is_in_no_mean_over_answers() -> None:
    alone, beside = summary_of(LONG).figures, summary_of(LONG, DEAD).figures
    rates = ("acceptance_rate", "mean_acceptance_length", "correction_rate", "useless_escalations")
    assert {name: beside[name] for name in rates} == {name: alone[name] for name in rates}
    assert (beside["unanswered_calls"], beside["cloud_call_rate"]) == (0.5, 3 / 5)


def test_cloud_mode_has_no_round_rates_but_reasons() -> None:
    summary = summary_of(CLOUD, CLOUD)
    rates = ("acceptance_rate", "correction_rate", "cloud_call_rate")
    assert [summary.figures[rate] for rate in rates] == [None] * 3
    assert [summary.reasons[rate] for rate in rates] == ["this mode has no rounds"] * 3


def test_captions_of_one_token_have_no_otps() -> None:
    summary = summary_of(EDGE, CLOUD)
    assert summary.figures["otps"] is None
    assert summary.reasons["otps"] == "no caption has a token that became visible after its first text"


def test_captions_of_one_token_are_left_out_of_otps() -> None:
    assert summary_of(EDGE, SHORT, CLOUD).figures["otps"] == pytest.approx(2 / 0.2)


AT_ONCE = Trace(
    (
        (0.5, Prepared(5)),
        (1.0, Drafted(Draft((2, 3)))),
        (1.0, Committed((2, 3), "local")),
        (1.0, Finished("length")),
    )
)


@pytest.mark.parametrize(
    ("trace", "text"), [(AT_ONCE, decode), (LONG, decode_to_nothing)], ids=["at once", "without text"]
)
def test_two_tokens_without_otps_have_a_true_reason(trace: Trace, text: metrics.DecodeText) -> None:
    summary = summary_of(trace, text=text)
    assert summary.figures["otps"] is None
    assert summary.reasons["otps"] == "no caption has a token that became visible after its first text"


def test_empty_captions_are_counted_and_have_no_ttft() -> None:
    summary = summary_of(LONG, SHORT, text=decode_to_nothing)
    assert (summary.figures["ttft"], summary.figures["otps"], summary.empty_captions) == (None, None, 2)
    assert summary.reasons["ttft"] == "every caption is empty"
    assert (summary.figures["bleu1"], summary.figures["bleu4"]) == (0, 0)


def test_a_figure_that_the_machine_cannot_measure_has_a_reason() -> None:
    summary = summary_of(LONG, SHORT)
    assert summary.figures["gpu_percent"] is None
    assert summary.reasons["gpu_percent"] == "no GPU"


def test_every_figure_that_is_none_has_a_reason() -> None:
    for summary in (summary_of(EDGE), summary_of(CLOUD), summary_of(LONG), summary_of(LONG, text=decode_to_nothing)):
        assert list(summary.figures) == list(METRICS)
        missing = {name for name, value in summary.figures.items() if value is None}
        assert missing == set(summary.reasons) & missing


def test_the_document_satisfies_the_schema(document: dict[str, Any]) -> None:
    results.validate_results(document)


@pytest.mark.parametrize("trace", [EDGE, CLOUD, LONG], ids=["edge", "cloud", "speculative"])
@pytest.mark.parametrize("text", [decode, decode_to_nothing])
def test_every_mode_and_an_empty_caption_satisfy_the_schema(
    document: dict[str, Any], tmp_path: Path, trace: Trace, text: metrics.DecodeText
) -> None:
    clips = [clip_result(make_clip("a", "他很高兴"), trace, USED, text)]
    results.write_results(
        tmp_path / "a.json", results_document(EXPERIMENT, clips, *summarise(clips, "chinese"), IN_FORCE, [])
    )


def test_the_document_has_the_figures_of_the_summary(document: dict[str, Any], both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    metrics = document["metrics"]
    assert metrics["figures"] == summary.figures
    assert (metrics["avg_bleu"], metrics["avg_cider"]) == (summary.figures["bleu4"], summary.figures["cider"])
    assert [metrics[f"avg_bertscore_{part}"] for part in ("precision", "recall", "f1")] == [None] * 3
    assert metrics["reasons"]["bertscore_f1"]
    assert document["experiment_config"] == EXPERIMENT
    assert document["skipped_clips"] == [{"file_id": "bad", "reason": "bad.wav: holds no audio"}]


def test_the_breakdown_of_a_cell_is_the_mean_of_its_clips(document: dict[str, Any], both: list[ClipResult]) -> None:
    assert list(document["metrics"]["latency_breakdown"]) == list(PARTS)
    assert sum(document["metrics"]["latency_breakdown"].values()) == pytest.approx((1.6 + 1.2) / 2)
    assert document["metrics"]["latency_breakdown"]["verify"] == pytest.approx((0.2 + 0.5 + 0.4) / 2)
    assert document["metrics"]["figures"]["discarded_draft"] == pytest.approx((0.1 + 0.0) / 2)
    closure = {"median": (1.6 / 2 + 1.2 / 1) / 2, "worst": 1.6 / 2, "unnamed_median": (1 - 1.5 / 2 + 1 - 1.1 / 1) / 2}
    assert document["metrics"]["breakdown_closure"] == pytest.approx(closure)


def test_measurements_of_a_clip_can_be_read_back(document: dict[str, Any], both: list[ClipResult]) -> None:
    saved = json.loads(json.dumps(document["detailed_results"]))
    for result, clip in zip(both, saved, strict=True):
        assert results.measurement_from_json(clip) == (result.trace, result.utilization, result.hindsight)


@pytest.mark.parametrize(
    ("name", "mean", "minimum", "maximum"),
    [
        ("ttft", 0.9, 0.8, 1.0),
        ("otps", (5 / 0.7 + 10) / 2, 5 / 0.7, 10),
        ("total_time", 1.4, 1.2, 1.6),
        ("cpu_percent", 125, 50, 200),
        ("ram_mb", 300, 250, 350),
        ("ram_peak_mb", 350, 300, 400),
        ("gpu_util", 40, 40, 40),
        ("gpu_memory_mb", 900, 900, 900),
        ("output_tokens", 4.5, 3, 6),
        ("features", 0.15, 0.1, 0.2),
        ("edge_prefill", 0.175, 0.15, 0.2),
        ("cloud_prefill", 0.175, 0.1, 0.25),
    ],
)
def test_latency_metrics_have_mean_minimum_and_maximum(
    document: dict[str, Any], name: str, mean: float, minimum: float, maximum: float
) -> None:
    values = [document["metrics"]["latency_metrics"][f"{name}_{kind}"] for kind in ("mean", "min", "max")]
    assert values == pytest.approx([mean, minimum, maximum])


def test_speculative_metrics_are_sums_over_clips(document: dict[str, Any]) -> None:
    counts = document["metrics"]["speculative_decoding_metrics"]
    assert counts.pop("acceptance_by_position") == pytest.approx([2 / 3, 1 / 2])
    assert counts.pop("accepted_lengths") == [1, 1, 1]
    assert counts == pytest.approx(
        {
            "tokens": 9,
            "local": 3,
            "accepted": 3,
            "correction": 1,
            "bonus": 2,
            "cloud": 0,
            "rounds": 5,
            "cloud_calls": 3,
            "unanswered_calls": 0,
            "drafted": 8,
            "verified": 5,
            "ahead": 0,
            "ahead_wasted": 0,
            "retracted": 0,
            "edge_passes": 8,
            "cloud_positions": 10,
            "discarded": 2,
        }
    )


def test_the_document_has_the_details_of_every_clip(document: dict[str, Any], both: list[ClipResult]) -> None:
    long, short = document["detailed_results"]
    assert (long["file_id"], long["generated_text"], long["token_ids"]) == ("long", "他很高兴又。", [2, 3, 4, 5, 6, 0])
    assert short["reference_captions"] == ["她很悲伤", "她很伤"]
    assert (long["finish_reason"], short["finish_reason"]) == ("length", "eos")
    assert (long["ttft"], long["otps"], long["total_time"]) == pytest.approx((0.8, 5 / 0.7, 1.6))
    assert (long["cpu_percent"], long["gpu_util"], short["gpu_util"]) == (50, None, 40)
    _, scores = summarise(both, "chinese")
    assert [long["bleu_score"], short["bleu_score"]] == list(scores.per_clip["bleu4"])


def test_the_environment_names_versions_and_no_host_or_path() -> None:
    environment = results.environment()
    assert set(environment) == set(ENVIRONMENT)
    assert environment["python"] == platform.python_version()
    assert not any(str(value).startswith(os.sep) for value in environment.values())


def test_the_environment_has_the_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    assert results.environment()["commit"] == head[:12]


def test_without_a_repository_or_git_the_commit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert results.checkout_commit(tmp_path / "installed") is None
    (tmp_path / "damaged" / ".git").mkdir(parents=True)
    assert results.checkout_commit(tmp_path / "damaged") is None
    (tmp_path / "without git" / ".git").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.checkout_commit(tmp_path / "without git") is None


def test_a_written_document_can_be_read_back(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    results.write_results(path, document)
    assert results.read_results(path) == document
    assert "他很高兴" in path.read_text(encoding="utf-8")


def without_its_metrics(document: dict[str, Any]) -> None:
    del document["metrics"]


def with_a_field_of_another_version(document: dict[str, Any]) -> None:
    document["schema_version"] = 1


def with_an_unknown_field(document: dict[str, Any]) -> None:
    document["host"] = "mine"


def with_an_unknown_mode(document: dict[str, Any]) -> None:
    document["experiment_config"]["strategy"]["mode"] = "fast"


def with_a_rate_above_one(document: dict[str, Any]) -> None:
    document["metrics"]["figures"]["acceptance_rate"] = 1.5


def with_a_time_below_zero(document: dict[str, Any]) -> None:
    document["metrics"]["latency_metrics"]["ttft_mean"] = -0.1


def with_a_clip_without_tokens(document: dict[str, Any]) -> None:
    document["detailed_results"][0]["token_ids"] = []


def with_no_clip(document: dict[str, Any]) -> None:
    document["detailed_results"] = []


def with_a_reason_that_is_no_text(document: dict[str, Any]) -> None:
    document["metrics"]["reasons"]["cider"] = None


BREAKS = [
    without_its_metrics,
    with_a_field_of_another_version,
    with_an_unknown_field,
    with_an_unknown_mode,
    with_a_rate_above_one,
    with_a_time_below_zero,
    with_a_clip_without_tokens,
    with_no_clip,
    with_a_reason_that_is_no_text,
]


@pytest.mark.parametrize("spoil", BREAKS)
def test_an_invalid_document_is_refused_and_the_old_file_remains(
    document: dict[str, Any], tmp_path: Path, spoil: Spoil
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    spoil(document)
    with pytest.raises(ValueError, match=r"^[\w/ ]+: "):
        results.write_results(path, document)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_lacks_is_refused_and_the_old_file_remains(
    document: dict[str, Any], tmp_path: Path, number: float
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    document["detailed_results"][0]["ttft"] = number
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(path, document)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_nan_from_a_clip_is_refused(document: dict[str, Any], both: list[ClipResult], tmp_path: Path) -> None:
    long, short = both
    bad = [replace(long, utilization=replace(USED, cpu=math.nan)), short]
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(
            tmp_path / "a.json", results_document(EXPERIMENT, bad, *summarise(bad, "chinese"), IN_FORCE, [])
        )
    assert os.listdir(tmp_path) == []


def test_reading_an_invalid_file_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    del document["environment"]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="top level: 'environment' is a required property"):
        results.read_results(path)


def test_reading_a_file_with_nan_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document["metrics"]["avg_cider"] = math.nan
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        results.read_results(path)


def test_the_schema_is_valid_and_names_every_metric_and_part() -> None:
    schema = json.loads(results.SCHEMA_FILE.read_text(encoding="utf-8"))
    figures = schema["properties"]["metrics"]["properties"]["figures"]
    assert list(figures["properties"]) == figures["required"] == list(METRICS)
    assert schema["$defs"]["latency_breakdown"]["required"] == list(PARTS)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == results.SCHEMA_VERSION
