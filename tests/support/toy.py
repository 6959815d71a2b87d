"""A table language model in float64: instant, exact, and so sensitive to the past that no cache error hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecloud_sd.events import Prompt
from edgecloud_sd.session import check_truncation

STATES = 257  # prime, so that the state keeps a trace of the whole past


@dataclass(frozen=True)
class ToyModel:
    """Logits come from `table` [STATES, vocab] by a hash of the prompt and everything fed so far."""

    table: Tensor
    eos: frozenset[int]

    def open(self, prompt: Prompt) -> ToySession:
        return ToySession(self, fold(0, prompt.ids[:-1]))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[vocab] for what follows all of `ids`, prompt included: the stateless oracle for every session."""
        return self.table[fold(0, ids)]


class ToySession:
    """The hash after each token is its cache."""

    def __init__(self, model: ToyModel, state: int) -> None:
        self._table = model.table
        self._states = [state]
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocab]; row i = logits for what follows tokens[i]."""
        for token in tokens:
            self._states.append(fold(self._states[-1], (token,)))
        self.tokens.extend(tokens)
        return self._table[self._states[-len(tokens) :]]

    def truncate(self, length: int) -> None:
        """Drop what follows the first `length` tokens. ValueError if there are fewer."""
        check_truncation(length, len(self.tokens))
        del self.tokens[length:]
        del self._states[length + 1 :]


def fold(state: int, tokens: Sequence[int]) -> int:
    """The state after `tokens`, from `state`."""
    for token in tokens:
        state = (state * 31 + token + 1) % STATES
    return state


def random_table(vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    """Normal logits [STATES, vocabulary], float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(STATES, vocabulary, dtype=torch.float64, generator=generator)
