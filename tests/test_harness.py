"""The harness: the same events on every clock, and each moment under a profile by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd import gate, wire
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.cloud.local import local_verifier
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Prepared,
    Prompt,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import LocalVerifier
from tests.support.fakes import UNSURE, Scripted
from tests.support.strategies import Case, any_link, cases, play, profiles

PROMPT = Prompt((5, 6), torch.zeros(2, 3))
PROFILE = Profile(
    "scripted",
    edge=Costs(prefill=2.0, forward=((1, 0.5), (2, 0.75))),
    cloud=Costs(prefill=5.0, forward=((1, 1.0), (5, 2.0))),
    features=0.125,
    gate=0.0625,
    queue=0.25,
)
LINK = Link("scripted", rtt=0.5, up=math.inf, down=math.inf)
# Rounds of two tokens: the first is local, the second is rejected at its second token, the third is accepted whole and
# gets a bonus, and the length limit cuts the fourth to one token.
EDGE = Scripted(wrong=frozenset({3}), unsure=frozenset({3, 4}))
CLOUD = Scripted()
ALL = Stopping(frozenset(), 8)


def caption(strategy: Strategy, harness: Harness, stopping: Stopping = ALL) -> Trace:
    return play(PROMPT, EDGE, CLOUD, strategy, stopping, harness)


def speculative(harness: Harness) -> Trace:
    return caption(Strategy("speculative", UNSURE, k=2), harness)


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_correction_costs_the_edge_the_seconds_of_the_profile(ahead: int) -> None:
    strategy = Strategy("speculative", k=2, draft_ahead=ahead)
    free, costly = (caption(strategy, Harness(replace(PROFILE, correction=seconds), LINK)) for seconds in (0.0, 4.0))
    corrections = metrics.counts(free).correction
    assert corrections == 1
    assert costly.seconds == free.seconds + 4.0 * corrections
    assert latency_breakdown(costly).parts["rollback"] == 4.0
    shown, earlier = (
        [moment for moment, event in trace.events if isinstance(event, Committed) and event.origin == "correction"]
        for trace in (costly, free)
    )
    assert shown == earlier  # the token is visible before the edge repairs its cache
    assert metrics.counts(costly) == metrics.counts(free)


def test_every_moment_of_a_speculative_caption_by_hand() -> None:
    local, rejected = Draft((0, 0), (0.0, 0.0)), Draft((0, 1), (0.0, 1.0))
    whole, last = Draft((0, 0), (1.0, 0.0)), Draft((0,), (0.0,))
    assert speculative(Harness(PROFILE, LINK)).events == (
        (0.125, Prepared(2)),
        (2.125, Opened("edge")),
        (3.25, Drafted(local, passes=(1, 1))),  # two steps of 0.5, two statistics of 0.0625
        (3.25, Committed((0, 0), "local")),
        (4.375, Drafted(rejected, passes=(1, 1))),
        (4.375, Escalated(rejected, 3)),  # feeds the last prompt token and two local ones
        (5.625, Opened("cloud")),  # starts at 0.125: up 0.25, queue 0.25, prefill 5
        (8.375, Verified(rejected, Verdict(1, 0))),  # up 0.25, queue, a pass over 5, down 0.25
        (8.375, Committed((0,), "accepted")),
        (8.375, Committed((0,), "correction")),
        (9.5, Drafted(whole, passes=(1, 1))),  # the last token was corrected, so nothing is left to guess
        (9.5, Escalated(whole, 1)),
        (11.75, Verified(whole, Verdict(2, 0))),  # up 0.25, queue, a pass over 3, down 0.25
        (11.75, Committed((0, 0), "accepted")),
        (11.75, Committed((0,), "bonus")),
        (12.5625, Drafted(last, passes=(2,))),  # one pass over the last draft token and the bonus, one statistic
        (12.5625, Committed((0,), "local")),
        (12.5625, Finished("length")),
    )


def test_lazy_prefill_starts_at_the_first_escalated_draft() -> None:
    lazy = caption(Strategy("speculative", UNSURE, k=2, prefill="lazy"), Harness(PROFILE, LINK))
    eager = speculative(Harness(PROFILE, LINK))
    delay = 4.375 + 0.25 + 0.25 + 5.0 - 5.625
    for (soon, event), (seconds, same) in zip(eager.events, lazy.events, strict=True):
        assert (seconds, same) == (soon + delay * (soon > 4.375), event)
    assert latency_breakdown(lazy).parts["cloud_prefill"] == 5.0
    assert metrics.wire_bytes(lazy) == metrics.wire_bytes(eager)


@pytest.mark.parametrize("prefill", ["eager", "lazy"])
def test_a_rest_crosses_the_link_in_a_real_message_and_nothing_crosses_without_it(prefill: str) -> None:
    base, sizes = wire.prompt_checksum(wire.encode_prompt(PROMPT), "rank(2)", wants_rest=True), []
    for wants_rest, expected in ((True, Verdict(1, 0, (1, 0))), (False, Verdict(1, 0))):
        harness = Harness(PROFILE, LINK)
        verifier = harness.deferred(local_verifier(CLOUD, Rank(2), harness, wants_rest), prefill)
        verification = verifier.open(PROMPT)
        assert verification.verify(0, [6], [1, 2, 1, 2]) == expected
        assert verification.verify(2, [0], []) == Verdict(0, 0)
        sizes.append([span.size for span in harness.watch.spans if span.part == "downlink"])
    requests = wire.build_verify_request(base, [6], 0, [1, 2, 1, 2]), wire.build_verify_request(base, [6, 1, 0], 2, [])
    verdicts = Verdict(1, 0, (1, 0)), Verdict(0, 0)
    assert sizes[0] == [
        wire.ANSWER_HEAD + len(wire.dumps(wire.build_verdict_message(verdict, request.check)))
        for verdict, request in zip(verdicts, requests, strict=True)
    ]
    checks = 2  # two checks may differ in their numbers of digits
    assert sizes[0][0] - sizes[1][0] == pytest.approx(len(',"rest":[1,0]'), abs=checks)
    assert sizes[0][1] == pytest.approx(sizes[1][1], abs=checks)


def test_every_span_of_a_speculative_caption_by_hand() -> None:
    opening = wire.REQUEST_HEAD + len(wire.encode_prompt(PROMPT))
    begun = wire.prompt_checksum(wire.encode_prompt(PROMPT), "greedy")
    first, second = (
        wire.build_verify_request(begun, [6, 0, 0], 0, [0, 1]),
        wire.build_verify_request(begun, [6, 0, 0, 0, 0], 4, [0, 0]),
    )
    up = [wire.REQUEST_HEAD + len(wire.dumps(request)) for request in (first, second)]
    answers = (
        wire.build_verdict_message(Verdict(1, 0), first.check),
        wire.build_verdict_message(Verdict(2, 0), second.check),
    )
    down = [wire.ANSWER_HEAD + len(wire.dumps(answer)) for answer in answers]
    spans = speculative(Harness(PROFILE, LINK)).spans
    assert [span for span in spans if span.part in ("uplink", "cloud_queue", "downlink")] == [
        Span("uplink", 0.0, 0.0),  # marks that a link is emulated
        Span("uplink", 4.375, 4.375, opening),  # crossed while the edge was busy
        Span("cloud_queue", 4.375, 4.375),
        Span("uplink", 5.625, 5.875, up[0]),
        Span("cloud_queue", 5.875, 6.125),
        Span("downlink", 8.125, 8.375, down[0]),
        Span("uplink", 9.5, 9.75, up[1]),
        Span("cloud_queue", 9.75, 10.0),
        Span("downlink", 11.5, 11.75, down[1]),
    ]
    gates = [span for span in spans if span.part == "gate"]
    assert gates[:2] == [Span("gate", 2.625, 2.6875), Span("gate", 3.1875, 3.25)]
    assert len(gates) == 7
    assert any(span.part == "rollback" for span in spans)  # the cloud rolls back the rejected token


def test_the_breakdown_of_a_speculative_caption_by_hand() -> None:
    breakdown = latency_breakdown(speculative(Harness(PROFILE, LINK)))
    assert breakdown.parts == {
        "features": 0.125,
        "edge_prefill": 2.0,
        "cloud_prefill": 1.25,
        "draft": 3 * 1.0 + 0.75,
        "gate": 7 * 0.0625,
        "uplink": 2 * 0.25,
        "network": 0.0,
        "cloud_queue": 2 * 0.25,
        "verify": 2.0 + 1.5,
        "cloud_decode": 0.0,
        "downlink": 2 * 0.25,
        "faults": 0.0,
        "rollback": 0.0,
        "other": 0.0,
    }
    assert breakdown.discarded == 0.5  # half of a draft that took a second


def draft_ahead(harness: Harness, chosen: gate.Gate = gate.ALWAYS) -> Trace:
    """Decode nine tokens with drafts of two, up to four tokens ahead. The edge is wrong at the eighth token."""
    strategy = Strategy("speculative", chosen, k=2, draft_ahead=4)
    edge = Scripted(wrong=frozenset({7}), unsure=frozenset(range(9)))
    return play(PROMPT, edge, Scripted(), strategy, Stopping(frozenset(), 9), harness)


def test_every_moment_of_a_caption_drafted_ahead_by_hand() -> None:
    first, second, third, last = Draft((0, 0)), Draft((0, 0, 0)), Draft((1, 0)), Draft((0,))
    assert draft_ahead(Harness(PROFILE, LINK)).events == (
        (0.125, Prepared(2)),
        (2.125, Opened("edge")),
        (3.125, Drafted(first, passes=(1, 1))),
        (3.125, Escalated(first, 1)),
        (5.625, Opened("cloud")),
        (7.625, Ahead((0, 0, 0, 0), 4)),  # four steps of 0.5 fit into the 2.25 of the verification
        (7.875, Verified(first, Verdict(2, 0))),  # up 0.25, queue 0.25, a pass over 3, down 0.25
        (7.875, Committed((0, 0), "accepted")),
        (7.875, Committed((0,), "bonus")),
        (7.875, Drafted(second, 3)),  # three of the four tokens ahead, because the first was the bonus; no step
        (7.875, Escalated(second, 1)),
        (9.375, Ahead((0, 1, 0), 3)),  # three steps fit into the verification
        (10.375, Verified(second, Verdict(3, 0))),  # a pass over 4
        (10.375, Committed((0, 0, 0), "accepted")),
        (10.375, Committed((0,), "bonus")),
        (10.375, Drafted(third, 2)),
        (10.375, Escalated(third, 1)),
        (10.375, Ahead((), 0)),
        (12.625, Verified(third, Verdict(0, 0))),
        (12.625, Committed((0,), "correction")),
        (13.125, Drafted(last, passes=(1,))),  # drafted again; the length limit leaves no room for a guess
        (13.125, Escalated(last, 1)),
        (13.125, Ahead((), 0)),
        (15.125, Verified(last, Verdict(1, 0))),
        (15.125, Committed((0,), "accepted")),
        (15.125, Finished("length")),
    )


def test_every_moment_of_a_guess_after_a_correction_by_hand() -> None:
    first, again = Draft((1, 0, 0)), Draft((0, 0, 0))
    edge, strategy = Scripted(wrong=frozenset({0})), Strategy("speculative", k=3)
    assert play(PROMPT, edge, CLOUD, strategy, Stopping(frozenset(), 5), Harness(PROFILE, LINK)).events == (
        (0.125, Prepared(2)),
        (2.125, Opened("edge")),
        (3.625, Drafted(first, passes=(1, 1, 1))),
        (3.625, Escalated(first, 1)),
        (5.625, Opened("cloud")),
        (8.125, Verified(first, Verdict(0, 0))),  # up 0.25, queue 0.25, a pass over 4, down 0.25
        (8.125, Committed((0,), "correction")),
        (9.125, Drafted(again, passes=(3,))),  # 0.5 + 2 * 0.25: the correction and two discarded tokens, all right
        (9.125, Escalated(again, 1)),
        (11.625, Verified(again, Verdict(3, 0))),  # a pass over 4
        (11.625, Committed((0, 0, 0), "accepted")),
        (11.625, Committed((0,), "bonus")),
        (11.625, Finished("length")),
    )


def test_a_lossy_draft_is_not_longer_after_drafting_ahead() -> None:
    trace = draft_ahead(Harness(PROFILE, LINK), UNSURE)  # every token is unsure, so every draft is verified
    drafted = [event for _, event in trace.events if isinstance(event, Drafted)]
    assert [(len(event.draft.tokens), event.ahead) for event in drafted] == [(2, 0), (2, 2), (2, 2), (1, 0)]


def test_the_breakdown_of_a_caption_drafted_ahead_by_hand() -> None:
    trace = draft_ahead(Harness(PROFILE, LINK))
    breakdown = latency_breakdown(trace)
    assert (breakdown.exposed, breakdown.hidden) == (0.25 + 1.0 + 2.25 + 2.0, 2.0 + 1.5)
    assert breakdown.parts["draft"] == 1.0 + 2.0 + 1.5 + 0.5
    assert breakdown.parts["verify"] == 0.75 + 1.5 + 1.25  # 1.5 and 1.0 s of the first two are hidden
    assert breakdown.parts["uplink"] == breakdown.parts["cloud_queue"] == 2 * 0.25
    assert breakdown.parts["downlink"] == 4 * 0.25
    assert breakdown.seconds == trace.seconds
    assert breakdown.discarded == 1.0  # the two tokens of the third draft
    assert metrics.bonus_guess_rate([trace]) == 1.0
    verify = [span.seconds for span in trace.spans if span.part == "verify" and span.seconds]
    assert verify == [1.5, 1.75, 1.5, 1.25]


def test_a_verdict_that_arrives_during_a_step_is_read_after_the_step() -> None:
    quick = replace(PROFILE, cloud=Costs(0.0, ((1, 0.25),)), queue=0.0)
    trace = draft_ahead(Harness(quick))
    ahead = [(seconds, event.made) for seconds, event in trace.events if isinstance(event, Ahead)]
    verified = [seconds for seconds, event in trace.events if isinstance(event, Verified)]
    assert ahead[0] == (verified[0], 1)
    assert latency_breakdown(trace).exposed == sum(
        after - before for (before, n), after in zip(ahead, verified, strict=True) if n == 0
    )


def test_a_message_takes_its_size_over_the_bandwidth() -> None:
    fast, slow = (speculative(Harness(PROFILE, replace(LINK, up=up, down=2 * up))) for up in (math.inf, 8000))
    for fast_span, span in zip(fast.spans, slow.spans, strict=True):
        if span.part in ("uplink", "downlink") and span.end > 4.375 + 8 * span.size / 8000:
            rate = {"uplink": 8000, "downlink": 16000}[span.part]
            assert span.end - span.start == pytest.approx(fast_span.end - fast_span.start + 8 * span.size / rate)
    assert slow.seconds > fast.seconds


def test_every_moment_of_a_cloud_caption_by_hand() -> None:
    trace = caption(Strategy("cloud"), Harness(PROFILE, LINK), Stopping(frozenset(), 3))
    assert trace.events == (
        (0.125, Prepared(2)),
        (5.625, Opened("cloud")),
        (6.875, Committed((0,), "cloud")),  # a step of 1, down 0.25; only the first token pays the latency
        (7.875, Committed((0,), "cloud")),
        (8.875, Committed((0,), "cloud")),
        (8.875, Finished("length")),
    )
    sizes = metrics.wire_bytes(trace)
    assert sizes is not None
    assert sizes[0] == wire.REQUEST_HEAD + len(wire.encode_prompt(PROMPT))
    assert sizes[1] > wire.ANSWER_HEAD + 3 * wire.CHUNK_HEAD


def test_every_moment_of_an_edge_caption_by_hand() -> None:
    trace = caption(Strategy("edge"), Harness(PROFILE, LINK), Stopping(frozenset(), 2))
    assert [seconds for seconds, _ in trace.events] == [0.125, 2.125, 2.625, 2.625, 3.125, 3.125, 3.125]
    assert metrics.wire_bytes(trace) is None


def test_without_a_link_the_queue_still_takes_time() -> None:
    breakdown = latency_breakdown(speculative(Harness(PROFILE)))
    assert (breakdown.parts["uplink"], breakdown.parts["downlink"], breakdown.parts["cloud_queue"]) == (0, 0, 0.5)
    assert (
        breakdown.seconds == 12.5625 - 0.25 - 2 * 2 * 0.25
    )  # one way of the prefill, and both ways of two verifications


def test_a_gate_without_a_statistic_takes_no_time() -> None:
    trace = caption(Strategy("speculative", k=2), Harness(PROFILE, LINK))
    assert latency_breakdown(trace).parts["gate"] == 0


def test_on_the_real_clock_a_link_takes_its_time() -> None:
    link = Link("short", rtt=0.01, up=math.inf, down=math.inf)
    trace = speculative(Harness(link=link))
    assert trace.tokens == speculative(Harness(PROFILE, LINK)).tokens
    messages = [span for span in trace.spans if span.part in ("uplink", "downlink") and span.start > 0]
    assert len(messages) == 5
    assert all(span.end - span.start >= 0.005 for span in messages[1:])


@settings(max_examples=25)  # four captions each
@given(cases(), profiles(), any_link, st.text(max_size=3))
def test_events_are_the_same_on_every_clock_and_a_virtual_trace_repeats(
    case: Case, profile: Profile, link: Link, seed: str
) -> None:
    scene = case.scene
    verifier = LocalVerifier(scene.cloud, case.strategy.rule, wants_rest=case.strategy.wants_rest)
    without_harness = stamp(decode(scene.prompt, case.strategy, scene.stopping, scene.edge, verifier))
    real, virtual = case.play(Harness()), case.play(Harness(profile, link, seed))
    for trace in (real, virtual):
        assert trace.tokens == without_harness.tokens
        if not case.strategy.draft_ahead:  # the number of tokens drafted ahead depends on the clock
            assert [event for _, event in trace.events[1:]] == [event for _, event in without_harness.events]
    assert case.play(Harness(profile, link, seed)) == virtual
    moments = [seconds for seconds, _ in virtual.events]
    assert moments == sorted(moments)


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_another_seed_draws_another_jitter(mode: str) -> None:
    strategy = Strategy("cloud") if mode == "cloud" else Strategy("speculative", k=2)
    traces = [caption(strategy, Harness(PROFILE, links.find_link("4g"), seed)) for seed in ("a", "b", "a")]
    assert traces[0] == traces[2]
    assert traces[0] != traces[1]
    assert traces[0].tokens == traces[1].tokens


def test_each_message_has_its_own_jitter() -> None:
    spans = speculative(Harness(PROFILE, replace(LINK, jitter=0.125))).spans
    trips = [span.end - span.start for span in spans if span.part in ("uplink", "downlink") and span.end > span.start]
    assert len({round(trip, 9) for trip in trips}) == 4  # the prefill of the cloud is hidden
    assert all(0.125 <= trip <= 0.375 for trip in trips)
