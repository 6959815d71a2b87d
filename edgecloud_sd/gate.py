"""Gates decide if a draft goes to the cloud. Draft stops decide where a draft ends.

Both read a score of each draft token, computed from the row of logits that the token was drafted from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecloud_sd import probs
from edgecloud_sd.events import Draft
from edgecloud_sd.fields import check_type, real_number

if TYPE_CHECKING:
    from torch import Tensor

GATE_NAMES = ("entropy", "always", "never")
Score = Callable[["Tensor"], float]  # scores a row of logits [vocab_size]
DRAFT_STOP_FORMS = ("none", "entropy", "entropy=x", "margin=x")


@dataclass(frozen=True)
class Gate:
    """A rule that escalates a draft if its largest score exceeds `threshold`.

    `score` is None for a gate that decides without one: `ALWAYS` and `NEVER`. Raise ValueError for a threshold that
    makes an entropy gate one of these, and TypeError for one that is no number.
    """

    name: str
    threshold: float
    score: Score | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", real_number("threshold", self.threshold))
        constants = {"always": -math.inf, "never": math.inf}
        if self.score is None:
            is_valid = constants.get(self.name) == self.threshold
        else:
            is_valid = self.name not in constants and (self.name != "entropy" or 0 < self.threshold < math.inf)
        if not is_valid:
            has_score = "without a score" if self.score is None else "with a score"
            raise ValueError(
                f"gate {self.name!r} {has_score} cannot have threshold {self.threshold:g}: "
                "use entropy_gate(threshold), ALWAYS or NEVER"
            )

    def __call__(self, draft: Draft) -> bool:
        """Return True if the draft goes to the cloud."""
        if self.score is None:
            return self.threshold < 0
        return max(draft.scores) > self.threshold

    @property
    def label(self) -> str:
        """The gate's part of a case id."""
        return f"H{self.threshold:g}" if self.name == "entropy" else self.name

    @property
    def can_escalate(self) -> bool:
        """True unless the gate never asks the cloud."""
        return self.threshold < math.inf


ALWAYS = Gate("always", -math.inf)
NEVER = Gate("never", math.inf)


def entropy_gate(threshold: float) -> Gate:
    """Return the gate that escalates if the largest entropy (nats) in the draft exceeds `threshold`.

    A threshold of 0 or below gives `ALWAYS`, and inf gives `NEVER`. Raise ValueError for nan.
    """
    threshold = real_number("the entropy threshold", threshold, " of nats")
    if threshold <= 0:
        return ALWAYS
    if threshold == math.inf:
        return NEVER
    return Gate("entropy", threshold, probs.entropy)


def parse_gate(name: str, threshold: float = math.nan) -> Gate:
    """Return a gate by name. Only `entropy` reads `threshold`. Raise ValueError for an unknown name."""
    if name == "entropy":
        return entropy_gate(threshold)
    if name == "always":
        return ALWAYS
    if name == "never":
        return NEVER
    raise ValueError(f"unknown gate {name!r}: choose one of {', '.join(GATE_NAMES)}")


@dataclass(frozen=True)
class DraftStop:
    """A rule that ends a draft with its first token whose score exceeds `threshold`.

    `score` is None if the rule reads the gate's own score. Raise ValueError for an unknown name or a threshold out of
    range, and TypeError for one that is no number.
    """

    name: str
    threshold: float
    score: Score | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", real_number("threshold", self.threshold))
        is_margin = self.name == "margin" and 0 < self.limit <= 1 and self.score is not None
        if not is_margin and not (self.name == "entropy" and self.limit > 0):
            raise ValueError(
                f"draft stop {self.name!r} cannot have threshold {self.threshold:g}: "
                f"use parse_draft_stop with one of {', '.join(DRAFT_STOP_FORMS)}"
            )

    def __call__(self, row: Tensor, gate_scores: Sequence[float]) -> bool:
        """Return True if the draft ends with its last token.

        `row` [vocab_size] holds the logits of that token. The last of `gate_scores` is its score under the gate.
        """
        return (gate_scores[-1] if self.score is None else self.score(row)) > self.threshold

    @property
    def limit(self) -> float:
        """The number in the rule's text: nats, or the difference of two probabilities."""
        return -self.threshold if self.name == "margin" else self.threshold

    @property
    def text(self) -> str:
        """The text that `parse_draft_stop` reads as this rule."""
        return f"{self.name}={self.limit!r}"

    @property
    def label(self) -> str:
        """The rule's part of a case id."""
        return f"stop{'M' if self.name == 'margin' else 'H'}{self.limit:g}"


def parse_draft_stop(text: str, gate: Gate) -> DraftStop | None:
    """Return the draft stop that `text` names, or None for `none`. Raise ValueError for any other text.

    `entropy` ends a draft at the gate's own threshold, so with the token that escalates it. Under a gate that reads no
    entropy it gives None. `entropy=x` ends a draft above x nats. `margin=x` ends it where the probabilities of the two
    most likely tokens differ by less than x.
    """
    check_type("draft_stop", text, str, f"give one of {', '.join(DRAFT_STOP_FORMS)}")
    name, _, number = text.partition("=")
    if text == "none" or (text == "entropy" and gate.score is not probs.entropy):
        return None
    try:
        limit = gate.threshold if text == "entropy" else float(number)
    except ValueError:
        limit = math.nan
    if name == "entropy" and limit > 0:
        return DraftStop("entropy", limit, None if gate.score is probs.entropy else probs.entropy)
    if name == "margin" and 0 < limit <= 1:
        return DraftStop("margin", -limit, _negative_margin)
    raise ValueError(
        f"is not one of {', '.join(DRAFT_STOP_FORMS)} (nats above 0 for entropy, a difference of probabilities up to 1 "
        "for margin)"
    )


def statistics_per_token(gate: Gate, draft_stop: DraftStop | None) -> int:
    """Return how many scores are computed for each draft token."""
    return int(gate.score is not None) + int(draft_stop is not None and draft_stop.score is not None)


def _negative_margin(row: Tensor) -> float:
    return -probs.margin(row)
