"""The edge's part of a round: draft up to k tokens greedily, with the statistic that the gate will read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgecloud_sd.events import Draft
from edgecloud_sd.session import Session, sync

if TYPE_CHECKING:
    from torch import Tensor

    from edgecloud_sd.gate import DraftStop


class Drafter:
    """A session's greedy tokens, made one forward pass each, and kept for as long as the context agrees with them.

    `score` is the gate's statistic of a row of logits, None where it reads none; `stop` may end a draft early.
    """

    def __init__(
        self,
        session: Session,
        eos: frozenset[int],
        score: Callable[[Tensor], float] | None = None,
        stop: DraftStop | None = None,
    ) -> None:
        self._session = session
        self._eos = eos
        self._score = score
        self._stop = stop
        self._context: list[int] = []
        self._tokens: list[int] = []  # made, in order, to follow the context
        self._scores: list[float] = []  # one a token, where there is a score
        self._unsure: list[bool] = []  # whether a draft ends with the token

    def follow(self, context: Sequence[int]) -> int:
        """Draft after `context` from now on. Returns how many of the tokens made so far follow it."""
        made = [*self._context, *self._tokens]
        agreed = len(self._context) <= len(context) and made[: len(context)] == list(context)
        passed = len(context) - len(self._context) if agreed else len(self._tokens)
        for kept in (self._tokens, self._scores, self._unsure):
            del kept[:passed]
        self._context = list(context)
        return len(self._tokens)

    def draft(self, k: int) -> Draft:
        """Up to `k` >= 1 tokens after the context, ending early at EOS or where `stop` says so.

        Made anew, the session is left holding the context and all of the draft but its last token.
        """
        n = 0
        while n < k:
            if n == len(self._tokens):
                self._more()
            n += 1
            if self._unsure[n - 1] or self._tokens[n - 1] in self._eos:
                break
        return Draft(tuple(self._tokens[:n]), tuple(self._scores[:n]))

    def ahead(self, n: int, verdict: Callable[[], bool]) -> int:
        """Make tokens until `n` stand after the context, EOS comes, or the `verdict` is there. Returns how many."""
        before = len(self._tokens)
        while len(self._tokens) < n and not self._ended and not verdict():
            self._more()
        return len(self._tokens) - before

    def _more(self) -> None:
        """One more token, by one forward pass."""
        row = self._session.extend(self._tokens[-1:]) if self._tokens else sync(self._session, self._context)
        self._tokens.append(int(row.argmax().item()))
        if self._score is not None:
            self._scores.append(self._score(row[0]))
        self._unsure.append(self._stop is not None and self._stop(row[0], self._scores))

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that stands after the context, the draft first."""
        return tuple(self._tokens)

    @property
    def _ended(self) -> bool:
        return bool(self._tokens) and self._tokens[-1] in self._eos
