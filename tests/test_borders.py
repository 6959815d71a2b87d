"""The borders of a generation: requests that do not fit, and clouds that are dead before the first call."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd import config, gate
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.cloud.retry import PATIENCE
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.cloud.transport import Transport
from edgecloud_sd.connect import connect
from edgecloud_sd.events import Committed, Event
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.prefill import PREFILL_TIMES
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import CloudFault
from tests.support.serving import ToyEngine, served

LIMIT = 67  # tokens; a clip of one second has a prompt of 59
SAMPLES = clips.make_clip("evaluation", 4).samples
CLOUD, LOSSLESS = Strategy("cloud"), Strategy("speculative", k=4)
ADAPTIVE = Strategy(k=None, draft_ahead=4)
NEVER = Strategy("speculative", gate.NEVER)
OPTION = f"the limit --max-tokens of the cloud's server, {LIMIT} tokens: "
MODEL = f"the maximum length of the cloud's model cloud, {LIMIT} tokens: "


@pytest.fixture(scope="module")
def remote(pipeline: Pipeline) -> Iterator[Pipeline]:
    """Yield the pocket pair with its cloud behind a server of few tokens."""
    assert isinstance(pipeline.cloud, LocalCloud)
    with served(pipeline.cloud, ServiceLimits(max_tokens=LIMIT, max_audio_seconds=1.1)) as url:
        connection = Connection(url, patience=0.0)
        yield pipeline.with_cloud(connection)
        connection.close()


@pytest.fixture(scope="module")
def short(pipeline: Pipeline) -> Pipeline:
    """Return the pocket pair with a cloud of few positions in this process."""
    cloud = LocalCloud(pipeline.pair.cloud)
    cloud.__dict__["model"] = pipeline.cloud_model
    cloud.__dict__["identity"] = replace(pipeline.cloud.identity, max_length=LIMIT)
    return pipeline.with_cloud(cloud)


@pytest.fixture
def dead() -> Iterator[str]:
    """Yield the URL of a port on which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def outcome(pipeline: Pipeline, request: Request, strategy: Strategy, new_tokens: int) -> tuple[int, ...] | str:
    """Return the tokens of a caption, or the message of a refusal before the first event."""
    seen: list[Event] = []
    try:
        seen += pipeline.events(request, strategy, new_tokens)
    except ValueError as error:
        assert not seen
        return str(error)
    return tuple(token for event in seen if isinstance(event, Committed) for token in event.tokens)


@pytest.mark.slow
def test_cloud_and_lossless_mode_agree_on_what_fits(remote: Pipeline, short: Pipeline) -> None:
    @settings(max_examples=30)
    @given(
        st.integers(2000, 17_000),
        st.integers(-12, 3),
        st.one_of(st.none(), st.integers(1, 9)),
        st.integers(0, 9),
        st.sampled_from(PREFILL_TIMES),
        st.booleans(),
    )
    def check(length: int, excess: int, k: int | None, ahead: int, prefill: str, is_served: bool) -> None:
        pipeline, limit = (remote, OPTION) if is_served else (short, MODEL)
        request = Request(SAMPLES[:length])
        prompt_tokens = len(pipeline.prompt(request).ids)
        new_tokens = max(LIMIT - prompt_tokens + excess, 1)
        lossless = Strategy("speculative", k=k, draft_ahead=ahead, prefill=prefill)
        outcomes = {outcome(pipeline, request, strategy, new_tokens) for strategy in (CLOUD, lossless)}
        assert len(outcomes) == 1
        if prompt_tokens + new_tokens > LIMIT:
            sizes = f"a prompt of {prompt_tokens} tokens and {new_tokens} new tokens exceed "
            assert sizes + limit in str(outcomes)
        else:
            assert not isinstance(outcomes.pop(), str)

    check()


@pytest.mark.parametrize("strategy", [Strategy("edge"), NEVER, LOSSLESS], ids=lambda strategy: strategy.label)
def test_the_maximum_length_of_the_edge_counts(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    monkeypatch.setattr(pipeline.edge.thinker.config.text_config, "max_position_embeddings", LIMIT)
    request = Request(SAMPLES[:16_000])
    assert not isinstance(outcome(pipeline, request, strategy, 8), str)
    assert "9 new tokens exceed the maximum length of the edge's model" in str(outcome(pipeline, request, strategy, 9))
    assert not isinstance(outcome(pipeline, request, CLOUD, 9), str)


def test_a_draft_beyond_the_servers_limit_is_refused_before_the_first_token(pipeline: Pipeline) -> None:
    message = "a draft of 5 tokens exceeds the limit of the cloud's server, 4 tokens: use a --k and a --draft-ahead of"
    assert isinstance(pipeline.cloud, LocalCloud)
    with (
        served(pipeline.cloud, ServiceLimits(max_draft=4)) as url,
        closing(Connection(url, patience=0.0)) as connection,
    ):
        remote, request = pipeline.with_cloud(connection), Request(SAMPLES[:4000])
        for strategy in (Strategy(k=5), Strategy(k=1, draft_ahead=9), Strategy(gate=gate.entropy_gate(0.1), k=7)):
            assert message in str(outcome(remote, request, strategy, 5))
            assert not isinstance(outcome(remote, request, strategy, 4), str)
        for strategy in (Strategy(k=4, draft_ahead=4), NEVER, CLOUD):
            assert not isinstance(outcome(remote, request, strategy, 6), str)
        lossy = Strategy(gate=gate.entropy_gate(0.1), k=4, draft_ahead=9)
        assert not isinstance(outcome(remote, request, lossy, 6), str)


def test_audio_beyond_the_servers_limit_is_refused_before_the_first_token(remote: Pipeline) -> None:
    message = "1.25 s of audio exceed the limit --max-audio-seconds of the cloud's server, 1.1 s"
    for strategy in (CLOUD, LOSSLESS, Strategy("speculative", gate.entropy_gate(9.0))):
        assert message in str(outcome(remote, Request(SAMPLES), strategy, 1))
    assert not isinstance(outcome(remote, Request(SAMPLES), NEVER, 1), str)


def test_a_gate_that_never_escalates_asks_no_cloud(pipeline: Pipeline, dead: str) -> None:
    alone = pipeline.trace(Request(SAMPLES), Strategy("edge")).tokens
    assert not NEVER.asks_cloud
    run = config.resolve({"mode": "speculative", "gate": "never", "cloud-url": dead, "shadow": "no"})
    with connect(run) as cloud:
        offline = pipeline.with_cloud(cloud)
        assert offline.trace(Request(SAMPLES), NEVER).tokens == alone
        assert "model" not in cloud.__dict__


@pytest.mark.parametrize("prefill", PREFILL_TIMES)
def test_the_edge_captions_alone_if_the_cloud_is_dead_from_the_start(
    pipeline: Pipeline, dead: str, prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, "edge", 0.0)
    alone = pipeline.trace(Request(SAMPLES), Strategy("edge")).tokens
    run = config.resolve({"mode": "speculative", "cloud-url": dead, "on-cloud-fault": "edge"})
    with connect(run) as cloud:
        offline = Pipeline.from_settings(run, cloud)
        offline.edge = pipeline.edge
        for strategy in (
            replace(LOSSLESS, prefill=prefill),
            Strategy(gate=gate.entropy_gate(0.01), rule=Rank(3)),
            ADAPTIVE,
        ):
            trace = offline.trace(Request(SAMPLES), strategy)
            assert trace.tokens == alone
            assert "the cloud failed" in str(metrics.degraded_reason(trace))
        assert offline.text(trace.tokens) == pipeline.text(alone)
        with pytest.raises(CloudFault):
            offline.trace(Request(SAMPLES), CLOUD)


def test_the_wait_for_a_cloud_that_is_away_is_part_of_the_caption(
    pipeline: Pipeline, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, "edge", 0.1)
    run = config.resolve({"mode": "cloud,lossless", "cloud-url": dead, "on-cloud-fault": "edge"})
    with connect(run) as cloud:
        offline = Pipeline.from_settings(run, cloud)
        offline.edge = pipeline.edge
        traces = [offline.trace(Request(SAMPLES), LOSSLESS, 4) for _ in range(3)]
    breakdowns = [latency_breakdown(trace) for trace in traces]
    assert [breakdown.parts["faults"] > 0.05 for breakdown in breakdowns] == [True, True, False]
    assert [metrics.breaker_openings(trace) for trace in traces] == [0, 1, 0]
    assert [metrics.met_open_breaker(trace) for trace in traces] == [False, False, True]
    for trace, breakdown in zip(traces, breakdowns, strict=True):
        assert breakdown.closure(trace.seconds) == pytest.approx(1)


@pytest.mark.slow
def test_a_cloud_that_comes_back_is_compared_before_it_is_asked(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection("http://127.0.0.1:1", patience=0.0)
    offline = Pipeline(cloud=connection, finish_alone=True)
    offline.edge = pipeline.edge
    assert metrics.degraded_reason(offline.trace(Request(SAMPLES), LOSSLESS, 4)) is not None
    with served(pipeline.cloud) as url, served(ToyEngine()) as foreign:  # type: ignore[arg-type]
        connection.transport = Transport(foreign, None, 10.0)
        with pytest.raises(ValueError, match="edge"):
            offline.trace(Request(SAMPLES), LOSSLESS, 4)
        del connection.identity
        connection.transport.close()
        connection.transport = Transport(url, None, 10.0)
        assert metrics.degraded_reason(offline.trace(Request(SAMPLES), LOSSLESS, 4)) is None
        connection.close()


@pytest.mark.parametrize("values", [{"on-cloud-fault": "error"}, {"on-cloud-fault": "edge", "mode": "cloud"}])
def test_a_run_that_needs_its_cloud_ends_without_it(
    dead: str, values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, "edge", 0.0)
    run = config.resolve({"mode": "lossless", "cloud-url": dead} | values)
    with pytest.raises(CloudFault, match=f"--cloud-url: {dead}: "), connect(run):
        pass
