"""Gates, acceptance rules, stopping and the statistics they read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate, probs
from edgecloud_sd.records import Draft, Verdict
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
    assert acceptance.parse("greedy") == acceptance.Rank(1)
    assert acceptance.parse("rank", 5) == acceptance.Rank(5)
    assert acceptance.parse("rank(7)").label == "rank7"
    assert acceptance.parse("rank").label == "rank20"


@pytest.mark.parametrize("rule", ["nucleus", "rank()", "rank(-1)", "", "greedy "])
def test_an_unknown_rule_names_the_known(rule: str) -> None:
    with pytest.raises(ValueError, match="choose greedy, rank or rank"):
        acceptance.parse(rule)


def test_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        acceptance.parse("rank(0)")


@pytest.mark.parametrize(("scores", "escalated"), [((0.2, 1.5), False), ((0.2, 1.6), True), ((1.6, 0.1), True)])
def test_the_entropy_gate_reads_the_largest_score(scores: tuple[float, ...], escalated: bool) -> None:
    assert gate.entropy(1.5)(Draft((1, 2), scores)) is escalated


def test_a_threshold_of_0_is_always_and_of_inf_never() -> None:
    assert gate.entropy(0) == gate.entropy(-3) == gate.parse("always", 9) == gate.ALWAYS
    assert gate.entropy(math.inf) == gate.parse("never", 9) == gate.NEVER
    assert gate.ALWAYS(Draft((1,)))
    assert gate.ALWAYS.escalates
    assert not gate.NEVER(Draft((1,)))
    assert not gate.NEVER.escalates


def test_an_unknown_gate_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown gate 'margin': choose one of entropy, always, never"):
        gate.parse("margin", 1)
    with pytest.raises(ValueError, match="not nan"):
        gate.entropy(math.nan)


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
