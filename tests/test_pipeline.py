"""From a request to a caption: every field of a strategy has its effect, and generations do not disturb each other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgecloud_sd import gate
from edgecloud_sd.acceptance import Rank, Synthetic
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.events import Ahead, Committed, Drafted, Trace, Verified
from edgecloud_sd.lookup import START, Match
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile
from tests.support.serving import served

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


def test_a_verdict_has_a_rest_if_the_strategy_reads_it(pipeline: Pipeline, remote: Pipeline, request_: Request) -> None:
    for place, revise in ((pipeline, "repeat"), (remote, "repeat"), (remote, "none")):
        trace = place.trace(request_, replace(ALWAYS, revise=revise), NEW_TOKENS)
        verified = [event for _, event in trace.events if isinstance(event, Verified)]
        opinions = [len(event.draft.tokens) - event.verdict.accepted - 1 for event in verified]
        assert max(opinions) > 0
        expected = [0 if revise == "none" else max(count, 0) for count in opinions]
        assert [len(event.verdict.rest) for event in verified] == expected


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


def test_lookup_learns_from_the_captions_of_its_own_strategy(pipeline: Pipeline, request_: Request) -> None:
    learning, guesses = fresh(pipeline), Strategy("edge", drafter="model+lookup")
    own, first = (learning.trace(request_, strategy) for strategy in (Strategy("edge"), guesses))
    again = learning.trace(request_, guesses)
    assert own.tokens == first.tokens == again.tokens
    counts = [
        sum(len(event.passes) for _, event in trace.events if isinstance(event, Drafted)) for trace in (first, again)
    ]
    assert counts[1] <= len(own.tokens) / 8 + 1 < counts[0]
    history = learning.history(guesses, "chinese")
    assert history is not None
    assert history.match([START]) == Match(1, own.tokens[0])
    others = learning.history(guesses, "english"), learning.history(Strategy(drafter="model+lookup"), "chinese")
    assert [other and other.match([START]) for other in others] == [None, None]
    assert learning.history(Strategy("edge"), "chinese") is None
    learning.forget_captions()
    assert history.match([START]) is None


@pytest.mark.slow
def test_drafter_lookup_never_loads_the_edge(pipeline: Pipeline, request_: Request) -> None:
    bare = Pipeline(pipeline.pair, pipeline.cloud)
    bare.front_end = pipeline.edge  # reading it again would take a second
    caption = bare.trace(request_, Strategy(k=8, drafter="lookup"))
    assert bare.text(caption.tokens, "cloud")
    assert caption.tokens == pipeline.trace(request_, Strategy("cloud")).tokens
    assert "edge" not in vars(bare)


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


@pytest.mark.slow
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


ENTROPY = gate.entropy_gate(1.0)
# every kind of strategy whose output is determined: a lossy one needs a k, because its output depends on it
KINDS = (
    Strategy("edge"),
    Strategy("cloud"),
    Strategy(k=3),
    Strategy(k=None, draft_ahead=4),
    Strategy(k=None, prefill="lazy"),
    Strategy(k=9, draft_ahead=9, prefill="lazy"),
    Strategy(k=4, draft_stop=gate.parse_draft_stop("margin=0.3", gate.ALWAYS)),
    Strategy(gate=ENTROPY, rule=Rank(3), k=4),
    Strategy(gate=ENTROPY, k=5, draft_stop=gate.parse_draft_stop("entropy", ENTROPY), draft_ahead=3),
    Strategy(gate=gate.NEVER),
    Strategy(rule=Synthetic((0.8, 0.5)), k=4, prefill="lazy"),
)
AT_ONCE, NEW_TOKENS = 8, 12
Jobs = list[tuple[Request, Strategy]]


@pytest.fixture(scope="module")
def remote(pipeline: Pipeline) -> Iterator[Pipeline]:
    """Yield the pocket pair with its cloud behind a server."""
    assert isinstance(pipeline.cloud, LocalCloud)
    with served(pipeline.cloud) as url:
        connection = Connection(url)
        yield pipeline.with_cloud(connection)
        connection.close()


def interleave(pipeline: Pipeline, jobs: Jobs) -> list[tuple[int, ...]]:
    """Decode all jobs in one thread, one event of a random job after the other."""
    order = random.Random(0)
    running = {index: pipeline.events(*job, NEW_TOKENS) for index, job in enumerate(jobs)}
    tokens: list[tuple[int, ...]] = [() for _ in jobs]
    while running:
        index = order.choice(list(running))
        event = next(running[index], None)
        if event is None:
            del running[index]
        elif isinstance(event, Committed):
            tokens[index] += event.tokens
    return tokens


def run_on_threads(pipeline: Pipeline, jobs: Jobs) -> list[tuple[int, ...]]:
    """Decode all jobs at once, each on a thread."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: pipeline.trace(job[0], job[1], NEW_TOKENS).tokens, jobs))


@pytest.mark.parametrize(
    ("place", "run", "turns"),
    [
        ("remote", run_on_threads, 1),
        *(
            pytest.param(place, run, 3, marks=pytest.mark.slow)  # three turns give every clip three kinds
            for place in ("pipeline", "remote")
            for run in (interleave, run_on_threads)
        ),
    ],
)
def test_captions_at_once_equal_their_solo_runs(
    request: pytest.FixtureRequest, place: str, run: Callable[[Pipeline, Jobs], list[tuple[int, ...]]], turns: int
) -> None:
    shared = fresh(request.getfixturevalue(place))
    requests = [Request(clips.make_clip("evaluation", index).samples, "chinese") for index in range(AT_ONCE)]
    for turn in range(turns):
        jobs = [(requests[index], KINDS[(3 * turn + index) % len(KINDS)]) for index in range(AT_ONCE)]
        alone = [solo_tokens(fresh(request.getfixturevalue("pipeline")), *job) for job in jobs]
        assert run(shared, jobs) == alone


SOLO: dict[tuple[bytes, Strategy], tuple[int, ...]] = {}


def solo_tokens(pipeline: Pipeline, request: Request, strategy: Strategy) -> tuple[int, ...]:
    """Return the tokens of a caption that runs alone, computed once."""
    key = request.samples.tobytes(), strategy
    if key not in SOLO:
        SOLO[key] = pipeline.trace(request, strategy, NEW_TOKENS).tokens
    return SOLO[key]


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


@pytest.mark.slow
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
