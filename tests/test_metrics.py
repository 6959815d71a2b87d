"""Metrics of a trace that is small enough to count by hand, and their invariants on random traces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.events import (
    Committed,
    Confirmed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Output,
    Prepared,
    Retracted,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Profile
from tests.support.strategies import Case, any_link, cases, profiles

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


SHOWN, LATER = Draft((2, 3, 4)), Draft((5, 6, 7))
LOOK_BACK = Trace(
    (
        (0.5, Drafted(Draft((2, 3)))),
        (0.5, Committed((2, 3), "local", False)),
        (1.0, Drafted(Draft((4,)))),
        (1.0, Escalated(SHOWN, 1)),
        (2.0, Verified(SHOWN, Verdict(1, 9))),
        (2.0, Confirmed(1)),
        (2.0, Retracted(1)),
        (2.5, Committed((9,), "correction")),
        (3.0, Drafted(Draft((5, 6)))),
        (3.0, Committed((5, 6), "local", False)),
        (3.5, Drafted(Draft((7,)))),
        (3.5, Escalated(LATER, 1)),
        (4.0, Verified(LATER, Verdict(3, 8))),
        (4.0, Confirmed(2)),
        (4.5, Committed((7,), "accepted")),
        (4.5, Committed((8,), "bonus")),
        (4.75, Finished("eos")),
    ),
    (Span("draft", 0.0, 0.5), Span("draft", 0.5, 1.0), Span("draft", 2.5, 3.0)),
)


def letters(ids: Sequence[int]) -> str:
    """Return one letter per token. Token 1 has no text, like a special token."""
    return "".join(" " if token == 1 else chr(96 + token) for token in ids)


def test_counts_of_a_trace_match_a_count_by_hand() -> None:
    assert metrics.counts(TRACE) == metrics.Counts(
        tokens=7, local=2, accepted=3, correction=1, bonus=1, rounds=3, cloud_calls=2, drafted=7, verified=5,
        cloud_positions=1 + 3 + 3 + 2,
    )  # fmt: skip


def test_with_look_back_confirmed_tokens_are_accepted_and_retracted_ones_discarded() -> None:
    counts = metrics.counts(LOOK_BACK)
    assert counts == metrics.Counts(
        tokens=6, accepted=4, correction=1, bonus=1, rounds=4, cloud_calls=2, drafted=6, verified=6, retracted=1,
        edge_passes=3, cloud_positions=1 + 3 + 1 + 3,
    )  # fmt: skip
    assert (counts.discarded, counts.written_share, counts.covered_share) == (2, 2 / 6, 1)
    assert (counts.edge_passes_per_token, counts.cloud_positions_per_token) == (3 / 6, 8 / 6)


def test_a_token_that_is_taken_back_counts_as_never_shown_but_for_the_first_text() -> None:
    assert metrics.chunks(LOOK_BACK) == [(0.5, 1), (2.5, 1), (3.0, 2), (4.5, 2)]
    assert metrics.itl_per_chunk(LOOK_BACK) == [2.0, 0.5, 1.5]
    assert (metrics.ttft(LOOK_BACK, letters), metrics.ttft_final(LOOK_BACK, letters)) == (0.5, 2.0)
    blank = Trace(((1.0, Committed((2,), "local", False)), (2.0, Retracted(1)), (2.5, Committed((1,), "correction"))))
    assert (metrics.ttft(blank, letters), metrics.ttft_final(blank, letters)) == (1.0, None)
    assert metrics.chunks(blank) == [(2.5, 1)]


def test_a_caption_ends_when_its_last_token_is_final() -> None:
    trace = Trace(
        (
            (1.0, Committed((2,), "local", False)),
            (2.0, Committed((3,), "local", False)),
            (3.0, Confirmed(2)),
            (3.5, Finished("eos")),
        )
    )
    assert metrics.chunks(trace) == [(1.0, 1), (2.0, 1)]
    assert (metrics.ttft_final(trace, letters), metrics.e2e(trace)) == (3.0, 3.0)
    assert metrics.after_first_chunk(trace) == (1, 2.0)


def test_mode_cloud_asks_once_for_a_caption() -> None:
    counts = metrics.counts(Trace(((1.0, Committed((2,), "cloud")), (2.0, Committed((3,), "cloud")))))
    assert (metrics.caption_calls(counts), counts.cloud_calls, counts.cloud_positions) == (1, 0, 2)
    assert metrics.caption_calls(metrics.counts(TRACE)) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discarded", 2),
        ("acceptance_rate", 3 / 5),
        ("mean_acceptance_length", 5 / 2),
        ("correction_rate", 1 / 2),
        ("cloud_call_rate", 2 / 3),
        ("cloud_calls_per_token", 2 / 7),
        ("local_share", 2 / 7),
        ("covered_share", 5 / 7),
        ("written_share", 2 / 7),
        ("cloud_positions_per_token", 9 / 7),
        ("waste", 2 / 7),
        ("waste_ahead", None),
    ],
)
def test_rates_of_a_trace_match_a_count_by_hand(name: str, value: float) -> None:
    assert getattr(metrics.counts(TRACE), name) == pytest.approx(value)


def test_acceptance_by_position_matches_a_count_by_hand() -> None:
    assert metrics.acceptance_by_position([TRACE, TRACE]) == [1.0, 0.5, 0.0]


def test_accepted_lengths_count_verifications_by_their_accepted_tokens() -> None:
    lengths = metrics.accepted_lengths([TRACE, TRACE])
    verdicts = [event.verdict.accepted for _, event in TRACE.events if isinstance(event, Verified)]
    assert lengths == [2 * verdicts.count(length) for length in range(max(verdicts) + 1)]
    assert metrics.accepted_lengths([Trace(())]) == []


@pytest.mark.parametrize(
    ("count", "percent", "value"),
    [(1, 50, None), (2, 50, 0.5), (19, 95, None), (20, 95, 18.05), (99, 99, None), (100, 99, 98.01)],
)
def test_a_percentile_is_interpolated_and_needs_enough_values(count: int, percent: int, value: float | None) -> None:
    assert metrics.percentile(range(count), percent) == (None if value is None else pytest.approx(value))


def test_times_of_a_trace_match_a_count_by_hand() -> None:
    first, last = metrics.ttft(TRACE, letters), metrics.e2e(TRACE)
    assert (first, last) == (1.5, 2.5)
    assert metrics.tpot(7, first, last) == pytest.approx(1 / 6)
    assert metrics.otps(7, first, last) == pytest.approx(6)
    assert metrics.feature_seconds(TRACE) == 0.1
    assert metrics.prefill_seconds(TRACE, "edge") == pytest.approx(0.2)
    assert metrics.prefill_seconds(TRACE, "cloud") == pytest.approx(0.4)


def test_an_undefined_metric_is_none() -> None:
    empty = Trace(((0.1, Prepared(3)), (0.2, Opened("cloud")), (0.3, Committed((1,), "cloud")), (0.3, Finished("eos"))))
    assert metrics.ttft(empty, letters) is metrics.ttft_final(empty, letters) is None
    assert metrics.tpot(1, 0.3, 0.4) is None
    assert metrics.tpot(2, 0.3, 0.3) is None
    assert metrics.after_first_chunk(empty) is metrics.after_first_chunk(Trace(())) is None
    assert metrics.otps(1, 0.3, 0.3) is None
    assert metrics.otps(2, 0.3, 0.3) is None
    assert metrics.prefill_seconds(empty, "edge") is None
    assert metrics.e2e(Trace(())) is None
    assert metrics.feature_seconds(Trace(())) is None
    assert metrics.e2e_tps(0, None) is None
    assert metrics.wire_bytes(empty) is None
    assert not metrics.chunks(Trace(()))
    assert metrics.itl_per_chunk(Trace(())) == metrics.itl_per_token(empty) == []
    assert metrics.acceptance_by_position([empty]) == []
    counts = metrics.counts(empty)
    assert [name for name in RATES if getattr(counts, name) is not None] == [
        "local_share", "covered_share", "written_share", "cloud_positions_per_token",
    ]  # fmt: skip
    assert [getattr(metrics.Counts(), name) for name in RATES] == [None] * len(RATES)


def test_ttft_waits_for_the_whole_chunk_and_for_a_complete_character() -> None:
    trace = Trace(
        (
            (1.0, Committed((1,), "accepted")),
            (2.0, Committed((2,), "correction")),
            (3.0, Committed((3,), "local")),
        )
    )
    assert metrics.ttft(trace, lambda ids: "abc"[: len(ids)]) == 2.0
    assert metrics.ttft(trace, lambda ids: "\u597d" if len(ids) == 3 else "\ufffd") == 3.0
    assert metrics.ttft(trace, lambda ids: " \ufffd") is None


def test_counts_add_up() -> None:
    total = metrics.counts(TRACE) + metrics.counts(TRACE)
    assert total.tokens == 14
    assert total.acceptance_rate == metrics.counts(TRACE).acceptance_rate


SHARES = (
    "acceptance_rate",
    "correction_rate",
    "cloud_call_rate",
    "cloud_calls_per_token",
    "local_share",
    "covered_share",
    "written_share",
    "waste",
)
RATES = (*SHARES, "mean_acceptance_length", "edge_passes_per_token", "cloud_positions_per_token")


@given(cases(), profiles(), any_link)
def test_counts_add_up_shares_stay_in_range_and_chunks_have_every_token(
    case: Case, profile: Profile, link: Link
) -> None:
    trace = case.play(Harness(profile, link))
    counts = metrics.counts(trace)
    own = counts.correction + counts.bonus
    assert counts.tokens == len(trace.tokens) == counts.local + counts.accepted + own + counts.cloud
    assert counts.drafted == counts.local + counts.accepted + counts.discarded
    assert 0 <= counts.discarded <= counts.verified + counts.ahead_wasted
    assert counts.verified <= counts.drafted
    assert 0 <= counts.ahead_wasted <= counts.ahead
    assert own <= counts.cloud_calls <= counts.rounds
    assert counts.retracted <= counts.discarded
    fed = [width for _, event in trace.events if isinstance(event, Drafted) for width in event.passes]
    assert len(fed) <= counts.edge_passes <= len(fed) + counts.ahead
    assert counts.written <= counts.covered <= counts.cloud_positions + own
    assert all(0 <= share <= 1 for name in SHARES if (share := getattr(counts, name)) is not None)
    longest = case.strategy.longest_draft(case.scene.stopping.max_new_tokens)
    assert counts.mean_acceptance_length is None or counts.mean_acceptance_length <= longest + 1
    assert all(0 <= p <= 1 for p in metrics.acceptance_by_position([trace]))
    chunks, gaps, last = metrics.chunks(trace), metrics.itl_per_chunk(trace), metrics.e2e(trace)
    assert last is not None
    assert sum(n for _, n in chunks) == counts.tokens
    assert min(n for _, n in chunks) >= 1
    later = metrics.after_first_chunk(trace) or (0, sum(gaps))
    assert later[0] == counts.tokens - chunks[0][1]
    assert -1e-9 <= sum(gaps) - later[1] <= 1e-9 or case.strategy.look_back
    assert sum(gaps) - 1e-9 <= later[1] <= last - chunks[0][0] + 1e-9
    assert all(0 <= token_gap <= gap for token_gap, gap in zip(metrics.itl_per_token(trace), gaps, strict=True))
    if not case.strategy.look_back and not case.strategy.gate.stops_before_token:
        assert len(chunks) == counts.rounds + counts.cloud  # one per round, or per token of the stream


@given(cases())
def test_no_event_takes_back_a_final_token_and_the_text_that_stays_is_the_output(case: Case) -> None:
    trace = case.play(Harness())
    output, final, text = Output(), "", ""
    for _, event in trace.events:
        open_count = len(output.tokens) - output.final
        if isinstance(event, Committed):
            text += letters(event.tokens)
        elif isinstance(event, Confirmed | Retracted):
            assert 1 <= event.count <= open_count
            text = text[: len(text) - event.count] if isinstance(event, Retracted) else text
        output.see(event)
        assert letters(output.tokens) == text
        assert text.startswith(final)
        assert set(output.origins[output.final :]) <= {"local"}
        final = text[: output.final]
    assert final == text == letters(trace.tokens)


@given(cases(), profiles(), any_link)
def test_final_text_never_comes_before_shown_text(case: Case, profile: Profile, link: Link) -> None:
    trace = case.play(Harness(profile, link))
    shown, final, last = metrics.ttft(trace, letters), metrics.ttft_final(trace, letters), metrics.e2e(trace)
    assert last is not None
    assert final is None or (shown is not None and shown <= final <= last)
    if not case.strategy.look_back:
        assert shown == final


def test_e2e_tps_is_tokens_per_second_over_the_whole_request() -> None:
    assert metrics.e2e_tps(5, 2.5) == 2


def test_chunks_are_the_moments_at_which_tokens_became_visible() -> None:
    assert metrics.chunks(TRACE) == [(1.5, 2), (2.0, 2), (2.5, 3)]
    assert metrics.itl_per_chunk(TRACE) == pytest.approx([0.5, 0.5])
    assert metrics.itl_per_token(TRACE) == pytest.approx([0.5 / 2, 0.5 / 3])
    assert metrics.after_first_chunk(TRACE) == (5, 1.0)


def test_each_round_and_each_streamed_token_is_one_chunk() -> None:
    trace = Trace(
        (
            (1.0, Drafted(FIRST)),
            (2.0, Verified(FIRST, Verdict(0, 8))),
            (2.25, Committed((8,), "correction")),
            (3.0, Drafted(SECOND)),
            (4.0, Verified(SECOND, Verdict(2, 9))),
            (4.25, Committed((4, 5), "accepted")),  # a draft that ends in EOS has no bonus
            (5.0, Drafted(THIRD)),
            (6.0, Verified(THIRD, Verdict(2, 9))),
            (6.25, Committed((6, 7), "accepted")),
            (6.5, Committed((9,), "bonus")),  # shown together with the accepted tokens
            (7.0, Committed((1,), "cloud")),
            (8.0, Committed((2,), "cloud")),
        )
    )
    assert metrics.chunks(trace) == [(2.25, 1), (4.25, 2), (6.5, 3), (7.0, 1), (8.0, 1)]


def test_wire_bytes_are_summed_for_each_direction() -> None:
    spans = (Span("uplink", 0, 1, 100), Span("downlink", 1, 2, 8), Span("gate", 2, 3), Span("uplink", 3, 4, 20))
    assert metrics.wire_bytes(Trace((), spans)) == (120, 8)
    assert metrics.wire_bytes(Trace((), spans[:1])) == (100, 0)
    assert metrics.wire_bytes(Trace((), spans[2:3])) is None


def test_an_escalation_without_a_correction_is_useless() -> None:
    assert metrics.useless_escalations([TRACE, TRACE]) == 1 / 2
    assert metrics.useless_escalations([Trace(TRACE.events[:4])]) is None


@pytest.mark.parametrize(("token", "share"), [(4, 1), (5, 0)])
def test_a_call_for_one_token_is_useless_if_the_edge_had_the_same(token: int, share: int) -> None:
    doubt = Draft((), (0.9,), doubted=4)
    trace = Trace(((1.0, Escalated(doubt, 3)), (2.0, Verified(doubt, Verdict(0, token)))))
    assert metrics.useless_escalations([trace]) == share


HINDSIGHTS = [
    Hindsight(1, ((0.9, True, True), (0.8, True, False), (0.1, False, True))),
    Hindsight(2, ((0.5, False, False), (None, True, False), (0.8, False, True))),
]


def test_gate_quality_matches_a_count_by_hand() -> None:
    assert metrics.missed_corrections(HINDSIGHTS, 12) == 3 / 12
    # rejected 0.9, 0.1 and 0.8, accepted 0.8 and 0.5: of six pairs three are higher and one is a tie
    assert metrics.auroc(HINDSIGHTS) == pytest.approx(3.5 / 6)


def test_gate_quality_without_scores_of_both_kinds_is_none() -> None:
    assert metrics.missed_corrections([Hindsight(0, ())], 0) is None
    assert metrics.auroc([]) is None
    assert metrics.auroc([Hindsight(0, ((0.5, True, True), (0.7, False, True)))]) is None
    assert metrics.auroc([Hindsight(0, ((None, True, True), (None, False, False)))]) is None


scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12)


def hindsights(drafts: list[tuple[float, bool]]) -> list[Hindsight]:
    return [Hindsight(0, ((score, True, rejected),)) for score, rejected in drafts]


@given(scored)
def test_auroc_is_the_chance_that_a_rejected_draft_scores_higher(drafts: list[tuple[float, bool]]) -> None:
    pairs = [(bad, good) for bad, rejected in drafts if rejected for good, other in drafts if not other]
    wins = [1 if bad > good else 0.5 if bad == good else 0 for bad, good in pairs]
    assert metrics.auroc(hindsights(drafts)) == (pytest.approx(sum(wins) / len(wins)) if wins else None)


@given(scored)
def test_auroc_depends_only_on_the_order_of_scores(drafts: list[tuple[float, bool]]) -> None:
    value = metrics.auroc(hindsights(drafts))
    assert metrics.auroc(hindsights([(math.exp(score) - 9, rejected) for score, rejected in drafts])) == value
    if value is not None:
        backwards = metrics.auroc(hindsights([(-score, rejected) for score, rejected in drafts]))
        assert backwards == pytest.approx(1 - value)
        assert metrics.auroc(hindsights([(7.0, rejected) for _, rejected in drafts])) == 0.5


def test_a_gap_is_closed_partly_completely_or_not_at_all() -> None:
    assert [metrics.gap_closed(ours, 0.25, 0.75) for ours in (0.25, 0.5, 0.75, 1.0, 0.0)] == [0, 0.5, 1, 1.5, -0.5]
    assert metrics.gap_closed(3.0, 4.0, 2.0) == 0.5  # for a quality of which less is better


def test_gap_closed_is_none_for_a_missing_quality_or_a_gap_within_the_noise() -> None:
    assert metrics.gap_closed(0.5, 0.5, 0.5) is None
    assert metrics.gap_closed(0.5, 0.25, 0.75, noise=0.5) is None
    assert metrics.gap_closed(0.5, 0.75, 0.25, noise=0.5) is None
    assert metrics.gap_closed(0.5, 0.25, 0.75, noise=0.49) == 0.5
    assert [metrics.gap_closed(*qualities) for qualities in ((None, 1, 2), (1, None, 2), (1, 2, None))] == [None] * 3
