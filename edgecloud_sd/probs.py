"""Statistics of one row of logits, as pure functions. Computed in float32 or wider, whatever the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> float:
    """Shannon entropy of softmax(logits) in nats: -sum_i p_i ln p_i, between 0 and ln(vocab). `logits`: [vocab]."""
    wide = logits if logits.element_size() >= 4 else logits.float()
    logp = wide.log_softmax(dim=-1)
    return float(-(logp.exp() * logp.clamp(min=-1e30)).sum())  # a probability of 0 adds 0, not nan


def margin(logits: Tensor) -> float:
    """Chance of the most likely token less that of the next, under softmax(logits): 0 to 1. `logits`: [vocab >= 2]."""
    first, second = logits.float().softmax(dim=-1).topk(2).values.tolist()
    return float(first - second)


def rank(logits: Tensor, token: int) -> int:
    """Place of `token` among the logits [vocab], 1 for the most likely; of equal logits the lowest id, as in argmax."""
    own = logits[token]
    return 1 + int((logits > own).sum()) + int((logits[:token] == own).sum())
