"""The contract of a model: one model, one prompt, one cache. Only `sync` repairs a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from edgecloud_sd.steps import RowLimit, Steps, no_limit, run_steps, split_rows

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


@runtime_checkable
class SteppedModel(Model, Protocol):
    """A model that can prefill in steps."""

    def open_steps(self, prompt: Prompt, limit: RowLimit) -> Steps[Session]:
        """Open a prompt as `open` does, in passes within `limit`."""


def open_steps(model: Model, prompt: Prompt, limit: RowLimit) -> Steps[Session]:
    """Open a prompt, in one step if the model cannot do it in several."""
    if isinstance(model, SteppedModel):
        return (yield from model.open_steps(prompt, limit))
    yield len(prompt.ids)
    return model.open(prompt)


def check_truncation(length: int, cached: int) -> None:
    """Raise the ValueError of `Session.truncate`."""
    if not 0 <= length <= cached:
        raise ValueError(f"cannot truncate to {length} tokens: the session holds {cached}")


def count_new(session: Session, context: Sequence[int], rows: int = 1) -> int:
    """Return how many tokens of the context `sync` feeds."""
    cached = session.tokens
    common = 0
    most = min(len(cached), len(context) - rows)
    while common < most and cached[common] == context[common]:
        common += 1
    return len(context) - common


def sync(session: Session, context: Sequence[int], rows: int = 1) -> Tensor:
    """Make the session's cache equal `context`, in one forward pass, and return the last `rows` rows of logits.

    The cache is truncated to the longest common prefix that leaves these rows to compute, then extended by the rest.
    Return [rows, vocab_size]. Row i is for the token that follows context[len(context) - rows + i].
    """
    return run_steps(sync_steps(session, context, rows))


def sync_steps(
    session: Session, context: Sequence[int], rows: int = 1, limit: RowLimit = no_limit, prompt_length: int = 0
) -> Steps[Tensor]:
    """Do the work of `sync` in passes within `limit`, for a session after a prompt of `prompt_length` tokens."""
    if not 1 <= rows <= len(context):
        raise ValueError(f"cannot return {rows} rows of a context of {len(context)} tokens")
    common = len(context) - count_new(session, context, rows)
    if common < len(session.tokens):
        session.truncate(common)
    logits: list[Tensor] = []
    first_row = prompt_length + len(context) - rows
    for part in split_rows(prompt_length + common, prompt_length + len(context), limit):
        yield part.stop - part.start
        new = session.extend(context[part.start - prompt_length : part.stop - prompt_length])
        if part.stop > first_row:
            # a view would cost time in the usual case
            logits.append(new if part.start >= first_row else new[first_row - part.start :])
    if len(logits) == 1:
        return logits[0]
    import torch

    return torch.cat(logits)
