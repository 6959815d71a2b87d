"""Gates decide if the cloud is asked. Draft stops decide where a draft ends.

Both read a score of each draft token, computed from the row of logits that the token was drafted from.

- `entropy`, `margin` and `logprob` escalate a draft if one of its tokens is too uncertain.
- `token` and its forms end the draft before the uncertain token, and let the cloud write that token.
- `risk` adds up the risks of all tokens since the last verdict. It sends them as a whole at the end of a caption, or
  lets the caption go: it then ends without a call.
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

GATE_NAMES = (
    *("entropy", "margin", "logprob", "token", "token(margin)", "token(logprob)", "risk"),
    *("always", "never"),
)
Score = Callable[["Tensor"], float]  # scores a row of logits [vocab_size]
RISK_LIMIT, OPINION_RISK = 1.0, 0.02  # the usual limit of gate risk, and the usual risk of a target's opinion
DRAFT_STOP_FORMS = ("none", "entropy", "entropy=x", "margin=x")


@dataclass(frozen=True)
class Gate:
    """A rule that asks the cloud if the scores of the tokens since its last verdict are too high.

    Gate risk asks if the total risk (`total_risk`) exceeds `threshold`, or at the end of a caption if it exceeds
    `send_above`. A token that the target proposed has the risk `opinion_risk`. Any other gate asks if one score exceeds
    `threshold`. `score` is None for a gate that decides without one: `ALWAYS` and `NEVER`. Raise ValueError for numbers
    that do not fit the gate, and TypeError for those that are none.
    """

    name: str
    threshold: float
    score: Score | None = None
    send_above: float = 0.0
    opinion_risk: float = 0.0

    def __post_init__(self) -> None:
        for field in ("threshold", "send_above", "opinion_risk"):
            object.__setattr__(self, field, real_number(field, getattr(self, field)))
        constants = {"always": -math.inf, "never": math.inf}
        if self.score is None:
            is_valid = constants.get(self.name) == self.threshold
        else:
            is_valid = self.name not in constants and _is_limit(self.name, self.limit)
        if not is_valid:
            has_score = "without a score" if self.score is None else "with a score"
            is_share = self.name == "risk" or self.statistic == "margin"
            raise ValueError(
                f"gate {self.name!r} {has_score} cannot have threshold {self.limit:g}: "
                f"use parse_gate(name, threshold) with one above 0{' and at most 1' * is_share}, ALWAYS or NEVER"
            )
        if self.name == "risk" and not (self.send_above <= 1 and 0 <= self.opinion_risk <= 1):
            raise ValueError(
                "gate 'risk' takes a send level of at most 1 and an opinion risk from 0 to 1, "
                f"not {self.send_above:g} and {self.opinion_risk:g}"
            )

    def __call__(self, draft: Draft, is_end: bool = False) -> bool:
        """Return True if the edge asks the cloud after this draft.

        The scores are those of all tokens since the last verdict. Under gate token the last one may be that of the
        token after the draft. `is_end` says that no token can follow the draft.
        """
        return self._exceeds(draft.scores, is_end)

    def ends_draft(self, scores: Sequence[float]) -> bool:
        """Return True if the gate asks the cloud at once after tokens with these scores, however short the draft is."""
        return self.sets_draft_length and self._exceeds(scores)

    def draft_score(self, scores: Sequence[float]) -> float | None:
        """Return the number that the gate compares with its limits: the total risk, or the largest score.

        It is None for a gate without a score, and without scores under any other gate than risk.
        """
        if self.score is None:
            return None
        return total_risk(scores) if self.name == "risk" else max(scores, default=None)

    def _exceeds(self, scores: Sequence[float], is_end: bool = False) -> bool:
        score = self.draft_score(scores)
        if score is None:
            return self.score is None and self.threshold < 0
        return score > self.threshold or (self.name == "risk" and is_end and score > self.send_above)

    @property
    def sets_draft_length(self) -> bool:
        """True if the gate may end a draft at any token. Then k changes no call, only the tokens shown at a time."""
        return self.name == "risk" or self.stops_before_token

    @property
    def stops_before_token(self) -> bool:
        """True if the draft ends before the uncertain token, which the cloud then writes."""
        return self.name.startswith("token")

    @property
    def statistic(self) -> str:
        """The statistic that the gate reads: entropy, margin, logprob or risk."""
        return _statistic(self.name)

    @property
    def sends_all(self) -> bool:
        """True if every token gets a verdict in the end: under gate always, and gate risk with a send level below 0."""
        return self.name == "always" or (self.name == "risk" and self.send_above < 0)

    @property
    def limit(self) -> float:
        """The threshold in the unit of its statistic: nats, a difference of probabilities, or a risk."""
        return -self.threshold if self.statistic == "margin" else self.threshold

    @property
    def label(self) -> str:
        """The gate's part of a case id."""
        if self.name == "risk":
            parts = ["risk", "all" if self.sends_all else f"f{self.send_above:g}"]
            parts += [f"B{self.threshold:g}"] if self.threshold != RISK_LIMIT else []
            parts += [f"s{self.opinion_risk:g}"] if self.opinion_risk != OPINION_RISK else []
            return "_".join(parts)
        letter = {"entropy": "H", "margin": "M", "logprob": "L"}.get(self.statistic)
        return f"{'token' if self.stops_before_token else ''}{letter}{self.limit:g}" if letter else self.name

    @property
    def can_escalate(self) -> bool:
        """True unless the gate never asks the cloud."""
        return self.threshold < math.inf


ALWAYS = Gate("always", -math.inf)
NEVER = Gate("never", math.inf)


def total_risk(risks: Sequence[float]) -> float:
    """Return R = 1 - prod(1 - r): the chance that a token is wrong, if each is wrong with a chance r of its own."""
    return 1 - math.prod(1 - risk for risk in risks)


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


def risk_gate(threshold: float = RISK_LIMIT, send_above: float = -1.0, opinion_risk: float = OPINION_RISK) -> Gate:
    """Return gate risk: ask above `threshold` at once, and above `send_above` at the end of a caption.

    The numbers are risks from 0 to 1. A `threshold` of 1 waits for the end. A `send_above` below 0 always sends.
    """
    return Gate("risk", threshold, probs.risk, send_above, opinion_risk)


def parse_gate(name: str, threshold: float = math.nan, *risk_numbers: float) -> Gate:
    """Return a gate by name. Gates always and never read no number.

    `risk_numbers` are the send level and the opinion risk of gate risk. Raise ValueError for an unknown name.
    """
    if name == "entropy":
        return entropy_gate(threshold)
    if name == "always":
        return ALWAYS
    if name == "never":
        return NEVER
    if name == "risk":
        return risk_gate(threshold, *risk_numbers)
    if name in GATE_NAMES:
        statistic = _statistic(name)
        return Gate(name, -threshold if statistic == "margin" else threshold, GATE_SCORES[statistic])
    raise ValueError(f"unknown gate {name!r}: choose one of {', '.join(GATE_NAMES)}")


def _statistic(name: str) -> str:
    """Return the statistic that a gate reads."""
    return "entropy" if name == "token" else name.removeprefix("token(").removesuffix(")")


def _is_limit(name: str, limit: float) -> bool:
    """Return True for a limit under which a gate with a score can give both answers."""
    if name == "risk" or _statistic(name) == "margin":
        return 0 < limit <= 1
    return name not in GATE_NAMES or 0 < limit < math.inf


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


GATE_SCORES: dict[str, Score] = {"entropy": probs.entropy, "margin": _negative_margin, "logprob": probs.surprisal}
