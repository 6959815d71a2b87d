"""The events of a speculative caption compared with plain decoding: one token at a time, without caches or guesses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest.mock import patch

from hypothesis import strategies as st

from edgecloud_sd import decoder
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Confirmed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prompt,
    Retracted,
    Verdict,
    Verified,
)
from edgecloud_sd.gate import NEVER
from edgecloud_sd.lookup import CaptionHistory, Lookup
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import CloudFault, LocalVerifier, Verification, Verifier
from edgecloud_sd.wire import MAX_DRAFT
from tests.support.fakes import Slow
from tests.support.strategies import VOCABULARY, Scene
from tests.support.toy import stateless_verdict

Call = tuple[int, tuple[int, ...], tuple[int, ...]]  # base, tokens and draft of one verification
ADAPTIVE_LENGTH = 3  # draft tokens under adaptive k


@dataclass(frozen=True)
class Recorder:
    """A verifier that records calls, makes each call twice as after a lost answer, and may fail at one of them."""

    verifier: Verifier
    fails_at: int | None = None
    calls: list[Call] = field(default_factory=list)

    def open(self, prompt: Prompt) -> RecordedVerification:
        return RecordedVerification(self, self.verifier.open(prompt))


@dataclass(frozen=True)
class RecordedVerification:
    recorder: Recorder
    verification: Verification

    def wait(self) -> None:
        self.verification.wait()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self.recorder.calls.append((base, tuple(tokens), tuple(draft)))
        verdict = self.verification.verify(base, tokens, draft)
        if len(self.recorder.calls) - 1 == self.recorder.fails_at:
            raise CloudFault("gone")
        assert self.verification.verify(base, tokens, draft) == verdict
        return verdict

    def generate(self, *arguments: object) -> Iterator[int]:
        raise NotImplementedError

    def close(self) -> None:
        self.verification.close()


@dataclass(frozen=True)
class Conditions:
    """All that a speculative caption must bear, whatever its strategy."""

    fails_at: int | None = None  # the call at which the cloud fails for good
    answers: tuple[bool, ...] = ()  # the verdict has come, as the edge asks while it drafts ahead
    shared_ids: int | None = None
    cap: int = MAX_DRAFT
    history: tuple[tuple[int, ...], ...] | None = None  # earlier captions, from which lookup guesses


@st.composite
def conditions(draw: st.DrawFn) -> Conditions:
    """Draw conditions. In about half of them the cloud never fails."""
    answers = tuple(draw(st.lists(st.booleans(), max_size=8)))
    fails_at, cap = draw(st.none() | st.integers(0, 4)), draw(st.sampled_from([MAX_DRAFT, MAX_DRAFT, 2, 5]))
    captions = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=20).map(tuple), max_size=3).map(tuple)
    return Conditions(
        fails_at, answers, draw(st.sampled_from([None, None, VOCABULARY - 2])), cap, draw(captions | st.none())
    )


def record(scene: Scene, strategy: Strategy, given: Conditions) -> tuple[list[Event], list[Call]]:
    """Decode a scene. Return its events, and the calls that its cloud saw."""
    recorder = Recorder(LocalVerifier(scene.cloud, strategy.rule, wants_rest=strategy.wants_rest), given.fails_at)
    answers, history = iter(given.answers), CaptionHistory()
    for caption in given.history or ():
        history.add(caption)
    if given.history is not None and strategy.drafter == "model":
        strategy = replace(strategy, drafter="model+lookup")  # it must change no token
    runtime = Runtime(
        choose_k=lambda: ADAPTIVE_LENGTH,
        background=(lambda call: Slow(call, answers, [])) if strategy.draft_ahead else None,
        finish_alone=True,
        shared_ids=given.shared_ids,
        lookup=Lookup(history, scene.stopping.eos, prompt=scene.prompt.ids),
    )
    with patch.object(decoder, "MAX_DRAFT", given.cap):
        return list(decode(scene.prompt, strategy, scene.stopping, scene.edge, recorder, runtime)), recorder.calls


def shown_tokens(events: Iterable[Event]) -> list[tuple[int, str]]:
    """Return each token of the output with its origin, as a display sees it.

    Raise AssertionError if a token is taken back that was final. A final token makes all before it final.
    """
    shown: list[tuple[int, str]] = []
    final = 0
    for event in events:
        if isinstance(event, Committed):
            assert event.tokens
            shown += [(token, event.origin) for token in event.tokens]
            final = len(shown) if event.is_final else final
        elif isinstance(event, Confirmed):
            assert 0 < event.count <= len(shown) - final
            shown[final : final + event.count] = [(token, "accepted") for token, _ in shown[final:]][: event.count]
            final += event.count
        elif isinstance(event, Retracted):
            assert 0 < event.count == len(shown) - final
            del shown[final:]
    return shown


def shown_ids(events: Iterable[Event]) -> tuple[int, ...]:
    """Return the ids of the output, as a display sees it."""
    return tuple(token for token, _ in shown_tokens(events))


@dataclass(frozen=True)
class Old:
    """A draft that was corrected: the tokens by place, and the target's opinions by place."""

    tokens: tuple[int, ...] = ()
    opinions: tuple[tuple[int, int], ...] = ()


def plain_proposal(own: int, old: Old, context: Sequence[int], revise: str) -> tuple[int, bool]:
    """Return the token to propose after `context`, and True for an opinion, by the rules as they are documented."""

    def is_alike(place: int, length: int) -> bool:
        return place >= length and [*context[-length:]] == [*old.tokens[place - length : place]]

    opinions, place = dict(old.opinions), len(context)
    if revise == "aligned" and not (place in opinions and is_alike(place, 2)):
        by_distance = sorted(opinions, key=lambda other: (abs(other - place), other))
        alike = [other for length in (3, 2) for other in by_distance if is_alike(other, length)]
        place = alike[0] if alike else place
    if revise == "none" or place not in opinions:
        return own, False
    if own == old.tokens[place] or (revise != "repeat" and place == len(context) and is_alike(place, 2)):
        return opinions[place], True
    return own, False


class Replay:
    """The plain decoding of one scene, beside the events of `decode` and the calls that its cloud saw.

    `check` raises AssertionError for events or calls that differ from it.
    """

    def __init__(self, scene: Scene, strategy: Strategy, given: Conditions, calls: Iterable[Call]) -> None:
        self.scene = scene
        self.strategy = strategy
        self.given = given
        self.calls = iter(calls)
        self.events: Iterator[Event] = iter(())
        self.context = [scene.prompt.last]
        self.final, self.at_cloud = 1, 0
        self.scores: tuple[float, ...] = ()
        self.old = Old()
        self.gate = strategy.gate
        self.looks_back = strategy.look_back and strategy.asks_cloud

    def check(self, events: Iterable[Event]) -> None:
        """Compare the events and calls with plain decoding."""
        self.events = iter(events)
        assert next(self.events) == Opened("edge")
        while self.scene.stopping.reason(self.context[1:]) is None:
            drafted = next(self.events)
            assert isinstance(drafted, Drafted)
            self.check_round(drafted)
        assert [*self.events] == [Finished(self.scene.stopping.reason(self.context[1:]) or "length")]
        assert [*self.calls] == []

    def check_round(self, drafted: Drafted) -> None:
        left = self.scene.stopping.room(len(self.context) - 1)
        left = min(left, self.given.cap - len(self.context) + self.final)
        draft = self.draft_plainly(drafted, left)
        assert drafted.draft == draft
        tokens, scores = draft.tokens, draft.scores
        self.scores += scores
        is_end = len(tokens) == left or not self.scene.stopping.eos.isdisjoint(tokens)
        if not self.asks(self.scores, is_end):
            self.commit_local(tokens, is_end or not self.looks_back)
            return
        if self.gate.stops_before_token:
            self.commit_local(tokens, not self.looks_back)
            tokens = ()
        scores = self.scores if self.looks_back else scores
        sent = replace(draft, tokens=(*self.context[self.final :], *tokens), scores=scores)
        assert next(self.events) == Escalated(sent, self.final - self.at_cloud)
        assert next(self.calls) == (self.at_cloud, (*self.context[self.at_cloud : self.final],), sent.tokens)
        answer = next(self.events)
        if not self.at_cloud:
            assert answer == Opened("cloud")
            answer = next(self.events)
        answer = next(self.events) if isinstance(answer, Ahead) else answer
        if answer == Degraded("gone"):
            self.gate, self.looks_back = NEVER, False
            self.commit_local(tokens, True)
            return
        scene, context = self.scene, self.context[: self.final]
        verdict = stateless_verdict(scene.cloud, scene.prompt, self.strategy.rule, context, sent.tokens)
        verdict = verdict if self.strategy.wants_rest else replace(verdict, rest=())
        assert answer == Verified(sent, verdict)
        self.apply(verdict, context, sent.tokens, len(self.context) - self.final)

    def apply(self, verdict: Verdict, context: list[int], draft: tuple[int, ...], pending: int) -> None:
        is_correction = verdict.accepted < len(draft)
        self.at_cloud = len(context) + verdict.accepted
        if is_correction:
            self.old = Old((*context, *draft), tuple(enumerate(verdict.rest, self.at_cloud + 1)))
        confirmed = min(verdict.accepted, pending)
        if confirmed:
            assert next(self.events) == Confirmed(confirmed)
        if confirmed < pending:
            assert next(self.events) == Retracted(pending - confirmed)
        context += draft[:confirmed]
        accepted, own = draft[confirmed : verdict.accepted], (verdict.token,)
        for tokens, origin in ((accepted, "accepted"), (own, "correction" if is_correction else "bonus")):
            if tokens and self.scene.stopping.reason(context[1:]) is None:
                assert next(self.events) == Committed(tokens, origin)  # type: ignore[arg-type]
                context += tokens
        self.context, self.final, self.scores = context, len(context), ()

    def commit_local(self, tokens: tuple[int, ...], is_final: bool) -> None:
        self.context += tokens
        if tokens:
            assert next(self.events) == Committed(tokens, "local", is_final)
        self.final = len(self.context) if is_final else self.final

    def asks(self, scores: Sequence[float], is_end: bool) -> bool:
        """Return the answer of the gate, from its definition."""
        if self.gate.name == "risk":
            risk = 1 - math.prod(1 - score for score in scores)
            return risk > self.gate.threshold or (is_end and risk > self.gate.send_above)
        return any(score > self.gate.threshold for score in scores) if self.gate.score else self.gate.name == "always"

    def draft_plainly(self, drafted: Drafted, left: int) -> Draft:
        """Draft token by token. A lossless draft may have as many as were drafted ahead."""
        reused = min(drafted.ahead, self.strategy.draft_ahead) if self.strategy.is_lossless else 0
        k = max(self.strategy.k or ADAPTIVE_LENGTH, reused)
        stop, gate, size = self.strategy.draft_stop, self.strategy.gate, self.given.shared_ids
        tokens: tuple[int, ...] = ()
        scores: tuple[float, ...] = ()
        is_over = False
        while not is_over and len(tokens) < min(k, left):
            context = [*self.context, *tokens]
            read = [min(token, size - 1) for token in context] if size else context
            row = self.scene.edge.logits([*self.scene.prompt.ids[:-1], *read])[:size]
            token, is_opinion = plain_proposal(int(row.argmax()), self.old, context, self.strategy.revise)
            tokens += (token,)
            if gate.score:
                is_risk_known = is_opinion and gate.name == "risk"
                scores += (gate.opinion_risk if is_risk_known else gate.score(row),)
            if self.gate.stops_before_token and self.asks(scores, False):
                return Draft(tokens[:-1], scores, tokens[-1])
            asks_now = self.gate.name == "risk" and self.asks((*self.scores, *scores), False)
            stops = stop is not None and (stop.score(row) if stop.score else scores[-1]) > stop.threshold
            is_over = asks_now or stops or token in self.scene.stopping.eos
        return Draft(tokens, scores)
