"""One model, one prompt, one cache: the contract every model meets, and the only code that repairs a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from edgecloud_sd.events import Prompt


class Session(Protocol):
    """A stream of tokens after a prompt whose last token is held back: `tokens` starts with that one."""

    @property
    def tokens(self) -> Sequence[int]:
        """Exactly what is in the cache after the prefilled prompt."""

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """One forward pass over at least one token: [len(tokens), vocab]; row i = logits for what follows tokens[i]."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. ValueError if there are fewer, or if it is negative."""


class Model(Protocol):
    """Opens sessions. Two sessions of one model never influence each other."""

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end a caption."""

    def open(self, prompt: Prompt) -> Session:
        """Encode the audio and prefill all but the last prompt token."""


def check_truncation(length: int, held: int) -> None:
    """The ValueError that `Session.truncate` promises."""
    if not 0 <= length <= held:
        raise ValueError(f"cannot truncate to {length} tokens: the session holds {held}")


def sync(session: Session, context: Sequence[int], rows: int = 1) -> Tensor:
    """Make the session's cache equal `context` and return its last `rows` logit rows, in one forward pass.

    Truncates to the longest common prefix that leaves the wanted rows to be computed, then extends by the rest.
    Returns [rows, vocab]: row i is for what follows context[len(context) - rows + i].
    """
    if not 1 <= rows <= len(context):
        raise ValueError(f"cannot return {rows} rows of a context of {len(context)} tokens")
    held = session.tokens
    common = 0
    limit = min(len(held), len(context) - rows)
    while common < limit and held[common] == context[common]:
        common += 1
    if common < len(held):
        session.truncate(common)
    logits = session.extend(context[common:])
    return logits if len(logits) == rows else logits[-rows:]  # no view where all are wanted
