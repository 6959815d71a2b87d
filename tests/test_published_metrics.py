"""The published metrics by their names: each formula on a trace written by hand, and a reason for every null."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import (
    Committed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure.published_metrics import CLIP_METRICS, RUN_METRICS, published_section
from edgecloud_sd.measure.summary import ClipResult, clip_result, summarise

FIRST, SECOND = Draft((2, 3, 4)), Draft((5, 6, 7))
# six tokens: three local ones; then one accepted, one correction, and one local one
ROUNDS: list[tuple[float, Event]] = [
    (0.5, Prepared(40)), (1.0, Opened("edge")),
    (2.0, Drafted(FIRST)), (2.5, Committed((2, 3, 4), "local")),
    (3.0, Drafted(SECOND)), (3.0, Escalated(SECOND, 3)), (4.0, Verified(SECOND, Verdict(1, 8))),
    (4.5, Committed((5,), "accepted")), (4.5, Committed((8,), "correction")),
    (5.0, Drafted(Draft((9,)))), (5.5, Committed((9,), "local")), (5.5, Finished("eos")),
]  # fmt: skip
EDGE_ALONE: list[tuple[float, Event]] = [
    (0.5, Prepared(20)), (1.0, Opened("edge")), (1.5, Committed((2, 3), "local")), (1.5, Finished("eos")),
]  # fmt: skip
DEAD: list[tuple[float, Event]] = [
    (0.5, Prepared(20)), (1.0, Opened("edge")), (2.0, Drafted(FIRST)), (2.0, Escalated(FIRST, 1)),
    (3.0, Degraded("no answer")), (3.0, Committed((2, 3, 4), "local")), (3.0, Finished("length")),
]  # fmt: skip
USED = Utilization(6.0, 3.0, 1073.741824, 2147.483648, None, None, {"gpu_percent": "no GPU", "gpu_memory_mb": "no GPU"})


def section(
    *traces: list[tuple[float, Event]], mode: str = "speculative", k: int | str | None = 3, language: str = "chinese"
) -> dict[str, Any]:
    results: list[ClipResult] = []
    for number, events in enumerate(traces):
        clip = Clip(f"clip{number}", Path("a.wav"), "chinese", ("他很高兴",))
        results.append(clip_result(clip, Trace(tuple(events)), USED, lambda ids: "他很高兴啊呀"[: len(ids)]))
    summary, scores = summarise(results, "chinese")
    return published_section(results, summary, scores, {"mode": mode, "k": k}, language)


def look_up(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("latency_metrics.ttft", 2.0),
        ("latency_metrics.itps", 80.0),
        ("latency_metrics.oet", 5.0),
        ("latency_metrics.otps", 6 / 5),
        ("latency_metrics.total_time", 5.5),
        ("latency_metrics.cpu_percent", 50.0),
        ("latency_metrics.ram_gb", 1.0),
        ("latency_metrics.memory_max_gb", 2.0),
        ("latency_metrics.prefill_time", 0.5),
        ("latency_metrics.cloud_calls", 1),
        ("latency_metrics.total_draft_tokens", 7),
        ("latency_metrics.total_accepted_tokens", 6),
        ("latency_metrics.cloud_verified_tokens", 3),
        ("latency_metrics.acceptance_rate", 6 / 7),
        ("latency_metrics.correction_rate", 1.0),
        ("latency_metrics.token_level_cloud_rate", 3 / 6),
        ("latency_metrics.corrected_token_rate", 1 / 6),
        ("latency_metrics.cloud_call_rate", 1 / (7 // 3 + 1)),
        ("latency_metrics.streaming_metrics.step_times", [2.0, 4.0, 5.0]),
        ("latency_metrics.streaming_metrics.otps", 6 / 3),
        ("latency_metrics.streaming_metrics.total_time", 5.0),
        ("speculative_decoding_metrics.output_tokens", 6),
        ("rejected_tokens", 2),
        ("total_rounds", 3),
        ("success", True),
    ],
)
def test_a_metric_of_a_clip_has_the_published_formula(path: str, expected: object) -> None:
    assert look_up(section(ROUNDS)["detailed_results"][0], path) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metrics.latency_metrics.ttft_mean", 2.0),
        ("metrics.latency_metrics.itps_max", 80.0),
        ("metrics.latency_metrics.avg_input_tokens", 40),
        ("metrics.latency_metrics.total_output_tokens", 12),
        ("metrics.speculative_decoding_metrics.avg_cloud_calls", 1),
        ("metrics.speculative_decoding_metrics.avg_acceptance_rate", 12 / 14),
        ("metrics.speculative_decoding_metrics.avg_correction_rate", 1.0),
        ("metrics.speculative_decoding_metrics.avg_cloud_call_rate", 1),
        ("metrics.speculative_decoding_metrics.total_samples", 2),
        ("speculative_metrics.avg_rounds", 3),
        ("speculative_metrics.total_cloud_calls", 2),
    ],
)
def test_a_metric_of_a_cell_has_the_published_formula(path: str, expected: object) -> None:
    assert look_up(section(ROUNDS, ROUNDS), path) == pytest.approx(expected)


@pytest.mark.parametrize(("traces", "k"), [([ROUNDS], None), ([EDGE_ALONE], None), ([EDGE_ALONE, EDGE_ALONE], 3)])
def test_every_name_is_there_and_every_null_has_a_reason(
    traces: list[list[tuple[float, Event]]], k: int | None
) -> None:
    published = section(*traces, k=k)
    for name in RUN_METRICS:
        if not name.endswith("_en"):
            assert look_up(published, name) is not None or published["reasons"][name]
    for name in CLIP_METRICS:
        values = [look_up(clip, name) for clip in published["detailed_results"]]
        assert None not in values or published["reasons"][f"detailed_results.{name}"]
    assert published["reasons"]["metrics.latency_metrics.gpu_util_mean"] == "no GPU"


def test_the_names_of_corpus_scores_end_in_the_language() -> None:
    assert "corpus_bleu_1_en" in section(ROUNDS, language="english")["metrics"]
    assert "corpus_bleu_1_ch" not in section(ROUNDS, language="english")["metrics"]


def test_modes_without_drafts_have_no_rate_of_them() -> None:
    published = section(EDGE_ALONE, mode="edge", k=None)
    path = "metrics.speculative_decoding_metrics.avg_acceptance_rate"
    assert look_up(published, path) is None
    assert published["reasons"][path] == "this mode has no rounds"


RATES = ("acceptance_rate", "correction_rate", "token_level_cloud_rate", "corrected_token_rate")


@pytest.mark.parametrize(
    "path",
    [
        *(f"detailed_results.latency_metrics.{name}" for name in RATES),
        *(f"metrics.speculative_decoding_metrics.avg_{name}" for name in RATES),
        "speculative_metrics.avg_acceptance_rate",
    ],
)
def test_a_cloud_that_never_answered_has_no_rates(path: str) -> None:
    published = section(DEAD)
    is_clip = path.startswith("detailed_results.")
    tree = published["detailed_results"][0] if is_clip else published
    assert look_up(tree, path.removeprefix("detailed_results.")) is None
    assert published["reasons"][path] == "the cloud failed before it had verified a draft"


def test_a_call_without_an_answer_is_in_no_correction_rate() -> None:
    path = "metrics.speculative_decoding_metrics.avg_correction_rate"
    assert look_up(section(ROUNDS, DEAD), path) == 1.0
    published = section(DEAD)
    assert (
        look_up(published, path) is look_up(published["detailed_results"][0], "latency_metrics.correction_rate") is None
    )
    assert published["reasons"][path] == "the cloud failed before it had verified a draft"
