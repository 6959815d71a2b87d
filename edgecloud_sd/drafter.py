"""The edge's part of a round: draft up to k tokens greedily, with the score that the gate reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgecloud_sd.events import Draft
from edgecloud_sd.gate import ALWAYS, Gate
from edgecloud_sd.lookup import GUESS_LENGTH, Lookup
from edgecloud_sd.revise import OldDraft, expect, propose
from edgecloud_sd.session import Session, count_new, sync
from edgecloud_sd.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DraftToken:
    """A token after the context.

    `score` is None if the gate reads none. `stops` is the draft stop's answer. `is_ahead` is True for a token that was
    drafted during a verification.
    """

    id: int
    score: float | None
    stops: bool
    is_ahead: bool


class Drafter:
    """The tokens that a session drafts after the context. They stay for as long as the context agrees with them.

    One forward pass gives one token. If the edge has a guess of the tokens to come, it feeds the guess in the same
    pass. It keeps the tokens that the guess has right, and the one after them. A guess never changes the tokens. After
    a correction the guess is the old draft, with the target's opinions in it if there are any (`revise`). Else it is
    what `lookup` proposes, if the edge has one.

    The strategy's gate computes the scores, and its draft stop may end a draft early. `shared_ids` is
    `Runtime.shared_ids`.
    """

    def __init__(
        self,
        session: Session,
        eos: frozenset[int],
        strategy: Strategy,
        shared_ids: int | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._session = session
        self._eos = eos
        self._strategy = strategy
        self._shared_ids = shared_ids
        self._lookup = lookup
        self._context: list[int] = []
        self._drafted: list[DraftToken] = []  # tokens after the context
        self._old = OldDraft()
        self._passes: list[int] = []

    def follow(self, context: Sequence[int], opinions: Sequence[int] | None = None) -> int:
        """Draft after `context` from now on. Return how many of the tokens that were drafted ahead follow it.

        If `context` ends with a correction, `opinions` are the target's on the places after it (`Verdict.rest`). They
        stay until the next correction, because tokens that were drafted ahead may already contain them.
        """
        before = [*self._context, *self.tokens]
        agrees = len(self._context) <= len(context) and before[: len(context)] == list(context)
        if not agrees and (opinions is not None or not self._old.opinions):
            self._old = OldDraft(tuple(before), len(context), tuple(opinions or ()))
        del self._drafted[: len(context) - len(self._context) if agrees else None]
        self._context = list(context)
        return self.count_ahead(len(self._drafted))

    def count_ahead(self, length: int) -> int:
        """Return how many of the first `length` tokens after the context were drafted ahead."""
        return sum(token.is_ahead for token in self._drafted[:length])

    def draft(self, k: int, room: int, gate: Gate = ALWAYS, scores: Sequence[float] = ()) -> Draft:
        """Return up to `k` >= 1 tokens after the context. The caption has room for `room` >= k tokens there.

        The draft ends early at EOS, at the draft stop, and when `gate` asks the cloud at once. The gate reads `scores`,
        then those of the draft: together they belong to the tokens since the last verdict. If the gate stops before a
        token, the draft has that token as `doubted`, and its score as well.
        """
        length = 0
        while length < k:
            if length == len(self._drafted):
                self._draft_more(room)
            length += 1
            last = self._drafted[length - 1]
            if gate.ends_draft([*scores, *self._scores(length)]):
                doubted = last.id if gate.stops_before_token else None
                return Draft(self.tokens[: length - gate.stops_before_token], self._scores(length), doubted)
            if last.stops or last.id in self._eos:
                break
        return Draft(self.tokens[:length], self._scores(length))

    def draft_ahead(self, length: int, limit: int, is_done: Callable[[], bool]) -> tuple[tuple[int, ...], int]:
        """Draft until `limit` tokens follow the context, EOS comes, or `is_done` is true.

        Return the tokens after the first `length`, and how many of them were not drafted ahead before.
        """
        before = self.count_ahead(len(self._drafted))
        self._drafted[length:] = [replace(token, is_ahead=True) for token in self._drafted[length:]]
        while len(self._drafted) < limit and not self._is_ended and not is_done():
            self._draft_more(1, is_ahead=True)
        return self.tokens[length:], self.count_ahead(len(self._drafted)) - before

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens drafted after the context, those of the current draft first."""
        return tuple(token.id for token in self._drafted)

    def take_passes(self) -> tuple[int, ...]:
        """Return the tokens fed in each forward pass since the last call."""
        passes = tuple(self._passes)
        self._passes.clear()
        return passes

    def _draft_more(self, room: int, is_ahead: bool = False) -> None:
        """Add at least one token, in one forward pass. After it at most `room` tokens follow the context."""
        context, revise = [*self._context, *self.tokens], self._strategy.revise
        guess = () if is_ahead else self._guess(context)[: room - len(self._drafted) - 1]
        fed = self._readable([*context, *guess])
        if not is_ahead:
            self._passes.append(count_new(self._session, fed, len(guess) + 1))
        for row, guessed in zip(sync(self._session, fed, len(guess) + 1), (*guess, None), strict=True):
            shared = row[: self._shared_ids]
            token, is_opinion = propose(int(shared.argmax().item()), self._old, context, revise)
            self._drafted.append(self._scored(token, shared, is_opinion, is_ahead))
            context.append(token)
            if token != guessed or token in self._eos:
                break

    def _guess(self, context: Sequence[int]) -> tuple[int, ...]:
        old = expect(self._old, context, self._strategy.revise)
        return old or (self._lookup.propose(context, GUESS_LENGTH) if self._lookup else ())

    def _scored(self, token: int, row: Tensor, is_opinion: bool, is_ahead: bool) -> DraftToken:
        gate, stop = self._strategy.gate, self._strategy.draft_stop
        score = None
        if gate.score is not None:
            score = gate.opinion_risk if is_opinion and gate.name == "risk" else gate.score(row)
        stops = stop is not None and stop(row, () if score is None else (score,))
        return DraftToken(token, score, stops, is_ahead)

    def _scores(self, length: int) -> tuple[float, ...]:
        return tuple(token.score for token in self._drafted[:length] if token.score is not None)

    def _readable(self, tokens: list[int]) -> list[int]:
        """Return tokens as the draft model reads them. Its embedding may lack an id that the target wrote."""
        return tokens if self._shared_ids is None else [min(token, self._shared_ids - 1) for token in tokens]

    @property
    def _is_ended(self) -> bool:
        return bool(self._drafted) and self._drafted[-1].id in self._eos


class LookupDrafter:
    """The drafts of `Lookup`, which take no model. A draft may be empty, and none is drafted ahead."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._context: list[int] = []

    def follow(self, context: Sequence[int], opinions: Sequence[int] | None = None) -> int:
        """Draft after `context` from now on. Return 0, because no token was drafted before."""
        self._context = list(context)
        return 0

    def count_ahead(self, length: int) -> int:
        """Return 0, because no token is drafted ahead."""
        return 0

    def draft(self, k: int, room: int, gate: Gate = ALWAYS, scores: Sequence[float] = ()) -> Draft:
        """Return up to `k` tokens after the context."""
        return Draft(self._lookup.propose(self._context, k))

    def draft_ahead(self, length: int, limit: int, is_done: Callable[[], bool]) -> tuple[tuple[int, ...], int]:
        """Return no tokens, because lookup takes no time that a verification could hide."""
        return (), 0

    def take_passes(self) -> tuple[int, ...]:
        """Return no passes."""
        return ()
