"""Drafting, drafting ahead of a verdict and stopping early: what is kept, what is made anew, that no token changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecloud_sd import gate, probs
from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.decoder import Decoding, decode
from edgecloud_sd.drafter import Drafter
from edgecloud_sd.events import Ahead, Committed, Draft, Drafted, Event, Prompt, Trace, Verdict, Verified
from edgecloud_sd.gate import parse_draft_stop
from edgecloud_sd.measure import metrics
from edgecloud_sd.prefill import Pending
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.verifier import CloudFault, LocalVerifier
from tests.support.strategies import Case, Scene, Scripted, gates, ks, ranks, scenes, speculative, stops
from tests.support.toy import ToyModel

LIMITS = st.sampled_from([0, 1, 2, 5, 30])
MANY = 300  # these run in milliseconds
ANSWERS = st.lists(st.booleans(), max_size=8)


@dataclass(frozen=True)
class Slow:
    """A call whose verdict is there when `answers` says so, and at the latest when it is waited for."""

    call: Callable[[], Verdict]
    answers: Iterator[bool]
    waited: list[bool]

    def done(self) -> bool:
        return next(self.answers, False)

    def result(self) -> Verdict:
        self.waited.append(True)
        return self.call()


def run(case: Case, ahead: int, answers: list[bool], is_lossless: bool) -> Trace:
    """The case with verdicts that let so much be drafted ahead of them."""
    left = iter(answers)

    def begin(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(call, left, [])

    how = replace(case.how, begin=begin if ahead else None, ahead=ahead, is_lossless=is_lossless)
    return stamp(decode(case.scene.prompt, how, case.scene.edge, LocalVerifier(case.scene.cloud, case.rule)))


@st.composite
def drafting(draw: st.DrawFn) -> Case:
    scene, chosen = draw(scenes()), draw(gates)
    return Case(scene, replace(speculative(scene, draw(ks), chosen), stop=draw(stops(chosen))), draw(ranks))


@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_drafting_ahead_changes_no_token_under_any_gate_rule_and_stop(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    waits = run(case, 0, [], is_lossless=False)
    trace = run(case, ahead, answers, is_lossless=False)
    assert trace.tokens == waits.tokens
    assert [each for _, each in trace.events if isinstance(each, Committed)] == [
        each for _, each in waits.events if isinstance(each, Committed)
    ]


@settings(max_examples=MANY)
@given(drafting(), LIMITS, ANSWERS)
def test_longer_drafts_of_what_was_made_ahead_change_no_token_of_strict_output(
    case: Case, ahead: int, answers: list[bool]
) -> None:
    is_lossless = replace(case, how=replace(case.how, gate=gate.ALWAYS, stop=None), rule=GREEDY)
    assert run(is_lossless, ahead, answers, is_lossless=True).tokens == run(is_lossless, 0, [], is_lossless=True).tokens


@given(drafting(), LIMITS, ANSWERS, st.booleans())
def test_what_is_drafted_ahead_goes_on_from_the_draft_and_is_kept_where_the_guess_was_right(
    case: Case, ahead: int, answers: list[bool], is_lossless: bool
) -> None:
    stood: tuple[int, ...] = ()
    for _, event in run(case, ahead, answers, is_lossless).events:
        if isinstance(event, Drafted):
            assert event.draft.tokens[: event.ahead] == stood[: event.ahead]
            assert event.ahead == min(len(stood), len(event.draft.tokens))
            if not is_lossless:
                assert len(event.draft.tokens) <= int(str(case.how.k))
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
    """Notes what each pass of a model is fed."""

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
def test_no_token_that_is_kept_is_drafted_again(scene: Scene, k: int, ahead: int, answers: list[bool]) -> None:
    edge = Counting(scene.edge)
    case = Case(replace(scene, edge=edge), speculative(scene, k), GREEDY)  # type: ignore[arg-type]
    trace = run(case, ahead, answers, is_lossless=True)
    new = sum(len(event.draft.tokens) - event.ahead for _, event in trace.events if isinstance(event, Drafted))
    assert len(edge.fed) == new + metrics.counts(trace).ahead


@given(scenes(), ks)
def test_a_right_drafter_that_is_never_interrupted_makes_each_token_once(scene: Scene, k: int) -> None:
    edge = Counting(scene.cloud)
    case = Case(replace(scene, edge=edge), speculative(scene, k), GREEDY)  # type: ignore[arg-type]
    trace = run(case, 30, [], is_lossless=True)
    counts = metrics.counts(trace)
    assert len(edge.fed) == len(trace.tokens)
    assert (counts.ahead_wasted, counts.correction) == (0, 0)


def test_a_draft_that_the_context_agrees_with_is_kept_and_any_other_is_cut_away() -> None:
    edge = Counting(Scripted(wrong=frozenset({2})))  # 0 0 1 0 0 ...
    drafter = Drafter(edge.open(None), frozenset())  # type: ignore[arg-type]
    drafter.follow([7])
    assert drafter.draft(2) == Draft((0, 0))
    assert drafter.ahead(5, lambda: False) == 3
    assert drafter.tokens == (0, 0, 1, 0, 0)
    assert drafter.follow([7, 0, 0, 1]) == 2  # its guess was right
    assert drafter.draft(3) == Draft((0, 0, 0))
    assert edge.fed == [(7,), (0,), (0,), (1,), (0,), (0,)]
    assert drafter.follow([7, 0, 0, 1, 5]) == 0  # another token in its place
    assert drafter.draft(1) == Draft((0,))
    assert edge.fed[6:] == [(5,)]
    assert drafter.follow([9]) == 0  # another stream: nothing agrees
    drafter.draft(1)
    assert edge.fed[7:] == [(9,)]


def test_nothing_is_drafted_beyond_the_verdict_the_end_or_the_limit() -> None:
    def drafter(eos: frozenset[int] = frozenset()) -> Drafter:
        made = Drafter(Scripted(wrong=frozenset({3})).open(None), eos)  # type: ignore[arg-type]
        made.follow([7])
        made.draft(2)
        return made

    answers = iter([False, True])
    assert drafter().ahead(9, lambda: next(answers)) == 1
    assert drafter().ahead(2, lambda: False) == 0
    assert drafter().ahead(6, lambda: False) == 4
    ended = drafter(frozenset({1}))
    assert ended.ahead(9, lambda: False) == 2
    assert ended.tokens == (0, 0, 0, 1)
    assert ended.ahead(9, lambda: False) == 0


@given(drafting())
def test_a_draft_stops_at_its_first_unsure_token_and_no_earlier(case: Case) -> None:
    stop, scene = case.how.stop, case.scene
    assume(stop)
    assert stop is not None
    score = stop.score or probs.entropy
    k, context = int(str(case.how.k)), list(scene.prompt.ids)
    for _, event in run(case, 0, [], is_lossless=False).events:
        if isinstance(event, Drafted):
            draft = event.draft.tokens
            unsure = [score(scene.edge.logits([*context, *draft[:i]])) > stop.threshold for i in range(len(draft))]
            assert not any(unsure[:-1])
            room = scene.stopping.room(len(context) - len(scene.prompt.ids))
            assert unsure[-1] or draft[-1] in scene.stopping.eos or len(draft) == min(k, room)
        elif isinstance(event, Committed):
            context.extend(event.tokens)


@given(scenes(), ks, st.floats(0.01, 2.0))
def test_stopping_where_the_gate_escalates_never_adds_an_escalation_that_a_shorter_draft_has_not(
    scene: Scene, k: int, threshold: float
) -> None:
    chosen = gate.entropy_gate(threshold)
    how = replace(speculative(scene, k, chosen), stop=parse_draft_stop("entropy", chosen))
    for _, event in run(Case(scene, how, Rank(3)), 0, [], is_lossless=False).events:
        if isinstance(event, Drafted):
            assert chosen(event.draft) == (event.draft.scores[-1] > threshold)


@pytest.mark.parametrize(
    ("text", "label"),
    [("entropy", "stopH1.5"), ("entropy=0.5", "stopH0.5"), ("margin=0.25", "stopM0.25"), ("none", None)],
)
def test_a_stop_is_known_by_its_rule_and_threshold(text: str, label: str | None) -> None:
    found = parse_draft_stop(text, gate.entropy_gate(1.5))
    assert (found and found.label) == label
    assert parse_draft_stop("entropy", gate.ALWAYS) is None


@pytest.mark.parametrize(
    "text", ["", "entropy=", "entropy=0", "entropy=nan", "margin", "margin=0", "margin=1.5", "top=3"]
)
def test_what_is_no_stop_is_an_error_that_names_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="none, entropy, entropy=x, margin=x"):
        parse_draft_stop(text, gate.ALWAYS)


def test_a_reader_that_leaves_while_a_verdict_is_on_its_way_waits_for_it() -> None:
    waited: list[bool] = []
    how = Decoding("speculative", Stopping(frozenset(), 8), 2, begin=lambda call: Slow(call, iter(()), waited), ahead=2)
    how = replace(how, gate=gate.ALWAYS)
    events = decode(Prompt((5, 6)), how, Scripted(), LocalVerifier(Scripted(), GREEDY))
    assert any(isinstance(event, Ahead) for event in events)
    assert waited == []
    events.close()  # type: ignore[attr-defined]
    assert waited == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, GeneratorExit])
@pytest.mark.parametrize("alone", [True, False])
def test_what_stops_the_edge_while_it_drafts_ahead_is_not_lost_in_a_fault_of_the_cloud(
    error: type[BaseException], alone: bool
) -> None:
    waited: list[bool] = []

    def fails() -> Verdict:
        raise CloudFault("gone")

    def begin(call: Callable[[], Verdict]) -> Pending[Verdict]:
        return Slow(fails, iter(()), waited)

    stopping = Stopping(frozenset(), 8)
    how = Decoding("speculative", stopping, 2, gate.ALWAYS, alone=alone, begin=begin, ahead=2)
    events = decode(Prompt((5, 6)), how, Scripted(), LocalVerifier(Scripted(), GREEDY))
    assert any(isinstance(event, Ahead) for event in events)
    with pytest.raises(error):
        events.throw(error())  # type: ignore[attr-defined]
    assert waited == [True]


@given(drafting())
def test_stopping_drafts_early_changes_no_token_of_strict_output(case: Case) -> None:
    stop = case.how.stop and replace(case.how.stop, score=case.how.stop.score or probs.entropy)
    is_lossless = replace(case, how=replace(case.how, gate=gate.ALWAYS, stop=stop), rule=GREEDY)
    whole = replace(is_lossless, how=replace(is_lossless.how, stop=None))
    assert run(is_lossless, 0, [], is_lossless=True).tokens == run(whole, 0, [], is_lossless=True).tokens


@pytest.mark.parametrize(("text", "stops"), [("margin=0.5", [False, True]), ("entropy=0.6", [False, True])])
def test_a_margin_stops_where_it_is_small_and_an_entropy_where_it_is_large(text: str, stops: list[bool]) -> None:
    rows = torch.tensor([[4.0, 0.0], [0.5, 0.0]])  # margins 0.96 and 0.24, entropies 0.09 and 0.66 nats
    stop = parse_draft_stop(text, gate.ALWAYS)
    assert stop is not None
    assert [stop(row, []) for row in rows] == stops


def test_what_was_drafted_ahead_is_counted_once_and_wasted_where_it_does_not_stand() -> None:
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
