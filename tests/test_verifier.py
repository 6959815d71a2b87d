"""Verification by itself: an absolute base makes a repeated call harmless, and a wrong one an error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import Rank, Rule, Synthetic, uniform
from edgecloud_sd.events import Prompt
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerification, LocalVerifier, prompt_seed
from tests.support.strategies import VOCABULARY, Scene, ranks, rates, scenes, synthetics
from tests.support.toy import ToyModel, random_table

tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)


@given(scenes(), ranks | synthetics, tokens, tokens)
def test_a_repeated_call_gives_the_same_verdict(scene: Scene, rule: Rule, draft: list[int], later: list[int]) -> None:
    verification = LocalVerifier(scene.cloud, rule).open(scene.prompt)
    first = verification.verify(0, [scene.prompt.last], draft)
    base = 1 + first.accepted
    second = verification.verify(base, [first.token], later)
    assert verification.verify(base, [first.token], later) == second
    assert verification.verify(0, [scene.prompt.last], draft) == first
    assert verification.verify(base, [first.token], later) == second


def fates(scene: Scene, rule: Rule, draft: list[int], cuts: list[int]) -> dict[int, bool]:
    """Whether each token of `draft` is kept, by its place in the caption, where rounds are as long as `cuts` say."""
    verification = LocalVerifier(scene.cloud, rule).open(scene.prompt)
    caption: list[int] = []
    told = 0
    found: dict[int, bool] = {}
    for k in cuts:
        asked = draft[len(caption) : len(caption) + k]
        context = [scene.prompt.last, *caption]
        verdict = verification.verify(told, context[told:], asked)
        found |= {
            len(caption) + place: place < verdict.accepted for place in range(min(verdict.accepted + 1, len(asked)))
        }
        told = len(context) + verdict.accepted
        caption += [*asked[: verdict.accepted], verdict.token]
    return found


cuts = st.lists(st.integers(1, 6), min_size=30, max_size=30)
long = st.lists(st.integers(0, VOCABULARY - 1), min_size=30, max_size=30)


@given(scenes(), rates, long, cuts, cuts)
def test_what_becomes_of_a_place_does_not_depend_on_how_drafts_are_cut(
    scene: Scene, rate: float, draft: list[int], some: list[int], others: list[int]
) -> None:
    one, other = (fates(scene, Synthetic((rate,)), draft, each) for each in (some, others))
    drawn = {place: uniform(prompt_seed(scene.prompt), place + 1) < rate for place in one | other}
    assert one | other == drawn
    assert {**other, **one} == drawn


@pytest.mark.parametrize("rates", [(0.78,), (0.9, 0.5, 0.2), (0.05, 1.0)])
def test_as_much_of_drafts_is_kept_as_the_rates_say_by_position(rates: tuple[float, ...]) -> None:
    model = ToyModel(random_table(VOCABULARY, 1), frozenset())
    rule = Synthetic(rates)
    judged, kept = [0] * 6, [0] * 6
    for clip in range(600):
        prompt = Prompt((clip, 2))
        verification = LocalVerifier(model, rule).open(prompt)
        context, told = [prompt.last], 0
        for _ in range(4):
            verdict = verification.verify(told, context[told:], [1] * 6)
            told = len(context) + verdict.accepted
            context += [*[1] * verdict.accepted, verdict.token]
            for place in range(min(verdict.accepted + 1, 6)):
                judged[place] += 1
                kept[place] += place < verdict.accepted
    for place in range(6):
        p = rates[min(place, len(rates) - 1)]
        assert abs(kept[place] - judged[place] * p) <= 5 * math.sqrt(judged[place] * p * (1 - p))
    assert judged[0] == 2400


def test_another_clip_and_another_question_have_other_fates() -> None:
    features = torch.rand(4, 20)
    asked = [Prompt((1, 2)), Prompt((2, 1)), Prompt((1, 2), features), Prompt((1, 2), features + 0.01)]
    assert len({prompt_seed(prompt) for prompt in asked}) == 4
    assert prompt_seed(Prompt((1, 2), features.clone())) == prompt_seed(asked[2])


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
