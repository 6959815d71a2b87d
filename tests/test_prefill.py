"""Eager and lazy prefill: the messages, the waits, and a failed prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import pytest
import torch

from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import Degraded, Escalated, Event, Finished, Opened, Prompt, Span, Trace, Verdict
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.prefill import EagerPrefill
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import CloudFault, Verification
from tests.support.fakes import UNSURE, Scripted
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ToyEngine, served
from tests.support.strategies import play

PROMPT = Prompt((5, 6), torch.zeros(2, 3))
STOPPING = Stopping(frozenset(), 6)
WHEN = ["eager", "lazy"]


class Counting:
    """A cloud that records its calls, and fails a given number of times."""

    def __init__(self, fails: int = 0, error: type[Exception] = CloudFault) -> None:
        self.done: list[str] = []
        self._fails = fails
        self._error = error

    def open(self, prompt: Prompt) -> Counting:
        self.done.append("open")
        return self

    def wait(self) -> None:
        self.done.append("wait")
        if self._fails:
            self._fails -= 1
            raise self._error("cannot be had")

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self.done.append("verify")
        return Verdict(len(draft), 0)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        self.done.append("generate")
        return iter(())

    def close(self) -> None:
        self.done.append("close")


def opened(cloud: Counting, when: str) -> Verification:
    return Harness().deferred(cloud, when).open(PROMPT)


def test_lazy_prefill_sends_nothing_if_no_draft_escalates() -> None:
    cloud = Counting()
    opened(cloud, "lazy").close()
    assert cloud.done == []


def test_eager_prefill_opens_and_closes_a_prompt_that_never_escalates() -> None:
    cloud = Counting()
    opened(cloud, "eager").close()
    assert set(cloud.done) - {"wait"} == {"close", "open"}  # told in time, it need not wait to be ready
    assert cloud.done[-1] == "close"
    assert cloud.done.count("open") == 1


@pytest.mark.parametrize("when", WHEN)
def test_the_first_call_opens_the_prompt_and_no_call_opens_it_twice(when: str) -> None:
    for first in ("wait", "verify", "generate"):
        cloud = Counting()
        verification = opened(cloud, when)
        for name in (first, "wait", "verify", "generate", "wait"):
            if name == "wait":
                verification.wait()
            elif name == "verify":
                verification.verify(0, [1], [1])
            else:
                verification.generate(STOPPING)
        verification.close()
        assert cloud.done[:2] == ["open", "wait"]
        assert cloud.done.count("open") == 1
        assert cloud.done[-1] == "close"
        assert cloud.done.count("close") == 1


@pytest.mark.parametrize("when", WHEN)
def test_a_fault_of_the_prefill_is_raised_by_the_wait_and_closing_does_not_try_again(when: str) -> None:
    cloud = Counting(fails=1)
    verification = opened(cloud, when)
    with pytest.raises(CloudFault, match="cannot be had"):
        verification.wait()
    verification.close()
    assert [name for name in cloud.done if name != "close"] == ["open", "wait"]
    assert cloud.done[-1] == "close"  # there may be something to give back even so


@pytest.mark.parametrize("error", [CloudFault, ValueError, RuntimeError, MemoryError])
@pytest.mark.parametrize("when", WHEN)
def test_closing_never_raises(when: str, error: type[Exception]) -> None:
    cloud = Counting(fails=9, error=error)
    opened(cloud, when).close()
    verification = opened(cloud, when)
    with pytest.raises(error):
        verification.wait()
    verification.close()


def test_a_failed_prefill_that_nobody_waits_for_is_ignored() -> None:
    def begin(call: Callable[[], Verification]) -> Future[Verification]:
        done: Future[Verification] = Future()
        with pytest.raises(RuntimeError) as caught:
            call()
        done.set_exception(caught.value)
        return done

    cloud = Counting(fails=1, error=RuntimeError)
    EagerPrefill(cloud, begin).open(PROMPT).close()
    assert cloud.done[:2] == ["open", "wait"]
    assert cloud.done[-1] == "close"


@dataclass(frozen=True)
class Late:
    """A call that starts when its result is asked for."""

    result: Callable[[], Verification]

    def done(self) -> bool:
        return False


def test_a_prefill_that_starts_after_the_end_is_closed_without_a_wait() -> None:
    cloud = Counting()
    EagerPrefill(cloud, Late).open(PROMPT).close()
    assert cloud.done == ["open", "close"]


def test_a_wait_after_a_failed_prefill_opens_the_prompt_again() -> None:
    for when in WHEN:
        cloud = Counting(fails=1)
        verification = opened(cloud, when)
        with pytest.raises(CloudFault):
            verification.wait()
        assert verification.verify(0, [1], [1, 1]) == Verdict(2, 0)
        assert cloud.done.count("open") == 2
        verification.close()


def test_a_closed_prompt_is_not_tried_again() -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(0.005)

    with served(ToyEngine()) as url, Proxy(url) as proxy:
        connection = Connection(proxy.url, patience=1000.0, sleep=sleep)
        harness = Harness()
        verifier = connection.verifier(GREEDY, harness)
        proxy.plan([Fault.REFUSED] * 1000)
        harness.deferred(verifier, "eager").open(Prompt((1, 2))).close()
        connection.close()
    assert len(slept) < 100  # of some 270


# The tests below run on the virtual clock. Features take 0.125 s.

PROFILE = Profile(
    "scripted",
    edge=Costs(prefill=2.0, forward=((1, 0.5), (2, 0.75))),
    cloud=Costs(prefill=3.0, forward=((1, 1.0), (5, 2.0))),
    features=0.125,
    gate=0.0625,
    queue=0.25,
)
LINK = Link("scripted", rtt=0.5, up=8192, down=8192)
EDGE = Scripted(wrong=frozenset({3}), unsure=frozenset({3, 4}))  # rounds of two: the second and third escalate


def caption(when: str, chosen: gate.Gate, profile: Profile = PROFILE) -> Trace:
    strategy = Strategy("speculative", chosen, k=2, prefill=when)
    return play(PROMPT, EDGE, Scripted(), strategy, STOPPING, Harness(profile, LINK))


def moment(trace: Trace, what: Event | type[Event]) -> float:
    return next(seconds for seconds, event in trace.events if event == what or event.__class__ is what)


def opening(trace: Trace) -> float:
    """Return the seconds that the cloud takes: the request's way, the queue and the prefill."""
    size = max(span.size for span in trace.spans)
    return 0.25 + 8 * size / LINK.up + PROFILE.queue + PROFILE.cloud.prefill


@pytest.mark.parametrize("prefill", [0.5, 2.0, 8.0])
def test_eager_prefill_takes_the_longer_of_both_sides_and_not_their_sum(prefill: float) -> None:
    profile = replace(PROFILE, edge=replace(PROFILE.edge, prefill=prefill))
    eager, lazy = caption("eager", gate.ALWAYS, profile), caption("lazy", gate.ALWAYS, profile)
    escalated = 0.125 + prefill + 2 * 0.5  # one draft of two tokens
    assert moment(eager, Escalated) == moment(lazy, Escalated) == escalated
    assert moment(eager, Opened("cloud")) == pytest.approx(max(escalated, 0.125 + opening(eager)))
    assert moment(lazy, Opened("cloud")) == pytest.approx(escalated + opening(lazy))
    assert eager.tokens == lazy.tokens
    # and only that much earlier is all that follows
    gain = moment(lazy, Opened("cloud")) - moment(eager, Opened("cloud"))
    assert lazy.seconds - eager.seconds == pytest.approx(gain)
    assert metrics.wire_bytes(eager) == metrics.wire_bytes(lazy)


@pytest.mark.parametrize("prefill", [0.5, 2.0, 2.625, 8.0])
def test_only_the_wait_for_the_prefill_is_in_the_breakdown(prefill: float) -> None:
    profile = replace(PROFILE, edge=replace(PROFILE.edge, prefill=prefill))
    trace = caption("eager", gate.ALWAYS, profile)
    escalated, waited = moment(trace, Escalated), moment(trace, Opened("cloud"))
    beside = [span for span in trace.spans if escalated <= span.start and span.end <= waited]
    assert sum(span.end - span.start for span in beside) <= waited - escalated + 1e-9
    kept = latency_breakdown(trace)
    assert min(kept.parts.values()) >= -1e-9
    assert kept.seconds == pytest.approx(trace.seconds)
    exposed = waited - escalated
    assert kept.parts["cloud_prefill"] == pytest.approx(min(exposed, PROFILE.cloud.prefill))
    assert (exposed == 0) == (prefill == 8.0)


@pytest.mark.parametrize("when", WHEN)
def test_a_caption_that_never_escalates_spends_no_time_on_the_cloud(when: str) -> None:
    sure = replace(UNSURE, threshold=1.5)
    trace = caption(when, sure)
    assert not any(isinstance(event, Escalated) or event == Opened("cloud") for _, event in trace.events)
    assert trace.seconds == pytest.approx(0.125 + 2.0 + 6 * (0.5 + 0.0625))
    kept = latency_breakdown(trace)
    assert kept.seconds == pytest.approx(trace.seconds)
    assert kept.parts["cloud_prefill"] == kept.parts["uplink"] == kept.parts["cloud_queue"] == 0
    found = metrics.wire_bytes(trace)
    assert found is not None
    # what was sent has crossed, needed or not
    assert (found[0] > 0) == (when == "eager")


def test_a_failed_prefill_is_recorded_once() -> None:
    class Failing:
        def open(self, prompt: Prompt) -> Verification:
            harness.send_up(1000)
            raise CloudFault("cannot be had")

    harness = Harness(PROFILE, LINK)
    verifier = harness.deferred(Failing(), "eager")
    runtime = Runtime(finish_alone=True)
    events = decode(PROMPT, Strategy("speculative", k=2), STOPPING, harness.edge(EDGE), verifier, runtime)
    trace = stamp(events, harness.watch)
    assert [event for _, event in trace.events if isinstance(event, Degraded)] == [Degraded("cannot be had")]
    assert isinstance(trace.events[-1][1], Finished)
    assert [span for span in trace.spans if span.size] == [Span("uplink", 3.0, 3.0, 1000)]
