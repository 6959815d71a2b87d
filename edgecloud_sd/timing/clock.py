"""Time, from outside the decode loop: real and virtual clocks, and the stamping of events."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from edgecloud_sd.events import Event, Finished, Span, Trace

Clock = Callable[[], float]  # gives seconds
real: Clock = time.perf_counter
_T = TypeVar("_T")


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
        self._beside = threading.local()

    def seconds(self) -> float:
        """Since the request."""
        return self.clock() - self.start

    def note(self, part: str, start: float, end: float | None = None, size: int = 0) -> None:
        """A span of `part`, from `start` to `end` or now."""
        self._noted().append(Span(part, start, self.seconds() if end is None else end, size))

    def timed(self, part: str, call: Callable[..., _T], *arguments: object, size: int = 0) -> _T:
        """`call(*arguments)`, its time noted as a span of `part`."""
        start = self.seconds()
        result = call(*arguments)
        self.note(part, start, size=size)
        return result

    def rest(self, part: str, call: Callable[[], _T]) -> _T:
        """`call()`; what of its time no span inside claims is noted as spans of `part`."""
        noted = self._noted()
        known, at = len(noted), self.seconds()
        result = call()
        inside = noted[known:]
        del noted[known:]
        for span in inside:
            if span.start > at:
                self.note(part, at, span.start)
            noted.append(span)
            at = span.end
        self.note(part, at)
        return result

    @contextmanager
    def beside(self, spans: list[Span]) -> Iterator[None]:
        """What this thread notes goes to `spans`: it happens beside the caption's own course."""
        self._beside.spans = spans
        try:
            yield
        finally:
            del self._beside.spans

    def wait(self, spans: Iterable[Span], start: float, hides: bool = False) -> None:
        """Note what was beside as far as it was waited for, from `start` to now. Payloads count, hidden or not.

        `hides`: what passed before `start` is to be told, as the spans' `hidden`.
        """
        for span in spans:
            hidden = max(min(span.end, start) - span.start, 0.0) if hides else 0.0
            self._noted().append(replace(span, start=max(span.start, start), end=max(span.end, start), hidden=hidden))

    def losses(self, part: str) -> Callable[..., None]:
        """A function to call where an attempt has failed: what it took since the last is one span.

        `sent` keeps its payloads; `again` adds to the attempt before instead of counting another.
        """
        noted = self._noted()
        known, start = len(noted), self.seconds()

        def lost(sent: bool = True, again: bool = False) -> None:
            nonlocal known, start
            payloads = [replace(span, start=start, end=start) for span in noted[known:] if span.size and sent]
            before = next((i for i in reversed(range(known)) if noted[i].part == part), None) if again else None
            noted[known:] = payloads
            if before is not None and noted[before].end == start:
                longer = replace(noted[before], end=self.seconds())
                noted[before:] = [*payloads, longer]
            else:
                self.note(part, start)
            known, start = len(noted), self.seconds()

        return lost

    def _noted(self) -> list[Span]:
        spans: list[Span] = getattr(self._beside, "spans", self.spans)
        return spans


@contextmanager
def garbage_collector_frozen() -> Iterator[None]:
    """Garbage collections look at what is made inside alone: one over a whole process can take as long as a caption."""
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def stamp(events: Iterable[Event], watch: Watch | None = None, finished: Callable[[], None] = lambda: None) -> Trace:
    """Run the generator to its end and note when each event came, in seconds since the watch was started (or now).

    `finished` is called at the last event, before anything is cleared away.
    """
    watch = watch or Watch()
    stamped = []
    for each in stream(events, watch):
        stamped.append(each)
        if isinstance(each[1], Finished):
            finished()
    end = stamped[-1][0] if stamped else 0.0
    # what is cleared away after the last event takes no time of the caption's, but what it sends has crossed the link
    after = (replace(span, start=end, end=end) for span in watch.spans if span.end > end and span.size)
    return Trace(tuple(stamped), (*(span for span in watch.spans if span.end <= end), *after))


def stream(events: Iterable[Event], watch: Watch | None = None) -> Iterator[tuple[float, Event]]:
    """As `stamp`, but handing each event on as it comes."""
    watch = watch or Watch()
    for event in events:
        yield watch.seconds(), event
