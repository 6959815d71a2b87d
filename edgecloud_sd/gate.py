"""Gates: whether a draft goes to the cloud, decided on one statistic of each drafted token; and where drafts stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecloud_sd import probs
from edgecloud_sd.events import Draft

if TYPE_CHECKING:
    from torch import Tensor

GATE_NAMES = ("entropy", "always", "never")
Score = Callable[["Tensor"], float]
DRAFT_STOP_FORMS = ("none", "entropy", "entropy=x", "margin=x")


@dataclass(frozen=True)
class Gate:
    """Escalate when the largest score in the draft exceeds `threshold`. `score` is None where no score is needed."""

    label: str
    threshold: float
    score: Score | None = None

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


def entropy_gate(threshold: float) -> Gate:
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


@dataclass(frozen=True)
class DraftStop:
    """A draft ends with its first token whose score exceeds `threshold`. `score` None is the gate's own score."""

    label: str
    threshold: float
    score: Score | None = None

    def __call__(self, row: Tensor, scores: Sequence[float]) -> bool:
        """For the last token made, from its row of logits [vocab]; `scores` are the gate's, that token's included."""
        return (scores[-1] if self.score is None else self.score(row)) > self.threshold


def parse_draft_stop(text: str, gate: Gate) -> DraftStop | None:
    """A rule to stop drafts by, under `gate`; None for no rule. ValueError, naming the known ones, for any other text.

    `entropy` stops at the threshold of the gate, so at a token that escalates the draft; it is None for other gates.
    `entropy=x` has a threshold of its own, in nats; `margin=x` stops where the two most likely tokens are
    less than x apart.
    """
    name, _, number = text.partition("=")
    if text == "none" or (text == "entropy" and gate.score is not probs.entropy):
        return None
    try:
        x = gate.threshold if text == "entropy" else float(number)
    except ValueError:
        x = math.nan
    if name == "entropy" and x > 0:
        return DraftStop(f"stopH{x:g}", x, None if gate.score is probs.entropy else probs.entropy)
    if name == "margin" and 0 < x <= 1:
        return DraftStop(f"stopM{x:g}", -x, _closeness)
    raise ValueError(
        f"is not one of {', '.join(DRAFT_STOP_FORMS)} "
        "(nats above 0 for entropy, a difference of chances, to 1, for margin)"
    )


def statistics_per_token(gate: Gate, stop: DraftStop | None) -> int:
    """How many are computed of each drafted token."""
    return int(gate.score is not None) + int(stop is not None and stop.score is not None)


def _closeness(row: Tensor) -> float:
    return -probs.margin(row)


def parse_gate(name: str, threshold: float) -> Gate:
    """A gate by name; only `entropy_gate` reads `threshold`. ValueError, naming the known gates, for any other name."""
    if name == "entropy":
        return entropy_gate(threshold)
    if name == "always":
        return ALWAYS
    if name == "never":
        return NEVER
    raise ValueError(f"unknown gate {name!r}: choose one of {', '.join(GATE_NAMES)}")
