"""Gates, acceptance rules, stopping and the statistics they read."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from urllib.parse import quote

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate, probs
from edgecloud_sd.cloud.server import MAX_RULE_LENGTH
from edgecloud_sd.events import Draft, Verdict
from edgecloud_sd.stopping import Stopping

logits = st.lists(st.floats(-20, 20), min_size=2, max_size=12).map(lambda row: torch.tensor(row, dtype=torch.float64))


@given(logits)
def test_entropy_is_that_of_the_softmax(row: torch.Tensor) -> None:
    p = row.softmax(-1)
    assert probs.entropy(row) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-9)
    assert -1e-9 <= probs.entropy(row) <= math.log(len(row)) + 1e-9


def test_entropy_of_equal_logits_is_log_vocab_and_of_a_certain_one_is_0() -> None:
    assert probs.entropy(torch.zeros(8)) == pytest.approx(math.log(8))
    assert probs.entropy(torch.tensor([0.0, -math.inf, -math.inf])) == 0


def test_entropy_in_half_precision_is_computed_wider() -> None:
    row = torch.linspace(-3, 3, 50)
    assert probs.entropy(row.to(torch.bfloat16)) == pytest.approx(
        probs.entropy(row.to(torch.bfloat16).double()), abs=1e-5
    )


@given(logits)
def test_ranks_are_an_order_in_which_the_argmax_is_first(row: torch.Tensor) -> None:
    ranks = [probs.rank(row, token) for token in range(len(row))]
    assert sorted(ranks) == list(range(1, len(row) + 1))
    assert ranks[int(row.argmax())] == 1


def test_of_equal_logits_the_lowest_id_ranks_first() -> None:
    assert [probs.rank(torch.tensor([1.0, 2.0, 2.0, 0.0]), token) for token in range(4)] == [3, 1, 2, 4]


@pytest.mark.parametrize(
    ("r", "draft", "expected"),
    [
        (1, [0, 1], Verdict(2, 2)),  # both are the cloud's own: bonus
        (1, [0, 2], Verdict(1, 1)),  # second rejected: correction
        (2, [0, 2], Verdict(2, 2)),
        (2, [2, 1], Verdict(0, 0)),  # nothing after a rejected token counts
    ],
)
def test_a_rule_keeps_what_ranks_high_enough(r: int, draft: list[int], expected: Verdict) -> None:
    rows = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert acceptance.Rank(r)(draft, rows) == expected


def test_rules_are_parsed_by_name() -> None:
    assert acceptance.parse_rule("synthetic(0.78)") == acceptance.Synthetic((0.78,))
    assert acceptance.parse_rule("synthetic(1/.5/0)") == acceptance.Synthetic((1.0, 0.5, 0.0))
    assert acceptance.parse_rule("synthetic(0.9/0.8/1)").label == "synthetic0.9_0.8_1"
    assert acceptance.parse_rule("greedy") == acceptance.Rank(1)
    assert acceptance.parse_rule("rank", 5) == acceptance.Rank(5)
    assert acceptance.parse_rule("rank(7)").label == "rank7"
    assert acceptance.parse_rule("rank").label == "rank20"


fractions = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@given(st.integers(1).map(acceptance.Rank) | fractions.map(tuple).map(acceptance.Synthetic))
def test_a_rule_is_what_its_text_says_which_a_query_can_hold_and_its_label_names_a_file(rule: acceptance.Rule) -> None:
    assert acceptance.parse_rule(rule.text) == rule
    assert quote(rule.text, safe="()/") == rule.text
    assert re.fullmatch(r"[\w.-]+", rule.label)
    assert rule.is_lossless == (rule == acceptance.GREEDY)


@pytest.mark.parametrize(
    "rule",
    [
        *("nucleus", "rank()", "rank(-1)", "", "greedy ", "rank(٣)"),
        *("synthetic", "synthetic()", "synthetic(-1)", "synthetic(1/)", "synthetic(nan)", "synthetic(0.5,0.5)"),
        *("synthetic(0.5 )", "synthetic(٣)"),
    ],
)
def test_an_unknown_rule_names_the_known(rule: str) -> None:
    with pytest.raises(ValueError, match=r"choose one of greedy, rank, rank\(r\), synthetic\(p\)"):
        acceptance.parse_rule(rule)


def test_a_rate_above_1_is_refused() -> None:
    for text in ("synthetic(0.5/1.5)", "synthetic(9999)"):
        with pytest.raises(ValueError, match=r"a rate of synthetic must be 0 to 1, not (1\.5|9999)"):
            acceptance.parse_rule(text)


@pytest.mark.parametrize("count", [0, 11])
def test_no_rate_and_more_than_a_request_can_hold_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"synthetic takes 1 to 10 rates, not {count}"):
        acceptance.Synthetic((0.5,) * count)
    longest = acceptance.Synthetic((1.2345678901234567e-300,) * 10)
    assert len(longest.text) <= MAX_RULE_LENGTH


@pytest.mark.parametrize(
    ("text", "uniforms", "expected"),
    [
        ("synthetic(0.5)", (0.4, 0.49), Verdict(2, 2)),  # bonus: the cloud's most likely
        ("synthetic(0.5)", (0.4, 0.5), Verdict(1, 2)),  # the most likely, 1, is the rejected token itself
        ("synthetic(0.5)", (0.9, 0.0), Verdict(0, 0)),
        ("synthetic(1/0.5/0)", (0.99, 0.4), Verdict(2, 2)),
        ("synthetic(0.5/1)", (0.4, 0.99), Verdict(2, 2)),
        ("synthetic(1/0)", (0.99, 0.0), Verdict(1, 2)),
    ],
)
def test_a_synthetic_rule_keeps_while_the_uniform_is_below_the_rate(
    text: str, uniforms: tuple[float, ...], expected: Verdict
) -> None:
    rows = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert acceptance.parse_rule(text)([1, 1], rows, uniforms) == expected


@given(logits, st.data())
def test_rate_1_keeps_all_and_rate_0_nothing_and_corrects_to_the_most_likely_other_token(
    row: torch.Tensor, data: st.DataObject
) -> None:
    draft = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=4))
    rows, uniforms = row.repeat(len(draft) + 1, 1), data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=4))
    assert acceptance.Synthetic((1.0,))(draft, rows, uniforms) == Verdict(len(draft), int(row.argmax()))
    verdict = acceptance.Synthetic((0.0,))(draft, rows, uniforms)
    ranks = {token: probs.rank(row, token) for token in range(len(row))}
    assert verdict == Verdict(0, min((token for token in ranks if token != draft[0]), key=ranks.__getitem__))


def test_what_is_drawn_for_a_place_stays_what_it_was() -> None:
    """Or saved runs could not be compared with new ones."""
    drawn = [acceptance.uniform(b"clip", place) for place in (0, 1, 2**40)]
    assert drawn == [0.49387617557847374, 0.05612093846526123, 0.08414888872867443]


@pytest.mark.parametrize("p", [0.02, 0.5, 0.78, 0.99])
def test_as_many_draws_lie_below_a_rate_as_it_says_over_places_and_over_clips(p: float) -> None:
    count = 10_000
    room = 5 * math.sqrt(count * p * (1 - p))  # standard deviations of the binomial
    for drawn in (
        [acceptance.uniform(b"clip", place) for place in range(count)],
        [acceptance.uniform(b"%d" % clip, 7) for clip in range(count)],
    ):
        assert all(0 <= each < 1 for each in drawn)
        assert abs(sum(each < p for each in drawn) - count * p) < room
        # and one says nothing of the next
        both = sum(one < p and other < p for one, other in pairwise(drawn))
        assert abs(both - (count - 1) * p**2) < 2 * room


def test_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        acceptance.parse_rule("rank(0)")


@pytest.mark.parametrize(("scores", "escalated"), [((0.2, 1.5), False), ((0.2, 1.6), True), ((1.6, 0.1), True)])
def test_the_entropy_gate_reads_the_largest_score(scores: tuple[float, ...], escalated: bool) -> None:
    assert gate.entropy_gate(1.5)(Draft((1, 2), scores)) is escalated


def test_a_threshold_of_0_is_always_and_of_inf_never() -> None:
    assert gate.entropy_gate(0) == gate.entropy_gate(-3) == gate.parse_gate("always", 9) == gate.ALWAYS
    assert gate.entropy_gate(math.inf) == gate.parse_gate("never", 9) == gate.NEVER
    assert gate.ALWAYS(Draft((1,)))
    assert gate.ALWAYS.can_escalate
    assert not gate.NEVER(Draft((1,)))
    assert not gate.NEVER.can_escalate


def test_an_unknown_gate_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown gate 'margin': choose one of entropy, always, never"):
        gate.parse_gate("margin", 1)
    with pytest.raises(ValueError, match="not nan"):
        gate.entropy_gate(math.nan)


def test_stopping_cuts_after_eos_and_at_the_limit() -> None:
    stopping = Stopping(frozenset({9}), 5)
    assert stopping.cut([1, 9, 2], 0) == (1, 9)
    assert stopping.cut([1, 2, 3], 3) == (1, 2)
    assert stopping.cut([1], 5) == ()
    assert stopping.cut([1, 2, 9], 3) == (1, 2)


@pytest.mark.parametrize(
    ("output", "reason"), [([], None), ([1], None), ([1, 9], "eos"), ([1, 2, 3], "length"), ([1, 2, 9], "eos")]
)
def test_stopping_says_why(output: list[int], reason: str | None) -> None:
    assert Stopping(frozenset({9}), 3).reason(output) == reason


def test_a_length_limit_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        Stopping(frozenset(), 0)
