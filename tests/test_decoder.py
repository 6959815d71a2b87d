"""The promises of the decode loop, on toy models in float64, so that rounding hides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd import decoder, gate, probs
from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import (
    Committed,
    Confirmed,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prompt,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.lookup import CaptionHistory, Lookup
from edgecloud_sd.measure import metrics
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.verifier import CloudFault, FailedVerifier, LocalVerification, LocalVerifier
from tests.support.fakes import Scripted
from tests.support.replay import Conditions, Replay, conditions, record, shown_ids, shown_tokens
from tests.support.strategies import Scene, ks, ranks, scenes, speculations, speculative
from tests.support.toy import ToyModel, random_table


def run(scene: Scene, strategy: Strategy) -> Trace:
    verifier = LocalVerifier(scene.cloud, strategy.rule, wants_rest=strategy.wants_rest)
    return stamp(decode(scene.prompt, strategy, scene.stopping, scene.edge, verifier))


def decode_greedily(model: ToyModel, prompt: Prompt, stopping: Stopping) -> tuple[int, ...]:
    """Return the greedy output of a model without a cache, as the reference."""
    output: list[int] = []
    while stopping.reason(output) is None:
        output.append(int(model.logits([*prompt.ids, *output]).argmax()))
    return tuple(output)


def commits(trace: Trace) -> list[Committed]:
    return [event for _, event in trace.events if isinstance(event, Committed)]


@given(scenes(), ks)
def test_lossless_output_equals_cloud_greedy_output(scene: Scene, k: int) -> None:
    assert run(scene, speculative(k)).tokens == decode_greedily(scene.cloud, scene.prompt, scene.stopping)


@given(scenes())
def test_cloud_mode_is_greedy(scene: Scene) -> None:
    assert run(scene, Strategy("cloud")).tokens == decode_greedily(scene.cloud, scene.prompt, scene.stopping)


@given(scenes())
def test_edge_mode_is_greedy_and_opens_no_cloud(scene: Scene) -> None:
    trace = stamp(decode(scene.prompt, Strategy("edge"), scene.stopping, scene.edge))
    assert trace.tokens == decode_greedily(scene.edge, scene.prompt, scene.stopping)
    assert [event.side for _, event in trace.events if isinstance(event, Opened)] == ["edge"]


@given(scenes(), ks)
def test_gate_never_gives_the_output_of_mode_edge(scene: Scene, k: int) -> None:
    assert run(scene, speculative(k, gate.NEVER)).tokens == decode_greedily(scene.edge, scene.prompt, scene.stopping)


@given(scenes(), ks)
def test_every_token_of_a_perfect_drafter_is_accepted(scene: Scene, k: int) -> None:
    same = Scene(scene.cloud, scene.cloud, scene.prompt, scene.stopping)
    counts = metrics.counts(run(same, speculative(k)))
    assert counts.correction == 0
    assert counts.accepted == counts.verified == counts.drafted


@given(scenes(), speculations())
def test_every_draft_token_and_every_committed_token_has_one_origin(scene: Scene, strategy: Strategy) -> None:
    trace = run(scene, strategy)
    counts = metrics.counts(trace)
    assert len(trace.tokens) == counts.local + counts.accepted + counts.correction + counts.bonus
    assert counts.local + counts.verified == counts.drafted
    assert 0 <= counts.discarded <= counts.verified
    assert counts.correction + counts.bonus <= counts.cloud_calls <= counts.rounds


@given(scenes(), ks, ranks)
def test_the_cloud_token_is_a_correction_after_a_rejection_and_a_bonus_otherwise(
    scene: Scene, k: int, rule: Rank
) -> None:
    rejected = False
    for _, event in run(scene, speculative(k, rule=rule)).events:
        if isinstance(event, Verified):
            rejected = event.verdict.accepted < len(event.draft.tokens)
        elif isinstance(event, Committed) and event.origin != "accepted":
            assert event.origin == ("correction" if rejected else "bonus")


@given(scenes(), speculations())
def test_output_ends_at_eos_or_at_the_length_limit(scene: Scene, strategy: Strategy) -> None:
    trace = run(scene, strategy)
    assert all(token not in scene.stopping.eos for token in trace.tokens[:-1])
    assert 1 <= len(trace.tokens) <= scene.stopping.max_new_tokens
    (finished,) = [event for _, event in trace.events if isinstance(event, Finished)]
    assert trace.events[-1][1] is finished
    assert (finished.reason == "eos") == (trace.tokens[-1] in scene.stopping.eos)


@given(scenes(), speculations())
def test_every_accepted_token_has_at_most_the_rank_of_the_rule(scene: Scene, strategy: Strategy) -> None:
    context = list(scene.prompt.ids)
    for token, origin in shown_tokens(event for _, event in run(scene, strategy).events):
        rank = probs.rank(scene.cloud.logits(context), token)
        assert isinstance(strategy.rule, Rank)
        assert rank <= {"local": 7, "accepted": strategy.rule.r}.get(origin, 1)
        context.append(token)


@settings(max_examples=4 * settings().max_examples)
@given(scenes(), speculations(), conditions())
def test_all_events_and_calls_are_those_of_plain_decoding(scene: Scene, strategy: Strategy, given: Conditions) -> None:
    check_against_plain_decoding(scene, strategy, given)


@pytest.mark.slow
@settings(max_examples=300)
@given(scenes(), speculations(), conditions())
def test_all_events_of_many_captions_are_those_of_plain_decoding(
    scene: Scene, strategy: Strategy, given: Conditions
) -> None:
    check_against_plain_decoding(scene, strategy, given)


def check_against_plain_decoding(scene: Scene, strategy: Strategy, given: Conditions) -> None:
    events, calls = record(scene, strategy, given)
    Replay(scene, strategy, given, calls).check(events)
    assert shown_ids(events) == Trace(tuple((0.0, event) for event in events)).tokens != ()


@given(scenes(), speculations(), conditions())
def test_a_strategy_that_sends_all_is_lossless_under_rule_greedy(
    scene: Scene, strategy: Strategy, given: Conditions
) -> None:
    sends_all = strategy.gate if strategy.gate.sends_all else gate.risk_gate(0.5)
    strategy = replace(strategy, gate=sends_all, rule=GREEDY, draft_stop=None)
    by_lookup = Strategy(k=strategy.k, look_back=strategy.look_back, drafter="lookup")
    adaptive = replace(strategy, k=None)
    for lossless in (strategy, adaptive, by_lookup):
        assert lossless.is_lossless
        events, _ = record(scene, lossless, replace(given, fails_at=None))
        assert shown_ids(events) == decode_greedily(scene.cloud, scene.prompt, scene.stopping)


def test_drafter_lookup_cannot_finish_alone() -> None:
    lookup = Lookup(CaptionHistory(), ())
    cloud, runtime = FailedVerifier(CloudFault("gone")), Runtime(finish_alone=True, lookup=lookup)
    with pytest.raises(CloudFault, match="gone"):
        list(decode(Prompt((1, 2)), Strategy(drafter="lookup"), Stopping(frozenset(), 5), None, cloud, runtime))


@given(scenes(), ks, ranks)
def test_a_rejected_draft_is_corrected_at_its_first_rejected_token(scene: Scene, k: int, rule: Rank) -> None:
    context = list(scene.prompt.ids)
    for _, event in run(scene, speculative(k, rule=rule)).events:
        if isinstance(event, Verified) and event.verdict.accepted < len(event.draft.tokens):
            before = [*context, *event.draft.tokens[: event.verdict.accepted]]
            rejected = event.draft.tokens[event.verdict.accepted]
            assert probs.rank(scene.cloud.logits(before), rejected) > rule.r
        if isinstance(event, Committed):
            context.extend(event.tokens)


@given(scenes(), ks, st.floats(0.01, 2.0))
def test_the_entropy_gate_escalates_exactly_the_drafts_above_its_threshold(
    scene: Scene, k: int, threshold: float
) -> None:
    context = list(scene.prompt.ids)
    entropies: list[float] = []
    for _, event in run(scene, speculative(k, gate.entropy_gate(threshold))).events:
        if isinstance(event, Drafted):
            prefixes = [[*context, *event.draft.tokens[:i]] for i in range(len(event.draft.tokens))]
            entropies = [probs.entropy(scene.edge.logits(prefix)) for prefix in prefixes]
        elif isinstance(event, Escalated):
            assert max(entropies) > threshold
        elif isinstance(event, Committed):
            if event.origin == "local":
                assert max(entropies) <= threshold
            context.extend(event.tokens)


class RecordingModel:
    """A model that records the number of tokens of each forward pass."""

    def __init__(self, model: ToyModel) -> None:
        self._model = model
        self.eos = model.eos
        self.passes: list[int] = []

    def open(self, prompt: Prompt) -> object:
        session = self._model.open(prompt)
        extend = session.extend

        def recorded(tokens: list[int]) -> object:
            self.passes.append(len(tokens))
            return extend(tokens)

        session.extend = recorded  # type: ignore[method-assign, assignment]
        return session


@given(scenes(), speculations())
def test_a_verification_is_one_forward_pass_and_feeds_no_token_twice(scene: Scene, strategy: Strategy) -> None:
    cloud = RecordingModel(scene.cloud)
    trace = run(replace(scene, cloud=cloud), strategy)  # type: ignore[arg-type]
    counts = metrics.counts(trace)
    assert len(cloud.passes) == counts.cloud_calls
    # each pass feeds the last prompt token, committed tokens and draft tokens, and none of them twice
    assert sum(cloud.passes) <= 1 + len(trace.tokens) + counts.discarded


def test_two_interleaved_captions_do_not_change_each_other() -> None:
    prompts, stopping = [Prompt((1, 2)), Prompt((3, 4))], Stopping(frozenset(), 20)
    table = random_table(5, 0)
    edge, cloud = ToyModel(table + 0.5 * random_table(5, 1), frozenset()), ToyModel(table, frozenset())
    strategy = Strategy("speculative", gate.risk_gate(0.5), k=3, revise="context")
    verifier = LocalVerifier(cloud, GREEDY, wants_rest=True)
    captions = [decode(prompt, strategy, stopping, edge, verifier) for prompt in prompts]
    together = zip(*itertools.zip_longest(*captions), strict=True)  # one event of each in turn
    for prompt, with_gaps in zip(prompts, together, strict=True):
        events = list(filter(None, with_gaps))
        assert shown_ids(events) == decode_greedily(cloud, prompt, stopping)
        assert events == list(decode(prompt, strategy, stopping, edge, verifier))


ENTROPIES = (0.08, 0.08, 0.13)  # nats, of the rows of Scripted: two sure places, and an unsure one


@pytest.mark.parametrize("look_back", [False, True])
def test_under_gate_token_the_cloud_writes_the_uncertain_token(look_back: bool) -> None:
    edge, cloud, stopping = Scripted(unsure=frozenset({2})), Scripted(wrong=frozenset({2})), Stopping(frozenset(), 4)
    strategy = Strategy("speculative", gate.parse_gate("token", 0.1), k=3, look_back=look_back)
    events = list(decode(Prompt((5, 6)), strategy, stopping, edge, LocalVerifier(cloud, GREEDY)))
    drafted, rest = events[1], events[2:]
    assert isinstance(drafted, Drafted)
    assert drafted.draft.tokens == (0, 0)
    assert drafted.draft.scores == pytest.approx(ENTROPIES, abs=0.002)
    sent = replace(drafted.draft, tokens=(0, 0) if look_back else ())
    assert rest[:4] == [
        Committed((0, 0), "local", is_final=not look_back),
        Escalated(sent, 1 if look_back else 3),
        Opened("cloud"),
        Verified(sent, Verdict(len(sent.tokens), 1)),
    ]
    assert [event for event in rest[4:] if not isinstance(event, Drafted)] == [
        *([Confirmed(2)] if look_back else []),
        Committed((1,), "bonus"),
        Committed((0,), "local"),
        Finished("length"),
    ]


def test_tokens_that_wait_for_a_verdict_are_sent_when_they_fill_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MAX_DRAFT", 3)
    strategy, stopping = Strategy("speculative", gate.risk_gate(), k=2), Stopping(frozenset(), 8)
    events = decode(Prompt((5, 6)), strategy, stopping, Scripted(), LocalVerifier(Scripted(), GREEDY))
    seen = list(itertools.islice(events, 40))  # a fault may be a loop without end
    assert [len(event.draft.tokens) for event in seen if isinstance(event, Escalated)] == [3, 3]
    assert seen[-1] == Finished("length")


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_the_verification_is_closed_when_the_events_are_closed_early(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(LocalVerification, "close", lambda self: closed.append(mode))
    model = ToyModel(random_table(5, 0), frozenset())
    strategy = Strategy("cloud") if mode == "cloud" else speculative(2)
    events = decode(Prompt((1, 2)), strategy, Stopping(frozenset(), 9), model, LocalVerifier(model, GREEDY))
    assert isinstance(events, Generator)
    while not isinstance(next(events), Committed):
        pass
    events.close()
    assert closed == [mode]


@pytest.mark.parametrize("mode", ["edge", "cloud", "speculative"])
def test_a_strategy_whose_model_is_missing_is_an_error(mode: str) -> None:
    with pytest.raises(ValueError, match="none was given"):
        list(decode(Prompt((1,)), Strategy(mode), Stopping(frozenset(), 3)))


def test_a_cloud_that_stops_before_eos_and_the_limit_is_an_error() -> None:
    class StopsEarly:
        def open(self, prompt: Prompt) -> StopsEarly:
            return self

        def wait(self) -> None:
            pass

        def generate(self, stopping: Stopping) -> list[int]:
            return [1]

        def close(self) -> None:
            pass

    events: list[Event] = []
    with pytest.raises(RuntimeError, match="stopped before EOS"):
        events.extend(decode(Prompt((1,)), Strategy("cloud"), Stopping(frozenset(), 3), cloud=StopsEarly()))  # type: ignore[arg-type]
