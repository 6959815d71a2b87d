"""Traces written as JSON and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from edgecloud_sd.events import (
    Ahead,
    Committed,
    Confirmed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Prepared,
    Retracted,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.measure import traces
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Profile
from tests.support.strategies import Case, any_link, cases, profiles

DRAFT = Draft((4, 5), (0.1, 0.7))
TRACE = Trace(
    (
        (0.5, Prepared(9)),
        (1.0, Drafted(DRAFT, passes=(1, 2))),
        (1.0, Escalated(DRAFT, 1)),
        (1.25, Ahead((6, 7), 2)),
        (1.5, Verified(DRAFT, Verdict(2, 6))),
        (1.625, Verified(DRAFT, Verdict(0, 6, (5,)))),
        (1.75, Drafted(Draft((7, 9), (0.3, 0.2), 8), 1)),
        (1.75, Committed((7, 9), "local", False)),
        (1.75, Confirmed(1)),
        (1.75, Retracted(1)),
        (2.0, Finished("eos")),
    ),
    (Span("uplink", 1.25, 1.25, 16, 0.25),),
)
SAVED: dict[str, Any] = {
    "events": [
        [0.5, "prepared", 9],
        [1.0, "drafted", [4, 5], [0.1, 0.7], None, 0, [1, 2]],
        [1.0, "escalated", [4, 5], [0.1, 0.7], None, 1],
        [1.25, "ahead", [6, 7], 2],
        [1.5, "verified", 2, 6],
        [1.625, "verified", 0, 6, [5]],
        [1.75, "drafted", [7, 9], [0.3, 0.2], 8, 1, []],
        [1.75, "committed", [7, 9], "local", False],
        [1.75, "confirmed", 1],
        [1.75, "retracted", 1],
        [2.0, "finished", "eos"],
    ],
    "spans": [["uplink", 1.25, 1.25, 16, 0.25]],
}


def test_a_trace_is_saved_as_lists_of_events_and_spans() -> None:
    assert traces.trace_to_json(TRACE) == SAVED
    assert traces.trace_from_json(SAVED) == TRACE


@settings(max_examples=25)
@given(cases(), profiles(), any_link)
def test_a_trace_read_from_json_equals_the_original(case: Case, profile: Profile, link: Link) -> None:
    trace = case.play(Harness(profile, link))
    assert traces.trace_from_json(json.loads(json.dumps(traces.trace_to_json(trace)))) == trace


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        "trace",
        {},
        {"events": []},
        {"spans": []},
        {"events": 3, "spans": []},
        {"events": [3], "spans": []},
        {"events": [[]], "spans": []},
        {"events": [[0.5]], "spans": []},
        {"events": [[0.5, "prepared"]], "spans": []},
        {"events": [[0.5, "prepared", 9, 9]], "spans": []},
        {"events": [[0.5, "drafted", [4]]], "spans": []},
        {"events": [[0.5, "drafted", 4, []]], "spans": []},
        {"events": [[0.5, "verified", 1]], "spans": []},
        {"events": [[0.5, "committed", [4]]], "spans": []},
        {"events": [[0.5, "committed", 4, "local"]], "spans": []},
        {"events": [[0.5, "guessed", 4]], "spans": []},
        {"events": [], "spans": [["uplink", 1.0]]},
        {"events": [], "spans": [3]},
        {"events": [["soon", "finished", "eos"]], "spans": []},
        {"events": [[0.5, "opened", "moon"]], "spans": []},
        {"events": [[0.5, "drafted", "ab", "cd"]], "spans": []},
        {"events": [[0.5, "committed", [4], "local", 9]], "spans": []},
        {"events": [[0.5, "committed", [4], "local", True, 9]], "spans": []},
        {"events": [], "spans": [["lunch", 0.0, 1.0, 0]]},
        {"events": [], "spans": [["uplink", "now", 1.0, 0]]},
    ],
)
def test_a_damaged_trace_is_an_error(saved: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        traces.trace_from_json(saved)


def test_an_unknown_event_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown event 'guessed'"):
        traces.trace_from_json({"events": [[0.5, "guessed", 4]], "spans": []})
