"""The latency breakdown: every part by hand, its sum for any strategy, and the cost of recording it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given

from edgecloud_sd import gate
from edgecloud_sd.events import (
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
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import (
    PARTS,
    LatencyBreakdown,
    discarded_seconds,
    latency_breakdown,
    mean_breakdown,
    round_trips,
)
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import Watch, stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Profile
from tests.support.strategies import Case, any_link, cases, profiles

FIRST, SECOND = Draft((1, 2, 3), (0.1, 0.2, 0.9)), Draft((4, 5), (0.1, 0.2))
BOTH = Trace(
    (
        (1.0, Prepared(20)),
        (3.0, Opened("edge")),
        (7.0, Opened("cloud")),
        (8.5, Drafted(FIRST, passes=(1, 1, 1))),
        (8.625, Escalated(FIRST, 1)),
        (10.625, Verified(FIRST, Verdict(1, 8))),
        (10.75, Committed((1,), "accepted")),
        (11.0, Committed((8,), "correction")),
        (12.0, Drafted(SECOND, passes=(3, 1))),
        (12.5, Committed((4, 5), "local")),
        (13.5, Finished("eos")),
    ),
    (
        Span("features", 0.0, 1.0),
        Span("edge_prefill", 1.0, 3.0),
        Span("uplink", 3.0, 4.0, 900),
        Span("cloud_queue", 4.0, 5.0),
        Span("cloud_prefill", 5.0, 7.0),
        Span("draft", 7.0, 7.25),
        Span("gate", 7.25, 7.5),
        Span("draft", 7.5, 7.75),
        Span("gate", 7.75, 8.0),
        Span("draft", 8.0, 8.25),
        Span("gate", 8.25, 8.5),
        Span("uplink", 8.625, 8.875, 20),
        Span("cloud_queue", 8.875, 9.0),
        Span("rollback", 9.0, 9.125),
        Span("verify", 9.125, 9.875),
        Span("downlink", 9.875, 10.625, 8),
        Span("rollback", 11.0, 11.125),
        Span("draft", 11.125, 11.25),
        Span("gate", 11.25, 11.5),
        Span("draft", 11.5, 11.625),
        Span("gate", 11.625, 11.75),
    ),
)
CLOUD = Trace(
    (
        (0.25, Prepared(20)),
        (1.0, Opened("cloud")),
        (2.0, Committed((1,), "cloud")),
        (2.5, Committed((2,), "cloud")),
        (2.625, Finished("length")),
    ),
    (
        Span("features", 0.0, 0.25),
        Span("uplink", 0.25, 0.5, 900),
        Span("cloud_prefill", 0.5, 1.0),
        Span("cloud_decode", 1.0, 1.5),
        Span("downlink", 1.5, 2.0, 4),
        Span("cloud_decode", 2.0, 2.375),
        Span("downlink", 2.375, 2.5, 4),
    ),
)


def test_every_part_of_a_speculative_caption_by_hand() -> None:
    assert latency_breakdown(BOTH).parts == {
        "features": 1.0,
        "edge_prefill": 2.0,
        "cloud_prefill": 2.0,
        "draft": 0.75 + 0.25,
        "gate": 0.75 + 0.375,
        "uplink": 1.25,
        "network": 0.0,
        "cloud_queue": 1.125,
        "verify": 0.75,
        "cloud_decode": 0.0,
        "downlink": 0.75,
        "faults": 0.0,
        "rollback": 0.25,
        "other": 0.125 + 0.125 + 0.25 + 0.25 + 0.5 + 1.0,
    }
    assert latency_breakdown(BOTH).seconds == 13.5


def test_every_part_of_a_cloud_caption_by_hand() -> None:
    parts = {"features": 0.25, "uplink": 0.25, "cloud_prefill": 0.5, "cloud_decode": 0.875, "downlink": 0.625}
    assert latency_breakdown(CLOUD).parts == dict.fromkeys(PARTS, 0.0) | parts | {"other": 0.125}
    assert latency_breakdown(CLOUD).discarded == 0


def test_discarded_seconds_are_those_of_discarded_draft_tokens() -> None:
    assert latency_breakdown(BOTH).discarded == 0.75 * 2 / 3  # two of the three tokens of the first draft


def test_discarded_seconds_are_shared_by_the_tokens_of_wide_passes_and_count_those_taken_back() -> None:
    wide, more = Draft((1, 2, 3, 4)), Draft((6,), (0.1, 0.9), doubted=7)
    trace = Trace(
        (
            (2.0, Drafted(wide, passes=(4,))),  # 0.5 s for each token
            (2.0, Committed((1, 2, 3, 4), "local", False)),
            (3.0, Escalated(wide, 1)),
            (4.0, Verified(wide, Verdict(1, 5))),
            (4.0, Confirmed(1)),
            (4.0, Retracted(3)),
            (4.0, Committed((5,), "correction")),
            (6.0, Drafted(more, passes=(1, 1))),
            (6.0, Committed((6,), "local")),
            (6.0, Escalated(Draft((), more.scores, doubted=7), 1)),
            (7.0, Verified(Draft((), more.scores, doubted=7), Verdict(0, 8))),
            (7.0, Committed((8,), "bonus")),
            (7.0, Finished("length")),
        ),
        (Span("draft", 0.0, 2.0), Span("draft", 4.0, 5.0), Span("draft", 5.0, 5.125)),
    )
    assert discarded_seconds(trace) == 3 * 0.5 + 0.125


def test_closure_and_unnamed_are_shares_of_the_wall_time() -> None:
    breakdown = LatencyBreakdown(dict.fromkeys(PARTS, 0.0) | {"draft": 6.0, "verify": 3.0, "other": 0.5}, 0.0)
    assert breakdown.seconds == 9.5
    assert breakdown.closure(10) == 0.95
    assert breakdown.unnamed(10) == pytest.approx(0.1)


def test_the_mean_is_taken_part_by_part() -> None:
    both, cloud = latency_breakdown(BOTH), latency_breakdown(CLOUD)
    mean = mean_breakdown(iter([both, cloud]))
    assert mean.parts == {name: (both.parts[name] + cloud.parts[name]) / 2 for name in PARTS}
    assert mean.discarded == both.discarded / 2


def test_a_verification_that_failed_at_the_end_is_no_round_trip() -> None:
    draft = Draft((1, 2))
    sent = ((0.0, Opened("edge")), (1.0, Drafted(draft)), (1.0, Escalated(draft, 1)), (2.0, Ahead((3,), 1)))
    spans = (Span("network", 2.0, 4.0, 9, hidden=1.0),)
    answered = Trace((*sent, (4.0, Verified(draft, Verdict(2, 3)))), spans)
    failed = Trace((*sent, (4.0, Degraded("gone"))), spans)
    assert round_trips(answered) == (2.0, 1.0)
    assert round_trips(failed) == (0.0, 0.0)


def test_the_mean_of_no_breakdown_is_an_error() -> None:
    with pytest.raises(ValueError, match="no breakdown"):
        mean_breakdown([])


def check_breakdown(trace: Trace) -> None:
    breakdown, events = latency_breakdown(trace), [event for _, event in trace.events]
    drafts = [event for event in events if isinstance(event, Drafted)]
    doubted = [event for event in events if isinstance(event, Verified) and event.draft.doubted is not None]
    discarded = metrics.counts(trace).discarded + sum(event.changes_text for event in doubted)
    assert list(breakdown.parts) == list(PARTS)
    assert breakdown.seconds == pytest.approx(trace.seconds, rel=1e-9, abs=1e-9)
    assert min(breakdown.parts.values()) >= -1e-9
    assert -1e-9 <= breakdown.discarded <= breakdown.parts["draft"] + 1e-9
    assert breakdown.discarded <= 1e-9 or discarded
    if all(len(event.passes) >= len(event.draft.tokens) - event.ahead for event in drafts):  # no pass gave several
        assert breakdown.discarded > 1e-9 or not discarded


@given(cases(), profiles(), any_link)
def test_no_second_is_lost_or_counted_twice_under_any_profile_and_link(
    case: Case, profile: Profile, link: Link
) -> None:
    check_breakdown(case.play(Harness(profile, link)))


@given(cases())
def test_no_second_is_lost_or_counted_twice_if_each_reading_of_the_clock_takes_one(case: Case) -> None:
    harness = Harness()
    harness.watch = Watch(itertools.count().__next__)
    check_breakdown(case.play(harness))


SAMPLED = [
    (0, "chinese", Strategy("speculative", k=4)),
    (7, "chinese", Strategy("speculative", gate.entropy_gate(0.5), k=3)),
    (21, "english", Strategy("edge")),
]


ATTEMPTS = 3  # a busy machine can interrupt a process, but rarely in each of several attempts


@pytest.fixture(scope="module")
def attempts(pipeline: Pipeline) -> list[list[tuple[Trace, float]]]:
    """Caption each sample several times. Return each trace with the wall seconds of another clock around it."""

    def time_caption(index: int, language: str, strategy: Strategy) -> tuple[Trace, float]:
        request = Request(clips.make_clip("evaluation", index).samples, language)
        start = time.monotonic()
        trace = pipeline.trace(request, strategy, 64)
        return trace, time.monotonic() - start

    time_caption(*SAMPLED[-1])  # the first caption allocates memory
    return [[time_caption(*sample) for _ in range(ATTEMPTS)] for sample in SAMPLED]


@pytest.mark.slow
def test_the_breakdown_closes_on_the_pocket_pair(attempts: list[list[tuple[Trace, float]]]) -> None:
    breakdowns = [[(latency_breakdown(trace), wall) for trace, wall in sample] for sample in attempts]
    gaps = [min(abs(1 - breakdown.closure(wall)) for breakdown, wall in sample) for sample in breakdowns]
    assert median(gaps) <= 0.02
    assert median(min(breakdown.unnamed(wall) for breakdown, wall in sample) for sample in breakdowns) < 0.05


def least_cpu_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the CPU seconds of the quickest call, because interruptions can only add to them."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_recording_takes_less_than_a_hundredth_of_a_caption(attempts: list[list[tuple[Trace, float]]]) -> None:
    n = 5000
    events: list[Event] = [Finished("eos")] * n
    watch = Watch()
    per_event = least_cpu_seconds(lambda: stamp(events)) / n
    per_span = least_cpu_seconds(lambda: [watch.timed("gate", int) for _ in events]) / n
    for trace, wall in (min(sample, key=lambda attempt: attempt[1]) for sample in attempts):
        assert len(trace.events) * per_event + len(trace.spans) * per_span < 0.01 * wall
