"""Verification alone: an absolute base makes a repeated call harmless, and a wrong base is an error."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import Rank, Rule, Synthetic, uniform
from edgecloud_sd.events import Prompt
from edgecloud_sd.steps import run_steps
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerification, LocalVerifier, prompt_seed
from tests.support.strategies import VOCABULARY, Scene, ranks, rates, scenes, synthetics
from tests.support.toy import ToyModel, random_table, stateless_verdict

tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)


@given(scenes(), ranks | synthetics, tokens, tokens | st.just([]))
def test_a_verdict_is_that_of_plain_forward_passes(
    scene: Scene, rule: Rule, output: list[int], draft: list[int]
) -> None:
    context = [scene.prompt.last, *output]
    expected = stateless_verdict(scene.cloud, scene.prompt, rule, context, draft)
    verifier = LocalVerifier(scene.cloud, rule, wants_rest=True)
    assert verifier.open(scene.prompt).verify(0, context, draft) == expected
    stepped = run_steps(replace(verifier, limit=lambda _: 2).open_steps(scene.prompt))
    assert run_steps(stepped.verify_steps(0, context, draft)) == expected
    unasked = replace(verifier, wants_rest=False).open(scene.prompt)
    assert unasked.verify(0, context, draft) == replace(expected, rest=())


@given(scenes(), ranks | synthetics, tokens | st.just([]), tokens | st.just([]))
def test_a_repeated_call_gives_the_same_verdict(scene: Scene, rule: Rule, draft: list[int], later: list[int]) -> None:
    verification = LocalVerifier(scene.cloud, rule, wants_rest=True).open(scene.prompt)
    first = verification.verify(0, [scene.prompt.last], draft)
    base = 1 + first.accepted
    second = verification.verify(base, [first.token], later)
    assert verification.verify(base, [first.token], later) == second
    assert verification.verify(0, [scene.prompt.last], draft) == first
    assert verification.verify(base, [first.token], later) == second


def record_accepted_places(scene: Scene, rule: Rule, draft: list[int], lengths: list[int]) -> dict[int, bool]:
    """Return for each verified place of `draft` if its token is accepted, in rounds of these lengths."""
    verification = LocalVerifier(scene.cloud, rule).open(scene.prompt)
    caption: list[int] = []
    base = 0
    is_accepted: dict[int, bool] = {}
    for k in lengths:
        cut = draft[len(caption) : len(caption) + k]
        context = [scene.prompt.last, *caption]
        verdict = verification.verify(base, context[base:], cut)
        is_accepted |= {
            len(caption) + place: place < verdict.accepted for place in range(min(verdict.accepted + 1, len(cut)))
        }
        base = len(context) + verdict.accepted
        caption += [*cut[: verdict.accepted], verdict.token]
    return is_accepted


draft_lengths = st.lists(st.integers(1, 6), min_size=30, max_size=30)
long_drafts = st.lists(st.integers(0, VOCABULARY - 1), min_size=30, max_size=30)


@given(scenes(), rates, long_drafts, draft_lengths, draft_lengths)
def test_rule_synthetic_accepts_the_same_places_for_any_draft_lengths(
    scene: Scene, rate: float, draft: list[int], some: list[int], others: list[int]
) -> None:
    first, second = (record_accepted_places(scene, Synthetic((rate,)), draft, lengths) for lengths in (some, others))
    expected = {place: uniform(prompt_seed(scene.prompt), place + 1) < rate for place in first | second}
    assert first | second == expected
    assert second | first == expected


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(0.78,), (0.9, 0.5, 0.2), (0.05, 1.0)])
def test_the_acceptance_rate_by_position_is_that_of_rule_synthetic(rates: tuple[float, ...]) -> None:
    model = ToyModel(random_table(VOCABULARY, 1), frozenset())
    rule = Synthetic(rates)
    verified, accepted = [0] * 6, [0] * 6
    for clip in range(600):
        prompt = Prompt((clip, 2))
        verification = LocalVerifier(model, rule).open(prompt)
        context, base = [prompt.last], 0
        for _ in range(4):
            verdict = verification.verify(base, context[base:], [1] * 6)
            base = len(context) + verdict.accepted
            context += [*[1] * verdict.accepted, verdict.token]
            for place in range(min(verdict.accepted + 1, 6)):
                verified[place] += 1
                accepted[place] += place < verdict.accepted
    for place in range(6):
        p = rates[min(place, len(rates) - 1)]
        assert abs(accepted[place] - verified[place] * p) <= 5 * math.sqrt(verified[place] * p * (1 - p))
    assert verified[0] == 2400


def test_the_seed_depends_on_the_ids_and_the_features_of_a_prompt() -> None:
    features = torch.rand(4, 20)
    prompts = [Prompt((1, 2)), Prompt((2, 1)), Prompt((1, 2), features), Prompt((1, 2), features + 0.01)]
    assert len({prompt_seed(prompt) for prompt in prompts}) == 4
    assert prompt_seed(Prompt((1, 2), features.clone())) == prompt_seed(prompts[2])


@pytest.fixture
def verification() -> LocalVerification:
    model = ToyModel(random_table(VOCABULARY, 1), frozenset())
    return LocalVerifier(model, Rank(1)).open(Prompt((1, 2)))


@pytest.mark.parametrize("base", [-1, 1])
def test_a_base_beyond_the_committed_tokens_is_an_error(verification: LocalVerification, base: int) -> None:
    with pytest.raises(ValueError, match=f"counts on {base} committed tokens here, and 0 are known"):
        verification.verify(base, [2], [3])


def test_a_base_within_rejected_tokens_is_an_error(verification: LocalVerification) -> None:
    own = next(verification.generate(Stopping(frozenset(), 1)))
    wrong = (own + 1) % VOCABULARY
    assert verification.verify(0, [2], [wrong, wrong]).accepted == 0
    with pytest.raises(ValueError, match="counts on 2 committed tokens here, and 1 are known"):
        verification.verify(2, [0], [0])


def test_a_verification_without_a_token_before_the_draft_is_an_error(verification: LocalVerification) -> None:
    with pytest.raises(ValueError, match="cannot return 1 rows of a context of 0 tokens"):
        verification.verify(0, [], [])
