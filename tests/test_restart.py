"""The real server is killed during a caption of the pocket pair; it is started again, or it stays away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import PATIENCE
from edgecloud_sd.events import Committed, Degraded, Event, Finished, Trace, Verified
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from tests.support.service import Service

pytestmark = pytest.mark.slow
LOSSLESS_K2 = Strategy("speculative", k=2)
CLOUD = Strategy("cloud")
REQUEST = Request(clips.make_clip("evaluation", 7).samples)
LENGTH = 32


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.kill()


@contextmanager
def remote_pipeline(service: Service, policy: str) -> Iterator[Pipeline]:
    with closing(Connection(service.url, None, 10.0, PATIENCE[policy])) as connection:
        yield Pipeline(cloud=connection, finish_alone=policy == "edge")


def caption(pipeline: Pipeline, strategy: Strategy, interrupt: Callable[[], None], after: int) -> Trace:
    """Return the trace of a caption, with a call of `interrupt` once the cloud has answered `after` times."""
    harness = Harness()

    def events() -> Iterator[Event]:
        answers = 0
        for event in pipeline.events(REQUEST, strategy, LENGTH, harness):
            yield event
            answers += isinstance(event, Verified) or (isinstance(event, Committed) and event.origin == "cloud")
            if answers == after:
                interrupt()
                answers += 1

    return stamp(events(), harness.watch)


# The tests run in this order, on one server that is started three times in all.


@pytest.mark.parametrize("strategy", [LOSSLESS_K2, CLOUD], ids=lambda strategy: strategy.mode)
def test_a_restart_of_the_cloud_during_a_caption_changes_no_token(
    pipeline: Pipeline, service: Service, strategy: Strategy
) -> None:
    expected = pipeline.trace(REQUEST, strategy, LENGTH).tokens
    with remote_pipeline(service, "wait") as remote:
        plain = remote.trace(REQUEST, strategy, LENGTH)
        assert plain.tokens == expected
        interrupted = caption(remote, strategy, service.restart, after=2)
    service.wait_until_ready()
    assert interrupted.tokens == expected
    assert latency_breakdown(plain).parts["faults"] == 0
    breakdown = latency_breakdown(interrupted)
    assert breakdown.parts["faults"] > breakdown.seconds / 2  # a start takes longer than many captions
    assert breakdown.seconds == pytest.approx(interrupted.seconds)


def test_the_edge_finishes_the_caption_of_a_cloud_that_stays_away(pipeline: Pipeline, service: Service) -> None:
    expected = pipeline.trace(REQUEST, LOSSLESS_K2, LENGTH).tokens
    with remote_pipeline(service, "edge") as remote:
        trace = caption(remote, LOSSLESS_K2, service.kill, after=2)
    events = [event for _, event in trace.events]
    (mark,) = [place for place, event in enumerate(events) if isinstance(event, Degraded)]
    by_the_cloud = Trace(trace.events[:mark]).tokens
    assert len(by_the_cloud) >= 2
    assert by_the_cloud == expected[: len(by_the_cloud)]
    assert {event.origin for event in events[mark:] if isinstance(event, Committed)} == {"local"}
    assert isinstance(events[-1], Finished)
    assert latency_breakdown(trace).parts["faults"] > 0
