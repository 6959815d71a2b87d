"""Eager and lazy prefill: the calls, the waits, and a failed prefill."""

from __future__ import annotations

import threading
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
from edgecloud_sd.verifier import CloudFault, Verification, Verifier
from tests.support.fakes import UNSURE, Scripted
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ToyEngine, served
from tests.support.strategies import play

PROMPT = Prompt((5, 6), torch.zeros(2, 3))
STOPPING = Stopping(frozenset(), 6)
WHEN = ["eager", "lazy"]


class Counting:
    """A cloud that records its calls, and whose first waits fail."""

    def __init__(self, fails: int = 0, error: type[Exception] = CloudFault) -> None:
        self.calls: list[str] = []
        self._fails = fails
        self._error = error

    def open(self, prompt: Prompt) -> Counting:
        self.calls.append("open")
        return self

    def wait(self) -> None:
        self.calls.append("wait")
        if self._fails:
            self._fails -= 1
            raise self._error("cannot be had")

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self.calls.append("verify")
        return Verdict(len(draft), 0)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        self.calls.append("generate")
        return iter(())

    def close(self) -> None:
        self.calls.append("close")


def opened(cloud: Counting, when: str) -> Verification:
    return Harness().deferred(cloud, when).open(PROMPT)


def test_lazy_prefill_sends_nothing_if_no_draft_escalates() -> None:
    cloud = Counting()
    opened(cloud, "lazy").close()
    assert cloud.calls == []


def test_eager_prefill_opens_and_closes_a_prompt_that_never_escalates() -> None:
    cloud = Counting()
    opened(cloud, "eager").close()
    assert set(cloud.calls) - {"wait"} == {"close", "open"}  # the wait is left out if the close comes first
    assert cloud.calls[-1] == "close"
    assert cloud.calls.count("open") == 1


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
        assert cloud.calls[:2] == ["open", "wait"]
        assert cloud.calls.count("open") == 1
        assert cloud.calls[-1] == "close"
        assert cloud.calls.count("close") == 1


@pytest.mark.parametrize("when", WHEN)
def test_a_fault_of_the_prefill_is_raised_by_the_wait_and_closing_does_not_try_again(when: str) -> None:
    cloud = Counting(fails=1)
    verification = opened(cloud, when)
    with pytest.raises(CloudFault, match="cannot be had"):
        verification.wait()
    verification.close()
    assert [name for name in cloud.calls if name != "close"] == ["open", "wait"]
    assert cloud.calls[-1] == "close"  # the cloud may keep something of a failed prompt


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
    assert cloud.calls[:2] == ["open", "wait"]
    assert cloud.calls[-1] == "close"


@dataclass(frozen=True)
class Late:
    """A call that starts when its result is waited for."""

    result: Callable[[], Verification]

    def done(self) -> bool:
        return False


def test_a_prefill_that_starts_after_the_end_is_closed_without_a_wait() -> None:
    cloud = Counting()
    EagerPrefill(cloud, Late).open(PROMPT).close()
    assert cloud.calls == ["open", "close"]


def test_a_call_after_a_failed_prefill_opens_the_prompt_again() -> None:
    for when in WHEN:
        cloud = Counting(fails=1)
        verification = opened(cloud, when)
        with pytest.raises(CloudFault):
            verification.wait()
        assert verification.verify(0, [1], [1, 1]) == Verdict(2, 0)
        assert cloud.calls.count("open") == 2
        verification.close()


class SignalsClose:
    """A verifier whose verification sets an event when it is closed."""

    def __init__(self, verifier: Verifier, is_closed: threading.Event) -> None:
        self._verifier = verifier
        self._is_closed = is_closed

    def open(self, prompt: Prompt) -> SignalsClose:
        self._verification = self._verifier.open(prompt)
        return self

    def wait(self) -> None:
        self._verification.wait()

    def close(self) -> None:
        self._verification.close()
        self._is_closed.set()


def test_a_closed_prompt_is_not_tried_again() -> None:
    ended_by_close: list[bool] = []  # one entry per sleep between two attempts
    is_retrying, is_closed = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        is_retrying.set()
        ended_by_close.append(is_closed.wait(60))
        assert ended_by_close[-1]  # ends the retries, so that a close without effect fails soon

    with served(ToyEngine()) as url, Proxy(url) as proxy:
        connection = Connection(proxy.url, patience=1000.0, sleep=sleep)
        harness = Harness()
        verifier = SignalsClose(connection.verifier(GREEDY, harness), is_closed)
        proxy.plan([Fault.REFUSED] * 1000)
        verification = harness.deferred(verifier, "eager").open(Prompt((1, 2)))  # type: ignore[arg-type]
        assert is_retrying.wait(60)
        verification.close()
        connection.close()
    assert ended_by_close == [True]  # patience would allow some 270


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


def moment(trace: Trace, sought: Event | type[Event]) -> float:
    return next(seconds for seconds, event in trace.events if event == sought or event.__class__ is sought)


def opening(trace: Trace) -> float:
    """Return the seconds that the cloud takes: the request's way, the queue and the prefill."""
    size = max(span.size for span in trace.spans)
    return 0.25 + 8 * size / LINK.up + PROFILE.queue + PROFILE.cloud.prefill


@pytest.mark.parametrize("prefill", [0.5, 2.0, 8.0])
def test_eager_prefill_takes_the_time_of_the_slower_side_and_not_the_sum(prefill: float) -> None:
    profile = replace(PROFILE, edge=replace(PROFILE.edge, prefill=prefill))
    eager, lazy = caption("eager", gate.ALWAYS, profile), caption("lazy", gate.ALWAYS, profile)
    escalated = 0.125 + prefill + 2 * 0.5  # one draft of two tokens
    assert moment(eager, Escalated) == moment(lazy, Escalated) == escalated
    assert moment(eager, Opened("cloud")) == pytest.approx(max(escalated, 0.125 + opening(eager)))
    assert moment(lazy, Opened("cloud")) == pytest.approx(escalated + opening(lazy))
    assert eager.tokens == lazy.tokens
    # everything that follows is earlier by the same time
    gain = moment(lazy, Opened("cloud")) - moment(eager, Opened("cloud"))
    assert lazy.seconds - eager.seconds == pytest.approx(gain)
    assert metrics.wire_bytes(eager) == metrics.wire_bytes(lazy)


@pytest.mark.parametrize("prefill", [0.5, 2.0, 2.625, 8.0])
def test_only_the_wait_for_the_prefill_is_in_the_breakdown(prefill: float) -> None:
    profile = replace(PROFILE, edge=replace(PROFILE.edge, prefill=prefill))
    trace = caption("eager", gate.ALWAYS, profile)
    escalated, waited = moment(trace, Escalated), moment(trace, Opened("cloud"))
    waits = [span for span in trace.spans if escalated <= span.start and span.end <= waited]
    assert sum(span.end - span.start for span in waits) <= waited - escalated + 1e-9
    breakdown = latency_breakdown(trace)
    assert min(breakdown.parts.values()) >= -1e-9
    assert breakdown.seconds == pytest.approx(trace.seconds)
    exposed = waited - escalated
    assert breakdown.parts["cloud_prefill"] == pytest.approx(min(exposed, PROFILE.cloud.prefill))
    assert (exposed == 0) == (prefill == 8.0)


@pytest.mark.parametrize("when", WHEN)
def test_a_caption_that_never_escalates_spends_no_time_on_the_cloud(when: str) -> None:
    sure = replace(UNSURE, threshold=1.5)
    trace = caption(when, sure)
    assert not any(isinstance(event, Escalated) or event == Opened("cloud") for _, event in trace.events)
    assert trace.seconds == pytest.approx(0.125 + 2.0 + 6 * (0.5 + 0.0625))
    breakdown = latency_breakdown(trace)
    assert breakdown.seconds == pytest.approx(trace.seconds)
    assert breakdown.parts["cloud_prefill"] == breakdown.parts["uplink"] == breakdown.parts["cloud_queue"] == 0
    sizes = metrics.wire_bytes(trace)
    assert sizes is not None
    assert (sizes[0] > 0) == (when == "eager")


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
