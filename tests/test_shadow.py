"""Looking back: what the cloud would have said, against asking it token by token."""

from __future__ import annotations

from typing import NoReturn

from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate, probs
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.events import Committed, Draft, Drafted, Escalated, Finished, Prompt, Trace, Verdict, Verified
from edgecloud_sd.measure import metrics, shadow
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier, prompt_seed
from tests.support.fakes import UNSURE, Scripted
from tests.support.strategies import Case, Scene, cases, play, ranks, rates, scenes, speculative


class Silent:
    """A cloud that must not be asked."""

    eos: frozenset[int] = frozenset()

    def open(self, prompt: Prompt) -> NoReturn:
        raise AssertionError("the cloud was asked")


def asked(case: Case, trace: Trace) -> Hindsight:
    """The cloud without any cache, one token at a time."""
    context = list(case.scene.prompt.ids)
    missed = 0
    drafts: list[tuple[float | None, bool, bool]] = []
    draft = Draft(())
    for _, event in trace.events:
        if isinstance(event, Drafted):
            draft = event.draft
        score = max(draft.scores) if draft.scores else None
        if isinstance(event, Verified):
            drafts.append((score, True, event.verdict.accepted != len(event.draft.tokens)))
        if isinstance(event, Committed):
            replaced = 0
            for token in event.tokens:
                replaced += probs.rank(case.scene.cloud.logits(context), token) > case.rule.r
                context.append(token)
            if event.origin == "local":
                missed += replaced
                drafts.append((score, False, replaced > 0))
    return Hindsight(missed, tuple(drafts))


@st.composite
def lenient(draw: st.DrawFn) -> Case:
    """A case in which many rounds of several tokens are local."""
    scene = draw(scenes())
    chosen = draw(st.sampled_from([gate.NEVER, gate.entropy_gate(1.2), gate.entropy_gate(1.7)]))
    rule = draw(ranks)
    return Case(scene, speculative(draw(st.integers(2, 5)), chosen, rule), rule)


@given(lenient() | cases())
def test_looking_back_is_asking_token_by_token_and_not_at_all_where_no_token_was_local(case: Case) -> None:
    trace = case.play(Harness())
    counts = metrics.counts(trace)
    cloud = LocalVerifier(case.scene.cloud if counts.local else Silent(), case.rule)
    found = shadow.shadow_verify(trace, case.scene.prompt, cloud)
    assert found == asked(case, trace)
    assert [sent for _, sent, _ in found.drafts].count(True) == counts.cloud_calls
    assert len(found.drafts) == counts.rounds
    assert 0 <= found.missed <= counts.local


@given(scenes(), st.integers(1, 5), rates)
def test_tokens_that_were_not_asked_about_have_the_fate_that_asking_would_have_shown(
    scene: Scene, k: int, rate: float
) -> None:
    rule = acceptance.Synthetic((rate,))
    trace = play(scene.prompt, scene.edge, scene.cloud, speculative(k, gate.NEVER), scene.stopping, Harness())
    found = shadow.shadow_verify(trace, scene.prompt, LocalVerifier(scene.cloud, rule))
    places = range(1, len(trace.tokens) + 1)
    assert found.missed == sum(acceptance.uniform(prompt_seed(scene.prompt), place) >= rate for place in places)


def test_each_round_by_hand() -> None:
    edge = Scripted(wrong=frozenset({1, 2, 3, 4, 6, 7}), unsure=frozenset({4, 7}))
    cloud = Scripted(wrong=frozenset({1, 6}))
    strategy = Strategy("speculative", UNSURE, k=2)
    trace = play(Prompt((5,)), edge, cloud, strategy, Stopping(frozenset(), 9), Harness())
    # local 0 and 1, local 2 and 3 that the cloud would both replace, 4 rejected, local 5 and 6, 7 rejected, local 8
    found = shadow.shadow_verify(trace, Prompt((5,)), LocalVerifier(cloud, Rank(1)))
    right, wrong, sent = (0.0, False, False), (0.0, False, True), (1.0, True, True)
    assert found == Hindsight(2, (right, wrong, sent, right, sent, right))


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
    silent = LocalVerifier(Silent(), Rank(1))
    assert shadow.shadow_verify(trace, Prompt((5,)), silent) == Hindsight(0, ((0.5, True, False),))
