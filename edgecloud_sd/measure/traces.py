"""Traces as JSON and back, without loss: a stopped run can go on, and every figure can be computed again."""

from __future__ import annotations

from typing import Any

from edgecloud_sd.events import (
    BREAKER_MARKS,
    Ahead,
    Committed,
    Confirmed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Retracted,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.fields import check_type
from edgecloud_sd.measure.breakdown import PARTS


def trace_to_json(trace: Trace) -> dict[str, Any]:
    """Return `{"events": [[seconds, name, values...], ...], "spans": [[part, start, end, bytes, hidden], ...]}`.

    Verified events do not repeat the draft of the escalated event before them.
    """
    return {
        "events": [[seconds, type(event).__name__.lower(), *_values(event)] for seconds, event in trace.events],
        "spans": [[span.part, span.start, span.end, span.size, span.hidden] for span in trace.spans],
    }


def trace_from_json(saved: dict[str, Any]) -> Trace:
    """Return the trace that `trace_to_json` wrote. Raise ValueError for anything else."""
    events: list[tuple[float, Event]] = []
    draft = Draft(())
    try:
        for seconds, name, *values in saved["events"]:
            event = _event(name, values, draft)
            if isinstance(event, Escalated):
                draft = event.draft
            events.append((seconds, event))
        trace = Trace(tuple(events), tuple(Span(*span) for span in saved["spans"]))
        times = [seconds for seconds, _ in events] + [time for span in trace.spans for time in (span.start, span.end)]
        sides = {event.side for _, event in events if isinstance(event, Opened)}
        has_known_names = {span.part for span in trace.spans} <= {*PARTS, *BREAKER_MARKS} and sides <= {"edge", "cloud"}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a saved trace: {error!r}") from error
    is_equal = trace_to_json(trace) == {"events": saved["events"], "spans": saved["spans"]}
    if not is_equal or not has_known_names or not all(isinstance(time, int | float) for time in times):
        raise ValueError("not a saved trace: it holds values that no trace has")
    return trace


def _values(event: Event) -> list[Any]:
    """Return the fields of an event, without its draft where another event has it."""
    if isinstance(event, Prepared):
        return [event.prompt_tokens]
    if isinstance(event, Opened):
        return [event.side]
    if isinstance(event, Drafted):
        return [*_draft_values(event.draft), event.ahead, list(event.passes)]
    if isinstance(event, Escalated):
        return [*_draft_values(event.draft), event.sent]
    if isinstance(event, Ahead):
        return [list(event.tokens), event.made]
    if isinstance(event, Verified):
        verdict = event.verdict
        return [verdict.accepted, verdict.token, *([list(verdict.rest)] if verdict.rest else [])]
    if isinstance(event, Committed):
        return [list(event.tokens), event.origin, event.is_final]
    if isinstance(event, Confirmed | Retracted):
        return [event.count]
    return [event.reason]  # degraded or finished


def _draft_values(draft: Draft) -> list[Any]:
    return [list(draft.tokens), list(draft.scores), draft.doubted]


def _draft(tokens: list[int], scores: list[float], doubted: int | None) -> Draft:
    return Draft(tuple(tokens), tuple(scores), doubted)


def _event(name: str, values: list[Any], draft: Draft) -> Event:
    """Return the event that `_values` took apart. `draft` is the last one drafted."""
    if name == "prepared":
        return Prepared(*values)
    if name == "opened":
        return Opened(*values)
    if name == "drafted":
        return Drafted(_draft(*values[:3]), values[3], tuple(values[4]))
    if name == "escalated":
        return Escalated(_draft(*values[:3]), *values[3:])
    if name == "ahead":
        return Ahead(tuple(values[0]), *values[1:])
    if name == "verified":
        return Verified(draft, Verdict(*values[:2], *map(tuple, values[2:])))
    if name == "committed":
        tokens, origin, is_final = values
        check_type("is_final", is_final, bool, "write true or false")
        return Committed(tuple(tokens), origin, is_final)
    if name == "confirmed":
        return Confirmed(*values)
    if name == "retracted":
        return Retracted(*values)
    if name == "degraded":
        return Degraded(*values)
    if name == "finished":
        return Finished(*values)
    raise ValueError(f"not a saved trace: unknown event {name!r}")
