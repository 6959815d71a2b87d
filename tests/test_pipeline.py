"""From a request to a caption: every field of a strategy has its effect, and generations do not disturb each other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgecloud_sd import gate
from edgecloud_sd.events import Ahead, Committed, Drafted, Event, Trace
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile

ALWAYS = Strategy("speculative", k=8)
FAR = links.find_link("4g")
MACHINES = profile.load_profile("laptop-gpu")


@pytest.fixture(scope="module")
def request_() -> Request:
    """Return a clip on which the draft model is unsure."""
    return Request(clips.make_clip("evaluation", 4).samples, "chinese")


def fresh(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline of the same models that has learned nothing."""
    return pipeline.with_cloud(pipeline.cloud)


def draft_lengths(trace: Trace) -> list[int]:
    return [len(event.draft.tokens) for _, event in trace.events if isinstance(event, Drafted)]


def test_a_draft_stop_ends_drafts_early(pipeline: Pipeline, request_: Request) -> None:
    unsure = gate.parse_draft_stop("entropy=0.5", gate.ALWAYS)
    whole, cut = (
        pipeline.trace(request_, replace(ALWAYS, draft_stop=stop), profile=MACHINES) for stop in (None, unsure)
    )
    assert cut.tokens == whole.tokens
    assert len(draft_lengths(cut)) > len(draft_lengths(whole))


def test_the_edge_drafts_ahead_as_far_as_the_strategy_says(pipeline: Pipeline, request_: Request) -> None:
    waits, ahead = (
        pipeline.trace(request_, replace(ALWAYS, draft_ahead=n), link=FAR, profile=MACHINES) for n in (0, 5)
    )
    assert not any(isinstance(event, Ahead) for _, event in waits.events)
    new = [event.made for _, event in ahead.events if isinstance(event, Ahead)]
    assert 0 < max(new) <= 5
    assert ahead.tokens == waits.tokens


def test_adaptive_k_knows_its_strategy_and_stays_for_the_run(pipeline: Pipeline, request_: Request) -> None:
    learning = fresh(pipeline)
    lossy = Strategy("speculative", gate.entropy_gate(1.5), k=None, prefill="lazy", draft_ahead=7)
    for strategy in (lossy, replace(ALWAYS, k=None)):
        learning.trace(request_, strategy, profile=MACHINES)
        statistics = learning.adaptive_k(strategy, "chinese", profile=MACHINES)
        assert statistics
        expected = (strategy.draft_ahead, strategy.is_lossless, strategy.prefill == "eager")
        assert (statistics.draft_ahead, statistics.is_lossless, statistics.has_eager_prefill) == expected
        assert statistics.step.n + statistics.step_beside_prefill.n > 0
    assert learning.adaptive_k(ALWAYS, "chinese", profile=MACHINES) is None


def test_a_replayed_trace_teaches_the_same_as_the_generation(pipeline: Pipeline, request_: Request) -> None:
    strategy = replace(ALWAYS, k=None)
    first, second = fresh(pipeline), fresh(pipeline)
    trace = first.trace(request_, strategy, link=FAR, profile=MACHINES, seed="one")
    statistics = second.adaptive_k(strategy, "chinese", FAR, MACHINES)
    assert statistics
    statistics.replay(trace)
    one, two = (each.trace(request_, strategy, link=FAR, profile=MACHINES, seed="two") for each in (first, second))
    assert one == two
    assert draft_lengths(one) != draft_lengths(trace)


@pytest.mark.parametrize("k", [3, None])
def test_interleaved_generations_do_not_disturb_each_other(pipeline: Pipeline, k: int | None) -> None:
    requests = [Request(clips.make_clip("evaluation", index).samples, "chinese") for index in (1, 4)]
    strategy = Strategy("speculative", k=k, draft_ahead=4)
    alone = [pipeline.trace(request, Strategy("cloud")).tokens for request in requests]
    running = [pipeline.events(request, strategy) for request in requests]
    events: list[list[Event]] = [[], []]
    while any(running_events is not None for running_events in running):
        for index, generation in enumerate(running):
            event = next(generation, None) if generation is not None else None
            if event is None:
                running[index] = None  # type: ignore[call-overload]
            else:
                events[index].append(event)
    tokens = [
        tuple(token for event in seen if isinstance(event, Committed) for token in event.tokens) for seen in events
    ]
    assert tokens == alone


@pytest.mark.parametrize("k", [3, None])
def test_threads_may_share_a_pipeline(pipeline: Pipeline, k: int | None) -> None:
    samples = [clips.make_clip("evaluation", index).samples for index in range(4)]
    alone = [pipeline.caption(each, strategy=Strategy("cloud")).tokens for each in samples]
    with ThreadPoolExecutor(4) as threads:
        shared = list(threads.map(lambda each: pipeline.caption(each, strategy=Strategy(k=k)).tokens, samples))
    assert shared == alone


def test_a_caption_has_its_text_its_tokens_and_its_trace(pipeline: Pipeline) -> None:
    samples = clips.make_clip("evaluation", 0).samples
    caption = pipeline.caption(samples, language="english", strategy=Strategy("edge"))
    assert caption.text == pipeline.text(caption.tokens)
    assert caption.tokens == caption.trace.tokens
    pcm = np.round(samples * 32767).astype(np.int16)
    assert pipeline.caption(pcm, language="english", strategy=Strategy("edge")).text == caption.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "klingon"}, "unknown language 'klingon': choose one of chinese, english"),
        ({"prompt_type": "loud"}, "unknown prompt_type 'loud': choose one of default, detailed, concise"),
        ({"sampling_rate": 0}, "sampling_rate must be a whole number of Hz above 0, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ],
)
def test_bad_arguments_of_a_caption_are_named(pipeline: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.caption(np.zeros(16_000, np.float32), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["edge", "cloud", "speculative"])
def test_loading_takes_no_time_of_the_first_caption(
    pipeline: Pipeline, request_: Request, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(checkpoint: str, *_: object) -> object:
        time.sleep(0.05)
        return pipeline.edge if checkpoint == pipeline.pair.edge else pipeline.cloud_model

    monkeypatch.setattr("edgecloud_sd.models.load.load_model", load)
    lazy, start = Pipeline(pipeline.pair), time.perf_counter()
    trace = lazy.trace(request_, Strategy(mode))
    assert trace.seconds < time.perf_counter() - start - 0.05
