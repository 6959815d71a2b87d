"""Clocks, watches and stamping, with every tick by hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from edgecloud_sd.events import Event, Finished, Opened, Prepared, Span, Trace
from edgecloud_sd.timing.clock import VirtualClock, Watch, garbage_collector_frozen, stamp, stream

EVENTS: list[Event] = [Opened("edge"), Finished("eos")]


def ticking(*moments: float) -> Watch:
    ticks = iter(moments)
    return Watch(lambda: next(ticks))


def test_a_virtual_clock_stands_still_until_it_is_advanced() -> None:
    clock = VirtualClock()
    assert clock() == clock() == 0
    clock.advance(0.25)
    clock.advance(0.5)
    assert clock() == clock.now == 0.75


def test_a_watch_counts_from_its_start() -> None:
    clock = VirtualClock()
    clock.advance(7)
    watch = Watch(clock)
    clock.advance(2)
    assert watch.seconds() == 2


def test_a_timed_call_records_its_span_and_returns_its_result() -> None:
    watch = ticking(10, 11, 13)
    assert watch.timed("uplink", max, 3, 4, size=12) == 4
    assert watch.spans == [Span("uplink", 1, 3, 12)]


def test_a_call_that_fails_is_not_recorded() -> None:
    watch = ticking(0, 1, 2)
    with pytest.raises(ZeroDivisionError):
        watch.timed("gate", divmod, 1, 0)
    assert watch.spans == []


def test_stamping_records_when_each_event_came() -> None:
    assert stamp(EVENTS, ticking(10, 10.5, 12)) == Trace(((0.5, EVENTS[0]), (2, EVENTS[1])))


def test_events_are_yielded_as_they_come() -> None:
    assert next(stream(EVENTS, ticking(20, 20.25))) == (0.25, EVENTS[0])


def test_stamping_keeps_the_spans_since_the_watch_started() -> None:
    watch = ticking(0, 1, 2, 3)
    watch.timed("gate", int)
    assert stamp([Prepared(3)], watch) == Trace(((3, Prepared(3)),), (Span("gate", 1, 2),))


def test_spans_after_the_last_event_are_no_part_of_the_trace() -> None:
    watch = ticking(0, 1, 2, 3)

    def events() -> Iterator[Event]:
        yield EVENTS[1]
        watch.timed("rollback", int)

    assert stamp(events(), watch) == Trace(((1, EVENTS[1]),))


def test_stamping_without_a_watch_counts_real_seconds_from_now() -> None:
    trace = stamp(EVENTS)
    assert 0 <= trace.events[0][0] <= trace.seconds
    assert trace.spans == ()


@pytest.mark.slow
def test_a_frozen_garbage_collector_visits_new_objects_alone() -> None:
    gc.unfreeze()
    try:
        with garbage_collector_frozen():
            assert gc.get_freeze_count() > 1000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as the tests have it


def test_the_end_is_reported_before_the_generator_cleans_up() -> None:
    seen: list[str] = []

    def events() -> Iterator[Event]:
        try:
            yield Finished("eos")
        finally:
            seen.append("cleared away")

    stamp(events(), on_finished=lambda: seen.append("finished"))
    assert seen == ["finished", "cleared away"]


def test_a_continued_attempt_counts_once_and_an_unsent_payload_does_not_count() -> None:
    clock = VirtualClock()
    watch = Watch(clock)
    lost = watch.record_failures("faults")
    watch.record("uplink", 0.0, 0.0, 900)
    clock.advance(1.0)
    lost(False)  # never sent
    watch.record("uplink", 1.0, 1.0, 900)
    clock.advance(2.0)
    lost()
    watch.record("uplink", 3.0, 3.0, 50)
    clock.advance(4.0)
    lost(again=True)  # a repeated fault is recorded too
    assert [(span.part, span.start, span.end, span.size) for span in watch.spans] == [
        ("faults", 0.0, 1.0, 0),
        ("uplink", 1.0, 1.0, 900),
        ("uplink", 3.0, 3.0, 50),
        ("faults", 1.0, 7.0, 0),
    ]


def test_the_remainder_of_a_call_is_the_time_that_no_span_inside_claims() -> None:
    clock = VirtualClock()
    watch = Watch(clock)

    def call(fails: bool) -> int:
        clock.advance(1.0)
        watch.timed("uplink", clock.advance, 2.0)
        clock.advance(4.0)
        if fails:
            raise ZeroDivisionError
        return 7

    assert watch.timed_remainder("verify", call, False) == 7
    with pytest.raises(ZeroDivisionError):
        watch.timed_remainder("verify", call, True)
    assert [(span.part, span.seconds) for span in watch.spans] == [
        *(("verify", 1.0), ("uplink", 2.0), ("verify", 4.0)),
        *(("faults", 1.0), ("uplink", 2.0), ("faults", 4.0)),
    ]
