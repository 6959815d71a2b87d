"""Drafting, drafting ahead and draft stops: the tokens that stay or are drafted again, and the unchanged output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecloud_sd import gate, probs
from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.drafter import Drafter
from edgecloud_sd.events import Ahead, Committed, Draft, Drafted, Event, Prompt, Trace, Verdict, Verified
from edgecloud_sd.gate import parse_draft_stop
from edgecloud_sd.measure import metrics
from edgecloud_sd.prefill import Pending
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.verifier import CloudFault, LocalVerifier
from tests.support.fakes import Scripted, Slow
from tests.support.strategies import Case, Scene, draft_stops, gates, ks, scenes, speculations, speculative
from tests.support.toy import ToyModel

LIMITS = st.sampled_from([0, 1, 2, 5, 30])
MANY = 4 * settings().max_examples  # an example takes milliseconds
ANSWERS = st.lists(st.booleans(), max_size=8)


def run(case: Case, ahead: int = 0, answers: Sequence[bool] = ()) -> Trace:
    """Decode a case in which the edge drafts up to `ahead` tokens ahead until `answers` reports a verdict."""
    remaining = iter(answers)

    def background(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(call, remaining, [])

    scene, strategy = case.scene, replace(case.strategy, draft_ahead=ahead)
    runtime = Runtime(background=background if ahead else None)
    verifier = LocalVerifier(scene.cloud, strategy.rule, wants_rest=strategy.wants_rest)
    return stamp(decode(scene.prompt, strategy, scene.stopping, scene.edge, verifier, runtime))


@st.composite
def drafting(draw: st.DrawFn) -> Case:
    """Draw a scene and any speculative strategy."""
    return Case(draw(scenes()), replace(draw(speculations()), draft_ahead=0))


def commits(trace: Trace) -> list[Committed]:
    return [event for _, event in trace.events if isinstance(event, Committed)]


def lossless(case: Case) -> Case:
    """Return the case under gate always and rule greedy, without a draft stop."""
    return replace(case, strategy=Strategy("speculative", k=case.strategy.k))


@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_drafting_ahead_changes_no_token_with_any_gate_rule_and_stop(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    expected, trace = run(case), run(case, ahead, answers)
    assert trace.tokens == expected.tokens
    assume(not case.strategy.is_lossless)  # a lossless draft may be longer, so its commits are cut differently
    assert commits(trace) == commits(expected)


@pytest.mark.slow
@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_longer_drafts_after_drafting_ahead_change_no_lossless_token(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    assert run(lossless(case), ahead, answers).tokens == run(lossless(case)).tokens


@given(drafting() | drafting().map(lossless), LIMITS, ANSWERS)
def test_tokens_drafted_ahead_become_the_next_draft_after_a_right_guess(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    ahead_tokens: tuple[int, ...] = ()
    for _, event in run(case, ahead, answers).events:
        if isinstance(event, Drafted):
            assert event.draft.tokens[: event.ahead] == ahead_tokens[: event.ahead]
            assert event.ahead == min(len(ahead_tokens), len(event.draft.tokens))
            if not case.strategy.is_lossless:
                assert len(event.draft.tokens) <= (case.strategy.k or 0)
            ahead_tokens = ahead_tokens[len(event.draft.tokens) :]
        elif isinstance(event, Ahead):
            assert event.tokens[: len(ahead_tokens)] == ahead_tokens
            assert 0 <= event.made == len(event.tokens) - len(ahead_tokens)
            assert len(event.tokens) <= max(ahead, len(ahead_tokens))
            ahead_tokens = event.tokens
        elif isinstance(event, Verified):
            right = event.verdict.accepted == len(event.draft.tokens) and ahead_tokens[:1] == (event.verdict.token,)
            assert event.right(ahead_tokens[0] if ahead_tokens else None) == right
            ahead_tokens = ahead_tokens[1:] if right else ()


class Counting:
    """A model that records the tokens of each forward pass in `fed`."""

    def __init__(self, model: ToyModel | Scripted) -> None:
        self._model = model
        self.fed: list[tuple[int, ...]] = []

    def open(self, prompt: object) -> Counting:
        self._session = self._model.open(prompt)  # type: ignore[arg-type]
        self.tokens = self._session.tokens
        return self

    def extend(self, tokens: list[int]) -> object:
        self.fed.append(tuple(tokens))
        return self._session.extend(tokens)

    def truncate(self, length: int) -> None:
        self._session.truncate(length)


@given(scenes(), ks, LIMITS, ANSWERS)
def test_the_events_record_the_width_of_each_forward_pass(
    scene: Scene, k: int, ahead: int, answers: list[bool]
) -> None:
    edge = Counting(scene.edge)
    case = Case(replace(scene, edge=edge), speculative(k))  # type: ignore[arg-type]
    trace = run(case, ahead, answers)
    passes = [event.passes for _, event in trace.events if isinstance(event, Drafted)]
    new = sum(len(event.draft.tokens) - event.ahead for _, event in trace.events if isinstance(event, Drafted))
    assert sum(map(len, passes)) <= new  # at least one token each
    if not ahead:
        assert [len(fed) for fed in edge.fed] == [width for widths in passes for width in widths]


@given(scenes(), ks)
def test_a_perfect_drafter_drafts_each_token_once(scene: Scene, k: int) -> None:
    edge = Counting(scene.cloud)
    case = Case(replace(scene, edge=edge), speculative(k))  # type: ignore[arg-type]
    trace = run(case, 30)
    counts = metrics.counts(trace)
    assert len(edge.fed) == len(trace.tokens)
    assert (counts.ahead_wasted, counts.correction) == (0, 0)


def test_draft_tokens_that_the_context_contains_stay_and_others_are_discarded() -> None:
    edge = Counting(Scripted(wrong=frozenset({2})))  # 0 0 1 0 0 ...
    drafter = Drafter(edge.open(None), frozenset(), Strategy(k=2))  # type: ignore[arg-type]
    drafter.follow([7])
    assert drafter.draft(2, 9) == Draft((0, 0))
    assert drafter.draft_ahead(2, 5, lambda: False) == ((1, 0, 0), 3)
    assert drafter.tokens == (0, 0, 1, 0, 0)
    assert drafter.follow([7, 0, 0, 1]) == 2  # the guess is right
    assert drafter.draft(3, 9) == Draft((0, 0, 0))
    assert edge.fed == [(7,), (0,), (0,), (1,), (0,), (0,)]
    assert drafter.follow([7, 0, 0, 1, 5]) == 0  # the context has another token there
    assert drafter.draft(1, 9) == Draft((0,))
    assert edge.fed[6:] == [(5, 0, 0)]  # the rest of the old draft is a guess
    assert drafter.follow([9]) == 0  # the context of another caption
    assert drafter.draft(1, 1) == Draft((0,))  # there is no room for a guess
    assert edge.fed[7:] == [(9,)]


def test_drafting_ahead_ends_at_the_verdict_at_eos_or_at_the_limit() -> None:
    def make_drafter(eos: frozenset[int] = frozenset()) -> Drafter:
        drafter = Drafter(Scripted(wrong=frozenset({3})).open(None), eos, Strategy(k=2))  # type: ignore[arg-type]
        drafter.follow([7])
        drafter.draft(2, 9)
        return drafter

    answers = iter([False, True])
    assert make_drafter().draft_ahead(2, 9, lambda: next(answers))[1] == 1
    assert make_drafter().draft_ahead(2, 2, lambda: False)[1] == 0
    assert make_drafter().draft_ahead(2, 6, lambda: False)[1] == 4
    ended = make_drafter(frozenset({1}))
    assert ended.draft_ahead(2, 9, lambda: False)[1] == 2
    assert ended.tokens == (0, 0, 0, 1)
    assert ended.draft_ahead(2, 9, lambda: False)[1] == 0


@given(drafting(), st.data())
def test_a_draft_stop_ends_a_draft_at_its_first_unsure_token(case: Case, data: st.DataObject) -> None:
    chosen = data.draw(gates.filter(lambda chosen: chosen.name != "risk" and not chosen.stops_before_token))
    stop, scene = data.draw(draft_stops(chosen).filter(bool)), case.scene
    assert stop is not None
    case = replace(case, strategy=replace(case.strategy, gate=chosen, draft_stop=stop, revise="none", look_back=False))
    score = stop.score or probs.entropy
    k, context = case.strategy.k or 0, list(scene.prompt.ids)
    for _, event in run(case).events:
        if isinstance(event, Drafted):
            draft = event.draft.tokens
            unsure = [score(scene.edge.logits([*context, *draft[:i]])) > stop.threshold for i in range(len(draft))]
            assert not any(unsure[:-1])
            room = scene.stopping.room(len(context) - len(scene.prompt.ids))
            assert unsure[-1] or draft[-1] in scene.stopping.eos or len(draft) == min(k, room)
        elif isinstance(event, Committed):
            context.extend(event.tokens)


@given(scenes(), ks, st.floats(0.01, 2.0))
def test_a_draft_that_stops_at_the_gate_threshold_escalates_for_its_last_token(
    scene: Scene, k: int, threshold: float
) -> None:
    chosen = gate.entropy_gate(threshold)
    strategy = replace(speculative(k, chosen, Rank(3)), draft_stop=parse_draft_stop("entropy", chosen))
    for _, event in run(Case(scene, strategy)).events:
        if isinstance(event, Drafted):
            assert chosen(event.draft) == (event.draft.scores[-1] > threshold)


def two_rounds_ahead(runtime: Runtime) -> Iterator[Event]:
    """Decode eight tokens, with drafts of two and two tokens drafted ahead."""
    strategy, stopping = replace(speculative(2), draft_ahead=2), Stopping(frozenset(), 8)
    return decode(Prompt((5, 6)), strategy, stopping, Scripted(), LocalVerifier(Scripted(), GREEDY), runtime)


def test_closing_the_events_during_a_verification_waits_for_it() -> None:
    waited: list[bool] = []
    runtime = Runtime(background=lambda call: Slow(call, iter(()), waited))
    events = two_rounds_ahead(runtime)
    assert any(isinstance(event, Ahead) for event in events)
    assert waited == []
    events.close()  # type: ignore[attr-defined]
    assert waited == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, GeneratorExit])
@pytest.mark.parametrize("alone", [True, False])
def test_a_fault_of_the_cloud_does_not_hide_an_error_while_drafting_ahead(
    error: type[BaseException], alone: bool
) -> None:
    waited: list[bool] = []

    def fail() -> Verdict:
        raise CloudFault("gone")

    def background(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(fail, iter(()), waited)

    events = two_rounds_ahead(Runtime(background=background, finish_alone=alone))
    assert any(isinstance(event, Ahead) for event in events)
    with pytest.raises(error):
        events.throw(error())  # type: ignore[attr-defined]
    assert waited == [True]


@given(drafting())
def test_a_draft_stop_changes_no_lossless_token(case: Case) -> None:
    stop = case.strategy.draft_stop
    own_score = stop and replace(stop, score=stop.score or probs.entropy)  # gate always gives no score
    stopped = replace(case, strategy=Strategy("speculative", k=case.strategy.k, draft_stop=own_score))
    assert run(stopped).tokens == run(lossless(case)).tokens


def test_tokens_drafted_ahead_count_once_and_are_wasted_after_a_wrong_guess() -> None:
    first, second = Draft((1, 2)), Draft((4, 5, 6))
    events: list[Event] = [
        Drafted(first),
        Ahead((3, 4, 5), 3),
        Verified(first, Verdict(2, 3)),  # the guess of the bonus is right, so two tokens stay
        Drafted(second, 2),
        Ahead((7, 8), 2),
        Verified(second, Verdict(1, 9)),  # both are wasted
    ]
    counts = metrics.counts(Trace(tuple((0.0, event) for event in events)))
    assert (counts.drafted, counts.ahead, counts.ahead_wasted, counts.waste_ahead) == (7, 5, 2, 0.4)
