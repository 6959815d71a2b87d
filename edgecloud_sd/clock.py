"""Time, from outside the decode loop: a clock is any callable that gives seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from edgecloud_sd.records import Event, Trace

Clock = Callable[[], float]
real: Clock = time.perf_counter


def stamp(events: Iterable[Event], clock: Clock = real) -> Trace:
    """Run the generator to its end and note when each event came, in seconds since this call."""
    return Trace(tuple(stream(events, clock)))


def stream(events: Iterable[Event], clock: Clock = real) -> Iterator[tuple[float, Event]]:
    """As `stamp`, but handing each event on as it comes."""
    start = clock()
    for event in events:
        yield clock() - start, event
