"""The latency breakdown of a request: the spans of its trace, summed by part, and the remainder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from edgecloud_sd.events import (
    BREAKER_MARKS,
    Ahead,
    Committed,
    Confirmed,
    Degraded,
    Drafted,
    Escalated,
    Event,
    Opened,
    Retracted,
    Trace,
    Verified,
)

PARTS = {
    "features": "The log-mel spectrogram and the prompt.",
    "edge_prefill": "The edge's audio encoder and prefill.",
    "cloud_prefill": "The cloud's audio encoder and prefill, as far as the edge waited for them.",
    "draft": "The edge's forward passes.",
    "gate": "The scores that the gate and the draft stop read.",
    "uplink": "A request on its way over an emulated link.",
    "network": "A real service: request and answer on their way, packing and unpacking included.",
    "cloud_queue": "A request in the cloud's queue.",
    "verify": "The cloud's forward pass over a draft, and its verdict.",
    "cloud_decode": "The cloud's own steps, in mode cloud.",
    "downlink": "An answer on its way back over an emulated link.",
    "faults": "Failed attempts to reach the cloud, the waits between them, and a repeated prefill.",
    "rollback": "Repairing a cache after a rejection: cutting it back, and the cost of a correction in a cost profile.",
    "other": "The remainder: the loop's own work between the parts, the edge's argmax included.",
}


@dataclass(frozen=True)
class LatencyBreakdown:
    """Seconds per part, with every name of `PARTS`.

    `discarded` are the seconds of `draft` that went into discarded tokens. `exposed` are the seconds from sending a
    draft to its verdict in which the edge waited. They are also part of the wall time. `hidden` are the seconds of
    verifications in which the edge drafted ahead. They belong to no part.
    """

    parts: dict[str, float]
    discarded: float
    exposed: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of the parts: the seconds of the trace, up to rounding."""
        return sum(self.parts.values())

    def closure(self, wall: float) -> float:
        """Return the sum of the parts divided by the wall seconds of another clock. A perfect closure is 1."""
        return self.seconds / wall

    def unnamed(self, wall: float) -> float:
        """Return the share of the wall seconds in no part but `other`."""
        return 1 - (self.seconds - self.parts["other"]) / wall


def latency_breakdown(trace: Trace) -> LatencyBreakdown:
    """Return the breakdown of one request."""
    parts = dict.fromkeys(PARTS, 0.0)
    for span in trace.spans:
        if span.part not in BREAKER_MARKS:
            parts[span.part] += span.end - span.start
    parts["other"] += trace.seconds - sum(parts.values())
    return LatencyBreakdown(parts, discarded_seconds(trace), *round_trips(trace))


def discarded_seconds(trace: Trace) -> float:
    """Return the seconds of the edge's forward passes for tokens that it drafted, and that are not output at the end.

    The new tokens of a draft share the seconds of its passes equally, unless each has a pass of its own.
    """
    seconds = _DraftSeconds(trace)
    for time, event in trace.events:
        seconds.see(time, event)
    seconds.discard(seconds.draft)
    seconds.discard(seconds.ahead)
    return seconds.discarded


class _DraftSeconds:
    """The seconds of the forward passes behind each drafted token, until it is final or discarded."""

    def __init__(self, trace: Trace) -> None:
        self._passes = deque(span for span in trace.spans if span.part == "draft")
        self._guess: int | None = None
        self._shown: list[float] = []  # one for each local token that is not final
        self.draft: list[float] = []  # one for each draft token that is not output, and for the doubted token
        self.ahead: list[float] = []  # one for each token drafted beyond the draft
        self.discarded = 0.0

    def see(self, time: float, event: Event) -> None:
        """Follow one more event."""
        if isinstance(event, Drafted):
            self._see_draft(event)
        elif isinstance(event, Ahead):
            new = self._take(sum(span.end <= time for span in self._passes))
            self.ahead += [0.0] * (event.made - len(new)) + new  # the others come from a wide pass of an earlier draft
            self._guess = event.guess
        elif isinstance(event, Verified):
            if event.right(self._guess):
                del self.ahead[0]
            else:
                self.discard(self.ahead)
            if event.draft.doubted is not None and not event.changes_text:
                self.draft.clear()  # the edge's pass gave the token that the cloud wrote
        elif isinstance(event, Degraded):
            self._shown += self.draft  # the edge goes on with these tokens
            self.draft.clear()
        elif isinstance(event, Confirmed):
            del self._shown[: event.count]
        elif isinstance(event, Retracted):
            self.discard(self._shown)
        elif isinstance(event, Committed) and event.origin in ("local", "accepted"):
            self._shown = [] if event.is_final else self._shown + self.draft[: len(event.tokens)]
            del self.draft[: len(event.tokens)]

    def discard(self, tokens: list[float]) -> None:
        """Count the seconds of the tokens as discarded."""
        self.discarded += sum(tokens)
        tokens.clear()

    def _see_draft(self, event: Drafted) -> None:
        self.discard(self.draft)
        new = self._take(len(event.passes))
        is_doubted_new = event.draft.doubted is not None and len(self.ahead) == event.ahead
        count = len(event.draft.tokens) - event.ahead + is_doubted_new
        self.draft = self.ahead[: event.ahead] + (new if len(new) == count else [sum(new) / max(count, 1)] * count)
        del self.ahead[: event.ahead]

    def _take(self, count: int) -> list[float]:
        """Return the seconds of the next passes."""
        return [self._passes.popleft().seconds for _ in range(min(count, len(self._passes)))]


def round_trips(trace: Trace) -> tuple[float, float]:
    """Return (seconds exposed, seconds hidden) of the verifications of a request. Prefill is no verification."""
    exposed = sent = answered = 0.0
    for seconds, event in trace.events:
        if isinstance(event, Escalated | Opened | Ahead):
            sent = seconds
        elif isinstance(event, Verified):
            exposed += seconds - sent
            answered = seconds
    # a verification that failed at the end has no answer, so it counts as none
    return exposed, sum(span.hidden for span in trace.spans if span.end <= answered)


def mean_breakdown(breakdowns: Iterable[LatencyBreakdown]) -> LatencyBreakdown:
    """Return the mean seconds per part. Raise ValueError without a breakdown."""
    breakdowns = list(breakdowns)
    if not breakdowns:
        raise ValueError("no breakdown to take the mean of")
    n = len(breakdowns)
    return LatencyBreakdown(
        {name: sum(breakdown.parts[name] for breakdown in breakdowns) / n for name in PARTS},
        *(sum(getattr(b, name) for b in breakdowns) / n for name in ("discarded", "exposed", "hidden")),
    )
