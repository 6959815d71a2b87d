"""Time, from outside the decode loop: real and virtual clocks, and the stamping of events."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from edgecloud_sd.records import Event, Span, Trace

Clock = Callable[[], float]  # gives seconds
real: Clock = time.perf_counter
T = TypeVar("T")


class VirtualClock:
    """Stands still until told how long something took: the same numbers on every run and machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Watch:
    """Started when a request is made; notes the spans of time that events alone cannot tell apart."""

    def __init__(self, clock: Clock = real) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self.start = clock()

    def seconds(self) -> float:
        """Since the request."""
        return self.clock() - self.start

    def timed(self, part: str, call: Callable[..., T], *arguments: object, size: int = 0) -> T:
        """`call(*arguments)`, its time noted as a span of `part`."""
        start = self.seconds()
        result = call(*arguments)
        self.spans.append(Span(part, start, self.seconds(), size))
        return result


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Garbage collections look at what is made inside alone: one over a whole process can take as long as a caption."""
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def stamp(events: Iterable[Event], watch: Watch | None = None) -> Trace:
    """Run the generator to its end and note when each event came, in seconds since the watch was started (or now)."""
    watch = watch or Watch()
    stamped = tuple(stream(events, watch))
    # what is cleared away after the last event is no part of the caption
    return Trace(stamped, tuple(span for span in watch.spans if not stamped or span.end <= stamped[-1][0]))


def stream(events: Iterable[Event], watch: Watch | None = None) -> Iterator[tuple[float, Event]]:
    """As `stamp`, but handing each event on as it comes."""
    watch = watch or Watch()
    for event in events:
        yield watch.seconds(), event
