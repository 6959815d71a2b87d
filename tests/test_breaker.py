"""The breaker of a cloud that fails repeatedly, alone and under a connection."""

from __future__ import annotations

import itertools
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.breaker import BREAKER_FAILURES, BREAKER_SECONDS, Breaker, BreakerOpen
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import PROBE_PATIENCE, PatienceEnded, Refused
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import BREAKER_OPEN, BREAKER_OPENED, Trace
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.measure.traces import trace_from_json, trace_to_json
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault
from tests.support.canned import PROMPT, SIX_TOKENS, TOY
from tests.support.serving import ToyEngine, served
from tests.support.toy import ToyModel, random_table


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_call(breaker: Breaker, error: BaseException | None = None) -> list[str]:
    """Run one call that ends with `error`. Return the mark of the breaker that it raises, if there is one."""
    try:
        with breaker.guard():
            if error:
                raise error
    except (CloudFault, KeyboardInterrupt) as raised:
        mark = getattr(raised, "breaker_mark", "")
        return [mark] if mark else []
    return []


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    marks = [run_call(breaker, PatienceEnded("no answer")) for _ in range(BREAKER_FAILURES)]
    assert marks == [[]] * (BREAKER_FAILURES - 1) + [[BREAKER_OPENED]]
    return breaker


def test_after_failures_in_a_row_a_call_is_not_tried_until_the_time_is_over() -> None:
    clock = Clock()
    breaker = opened(clock)
    with pytest.raises(BreakerOpen, match=r"not tried, because the cloud failed 2 calls in a row.*\(no answer\)"):
        breaker.guard().__enter__()
    clock.now = BREAKER_SECONDS
    with breaker.guard() as is_probe:
        assert is_probe
        assert run_call(breaker) == [BREAKER_OPEN]  # one probe at a time
    assert run_call(breaker) == []


@pytest.mark.parametrize(
    ("end", "marks"),
    [
        (PatienceEnded("no answer"), [BREAKER_OPEN]),
        (Refused("413"), []),
        (CloudFault("the caption was closed"), []),
        (KeyboardInterrupt(), []),
        (None, []),
    ],
)
def test_only_a_probe_without_an_answer_keeps_the_breaker_open(end: BaseException | None, marks: list[str]) -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = BREAKER_SECONDS
    assert run_call(breaker, end) == ([BREAKER_OPENED] if isinstance(end, PatienceEnded) else [])
    assert run_call(breaker) == marks


def test_an_answer_between_two_failures_keeps_the_breaker_closed() -> None:
    breaker = Breaker(Clock())
    for _ in range(9):
        assert run_call(breaker, PatienceEnded("no answer")) == []
        assert run_call(breaker) == []


def test_a_cloud_that_is_full_is_there_so_its_refusals_close_the_breaker() -> None:
    breaker = Breaker(Clock())
    for _ in range(3 * BREAKER_FAILURES):
        assert run_call(breaker, PatienceEnded("no answer")) == []
        assert run_call(breaker, PatienceEnded("429", is_busy=True)) == []


def test_a_call_that_began_before_the_breaker_opened_does_not_open_it_again() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    early = breaker.guard()
    early.__enter__()
    for _ in range(BREAKER_FAILURES):
        run_call(breaker, PatienceEnded("no answer"))
    clock.now = BREAKER_SECONDS - 1
    late = PatienceEnded("no answer")
    assert not early.__exit__(PatienceEnded, late, None)
    assert late.breaker_mark == ""
    clock.now = BREAKER_SECONDS
    assert run_call(breaker) == []


def test_threads_that_fail_together_open_the_breaker_once() -> None:
    breaker = Breaker(Clock())
    with ThreadPoolExecutor(8) as threads:
        marks = threads.map(lambda number: run_call(breaker, PatienceEnded("no answer")), range(64))
    assert list(itertools.chain(*marks)).count(BREAKER_OPENED) == 1


@pytest.fixture
def dead_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def caption(connection: Connection) -> Trace:
    """Return a caption that the edge may finish alone."""
    harness = Harness()
    verifier = harness.deferred(connection.verifier(GREEDY, harness), "eager")
    edge = ToyModel(random_table(TOY.vocab_size, 1), frozenset())
    events = decode(PROMPT, Strategy("speculative"), SIX_TOKENS, edge, verifier, Runtime(finish_alone=True))
    return stamp(events, harness.watch)


def test_captions_of_a_dead_cloud_wait_out_their_patience_only_until_the_breaker_opens(dead_url: str) -> None:
    delays: list[float] = []
    connection = Connection(dead_url, patience=2.0, sleep=delays.append)
    connection.identity = TOY
    traces = []
    for _ in range(4):
        traces.append(caption(connection))
        delays.append(-1.0)  # the end of a caption
    waits = [sum(group) for ended, group in itertools.groupby(delays, lambda delay: delay < 0) if not ended]
    assert len(waits) == BREAKER_FAILURES
    assert [metrics.breaker_openings(trace) for trace in traces] == [0, 1, 0, 0]
    assert [metrics.met_open_breaker(trace) for trace in traces] == [False, False, True, True]
    assert [metrics.failed_attempts(trace) > 0 for trace in traces] == [True, True, False, False]
    assert [metrics.degraded_reason(trace) is not None for trace in traces] == [True] * 4
    for trace in traces:
        assert trace_from_json(trace_to_json(trace)) == trace
        assert latency_breakdown(trace).seconds == pytest.approx(trace.seconds)
    connection.close()


def test_a_cloud_that_is_back_closes_the_breaker() -> None:
    clock = Clock()
    with served(ToyEngine()) as url:
        connection = Connection(url, patience=60.0)
        connection.breaker = opened(clock)
        with pytest.raises(BreakerOpen):
            _ = connection.identity
        clock.now = BREAKER_SECONDS
        assert connection.identity == TOY
        assert metrics.degraded_reason(caption(connection)) is None
        connection.close()


def test_a_probe_has_less_patience(dead_url: str) -> None:
    clock = Clock()
    delays: list[float] = []
    connection = Connection(dead_url, patience=60.0, sleep=delays.append)
    connection.breaker = opened(clock)
    clock.now = BREAKER_SECONDS
    with pytest.raises(PatienceEnded):
        _ = connection.identity
    assert sum(delays) <= PROBE_PATIENCE
    connection.close()


def test_a_caption_that_meets_the_breaker_open_before_its_first_call_is_counted(dead_url: str) -> None:
    clock = Clock()
    connection = Connection(dead_url, patience=0.0)
    connection.breaker = opened(clock)
    edge, harness = ToyModel(random_table(TOY.vocab_size, 1), frozenset()), Harness()
    events = generation_events(
        lambda: PROMPT, Strategy("speculative"), SIX_TOKENS, edge, connection, harness, finish_alone=True
    )
    trace = stamp(events, harness.watch)
    assert metrics.met_open_breaker(trace)
    assert metrics.degraded_reason(trace) is not None
    assert metrics.failed_attempts(trace) == 0
    connection.close()
