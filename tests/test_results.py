"""The results file of two clips whose figures are counted by hand."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgecloud_sd.data.dataset import Clip, SkippedClip
from edgecloud_sd.events import (
    Committed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Prepared,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import metrics, quality, results
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.results import results_document
from edgecloud_sd.measure.summary import METRICS, ClipResult, Summary, clip_result, summarise

Spoil = Callable[[dict[str, Any]], None]
CHARACTERS = "。她他很高兴又悲伤"  # token id -> text


def decode(ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids)


def nothing(ids: Sequence[int]) -> str:
    return ""


def clip(name: str, *references: str) -> Clip:
    return Clip(name, Path(f"{name}.wav"), "chinese", references)


# 3 rounds: a draft of 2 accepted whole, one of 2 committed locally, one of 2 rejected at once
LONG = Trace(
    (
        (0.10, Prepared(5)),
        (0.25, Opened("edge")),
        (0.50, Opened("cloud")),
        (0.60, Drafted(Draft((2, 3)))),
        (0.60, Escalated(Draft((2, 3)), 1)),
        (0.80, Verified(Draft((2, 3)), Verdict(2, 4))),
        (0.80, Committed((2, 3), "accepted")),
        (0.80, Committed((4,), "bonus")),
        (0.90, Drafted(Draft((5, 6)))),
        (0.90, Committed((5, 6), "local")),
        (1.00, Drafted(Draft((7, 8)))),
        (1.00, Escalated(Draft((7, 8)), 3)),
        (1.50, Verified(Draft((7, 8)), Verdict(0, 0))),
        (1.50, Committed((0,), "correction")),
        (1.60, Finished("length")),
    )
)
# 2 rounds: a draft of 1 accepted, then one of 1 committed locally
SHORT = Trace(
    (
        (0.20, Prepared(5)),
        (0.40, Opened("edge")),
        (0.50, Opened("cloud")),
        (0.60, Drafted(Draft((1,)))),
        (0.60, Escalated(Draft((1,)), 1)),
        (1.00, Verified(Draft((1,)), Verdict(1, 3))),
        (1.00, Committed((1,), "accepted")),
        (1.00, Committed((3,), "bonus")),
        (1.10, Drafted(Draft((8,)))),
        (1.20, Committed((8,), "local")),
        (1.20, Finished("eos")),
    )
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
CLOUD = Trace(((0.1, Prepared(5)), (0.2, Opened("cloud")), (0.4, Committed((2,), "cloud")), (0.4, Finished("length"))))

NO_GPU = {"gpu_percent": "no GPU", "gpu_memory_mb": "no GPU"}
USED = Utilization(wall=2.0, cpu=1.0, rss_mean_mb=350.0, rss_peak_mb=400.0, reasons=NO_GPU)
BUSY = Utilization(wall=1.0, cpu=2.0, rss_mean_mb=250.0, rss_peak_mb=300.0, gpu_percent=40.0, gpu_memory_mb=900.0)
EXPERIMENT = {
    "case": "speculative-pocket-H1.5-k2-rank20-zh",
    "pair": "pocket",
    "mode": "speculative",
    "gate": "entropy",
    "k": 2,
    "draft_stop": None,
    "draft_ahead": 0,
    "rule": "rank20",
    "link": "none",
    "open": "eager",
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
    "python", "torch", "transformers", "edgecloud_sd", "system", "machine", "cpu", "cores", "gpu",
)  # fmt: skip


HELD = LimitsInForce(cores=(0, 1), torch_threads=1, memory_bytes=None)


@pytest.fixture
def both() -> list[ClipResult]:
    long = clip_result(clip("long", "他很高兴又。"), LONG, USED, decode)
    return [long, clip_result(clip("short", "她很悲伤", "她很伤"), SHORT, BUSY, decode)]


@pytest.fixture
def made(both: list[ClipResult], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The whole document, without waiting for torch to say which version it is."""
    monkeypatch.setattr(results, "environment", lambda: dict.fromkeys(ENVIRONMENT, "1.0"))
    skipped = [SkippedClip("bad", "bad.wav: holds no audio")]
    return results_document(dict(EXPERIMENT), both, *summarise(both, "chinese"), HELD, skipped)


def summary_of(*traces: Trace, text: metrics.DecodeText = decode) -> Summary:
    return summarise([clip_result(clip("a", "他很高兴"), trace, USED, text) for trace in traces], "chinese")[0]


def test_a_clips_result_says_all_of_its_trace(both: list[ClipResult]) -> None:
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


def test_cpu_is_a_ratio_of_sums_and_memory_the_highest(both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    assert summary.figures["cpu_percent"] == pytest.approx(100 * (1.0 + 2.0) / (2.0 + 1.0))
    assert summary.figures["rss_peak"] == 400
    assert summary.figures["rss_mean"] == 300


def test_gpu_is_the_mean_of_what_was_measured(both: list[ClipResult]) -> None:
    assert summarise(both, "chinese")[0].figures["gpu_percent"] == 40


def test_quality_is_that_of_the_captions(both: list[ClipResult]) -> None:
    summary, scores = summarise(both, "chinese")
    assert scores == quality.score(["他很高兴又。", "她很伤"], [["他很高兴又。"], ["她很悲伤", "她很伤"]], "chinese")
    assert {name: summary.figures[name] for name in quality.QUALITY_METRICS} == scores.corpus
    assert (summary.tokenizer, summary.empty_captions) == ("characters", 0)


def test_edge_mode_verifies_nothing_and_says_so() -> None:
    summary = summary_of(EDGE, EDGE)
    assert (summary.figures["acceptance_rate"], summary.figures["correction_rate"]) == (None, None)
    assert summary.figures["cloud_call_rate"] == 0
    assert summary.acceptance_by_position == ()
    assert summary.reasons["acceptance_rate"] == summary.reasons["correction_rate"] == "nothing was verified"


def test_cloud_mode_has_no_rounds_and_says_so() -> None:
    summary = summary_of(CLOUD, CLOUD)
    rates = ("acceptance_rate", "correction_rate", "cloud_call_rate")
    assert [summary.figures[rate] for rate in rates] == [None] * 3
    assert [summary.reasons[rate] for rate in rates] == ["this mode has no rounds"] * 3


def test_captions_of_one_token_have_no_otps() -> None:
    summary = summary_of(EDGE, CLOUD)
    assert summary.figures["otps"] is None
    assert summary.reasons["otps"] == "no caption has a token later than its first with text"


def test_captions_of_one_token_do_not_count_in_otps() -> None:
    assert summary_of(EDGE, SHORT, CLOUD).figures["otps"] == pytest.approx(2 / 0.2)


AT_ONCE = Trace(
    (
        (0.5, Prepared(5)),
        (1.0, Drafted(Draft((2, 3)))),
        (1.0, Committed((2, 3), "local")),
        (1.0, Finished("length")),
    )
)


@pytest.mark.parametrize(("trace", "text"), [(AT_ONCE, decode), (LONG, nothing)], ids=["at once", "without text"])
def test_two_tokens_without_otps_have_a_reason_that_is_true(trace: Trace, text: metrics.DecodeText) -> None:
    summary = summary_of(trace, text=text)
    assert summary.figures["otps"] is None
    assert summary.reasons["otps"] == "no caption has a token later than its first with text"


def test_empty_captions_are_counted_and_have_no_ttft() -> None:
    summary = summary_of(LONG, SHORT, text=nothing)
    assert (summary.figures["ttft"], summary.figures["otps"], summary.empty_captions) == (None, None, 2)
    assert summary.reasons["ttft"] == "every caption is empty"
    assert (summary.figures["bleu1"], summary.figures["bleu4"]) == (0, 0)


def test_what_the_machine_cannot_tell_has_its_reason() -> None:
    summary = summary_of(LONG, SHORT)
    assert summary.figures["gpu_percent"] is None
    assert summary.reasons["gpu_percent"] == "no GPU"


def test_every_figure_that_is_none_has_a_reason() -> None:
    for summary in (summary_of(EDGE), summary_of(CLOUD), summary_of(LONG), summary_of(LONG, text=nothing)):
        assert list(summary.figures) == list(METRICS)
        missing = {name for name, value in summary.figures.items() if value is None}
        assert missing == set(summary.reasons) & missing


def test_the_document_satisfies_the_schema(made: dict[str, Any]) -> None:
    results.validate_results(made)


@pytest.mark.parametrize("trace", [EDGE, CLOUD, LONG], ids=["edge", "cloud", "speculative"])
@pytest.mark.parametrize("text", [decode, nothing])
def test_every_mode_and_an_empty_caption_satisfy_the_schema(
    made: dict[str, Any], tmp_path: Path, trace: Trace, text: metrics.DecodeText
) -> None:
    alone = [clip_result(clip("a", "他很高兴"), trace, USED, text)]
    results.write_results(
        tmp_path / "a.json", results_document(EXPERIMENT, alone, *summarise(alone, "chinese"), HELD, [])
    )


def test_the_document_holds_the_summary(made: dict[str, Any], both: list[ClipResult]) -> None:
    summary, _ = summarise(both, "chinese")
    metrics = made["metrics"]
    assert metrics["figures"] == summary.figures
    assert (metrics["avg_bleu"], metrics["avg_cider"]) == (summary.figures["bleu4"], summary.figures["cider"])
    assert [metrics[f"avg_bertscore_{part}"] for part in ("precision", "recall", "f1")] == [None] * 3
    assert metrics["reasons"]["bertscore_f1"]
    assert made["experiment_config"] == EXPERIMENT
    assert made["skipped_clips"] == [{"file_id": "bad", "reason": "bad.wav: holds no audio"}]


def test_the_breakdown_of_a_cell_is_the_mean_of_its_clips(made: dict[str, Any], both: list[ClipResult]) -> None:
    assert list(made["metrics"]["latency_breakdown"]) == list(PARTS)
    assert sum(made["metrics"]["latency_breakdown"].values()) == pytest.approx((1.6 + 1.2) / 2)
    assert made["metrics"]["latency_breakdown"]["verify"] == pytest.approx((0.2 + 0.5 + 0.4) / 2)
    assert made["metrics"]["figures"]["discarded_draft"] == pytest.approx((0.1 + 0.0) / 2)
    closure = {"median": (1.6 / 2 + 1.2 / 1) / 2, "worst": 1.6 / 2, "unnamed_median": (1 - 1.5 / 2 + 1 - 1.1 / 1) / 2}
    assert made["metrics"]["breakdown_closure"] == pytest.approx(closure)


def test_what_was_measured_of_a_clip_can_be_read_back(made: dict[str, Any], both: list[ClipResult]) -> None:
    saved = json.loads(json.dumps(made["detailed_results"]))
    for each, clip in zip(both, saved, strict=True):
        assert results.measurement_from_json(clip) == (each.trace, each.used, each.hindsight)


@pytest.mark.parametrize(
    ("name", "mean", "least", "most"),
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
def test_latency_metrics_have_mean_least_and_most(
    made: dict[str, Any], name: str, mean: float, least: float, most: float
) -> None:
    found = [made["metrics"]["latency_metrics"][f"{name}_{kind}"] for kind in ("mean", "min", "max")]
    assert found == pytest.approx([mean, least, most])


def test_the_speculative_metrics_add_up(made: dict[str, Any]) -> None:
    found = made["metrics"]["speculative_decoding_metrics"]
    assert found.pop("acceptance_by_position") == pytest.approx([2 / 3, 1 / 2])
    assert found == pytest.approx(
        {
            "tokens": 9,
            "local": 3,
            "accepted": 3,
            "correction": 1,
            "bonus": 2,
            "cloud": 0,
            "rounds": 5,
            "cloud_calls": 3,
            "drafted": 8,
            "verified": 5,
            "ahead": 0,
            "ahead_wasted": 0,
            "discarded": 2,
        }
    )


def test_each_clip_stands_in_the_document(made: dict[str, Any], both: list[ClipResult]) -> None:
    long, short = made["detailed_results"]
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


def test_what_is_written_is_read_back(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    results.write_results(path, made)
    assert results.read_results(path) == made
    assert "他很高兴" in path.read_text(encoding="utf-8")


def without_its_metrics(document: dict[str, Any]) -> None:
    del document["metrics"]


def with_a_field_of_another_version(document: dict[str, Any]) -> None:
    document["schema_version"] = 1


def with_an_unknown_field(document: dict[str, Any]) -> None:
    document["host"] = "mine"


def with_an_unknown_mode(document: dict[str, Any]) -> None:
    document["experiment_config"]["mode"] = "fast"


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
def test_an_invalid_document_is_refused_and_the_file_stays(made: dict[str, Any], tmp_path: Path, spoil: Spoil) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    spoil(made)
    with pytest.raises(ValueError, match=r"^[\w/ ]+: "):
        results.write_results(path, made)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_does_not_know_is_refused_and_the_file_stays(
    made: dict[str, Any], tmp_path: Path, number: float
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    made["detailed_results"][0]["ttft"] = number
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(path, made)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_nan_from_a_clip_is_refused(made: dict[str, Any], both: list[ClipResult], tmp_path: Path) -> None:
    long, short = both
    bad = [replace(long, used=replace(USED, cpu=math.nan)), short]
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(
            tmp_path / "a.json", results_document(EXPERIMENT, bad, *summarise(bad, "chinese"), HELD, [])
        )
    assert os.listdir(tmp_path) == []


def test_an_invalid_file_is_not_read(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    del made["environment"]
    path.write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ValueError, match="the whole: 'environment' is a required property"):
        results.read_results(path)


def test_a_file_that_holds_nan_is_not_read(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    made["metrics"]["avg_cider"] = math.nan
    path.write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ValueError, match="holds NaN"):
        results.read_results(path)


def test_the_schema_is_itself_valid_and_names_every_figure_and_part() -> None:
    schema = json.loads(results.SCHEMA_FILE.read_text(encoding="utf-8"))
    figures = schema["properties"]["metrics"]["properties"]["figures"]
    assert list(figures["properties"]) == figures["required"] == list(METRICS)
    assert schema["$defs"]["latency_breakdown"]["required"] == list(PARTS)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == results.SCHEMA_VERSION
