"""The edge's part of a round: draft up to k tokens greedily, with the score that the gate reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgecloud_sd.events import Draft
from edgecloud_sd.gate import DraftStop, Score
from edgecloud_sd.session import Session, sync


class Drafter:
    """The greedy tokens of a session, one forward pass each. They stay for as long as the context agrees with them.

    `score` computes the gate's score, or is None if the gate reads none. `draft_stop` may end a draft early.
    `shared_ids` is `Runtime.shared_ids`.
    """

    def __init__(
        self,
        session: Session,
        eos: frozenset[int],
        score: Score | None = None,
        draft_stop: DraftStop | None = None,
        shared_ids: int | None = None,
    ) -> None:
        self._session = session
        self._eos = eos
        self._score = score
        self._draft_stop = draft_stop
        self._shared_ids = shared_ids
        self._context: list[int] = []
        # Each list has one entry per token drafted after the context, except that scores may stay empty.
        self._tokens: list[int] = []
        self._scores: list[float] = []
        self._ends_draft: list[bool] = []

    def follow(self, context: Sequence[int]) -> int:
        """Draft after `context` from now on. Return how many of the tokens drafted so far follow it."""
        drafted = [*self._context, *self._tokens]
        agrees = len(self._context) <= len(context) and drafted[: len(context)] == list(context)
        outdated = len(context) - len(self._context) if agrees else len(self._tokens)
        for values in (self._tokens, self._scores, self._ends_draft):
            del values[:outdated]
        self._context = list(context)
        return len(self._tokens)

    def draft(self, k: int) -> Draft:
        """Return up to `k` >= 1 tokens after the context. The draft ends early at EOS or at the draft stop.

        Afterwards the session's cache holds the context and all draft tokens but the last new one.
        """
        length = 0
        while length < k:
            if length == len(self._tokens):
                self._draft_one()
            length += 1
            if self._ends_draft[length - 1] or self._tokens[length - 1] in self._eos:
                break
        return Draft(tuple(self._tokens[:length]), tuple(self._scores[:length]))

    def draft_ahead(self, limit: int, is_done: Callable[[], bool]) -> int:
        """Draft until `limit` tokens follow the context, EOS comes, or `is_done` is true. Return the number drafted."""
        before = len(self._tokens)
        while len(self._tokens) < limit and not self._is_ended and not is_done():
            self._draft_one()
        return len(self._tokens) - before

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens drafted after the context, those of the current draft first."""
        return tuple(self._tokens)

    def _draft_one(self) -> None:
        logits = self._session.extend(self._tokens[-1:]) if self._tokens else sync(self._session, self._read_context())
        row = logits[0, : self._shared_ids]
        self._tokens.append(int(row.argmax().item()))
        if self._score is not None:
            self._scores.append(self._score(row))
        self._ends_draft.append(self._draft_stop is not None and self._draft_stop(row, self._scores))

    def _read_context(self) -> list[int]:
        """Return the context as the draft model reads it. Its embedding may lack an id that the target wrote."""
        if self._shared_ids is None:
            return self._context
        return [min(token, self._shared_ids - 1) for token in self._context]

    @property
    def _is_ended(self) -> bool:
        return bool(self._tokens) and self._tokens[-1] in self._eos
