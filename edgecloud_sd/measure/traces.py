"""Traces as JSON and back, without loss: so that a stopped run can go on, and every figure can be computed again."""

from __future__ import annotations

from typing import Any

from edgecloud_sd.events import (
    Ahead,
    Committed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.measure.breakdown import PARTS, part_of_event


def trace_to_json(trace: Trace) -> dict[str, Any]:
    """`{"events": [[seconds, name, what it holds...], ...], "spans": [[part, start, end, bytes, hidden], ...]}`.

    Escalated and verified events do not repeat their draft: it is the drafted event's before them.
    """
    return {
        "events": [[seconds, type(event).__name__.lower(), *_holds(event)] for seconds, event in trace.events],
        "spans": [[span.part, span.start, span.end, span.size, span.hidden] for span in trace.spans],
    }


def trace_from_json(saved: dict[str, Any]) -> Trace:
    """The trace that `trace_to_json` made this of. ValueError for anything else."""
    events: list[tuple[float, Event]] = []
    draft = Draft(())
    try:
        for seconds, name, *holds in saved["events"]:
            event = _event(name, holds, draft)
            if isinstance(event, Drafted):
                draft = event.draft
            events.append((seconds, event))
        trace = Trace(tuple(events), tuple(Span(*span) for span in saved["spans"]))
        parts = {span.part for span in trace.spans} | {part_of_event(event) for _, event in events}
        times = [seconds for seconds, _ in events] + [time for span in trace.spans for time in (span.start, span.end)]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a saved trace: {error!r}") from error
    whole = trace_to_json(trace) == {"events": saved["events"], "spans": saved["spans"]}
    if not whole or not parts <= PARTS.keys() or not all(isinstance(time, int | float) for time in times):
        raise ValueError("not a saved trace: it holds what no trace has")
    return trace


def _holds(event: Event) -> list[Any]:
    if isinstance(event, Prepared):
        return [event.prompt_tokens]
    if isinstance(event, Opened):
        return [event.side]
    if isinstance(event, Drafted):
        return [list(event.draft.tokens), list(event.draft.scores), event.ahead]
    if isinstance(event, Escalated):
        return [event.sent]
    if isinstance(event, Ahead):
        return [list(event.tokens), event.made]
    if isinstance(event, Verified):
        return [event.verdict.accepted, event.verdict.token]
    if isinstance(event, Committed):
        return [list(event.tokens), event.origin]
    return [event.reason]  # degraded, or finished


def _event(name: str, holds: list[Any], draft: Draft) -> Event:
    if name == "prepared":
        return Prepared(*holds)
    if name == "opened":
        return Opened(*holds)
    if name == "drafted":
        return Drafted(Draft(tuple(holds[0]), tuple(holds[1])), *holds[2:])
    if name == "escalated":
        return Escalated(draft, *holds)
    if name == "ahead":
        return Ahead(tuple(holds[0]), *holds[1:])
    if name == "verified":
        return Verified(draft, Verdict(*holds))
    if name == "committed":
        return Committed(tuple(holds[0]), holds[1])
    if name == "degraded":
        return Degraded(*holds)
    if name == "finished":
        return Finished(*holds)
    raise ValueError(f"not a saved trace: unknown event {name!r}")
