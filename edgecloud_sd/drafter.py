"""The edge's part of a round: draft up to k tokens greedily, with the statistic that the gate will read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgecloud_sd.records import Draft
from edgecloud_sd.session import Session, sync

if TYPE_CHECKING:
    from torch import Tensor


def draft(
    session: Session,
    context: Sequence[int],
    k: int,
    eos: frozenset[int],
    score: Callable[[Tensor], float] | None = None,
) -> Draft:
    """Up to `k` >= 1 tokens after `context`, ending early at EOS. One forward pass a token.

    The session is left holding the context and all of the draft but its last token.
    """
    tokens: list[int] = []
    scores: list[float] = []
    row = sync(session, context)[-1]
    while True:
        tokens.append(int(row.argmax()))
        if score is not None:
            scores.append(score(row))
        if len(tokens) == k or tokens[-1] in eos:
            return Draft(tuple(tokens), tuple(scores))
        row = session.extend(tokens[-1:])[-1]
