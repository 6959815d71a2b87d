"""Ours beside transformers' generate: the same tokens, what is counted, and what is shown."""

from __future__ import annotations

import copy
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

pytestmark = pytest.mark.slow  # all of it takes long beside the rest

LOSSLESS = Strategy("speculative", k=BASELINE_K)
LIMIT = 64

# seconds a clip of 10 tokens, by the names of WAYS
SECONDS = {
    "greedy": 4.0,
    "assisted": 3.0,
    "assisted_k": 2.0,
    "hearing": 1.75,
    "cloud": 2.5,
    "speculative": 1.0,
    "auto": 0.5,
    "bound": 0.8,
}


def captions(scale: float = 1.0, n: int = 10) -> dict[str, TimedCaption]:
    return {way: TimedCaption((7,) * n, scale * SECONDS[way]) for way in WAYS}


@pytest.fixture(scope="module")
def heard(pipeline: Pipeline) -> list[PreparedClip]:
    """In the first the edge is less sure of some of its drafts than the default threshold."""
    requests = [
        Request(clips.make_clip("evaluation", i).samples, language) for i, language in [(4, "chinese"), (0, "english")]
    ]
    return [baselines.prepare_clip(pipeline, request, LOSSLESS, LIMIT) for request in requests]


@pytest.fixture(scope="module")
def ways(pipeline: Pipeline) -> dict[str, baselines.Way]:
    return baselines.ways(pipeline, LOSSLESS, LIMIT)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_the_same_tokens(
    pipeline: Pipeline, heard: list[PreparedClip], ways: dict[str, baselines.Way], way: str
) -> None:
    for clip in heard:
        found = ways[way](clip)
        assert found.tokens == clip.tokens
        assert found.tokens[-1] in pipeline.cloud_model.eos
        assert found.seconds > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_stops_at_the_same_length(pipeline: Pipeline, heard: list[PreparedClip], way: str) -> None:
    short = baselines.prepare_clip(pipeline, heard[0].request, LOSSLESS, 7)
    assert baselines.ways(pipeline, LOSSLESS, 7)[way](short).tokens == heard[0].tokens[:7]


def passes(thinker: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each forward pass of a thinker feeds."""
    seen: list[int] = []
    text = thinker.model.language_model
    forward = text.forward

    def counted(*given: Any, **named: Any) -> Any:
        seen.append(named["inputs_embeds"].shape[1])
        return forward(*given, **named)

    monkeypatch.setattr(text, "forward", counted)
    return seen


def test_an_assistant_hears_where_it_is_made_to(
    pipeline: Pipeline, heard: list[PreparedClip], ways: dict[str, baselines.Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = pipeline.edge.thinker.model.audio_tower
    forward = tower.forward
    towers = []

    def counted(*given: Any, **named: Any) -> Any:
        towers.append(given)
        return forward(*given, **named)

    monkeypatch.setattr(tower, "forward", counted)
    ways["assisted"](heard[0])
    assert not towers  # or transformers' own has learned to, and `hearing` is not needed any more
    ways["hearing"](heard[0])
    assert len(towers) == 1


def test_a_constant_schedule_drafts_k_tokens(
    pipeline: Pipeline, heard: list[PreparedClip], ways: dict[str, baselines.Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes(pipeline.cloud_model.thinker, monkeypatch)
    ways["assisted_k"](heard[0])
    assert set(seen[1:-1]) == {BASELINE_K + 1}
    seen.clear()
    ways["hearing"](heard[0])
    assert max(seen[1:]) > BASELINE_K + 1


def test_the_models_settings_stay_as_they_are(pipeline: Pipeline, heard: list[PreparedClip]) -> None:
    edge = pipeline.edge.thinker
    before = copy.deepcopy(edge.generation_config)
    made = baselines.hearing(baselines.assistant(edge, num_assistant_tokens=9))
    baselines.generated(pipeline.cloud_model, heard[0], LIMIT, made)
    assert edge.generation_config == before
    assert made.generation_config.num_assistant_tokens == 9
    assert "prepare_inputs_for_generation" not in vars(edge)
    assert made.lm_head.weight is edge.lm_head.weight


def test_the_bound_is_of_the_passes_that_a_caption_takes(pipeline: Pipeline, heard: list[PreparedClip]) -> None:
    clip = heard[0]
    sides = {side: [each for each in clip.passes if each.side == side] for side in ("edge", "cloud")}
    assert [(sides[side][0].held, sides[side][0].ids[0]) for side in sides] == [(0, clip.prompt.last)] * 2
    fed = [clip.prompt.last, *clip.tokens]
    for each in sides["cloud"]:  # what is committed, and then the draft
        assert list(each.ids[:-4]) == fed[each.held : each.held + len(each.ids) - 4]
    assert max(len(each.ids) for each in sides["cloud"]) >= 5
    assert max(len(each.ids) for each in sides["edge"]) <= 2
    assert len(sides["edge"]) > 2 * len(sides["cloud"])


def test_the_replay_makes_those_passes_and_no_others(
    pipeline: Pipeline, heard: list[PreparedClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = heard[0]
    made: list[tuple[str, int, int]] = []
    prefilled: list[str] = []
    models = {"edge": pipeline.edge, "cloud": pipeline.cloud_model}
    ends: dict[str, int] = {}

    def noted(side: str) -> Any:
        logits, prefill = models[side].logits, models[side].prefill

        def run(ids: torch.Tensor, cache: Any) -> Any:
            made.append((side, cache.length - ends[side], len(ids)))
            return logits(ids, cache)

        def fill(prompt: Any) -> Any:
            prefilled.append(side)
            cache = prefill(prompt)
            ends[side] = cache.length
            return cache

        other = copy.copy(models[side])
        vars(other).update(logits=run, prefill=fill)
        return other

    assert baselines.replay_passes({side: noted(side) for side in models}, clip.prompt, clip.passes) > 0
    assert made == [(each.side, each.held, len(each.ids)) for each in clip.passes]
    assert prefilled == ["edge", "cloud"]


def test_the_features_are_outside(pipeline: Pipeline, heard: list[PreparedClip]) -> None:
    trace = pipeline.trace(heard[0].request, LOSSLESS, LIMIT)
    found = baselines.timed(trace)
    assert found.seconds == trace.seconds - trace.events[0][0] < trace.seconds


def test_each_way_has_its_turn_to_be_first() -> None:
    n = len(WAYS)
    orders = [baselines.turns(number) for number in range(n + 1)]
    assert [order[0] for order in orders] == [*WAYS, "greedy"]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(WAYS))}


def test_other_tokens_are_named() -> None:
    found = captions() | {"cloud": TimedCaption((7, 8), 1.0)}
    assert baselines.differing(captions()) == []
    assert baselines.differing(found) == ["cloud"]
    assert baselines.baseline_metrics([captions(), found])["differing"] == 1


def test_ratios_are_of_sums_a_token() -> None:
    found = baselines.baseline_metrics([captions(), captions(3.0, 20)])
    assert found["greedy"] == pytest.approx(16 / 30)
    expected = {
        "over_greedy": 4.0,
        "over_assisted": 3.0,
        "over_assisted_k": 2.0,
        "over_hearing": 1.75,
        "over_cloud": 2.5,
        "auto_over_greedy": 8.0,
        "auto_over_cloud": 5.0,
        "cloud_over_greedy": 1.6,
        "share_of_bound": 0.8,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert list(found) == list(baselines.BASELINE_METRICS)
    assert baselines.way_ratios([captions()])["over_greedy"] == Interval(4.0, None, None)


def test_no_clips_are_an_error() -> None:
    with pytest.raises(ValueError, match="no clips to compare on"):
        baselines.baseline_metrics([])


def test_the_table_has_a_row_a_way() -> None:
    shown = baselines.render_baselines({"baselines-pocket-k4-zh": [captions(), captions(2.0)]})
    lines = shown.splitlines()
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(WAYS)]] == list(WAYS.values())
    assert "baselines-pocket-k4-zh, 2 clips" in lines[0]
    (ours,) = [line.split("  ") for line in lines if line.startswith(WAYS["speculative"])]
    assert [cell.strip() for cell in ours if cell.strip()][1:] == [
        "150.00",
        *(f"{ratio} [{ratio}, {ratio}]" for ratio in ("4.00", "3.00", "2.00", "1.75", "2.50")),
        "80% [80%, 80%]",
    ]
    other = captions() | {"cloud": TimedCaption((7, 8), 1.0)}
    assert "- 1 captions are not the same" in baselines.render_baselines({"a": [captions(), other]})


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({}, ["baselines-pocket-k4-zh"]),
        ({"language": "english,chinese"}, ["baselines-pocket-k4-en"]),
        ({"gate": "entropy,always", "rule": "greedy", "k": "7,2"}, ["baselines-pocket-k7-zh"]),
        ({"gate": "always", "k": "7"}, ["baselines-pocket-k4-zh"]),  # by rank, so not strict
        ({"gate": "always", "rule": "greedy", "k": "auto"}, ["baselines-pocket-k4-zh"]),
        ({"mode": "edge,cloud"}, []),
        ({"clock": "virtual", "profile": "published"}, []),
        ({"cloud-url": "auto"}, []),
    ],
)
def test_what_a_run_asks_for(asked: dict[str, Any], ids: list[str]) -> None:
    settings = config.resolve(asked)
    assert [each.id for each in baselines.baseline_cases(settings)] == ids
    assert baselines.is_left_out(settings) == (not ids)


def test_a_large_pair_is_compared_only_where_that_is_asked_for() -> None:
    settings = config.resolve({"pair": "qwen2.5-omni"})
    assert [each.id for each in baselines.baseline_cases(settings)] == ["baselines-qwen2.5-omni-k4-zh"]
    assert baselines.is_left_out(settings)


def test_every_figure_is_a_row() -> None:
    extra = {"baselines": {"figures": baselines.baseline_metrics([captions(), captions()])}}
    saved = {"name": "test_baselines[x]", "fullname": "bench/test_baselines.py::test_baselines[x]", "extra_info": extra}
    found = {row["name"]: row for row in rows.metric_rows(saved | {"params": None, "param": None, "options": {}})}
    assert list(found) == [f"test_baselines[x]:{name}" for name in baselines.BASELINE_METRICS]
    assert found["test_baselines[x]:over_greedy"]["group"] == "over_greedy (ratio, higher is better)"
    assert found["test_baselines[x]:over_greedy"]["stats"]["ops"] == pytest.approx(4.0)
    assert found["test_baselines[x]:bound"]["stats"]["mean"] == pytest.approx(0.08)


@pytest.mark.slow
def test_the_benchmark_says_which_way_wrote_something_else(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)  # which pytest-benchmark asks for seconds about the machine
    broken = baselines.ways

    def wrong(*given: Any) -> dict[str, Callable[[PreparedClip], TimedCaption]]:
        return broken(*given) | {"cloud": lambda clip: TimedCaption(clip.tokens[:-1], 1.0)}

    files = ("-k", "test_baselines", "--max-samples", "2", "--benchmark-json", "saved.json")
    done = run(pytester, *files)
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["* baselines *", "baselines-pocket-k4-zh, 2 clips*"])
    monkeypatch.setattr("bench.baselines.ways", wrong)
    done = run(pytester, *files)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*: not the tokens of transformers' greedy generate: our cloud mode"])
