"""Drafting, drafting ahead and draft stops: which tokens stay, which are drafted again, and that no output changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
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
from tests.support.fakes import Scripted
from tests.support.strategies import Case, Scene, draft_stops, gates, ks, ranks, scenes, speculative
from tests.support.toy import ToyModel

LIMITS = st.sampled_from([0, 1, 2, 5, 30])
MANY = 300  # these run in milliseconds
ANSWERS = st.lists(st.booleans(), max_size=8)


@dataclass(frozen=True)
class Slow:
    """A call that is done when `answers` says so, and at the latest when its result is waited for."""

    call: Callable[[], Verdict]
    answers: Iterator[bool]
    waited: list[bool]

    def done(self) -> bool:
        return next(self.answers, False)

    def result(self) -> Verdict:
        self.waited.append(True)
        return self.call()


def run(case: Case, ahead: int = 0, answers: Sequence[bool] = ()) -> Trace:
    """Decode a case whose verdicts arrive so late that the edge drafts ahead of them."""
    remaining = iter(answers)

    def background(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(call, remaining, [])

    scene, strategy = case.scene, replace(case.strategy, draft_ahead=ahead)
    runtime = Runtime(background=background if ahead else None)
    verifier = LocalVerifier(scene.cloud, strategy.rule)
    return stamp(decode(scene.prompt, strategy, scene.stopping, scene.edge, verifier, runtime))


@st.composite
def drafting(draw: st.DrawFn) -> Case:
    """Draw a scene and a speculative strategy with any gate, rule and draft stop."""
    chosen = draw(gates)
    return Case(draw(scenes()), Strategy("speculative", chosen, draw(ranks), draw(ks), draw(draft_stops(chosen))))


def lossless(case: Case) -> Case:
    """Return the case under gate always and rule greedy, without a draft stop."""
    return replace(case, strategy=Strategy("speculative", k=case.strategy.k))


@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_drafting_ahead_changes_no_token_under_any_gate_rule_and_stop(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    waits, trace = run(case), run(case, ahead, answers)
    assert trace.tokens == waits.tokens
    assume(not case.strategy.is_lossless)  # a lossless draft may be longer, so its commits are cut differently
    assert [each for _, each in trace.events if isinstance(each, Committed)] == [
        each for _, each in waits.events if isinstance(each, Committed)
    ]


@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_longer_drafts_after_drafting_ahead_change_no_lossless_token(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    assert run(lossless(case), ahead, answers).tokens == run(lossless(case)).tokens


@given(drafting() | drafting().map(lossless), LIMITS, ANSWERS)
def test_tokens_drafted_ahead_follow_the_draft_and_stay_after_a_right_guess(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    stood: tuple[int, ...] = ()
    for _, event in run(case, ahead, answers).events:
        if isinstance(event, Drafted):
            assert event.draft.tokens[: event.ahead] == stood[: event.ahead]
            assert event.ahead == min(len(stood), len(event.draft.tokens))
            if not case.strategy.is_lossless:
                assert len(event.draft.tokens) <= (case.strategy.k or 0)
            stood = stood[len(event.draft.tokens) :]
        elif isinstance(event, Ahead):
            assert event.tokens[: len(stood)] == stood
            assert 0 <= event.made == len(event.tokens) - len(stood)
            assert len(event.tokens) <= max(ahead, len(stood))
            stood = event.tokens
        elif isinstance(event, Verified):
            right = event.verdict.accepted == len(event.draft.tokens) and stood[:1] == (event.verdict.token,)
            assert event.right(stood[0] if stood else None) == right
            stood = stood[1:] if right else ()


class Counting:
    """A model that records the tokens of each forward pass."""

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
def test_no_kept_token_is_drafted_twice(scene: Scene, k: int, ahead: int, answers: list[bool]) -> None:
    edge = Counting(scene.edge)
    case = Case(replace(scene, edge=edge), speculative(k))  # type: ignore[arg-type]
    trace = run(case, ahead, answers)
    new = sum(len(event.draft.tokens) - event.ahead for _, event in trace.events if isinstance(event, Drafted))
    assert len(edge.fed) == new + metrics.counts(trace).ahead


@given(scenes(), ks)
def test_a_perfect_drafter_drafts_each_token_once(scene: Scene, k: int) -> None:
    edge = Counting(scene.cloud)
    case = Case(replace(scene, edge=edge), speculative(k))  # type: ignore[arg-type]
    trace = run(case, 30)
    counts = metrics.counts(trace)
    assert len(edge.fed) == len(trace.tokens)
    assert (counts.ahead_wasted, counts.correction) == (0, 0)


def test_a_draft_stays_if_the_context_agrees_and_is_discarded_otherwise() -> None:
    edge = Counting(Scripted(wrong=frozenset({2})))  # 0 0 1 0 0 ...
    drafter = Drafter(edge.open(None), frozenset())  # type: ignore[arg-type]
    drafter.follow([7])
    assert drafter.draft(2) == Draft((0, 0))
    assert drafter.draft_ahead(5, lambda: False) == 3
    assert drafter.tokens == (0, 0, 1, 0, 0)
    assert drafter.follow([7, 0, 0, 1]) == 2  # the guess is right
    assert drafter.draft(3) == Draft((0, 0, 0))
    assert edge.fed == [(7,), (0,), (0,), (1,), (0,), (0,)]
    assert drafter.follow([7, 0, 0, 1, 5]) == 0  # another token there
    assert drafter.draft(1) == Draft((0,))
    assert edge.fed[6:] == [(5,)]
    assert drafter.follow([9]) == 0  # another stream
    drafter.draft(1)
    assert edge.fed[7:] == [(9,)]


def test_drafting_ahead_ends_at_the_verdict_at_eos_or_at_the_limit() -> None:
    def drafter(eos: frozenset[int] = frozenset()) -> Drafter:
        made = Drafter(Scripted(wrong=frozenset({3})).open(None), eos)  # type: ignore[arg-type]
        made.follow([7])
        made.draft(2)
        return made

    answers = iter([False, True])
    assert drafter().draft_ahead(9, lambda: next(answers)) == 1
    assert drafter().draft_ahead(2, lambda: False) == 0
    assert drafter().draft_ahead(6, lambda: False) == 4
    ended = drafter(frozenset({1}))
    assert ended.draft_ahead(9, lambda: False) == 2
    assert ended.tokens == (0, 0, 0, 1)
    assert ended.draft_ahead(9, lambda: False) == 0


@given(drafting())
def test_a_draft_stop_ends_a_draft_at_its_first_unsure_token(case: Case) -> None:
    stop, scene = case.strategy.draft_stop, case.scene
    assume(stop)
    assert stop is not None
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


@pytest.mark.parametrize(
    ("text", "label"),
    [("entropy", "stopH1.5"), ("entropy=0.5", "stopH0.5"), ("margin=0.25", "stopM0.25"), ("none", None)],
)
def test_a_draft_stop_has_a_label_of_its_rule_and_limit(text: str, label: str | None) -> None:
    found = parse_draft_stop(text, gate.entropy_gate(1.5))
    assert (found and found.label) == label
    assert parse_draft_stop("entropy", gate.ALWAYS) is None


@pytest.mark.parametrize(
    "text", ["", "entropy=", "entropy=0", "entropy=nan", "margin", "margin=0", "margin=1.5", "top=3"]
)
def test_an_unknown_draft_stop_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="none, entropy, entropy=x, margin=x"):
        parse_draft_stop(text, gate.ALWAYS)


def two_rounds_ahead(runtime: Runtime) -> Iterator[Event]:
    """Decode eight tokens, with drafts of two and two tokens drafted ahead."""
    strategy, stopping = replace(speculative(2), draft_ahead=2), Stopping(frozenset(), 8)
    return decode(Prompt((5, 6)), strategy, stopping, Scripted(), LocalVerifier(Scripted(), GREEDY), runtime)


def test_a_reader_that_leaves_during_a_verification_waits_for_it() -> None:
    waited: list[bool] = []
    runtime = Runtime(background=lambda call: Slow(call, iter(()), waited))
    events = two_rounds_ahead(runtime)
    assert any(isinstance(event, Ahead) for event in events)
    assert waited == []
    events.close()  # type: ignore[attr-defined]
    assert waited == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, GeneratorExit])
@pytest.mark.parametrize("alone", [True, False])
def test_an_error_of_the_edge_while_it_drafts_ahead_is_not_hidden_by_a_fault_of_the_cloud(
    error: type[BaseException], alone: bool
) -> None:
    waited: list[bool] = []

    def fails() -> Verdict:
        raise CloudFault("gone")

    def background(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(fails, iter(()), waited)

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


@pytest.mark.parametrize(("text", "stops"), [("margin=0.5", [False, True]), ("entropy=0.6", [False, True])])
def test_a_margin_stops_where_it_is_small_and_an_entropy_where_it_is_large(text: str, stops: list[bool]) -> None:
    rows = torch.tensor([[4.0, 0.0], [0.5, 0.0]])  # margins 0.96 and 0.24, entropies 0.09 and 0.66 nats
    stop = parse_draft_stop(text, gate.ALWAYS)
    assert stop is not None
    assert [stop(row, []) for row in rows] == stops


def test_tokens_drafted_ahead_count_once_and_are_wasted_if_they_do_not_stand() -> None:
    first, second = Draft((1, 2)), Draft((4, 5, 6))
    events: list[Event] = [
        Drafted(first),
        Ahead((3, 4, 5), 3),
        Verified(first, Verdict(2, 3)),  # a right guess, and two that stand
        Drafted(second, 2),
        Ahead((7, 8), 2),
        Verified(second, Verdict(1, 9)),  # both in vain
    ]
    counts = metrics.counts(Trace(tuple((0.0, event) for event in events)))
    assert (counts.drafted, counts.ahead, counts.ahead_wasted, counts.waste_ahead) == (7, 5, 2, 0.4)
