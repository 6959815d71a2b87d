"""Where a caption's time went: its trace, cut into named parts that add up to its wall time.

The time before an event belongs to what that event reports; a span inside it belongs to its own part instead, so that
no second is counted twice and none is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edgecloud_sd.events import Ahead, Committed, Degraded, Drafted, Escalated, Event, Opened, Prepared, Trace, Verified

PARTS = {
    "features": "computing the log-mel spectrogram and building the prompt",
    "edge_prefill": "the edge's audio encoder and prefill",
    "cloud_prefill": "the cloud's audio encoder and prefill",
    "draft": "the edge's forward passes and argmax",
    "gate": "the gate's statistic and decision",
    "uplink": "request on its way over an emulated link",
    "network": "a real service: request and answer under way, packing and unpacking included",
    "cloud_queue": "request waiting at the cloud",
    "verify": "the cloud's forward pass over a draft, and its verdict",
    "cloud_decode": "the cloud's own steps, in cloud mode",
    "downlink": "answer on its way back over an emulated link",
    "faults": "attempts on a cloud that failed, the waits between them, opening anew",
    "rollback": "cutting a cache back after a rejection",
    "other": "the loop's bookkeeping between events",
}


@dataclass(frozen=True)
class LatencyBreakdown:
    """Seconds by part, every name of `PARTS` present.

    `discarded` are those of `draft` spent on discarded tokens. Of the round trips of verdicts, from a draft's sending
    to its answer, `exposed` are the seconds that the edge waited for, and part of the wall time; `hidden` are those in
    which it drafted ahead, and no part of their own.
    """

    parts: dict[str, float]
    discarded: float
    exposed: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of the parts: the trace's own seconds, but for rounding."""
        return sum(self.parts.values())

    def closure(self, wall: float) -> float:
        """Sum of the parts / wall seconds measured by another clock around the caption; 1 is perfect."""
        return self.seconds / wall

    def unnamed(self, wall: float) -> float:
        """Share of the wall time that no part but `other` accounts for."""
        return 1 - (self.seconds - self.parts["other"]) / wall


def latency_breakdown(trace: Trace) -> LatencyBreakdown:
    """The latency breakdown of one caption.

    The seconds before an event that tells of drafted tokens are shared among those that are new: each took one forward
    pass. A discarded token's share is discarded.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for span in trace.spans:
        parts[span.part] += span.end - span.start
    discarded = 0.0
    draft: list[float] = []  # seconds of each token of the round's draft that is not committed (yet)
    ahead: list[float] = []  # and of each token that was drafted beyond it
    guess = None
    for event, seconds in intervals(trace):
        parts[part_of_event(event)] += seconds
        if isinstance(event, Drafted):
            new = len(event.draft.tokens) - event.ahead
            discarded += sum(draft)
            draft, ahead = [*ahead[: event.ahead], *[seconds / max(new, 1)] * new], ahead[event.ahead :]
        elif isinstance(event, Ahead):
            ahead += [seconds / max(event.made, 1)] * event.made
            guess = event.guess
        elif isinstance(event, Verified):
            if event.right(guess):
                del ahead[0]
            else:
                discarded += sum(ahead)
                ahead = []
        elif isinstance(event, Committed) and event.origin in ("local", "accepted"):
            del draft[: len(event.tokens)]
    return LatencyBreakdown(parts, discarded + sum(draft) + sum(ahead), *round_trips(trace))


def round_trips(trace: Trace) -> tuple[float, float]:
    """Return (s exposed, s hidden) of a caption's round trips; the prefill of the cloud is none."""
    exposed = sent = answered = 0.0
    for seconds, event in trace.events:
        if isinstance(event, Escalated | Opened | Ahead):
            sent = seconds
        elif isinstance(event, Verified):
            exposed += seconds - sent
            answered = seconds
    return exposed, sum(span.hidden for span in trace.spans if span.end <= answered)  # what failed at last is no trip


def intervals(trace: Trace) -> Iterator[tuple[Event, float]]:
    """Each event with the seconds before it that no span claims."""
    spans = iter(trace.spans)
    span = next(spans, None)
    before = 0.0
    for seconds, event in trace.events:
        rest = seconds - before
        while span is not None and span.end <= seconds:
            rest -= span.end - span.start
            span = next(spans, None)
        yield event, rest
        before = seconds


def part_of_event(event: Event) -> str:
    """The part that the time before `event` belongs to."""
    if isinstance(event, Prepared):
        return "features"
    if isinstance(event, Opened):
        return f"{event.side}_prefill"
    if isinstance(event, Drafted | Ahead):
        return "draft"
    if isinstance(event, Escalated):
        return "gate"
    if isinstance(event, Verified):
        return "verify"
    if isinstance(event, Committed) and event.origin == "cloud":
        return "cloud_decode"
    if isinstance(event, Degraded):
        return "faults"
    return "other"


def mean_breakdown(breakdowns: Iterable[LatencyBreakdown]) -> LatencyBreakdown:
    """Seconds a caption, part by part. ValueError for none."""
    all_of_them = list(breakdowns)
    if not all_of_them:
        raise ValueError("no breakdown to take the mean of")
    n = len(all_of_them)
    return LatencyBreakdown(
        {name: sum(each.parts[name] for each in all_of_them) / n for name in PARTS},
        *(sum(getattr(each, name) for each in all_of_them) / n for name in ("discarded", "exposed", "hidden")),
    )
