"""The latency breakdown of a request: the spans of its trace, summed by part, and the remainder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edgecloud_sd.events import BREAKER_MARKS, Ahead, Committed, Drafted, Escalated, Opened, Trace, Verified

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
    """Return the seconds of the forward passes that drafted discarded tokens. Each draft token took one pass."""
    passes: Iterator[float] = (span.seconds for span in trace.spans if span.part == "draft")
    discarded = 0.0
    draft: list[float] = []  # seconds of each token of the round's draft that is not committed yet
    ahead: list[float] = []  # seconds of each token drafted beyond it
    guess = None
    for _, event in trace.events:
        if isinstance(event, Drafted):
            discarded += sum(draft)
            new = [next(passes, 0.0) for _ in event.draft.tokens[event.ahead :]]
            draft, ahead = [*ahead[: event.ahead], *new], ahead[event.ahead :]
        elif isinstance(event, Ahead):
            ahead += [next(passes, 0.0) for _ in range(event.made)]
            guess = event.guess
        elif isinstance(event, Verified):
            if event.right(guess):
                del ahead[0]
            else:
                discarded += sum(ahead)
                ahead = []
        elif isinstance(event, Committed) and event.origin in ("local", "accepted"):
            del draft[: len(event.tokens)]
    return discarded + sum(draft) + sum(ahead)


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
