"""Gates: whether a draft goes to the cloud, decided on one statistic of each drafted token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecloud_sd import probs
from edgecloud_sd.records import Draft

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("entropy", "always", "never")


@dataclass(frozen=True)
class Gate:
    """Escalate when the largest score in the draft exceeds `threshold`. `score` is None where no score is needed."""

    label: str
    threshold: float
    score: Callable[[Tensor], float] | None = None

    def __call__(self, draft: Draft) -> bool:
        if self.score is None:
            return self.threshold < 0
        return max(draft.scores) > self.threshold

    @property
    def escalates(self) -> bool:
        """False for a gate that can never ask the cloud."""
        return self.threshold < math.inf


ALWAYS = Gate("always", -math.inf)
NEVER = Gate("never", math.inf)


def entropy(threshold: float) -> Gate:
    """Escalate when the largest entropy (nats) in the draft exceeds `threshold`.

    At 0 or below it is `ALWAYS`, at inf `NEVER`. ValueError for nan.
    """
    if math.isnan(threshold):
        raise ValueError("the entropy threshold must be a number of nats, not nan")
    if threshold <= 0:
        return ALWAYS
    if threshold == math.inf:
        return NEVER
    return Gate(f"H{threshold:g}", threshold, probs.entropy)


def parse(name: str, threshold: float) -> Gate:
    """A gate by name; only `entropy` reads `threshold`. ValueError, naming the known gates, for any other name."""
    if name == "entropy":
        return entropy(threshold)
    if name == "always":
        return ALWAYS
    if name == "never":
        return NEVER
    raise ValueError(f"unknown gate {name!r}: choose one of {', '.join(NAMES)}")
