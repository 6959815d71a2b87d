"""The contract of a model: one model, one prompt, one cache. Only `sync` repairs a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from edgecloud_sd.events import Prompt


class Session(Protocol):
    """A stream of tokens after a prefilled prompt.

    Prefill holds back the last prompt token. It is the first token that a session is fed.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """Exactly the tokens in the cache after the prefilled part of the prompt."""

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed at least one token in one forward pass.

        Return logits [len(tokens), vocab_size]. Row i is for the token that follows tokens[i].
        """

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raise ValueError if `length` is negative or exceeds len(tokens)."""


class Model(Protocol):
    """A model that opens sessions. Two sessions of one model never influence each other."""

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end a generation."""

    def open(self, prompt: Prompt) -> Session:
        """Encode the audio and prefill all prompt tokens but the last."""


def check_truncation(length: int, cached: int) -> None:
    """Raise the ValueError of `Session.truncate`."""
    if not 0 <= length <= cached:
        raise ValueError(f"cannot truncate to {length} tokens: the session holds {cached}")


def sync(session: Session, context: Sequence[int], rows: int = 1) -> Tensor:
    """Make the session's cache equal `context`, in one forward pass, and return the last `rows` rows of logits.

    The cache is truncated to the longest common prefix that leaves these rows to compute, then extended by the rest.
    Return [rows, vocab_size]. Row i is for the token that follows context[len(context) - rows + i].
    """
    if not 1 <= rows <= len(context):
        raise ValueError(f"cannot return {rows} rows of a context of {len(context)} tokens")
    cached = session.tokens
    common = 0
    limit = min(len(cached), len(context) - rows)
    while common < limit and cached[common] == context[common]:
        common += 1
    if common < len(cached):
        session.truncate(common)
    logits = session.extend(context[common:])
    return logits if len(logits) == rows else logits[-rows:]  # a view would cost time in the usual case
