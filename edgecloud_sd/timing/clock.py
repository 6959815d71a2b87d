"""Time, measured from outside the decode loop: real and virtual clocks, spans, and the stamping of events."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from edgecloud_sd.events import BREAKER_MARKS, BREAKER_OPEN, Event, Finished, Span, Trace

Clock = Callable[[], float]  # returns seconds
real: Clock = time.perf_counter
_T = TypeVar("_T")


class VirtualClock:
    """A clock that stands still until it is told how long something took. It gives equal numbers on every machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class Watch:
    """A clock that starts with a request and records the spans of its parts."""

    def __init__(self, clock: Clock = real) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self._background = threading.local()
        self.restart()

    def restart(self) -> None:
        """Let the request begin now: work before it, such as loading a model, is no part of its time."""
        self.start = self.clock()

    def seconds(self) -> float:
        """Return the seconds since the request."""
        return self.clock() - self.start

    def record(self, part: str, start: float, end: float | None = None, size: int = 0) -> None:
        """Record a span of `part` from `start` to `end`, or to now."""
        self._recorded().append(Span(part, start, self.seconds() if end is None else end, size))

    def timed(self, part: str, call: Callable[..., _T], *arguments: object, size: int = 0) -> _T:
        """Return `call(*arguments)` and record its time as a span of `part`."""
        start = self.seconds()
        result = call(*arguments)
        self.record(part, start, size=size)
        return result

    def timed_remainder(self, part: str, call: Callable[..., _T], *arguments: object) -> _T:
        """Return `call(*arguments)`. Record the time that no span inside claims as spans of `part`.

        If the call raises, that time is recorded as spans of `faults`, unless the call has recorded its failure itself.
        """
        spans = self._recorded()
        first, start = len(spans), self.seconds()
        try:
            result = call(*arguments)
        except BaseException:
            if not any(span.part in ("faults", BREAKER_OPEN) for span in spans[first:]):
                self._record_remainder("faults", spans, first, start)
            raise
        self._record_remainder(part, spans, first, start)
        return result

    def _record_remainder(self, part: str, spans: list[Span], first: int, start: float) -> None:
        """Record the time since `start` that no span from `first` on claims as spans of `part`."""
        inside = spans[first:]
        del spans[first:]
        for span in inside:
            if span.start > start:
                self.record(part, start, span.start)
            spans.append(span)
            start = span.end
        self.record(part, start)

    @contextmanager
    def in_background(self, spans: list[Span]) -> Iterator[None]:
        """Record the spans of this thread in `spans`, because they pass beside the generation's own work."""
        self._background.spans = spans
        try:
            yield
        finally:
            del self._background.spans

    def record_wait(self, spans: Iterable[Span], start: float, keep_hidden: bool = False) -> None:
        """Record the part of background `spans` that was waited for, from `start` to now. Payloads count in full.

        With `keep_hidden` each span also keeps its seconds before `start`, as `hidden`.
        """
        for span in spans:
            hidden = max(min(span.end, start) - span.start, 0.0) if keep_hidden else 0.0
            exposed = replace(span, start=max(span.start, start), end=max(span.end, start), hidden=hidden)
            self._recorded().append(exposed)

    def record_failures(self, part: str) -> Callable[..., None]:
        """Return a function to call after each failed attempt. It records the time since the last call as one span.

        With `sent` the payloads of the attempt still count. With `again` the time lengthens the span before instead of
        counting as another attempt.
        """
        spans = self._recorded()
        first, start = len(spans), self.seconds()

        def record_failure(sent: bool = True, again: bool = False) -> None:
            nonlocal first, start
            payloads = [replace(span, start=start, end=start) for span in spans[first:] if span.size and sent]
            before = next((i for i in reversed(range(first)) if spans[i].part == part), None) if again else None
            spans[first:] = payloads
            if before is not None and spans[before].end == start:
                longer = replace(spans[before], end=self.seconds())
                spans[before:] = [*payloads, longer]
            else:
                self.record(part, start)
            first, start = len(spans), self.seconds()

        return record_failure

    def _recorded(self) -> list[Span]:
        """Return the list that spans of this thread go to."""
        spans: list[Span] = getattr(self._background, "spans", self.spans)
        return spans


@contextmanager
def garbage_collector_frozen() -> Iterator[None]:
    """Let garbage collections visit new objects alone. A full collection can take as long as a caption."""
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def stamp(events: Iterable[Event], watch: Watch | None = None, on_finished: Callable[[], None] = lambda: None) -> Trace:
    """Run the events to their end, and record when each came, in seconds since the watch started (or now).

    `on_finished` is called at the last event, before the generator cleans up.
    """
    watch = watch or Watch()
    stamped = []
    for seconds, event in stream(events, watch):
        stamped.append((seconds, event))
        if isinstance(event, Finished):
            on_finished()
    end = stamped[-1][0] if stamped else 0.0
    # clean-up after the last event takes no time of the generation, but its messages and marks count
    late = [span for span in watch.spans if span.end > end and (span.size or span.part in BREAKER_MARKS)]
    at_end = (replace(span, start=end, end=end) for span in late)
    return Trace(tuple(stamped), (*(span for span in watch.spans if span.end <= end), *at_end))


def stream(events: Iterable[Event], watch: Watch | None = None) -> Iterator[tuple[float, Event]]:
    """Yield each event as it comes, with the seconds since the watch started (or now)."""
    watch = watch or Watch()
    for event in events:
        yield watch.seconds(), event
