"""The statistics of a row of logits: entropy and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from edgecloud_sd import probs
from tests.support.strategies import logit_rows


@given(logit_rows)
def test_entropy_is_the_entropy_of_the_softmax(row: torch.Tensor) -> None:
    p = row.softmax(-1)
    assert probs.entropy(row) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-9)
    assert -1e-9 <= probs.entropy(row) <= math.log(len(row)) + 1e-9


def test_the_entropy_of_equal_logits_is_log_n_and_that_of_a_certain_token_is_0() -> None:
    assert probs.entropy(torch.zeros(8)) == pytest.approx(math.log(8))
    assert probs.entropy(torch.tensor([0.0, -math.inf, -math.inf])) == 0


def test_entropy_of_bfloat16_logits_is_computed_in_a_wider_format() -> None:
    row = torch.linspace(-3, 3, 50)
    assert probs.entropy(row.to(torch.bfloat16)) == pytest.approx(
        probs.entropy(row.to(torch.bfloat16).double()), abs=1e-5
    )


@given(logit_rows)
def test_ranks_are_a_permutation_and_the_argmax_has_rank_1(row: torch.Tensor) -> None:
    ranks = [probs.rank(row, token) for token in range(len(row))]
    assert sorted(ranks) == list(range(1, len(row) + 1))
    assert ranks[int(row.argmax())] == 1


def test_the_lowest_id_of_equal_logits_ranks_first() -> None:
    assert [probs.rank(torch.tensor([1.0, 2.0, 2.0, 0.0]), token) for token in range(4)] == [3, 1, 2, 4]
