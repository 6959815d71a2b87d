"""Metrics on a trace small enough to count by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgecloud_sd import metrics
from edgecloud_sd.clock import stamp, stream
from edgecloud_sd.records import (
    Committed,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Trace,
    Verdict,
    Verified,
)

FIRST, SECOND, THIRD = Draft((1, 2, 3)), Draft((4, 5)), Draft((6, 7))
TRACE = Trace(
    (
        (0.1, Prepared(20)),
        (0.3, Opened("edge")),
        (0.7, Opened("cloud")),
        (1.0, Drafted(FIRST)),
        (1.0, Escalated(FIRST, 1)),
        (1.4, Verified(FIRST, Verdict(1, 8))),
        (1.5, Committed((1,), "accepted")),
        (1.5, Committed((8,), "correction")),
        (2.0, Drafted(SECOND)),
        (2.0, Committed((4, 5), "local")),
        (2.2, Drafted(THIRD)),
        (2.2, Escalated(THIRD, 3)),
        (2.4, Verified(THIRD, Verdict(2, 9))),
        (2.5, Committed((6, 7), "accepted")),
        (2.5, Committed((9,), "bonus")),
        (2.6, Finished("eos")),
    )
)


def letters(ids: Sequence[int]) -> str:
    """Token 1 has no text, as a special token has none."""
    return "".join(" " if token == 1 else chr(96 + token) for token in ids)


def test_counts_by_hand() -> None:
    assert metrics.counts(TRACE) == metrics.Counts(
        tokens=7, local=2, accepted=3, correction=1, bonus=1, rounds=3, cloud_calls=2, drafted=7, verified=5
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discarded", 2),
        ("acceptance_rate", 3 / 5),
        ("mean_accepted_length", 5 / 2),
        ("correction_rate", 1 / 2),
        ("cloud_call_rate", 2 / 3),
        ("cloud_calls_per_token", 2 / 7),
        ("edge_share", 2 / 7),
        ("waste", 2 / 7),
    ],
)
def test_rates_by_hand(name: str, value: float) -> None:
    assert getattr(metrics.counts(TRACE), name) == pytest.approx(value)


def test_acceptance_by_position_by_hand() -> None:
    assert metrics.acceptance_by_position([TRACE, TRACE]) == [1.0, 0.5, 0.0]


def test_times_by_hand() -> None:
    first, last = metrics.ttft(TRACE, letters), metrics.e2e(TRACE)
    assert (first, last) == (1.5, 2.5)
    assert metrics.tpot(7, first, last) == pytest.approx(1 / 6)
    assert metrics.otps(7, first, last) == pytest.approx(6)
    assert metrics.features(TRACE) == 0.1
    assert metrics.opening(TRACE, "edge") == pytest.approx(0.2)
    assert metrics.opening(TRACE, "cloud") == pytest.approx(0.4)


def test_the_undefined_is_none() -> None:
    empty = Trace(((0.1, Prepared(3)), (0.2, Opened("cloud")), (0.3, Committed((1,), "cloud")), (0.3, Finished("eos"))))
    assert metrics.ttft(empty, letters) is None
    assert metrics.tpot(1, 0.3, 0.3) is None
    assert metrics.otps(1, 0.3, 0.3) is None
    assert metrics.otps(2, 0.3, 0.3) is None
    assert metrics.opening(empty, "edge") is None
    assert metrics.e2e(Trace(())) is None
    nothing = metrics.counts(empty)
    rates = ("acceptance_rate", "correction_rate", "cloud_call_rate", "cloud_calls_per_token", "waste")
    assert [getattr(nothing, name) for name in rates] == [None] * 5


def test_counts_add_up() -> None:
    total = metrics.counts(TRACE) + metrics.counts(TRACE)
    assert total.tokens == 14
    assert total.acceptance_rate == metrics.counts(TRACE).acceptance_rate


def test_stamping_notes_when_each_event_came() -> None:
    ticks = iter([10.0, 10.5, 12.0, 20.0, 20.25])
    events: list[Event] = [Opened("edge"), Finished("eos")]
    assert stamp(events, lambda: next(ticks)) == Trace(((0.5, events[0]), (2.0, events[1])))
    assert next(stream(events, lambda: next(ticks))) == (0.25, events[0])
