"""A table language model in float64: instant, exact, and sensitive to the whole past, so that no cache error hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecloud_sd import probs
from edgecloud_sd.acceptance import Rank, Rule, Synthetic, uniform
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.session import check_truncation
from edgecloud_sd.verifier import prompt_seed

STATES = 257  # prime, so that the state depends on every earlier token


@dataclass(frozen=True)
class ToyModel:
    """A model whose logits are the row of `table` [STATES, vocab] at a hash of the prompt and all tokens."""

    table: Tensor
    eos: frozenset[int]

    def open(self, prompt: Prompt) -> ToySession:
        """Return a session after all but the last prompt token."""
        return ToySession(self, hash_tokens(0, prompt.ids[:-1]))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return logits [vocab] for what follows `ids`, prompt included; tests compare sessions with this."""
        return self.table[hash_tokens(0, ids)]


class ToySession:
    """A session whose cache is the hash after each token."""

    def __init__(self, model: ToyModel, state: int) -> None:
        self._table = model.table
        self._states = [state]
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens` and return logits [len(tokens), vocab]; row i = logits for what follows tokens[i]."""
        for token in tokens:
            self._states.append(hash_tokens(self._states[-1], (token,)))
        self.tokens.extend(tokens)
        return self._table[self._states[-len(tokens) :]]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raise ValueError if there are fewer."""
        check_truncation(length, len(self.tokens))
        del self.tokens[length:]
        del self._states[length + 1 :]


def hash_tokens(state: int, tokens: Sequence[int]) -> int:
    """Return the state after `tokens`, starting from `state`."""
    for token in tokens:
        state = (state * 31 + token + 1) % STATES
    return state


def random_table(vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    """Return normally distributed logits [STATES, vocabulary] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(STATES, vocabulary, dtype=torch.float64, generator=generator)


def stateless_verdict(
    model: ToyModel, prompt: Prompt, rule: Rule, context: Sequence[int], draft: Sequence[int]
) -> Verdict:
    """Return the verdict with its rest, from one plain row of logits for each place."""
    rows = [model.logits([*prompt.ids[:-1], *context, *draft[:place]]) for place in range(len(draft) + 1)]

    def accepts(place: int) -> bool:
        if isinstance(rule, Synthetic):
            rate = rule.rates[min(place, len(rule.rates) - 1)]
            return uniform(prompt_seed(prompt), len(context) + place) < rate
        assert isinstance(rule, Rank)
        return probs.rank(rows[place], draft[place]) <= rule.r

    places = range(len(draft))
    opinions = [draft[place] if accepts(place) else int(rows[place].argmax()) for place in places]
    accepted = next((place for place in places if not accepts(place)), len(draft))
    last = rows[accepted].clone()
    if accepted < len(draft):
        last[draft[accepted]] = -math.inf
    return Verdict(accepted, int(last.argmax()), tuple(opinions[accepted + 1 :]))
