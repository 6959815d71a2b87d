"""Verification by itself: an absolute base makes a repeated call harmless, and a wrong one an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import Rank
from edgecloud_sd.models.toy import ToyModel, random_table
from edgecloud_sd.records import Prompt
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerification, LocalVerifier
from tests.strategies import VOCABULARY, Scene, ranks, scenes

tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)


@given(scenes(), ranks, tokens, tokens)
def test_a_repeated_call_gives_the_same_verdict(scene: Scene, rule: Rank, draft: list[int], later: list[int]) -> None:
    verification = LocalVerifier(scene.cloud, rule).open(scene.prompt)
    first = verification.verify(0, [scene.prompt.last], draft)
    base = 1 + first.accepted
    second = verification.verify(base, [first.token], later)
    assert verification.verify(base, [first.token], later) == second
    assert verification.verify(0, [scene.prompt.last], draft) == first
    assert verification.verify(base, [first.token], later) == second


@pytest.fixture
def verification() -> LocalVerification:
    model = ToyModel(random_table(VOCABULARY, 1), frozenset())
    return LocalVerifier(model, Rank(1)).open(Prompt((1, 2)))


@pytest.mark.parametrize("base", [-1, 1])
def test_a_base_beyond_what_is_known_is_an_error(verification: LocalVerification, base: int) -> None:
    with pytest.raises(ValueError, match=f"counts on {base} committed tokens here, and 0 are known"):
        verification.verify(base, [2], [3])


def test_a_base_within_rejected_tokens_is_an_error(verification: LocalVerification) -> None:
    own = next(verification.generate(Stopping(frozenset(), 1)))
    wrong = (own + 1) % VOCABULARY
    assert verification.verify(0, [2], [wrong, wrong]).accepted == 0
    with pytest.raises(ValueError, match="counts on 2 committed tokens here, and 1 are known"):
        verification.verify(2, [0], [0])
