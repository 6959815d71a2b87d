"""Our modes compared with transformers' generate: the tokens, the timing, the metrics and the table."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import baselines, rows
from bench.baselines import BASELINE_K, WAYS, PreparedClip, TimedCaption
from edgecloud_sd import config
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from tests.support.suite import run

pytestmark = pytest.mark.slow  # all tests of this file take long, compared with the others

LOSSLESS = Strategy("speculative", k=BASELINE_K)
LIMIT = 64

# seconds per clip of 10 tokens, by the names of WAYS
SECONDS = {
    "greedy": 4.0,
    "assisted": 3.0,
    "assisted_k": 2.0,
    "assisted_audio": 1.75,
    "cloud": 2.5,
    "speculative": 1.0,
    "auto": 0.5,
    "bound": 0.8,
}


def captions(scale: float = 1.0, n: int = 10) -> dict[str, TimedCaption]:
    return {way: TimedCaption((7,) * n, scale * SECONDS[way]) for way in WAYS}


@pytest.fixture(scope="module")
def prepared(pipeline: Pipeline) -> list[PreparedClip]:
    """Prepare two clips. In the first, some drafts have an entropy above the default threshold."""
    requests = [
        Request(clips.make_clip("evaluation", i).samples, language) for i, language in [(4, "chinese"), (0, "english")]
    ]
    return [baselines.prepare_clip(pipeline, request, LOSSLESS, LIMIT) for request in requests]


@pytest.fixture(scope="module")
def ways(pipeline: Pipeline) -> dict[str, baselines.Way]:
    return baselines.build_ways(pipeline, LOSSLESS, LIMIT)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_the_same_tokens(
    pipeline: Pipeline, prepared: list[PreparedClip], ways: dict[str, baselines.Way], way: str
) -> None:
    for clip in prepared:
        caption = ways[way](clip)
        assert caption.tokens == clip.tokens
        assert caption.tokens[-1] in pipeline.cloud_model.eos
        assert caption.seconds > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_stops_at_the_length_limit(pipeline: Pipeline, prepared: list[PreparedClip], way: str) -> None:
    short = baselines.prepare_clip(pipeline, prepared[0].request, LOSSLESS, 7)
    assert baselines.build_ways(pipeline, LOSSLESS, 7)[way](short).tokens == prepared[0].tokens[:7]


def record_widths(thinker: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each forward pass of a thinker appends its number of positions."""
    widths: list[int] = []
    text = thinker.model.language_model
    forward = text.forward

    def recorded(*args: Any, **options: Any) -> Any:
        widths.append(options["inputs_embeds"].shape[1])
        return forward(*args, **options)

    monkeypatch.setattr(text, "forward", recorded)
    return widths


def test_only_the_assistant_with_audio_encodes_the_audio(
    pipeline: Pipeline, prepared: list[PreparedClip], ways: dict[str, baselines.Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = pipeline.edge.thinker.model.audio_tower
    forward = tower.forward
    calls = []

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return forward(*args, **options)

    monkeypatch.setattr(tower, "forward", recorded)
    ways["assisted"](prepared[0])
    assert not calls  # if this fails, transformers passes the audio now, and `keep_audio` can be deleted
    ways["assisted_audio"](prepared[0])
    assert len(calls) == 1


def test_a_constant_schedule_drafts_k_tokens(
    pipeline: Pipeline, prepared: list[PreparedClip], ways: dict[str, baselines.Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = record_widths(pipeline.cloud_model.thinker, monkeypatch)
    ways["assisted_k"](prepared[0])
    assert set(widths[1:-1]) == {BASELINE_K + 1}
    widths.clear()
    ways["assisted_audio"](prepared[0])
    assert max(widths[1:]) > BASELINE_K + 1


def test_the_settings_of_the_loaded_models_do_not_change(pipeline: Pipeline, prepared: list[PreparedClip]) -> None:
    edge = pipeline.edge.thinker
    before = copy.deepcopy(edge.generation_config)
    assistant = baselines.keep_audio(baselines.build_assistant(edge, num_assistant_tokens=9))
    baselines.time_generate(pipeline.cloud_model, prepared[0], LIMIT, assistant)
    assert edge.generation_config == before
    assert assistant.generation_config.num_assistant_tokens == 9
    assert "prepare_inputs_for_generation" not in vars(edge)
    assert assistant.lm_head.weight is edge.lm_head.weight


def test_the_recorded_passes_are_those_of_a_speculative_caption(prepared: list[PreparedClip]) -> None:
    clip = prepared[0]
    edge, cloud = ([step for step in clip.passes if step.side == side] for side in ("edge", "cloud"))
    assert [(steps[0].cached, steps[0].ids[0]) for steps in (edge, cloud)] == [(0, clip.prompt.last)] * 2
    committed = [clip.prompt.last, *clip.tokens]
    for step in cloud:  # committed tokens, and then the draft
        assert list(step.ids[:-4]) == committed[step.cached : step.cached + len(step.ids) - 4]
    assert max(len(step.ids) for step in cloud) >= 5
    assert max(len(step.ids) for step in edge) <= 4  # a correction, and the rest of the draft before it
    assert len(edge) > 2 * len(cloud)


def test_the_replay_runs_the_recorded_passes_and_no_others(pipeline: Pipeline, prepared: list[PreparedClip]) -> None:
    clip = prepared[0]
    passes: list[tuple[str, int, int]] = []
    prefilled: list[str] = []
    models = {"edge": pipeline.edge, "cloud": pipeline.cloud_model}
    prompt_lengths: dict[str, int] = {}

    def recording(side: str) -> Any:
        logits, prefill = models[side].logits, models[side].prefill

        def record_logits(ids: torch.Tensor, cache: Any) -> Any:
            passes.append((side, cache.length - prompt_lengths[side], len(ids)))
            return logits(ids, cache)

        def record_prefill(prompt: Any) -> Any:
            prefilled.append(side)
            cache = prefill(prompt)
            prompt_lengths[side] = cache.length
            return cache

        model = copy.copy(models[side])
        vars(model).update(logits=record_logits, prefill=record_prefill)
        return model

    assert baselines.replay_passes({side: recording(side) for side in models}, clip.prompt, clip.passes) > 0
    assert passes == [(step.side, step.cached, len(step.ids)) for step in clip.passes]
    assert prefilled == ["edge", "cloud"]


def test_the_features_are_not_timed(pipeline: Pipeline, prepared: list[PreparedClip]) -> None:
    trace = pipeline.trace(prepared[0].request, LOSSLESS, LIMIT)
    caption = baselines.time_from_prompt(trace)
    assert caption.seconds == trace.seconds - trace.events[0][0] < trace.seconds


def test_each_way_is_the_first_in_turn() -> None:
    n = len(WAYS)
    orders = [baselines.order_ways(number) for number in range(n + 1)]
    assert [order[0] for order in orders] == [*WAYS, "greedy"]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(WAYS))}


def test_ways_with_other_tokens_are_named_and_counted() -> None:
    others = captions() | {"cloud": TimedCaption((7, 8), 1.0)}
    assert baselines.list_differing_ways(captions()) == []
    assert baselines.list_differing_ways(others) == ["cloud"]
    assert baselines.baseline_metrics([captions(), others])["differing"] == 1


def test_ratios_are_those_of_summed_seconds_per_summed_token() -> None:
    values = baselines.baseline_metrics([captions(), captions(3.0, 20)])
    assert values["greedy"] == pytest.approx(16 / 30)
    expected = {
        "over_greedy": 4.0,
        "over_assisted": 3.0,
        "over_assisted_k": 2.0,
        "over_assisted_audio": 1.75,
        "over_cloud": 2.5,
        "auto_over_greedy": 8.0,
        "auto_over_cloud": 5.0,
        "cloud_over_greedy": 1.6,
        "share_of_bound": 0.8,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert list(values) == list(baselines.BASELINE_METRICS)
    assert baselines.way_ratios([captions()])["over_greedy"] == Interval(4.0, None, None, "1 clip: too few")


def test_metrics_of_no_clips_are_an_error() -> None:
    with pytest.raises(ValueError, match="no clips to compare on"):
        baselines.baseline_metrics([])


def test_the_table_has_a_row_per_way() -> None:
    table = baselines.render_baselines({"baselines-pocket-k4-zh": [captions(), captions(2.0)] * 3})
    lines = table.splitlines()
    assert all(line.startswith(f"{way} ") for line, way in zip(lines[2:], WAYS.values(), strict=False))
    assert "baselines-pocket-k4-zh, 6 clips" in lines[0]
    (speculative,) = [line for line in lines if line.startswith(WAYS["speculative"] + " ")]
    assert re.findall(r"[\d.]+%?(?: \[.*?\])?", speculative) == [
        "150.00",
        *(f"{ratio} [{ratio}, {ratio}]" for ratio in ("4.00", "3.00", "2.00", "1.75", "2.50")),
        "80% [80%, 80%]",
    ]
    others = captions() | {"cloud": TimedCaption((7, 8), 1.0)}
    assert "- 1 captions are not the same" in baselines.render_baselines({"a": [captions(), others]})


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, ["baselines-pocket-k3-zh"]),
        ({"language": "english,chinese"}, ["baselines-pocket-k3-en"]),
        ({"gate": "entropy,always", "rule": "greedy", "k": "7,2"}, ["baselines-pocket-k7-zh"]),
        ({"mode": "speculative", "gate": "always", "k": "7"}, ["baselines-pocket-k4-zh"]),  # rule rank is not lossless
        ({"gate": "always", "rule": "greedy", "k": "auto"}, ["baselines-pocket-k4-zh"]),
        ({"mode": "edge,cloud"}, []),
        ({"clock": "virtual", "profile": "published"}, []),
        ({"cloud-url": "auto"}, []),
    ],
)
def test_a_run_has_one_case_with_its_first_lossless_k_and_language(options: dict[str, Any], ids: list[str]) -> None:
    settings = config.resolve(options)
    assert [case.id for case in baselines.baseline_cases(settings)] == ids


def test_every_metric_has_a_row_in_the_saved_file() -> None:
    extra = {"baselines": {"figures": baselines.baseline_metrics([captions(), captions()])}}
    saved = {"name": "test_baselines[x]", "fullname": "bench/test_baselines.py::test_baselines[x]", "extra_info": extra}
    by_name = {row["name"]: row for row in rows.metric_rows(saved | {"params": None, "param": None, "options": {}})}
    assert list(by_name) == [f"test_baselines[x]:{name}" for name in baselines.BASELINE_METRICS]
    assert by_name["test_baselines[x]:over_greedy"]["group"] == "over_greedy (ratio, higher is better)"
    assert by_name["test_baselines[x]:over_greedy"]["stats"]["ops"] == pytest.approx(4.0)
    assert by_name["test_baselines[x]:bound"]["stats"]["mean"] == pytest.approx(0.08)


def test_the_benchmark_prints_its_table_and_fails_for_a_way_with_other_tokens(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)  # pytest-benchmark calls it, and it takes seconds
    build_ways = baselines.build_ways

    def build_wrong_ways(*args: Any) -> dict[str, Callable[[PreparedClip], TimedCaption]]:
        return build_ways(*args) | {"cloud": lambda clip: TimedCaption(clip.tokens[:-1], 1.0)}

    options = ("-k", "test_baselines", "--extra", "baselines", "--max-samples", "2", "--benchmark-json", "saved.json")
    result = run(pytester, *options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["* baselines *", "baselines-pocket-k3-zh, 2 clips*"])
    monkeypatch.setattr("bench.baselines.build_ways", build_wrong_ways)
    result = run(pytester, *options)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*: not the tokens of transformers' greedy generate: our cloud mode"])
