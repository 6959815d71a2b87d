"""Shadow verification, compared with a verification of each token alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate, probs, wire
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.events import (
    Committed,
    Confirmed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Prompt,
    Retracted,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.measure import metrics, shadow
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerification, LocalVerifier, prompt_seed
from tests.support.fakes import UNSURE, Scripted
from tests.support.strategies import Case, Scene, cases, play, ranks, rates, scenes, speculative


class Unused:
    """A cloud whose use is an error."""

    eos: frozenset[int] = frozenset()

    def open(self, prompt: Prompt) -> NoReturn:
        raise AssertionError("the cloud was used")


def verify_each_token(case: Case, trace: Trace) -> Hindsight:
    """Return the reference: the cloud decides on one token at a time, without a cache."""

    def rejects(tokens: Sequence[int], rank: int) -> list[bool]:
        contexts = [[*case.scene.prompt.ids, *final, *tokens[:n]] for n in range(len(tokens))]
        ranks = [probs.rank(case.scene.cloud.logits(c), token) for c, token in zip(contexts, tokens, strict=True)]
        return [found > rank for found in ranks]

    def level(scores: Sequence[float]) -> float | None:
        if case.strategy.gate.name == "risk":
            return 1 - math.prod(1 - score for score in scores)
        return max(scores, default=None)

    final: list[int] = []
    shown: list[tuple[int, float | None]] = []  # the local tokens that are not final, with their scores
    missed = 0
    drafts: list[tuple[float | None, bool, bool]] = []
    draft = Draft(())
    for _, event in trace.events:
        if isinstance(event, Drafted):
            draft = event.draft
        elif isinstance(event, Verified):
            tokens, doubted = event.draft.tokens, event.draft.doubted
            changes = any(rejects(tokens, case.rule.r))
            changes |= doubted is not None and rejects([*tokens, doubted], 1)[-1]
            drafts.append((level(event.draft.scores), True, changes))
            final += tokens[: min(event.verdict.accepted, len(shown))]
            shown = []
        elif isinstance(event, Committed) and event.origin != "local":
            final += event.tokens
        elif isinstance(event, Committed):
            shown += zip(event.tokens, draft.scores or [None] * len(event.tokens), strict=False)
            if event.is_final:
                replaced = rejects([token for token, _ in shown], case.rule.r)
                missed += sum(replaced)
                drafts.append((level([score for _, score in shown if score is not None]), False, any(replaced)))
                final += [token for token, _ in shown]
                shown = []
    return Hindsight(missed, tuple(drafts))


@st.composite
def mostly_local(draw: st.DrawFn) -> Case:
    """Draw a case in which many rounds of several tokens are local."""
    scene = draw(scenes())
    chosen = draw(st.sampled_from([gate.NEVER, gate.entropy_gate(1.2), gate.entropy_gate(1.7)]))
    rule = draw(ranks)
    return Case(scene, speculative(draw(st.integers(2, 5)), chosen, rule), rule)


@given(mostly_local() | cases())
def test_shadow_verification_equals_single_verifications_and_needs_no_cloud_without_local_tokens(case: Case) -> None:
    trace = case.play(Harness())
    counts = metrics.counts(trace)
    cloud = LocalVerifier(case.scene.cloud if counts.local else Unused(), case.rule)
    hindsight = shadow.shadow_verify(trace, case.scene.prompt, cloud, case.strategy.gate)
    assert hindsight == verify_each_token(case, trace)
    assert [sent for _, sent, _ in hindsight.drafts].count(True) == counts.cloud_calls
    if not case.strategy.look_back and not case.strategy.gate.stops_before_token:
        assert len(hindsight.drafts) == counts.rounds
    assert 0 <= hindsight.missed <= counts.local


@given(scenes(), st.integers(1, 5), rates)
def test_under_rule_synthetic_local_tokens_are_missed_corrections_as_their_draws_decide(
    scene: Scene, k: int, rate: float
) -> None:
    rule = acceptance.Synthetic((rate,))
    trace = play(scene.prompt, scene.edge, scene.cloud, speculative(k, gate.NEVER), scene.stopping, Harness())
    hindsight = shadow.shadow_verify(trace, scene.prompt, LocalVerifier(scene.cloud, rule), gate.NEVER)
    places = range(1, len(trace.tokens) + 1)
    assert hindsight.missed == sum(acceptance.uniform(prompt_seed(scene.prompt), place) >= rate for place in places)


@given(mostly_local(), st.integers(1, 4))
def test_no_shadow_draft_exceeds_the_limit_of_a_message(case: Case, limit: int) -> None:
    trace = case.play(Harness())
    cloud = LocalVerifier(case.scene.cloud, case.rule)
    expected = shadow.shadow_verify(trace, case.scene.prompt, cloud, case.strategy.gate)
    lengths: list[int] = []

    class Limited(LocalVerification):
        def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
            lengths.append(len(draft))
            return super().verify(base, tokens, draft)

    class LimitedVerifier(LocalVerifier):
        def open(self, prompt: Prompt) -> LocalVerification:
            return Limited(self, self.model.open(prompt), prompt)

    with patch.object(wire, "MAX_DRAFT", limit):
        limited = LimitedVerifier(cloud.model, case.rule)
        assert shadow.shadow_verify(trace, case.scene.prompt, limited, case.strategy.gate) == expected
    assert max(lengths, default=0) <= limit


def test_the_hindsight_of_each_round_by_hand() -> None:
    edge = Scripted(wrong=frozenset({1, 2, 3, 4, 6, 7}), unsure=frozenset({4, 7}))
    cloud = Scripted(wrong=frozenset({1, 6}))
    strategy = Strategy("speculative", UNSURE, k=2)
    trace = play(Prompt((5,)), edge, cloud, strategy, Stopping(frozenset(), 9), Harness())
    # local 0 and 1; local 2 and 3, both to be replaced; 4 rejected; local 5 and 6; 7 rejected; local 8
    hindsight = shadow.shadow_verify(trace, Prompt((5,)), LocalVerifier(cloud, Rank(1)), UNSURE)
    right, wrong, sent = (0.0, False, False), (0.0, False, True), (1.0, True, True)
    assert hindsight == Hindsight(2, (right, wrong, sent, right, sent, right))


def test_a_whole_draft_that_was_escalated_counts_as_accepted() -> None:
    draft = Draft((1, 2), (0.5, 0.25))
    trace = Trace(
        (
            (0.0, Drafted(draft)),
            (0.0, Escalated(draft, 1)),
            (0.0, Verified(draft, Verdict(2, 3))),
            (0.0, Committed((1, 2), "accepted")),
            (0.0, Finished("eos")),
        )
    )
    unused = LocalVerifier(Unused(), Rank(1))
    assert shadow.shadow_verify(trace, Prompt((5,)), unused, UNSURE) == Hindsight(0, ((0.5, True, False),))


def test_with_look_back_one_decision_of_the_gate_covers_all_tokens_since_the_last_verdict() -> None:
    chosen = gate.risk_gate(1.0, 0.6)
    shown = Draft((0, 1, 1), (0.5, 0.5, 0.25))
    trace = Trace(
        (
            (0.0, Drafted(Draft((0, 1), (0.5, 0.5)))),
            (0.0, Committed((0, 1), "local", False)),
            (0.0, Drafted(Draft((1,), (0.25,)))),
            (0.0, Escalated(shown, 1)),
            (0.0, Verified(shown, Verdict(1, 0))),
            (0.0, Confirmed(1)),
            (0.0, Retracted(1)),
            (0.0, Committed((0,), "correction")),
            (0.0, Drafted(Draft((0,), (0.25,)))),
            (0.0, Committed((0,), "local", False)),
            (0.0, Drafted(Draft((1,), (0.25,)))),
            (0.0, Committed((1,), "local")),
            (0.0, Finished("length")),
        )
    )
    hindsight = shadow.shadow_verify(trace, Prompt((5,)), LocalVerifier(Scripted(), Rank(1)), chosen)
    assert hindsight == Hindsight(1, ((1 - 0.5 * 0.5 * 0.75, True, True), (1 - 0.75**2, False, True)))


@pytest.mark.parametrize(("token", "is_changed"), [(4, False), (5, True)])
def test_under_gate_token_the_tokens_before_the_uncertain_one_are_a_decision_of_their_own(
    token: int, is_changed: bool
) -> None:
    draft = Draft((0, 0), (0.1, 0.2, 0.9), doubted=4)
    trace = Trace(
        (
            (0.0, Drafted(draft)),
            (0.0, Committed((0, 0), "local")),
            (0.0, Escalated(Draft((), draft.scores, 4), 3)),
            (0.0, Verified(Draft((), draft.scores, 4), Verdict(0, token))),
            (0.0, Committed((token,), "bonus")),
            (0.0, Finished("length")),
        )
    )
    chosen = gate.parse_gate("token", 0.5)
    hindsight = shadow.shadow_verify(trace, Prompt((5,)), LocalVerifier(Scripted(), Rank(1)), chosen)
    assert hindsight == Hindsight(0, ((0.2, False, False), (0.9, True, is_changed)))
