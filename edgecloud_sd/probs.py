"""Statistics of one row of logits, as pure functions. They compute in float32 or wider."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> float:
    """Return the Shannon entropy of softmax(logits) in nats: -sum_i p_i ln p_i, from 0 to ln(vocab_size).

    `logits` is [vocab_size].
    """
    wide = logits if logits.element_size() >= 4 else logits.float()
    logp = wide.log_softmax(dim=-1)
    return float(-(logp.exp() * logp.clamp(min=-1e30)).sum())  # without the clamp a probability of 0 gives nan


def margin(logits: Tensor) -> float:
    """Return the probability of the most likely token minus that of the next one, from 0 to 1.

    `logits` is [vocab_size], with at least two entries.
    """
    first, second = logits.float().softmax(dim=-1).topk(2).values.tolist()
    return float(first - second)


def surprisal(logits: Tensor) -> float:
    """Return -ln p of the most likely token in nats, from 0 on. `logits` is [vocab_size]."""
    wide = logits if logits.element_size() >= 4 else logits.float()
    return -float(wide.log_softmax(dim=-1).max())


def risk(logits: Tensor) -> float:
    """Return 1 - p of the most likely token, from 0 to 1. `logits` is [vocab_size]."""
    return -math.expm1(-surprisal(logits))


def rank(logits: Tensor, token: int) -> int:
    """Return the place of `token` among the logits [vocab_size]: 1 is the most likely.

    Among equal logits the lowest id comes first, as in argmax.
    """
    own = logits[token]
    return 1 + int((logits > own).sum()) + int((logits[:token] == own).sum())
