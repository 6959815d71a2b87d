"""The level of a gate: from a budget of cloud calls or of tokens that the cloud writes, or from a promise.

The level is the send level f of gate risk. A caption meets that gate at each of its *endings*: its first draft, and the
redraft after each correction. The gate lets it go, without another call, at the first ending whose risk R is at most f.
Up to there the decoding does not depend on f. So one lossless decode of a clip shows what every f does with it.

The promise is "with chance >= 1 - alpha a caption is the cloud's own". Let s_i be the smallest R at which caption i
would be let go while it differs, or inf. The caption differs if f >= s_i. `own_level` returns an f just below the k-th
smallest of n scores, with k = floor(alpha (n + 1)). If n clips and a new one are exchangeable, the caption of the new
one then differs with chance alpha at most. It differs only if its score is below the k-th smallest of the others. Among
n + 1 clips at most k have such a score, and exchangeable clips are equally likely to be one of these.

This is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, arXiv:2208.02814) of the loss "differs",
which rises with f. The chance is a mean over calibrations and clips. For one calibration it varies as Beta(k, n + 1 -
k) if no scores are equal (Vovk 2012, arXiv:1209.2673).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from edgecloud_sd.events import Committed, Confirmed, Trace, Verified
from edgecloud_sd.gate import Gate, total_risk
from edgecloud_sd.measure.metrics import Counts
from edgecloud_sd.strategy import Strategy

ALWAYS_SEND = -1.0  # a send level below every risk: lossless
NEVER_SEND = 1.0  # a send level that no risk exceeds


class LevelRange(NamedTuple):
    """The levels that feedback may give a gate, and the step for each call or token beyond a budget."""

    low: float
    high: float
    step: float


LEVEL_RANGES = {
    "risk": LevelRange(0.0, NEVER_SEND, 0.05),
    "token": LevelRange(1e-6, 12.0, 0.1),  # 12 nats: ln of a vocabulary of 160,000 ids
    "token(logprob)": LevelRange(1e-6, 12.0, 0.1),
    "token(margin)": LevelRange(-1.0, -1e-6, 0.05),  # a margin with its sign changed, so that less of it is uncertain
}


def gate_at(gate: Gate, level: float) -> Gate:
    """Return a gate of `LEVEL_RANGES` with another level: the send level of gate risk, or a gate's threshold."""
    return replace(gate, send_above=level) if gate.name == "risk" else replace(gate, threshold=level)


def gate_level(gate: Gate) -> float:
    """Return the level of a gate of `LEVEL_RANGES`."""
    return gate.send_above if gate.name == "risk" else gate.threshold


def stated_level(gate: Gate) -> float:
    """Return the level of a gate as its option states it: a margin has no sign."""
    return gate.send_above if gate.name == "risk" else gate.limit


@dataclass(frozen=True)
class Ending:
    """A moment at which gate risk may let a caption go, with the caption as it is then.

    `risk` is R, or -inf at the end of a caption that was never let go. `calls` and `written` count the cloud's
    verifications and tokens so far.
    """

    risk: float
    calls: int
    written: int
    tokens: int
    is_own: bool


Endings = Sequence[Ending]  # those of a caption in order, the last with risk -inf


@dataclass(frozen=True)
class LevelCost:
    """The costs of captions under a gate of one level: calls per caption, and tokens the cloud wrote / all tokens."""

    level: float
    calls: float
    written_share: float


@dataclass(frozen=True)
class Budget:
    """A limit on the mean of one figure of `LevelCost`. Its `kind` is `calls` or `written_share`."""

    kind: str
    limit: float

    def is_kept(self, cost: LevelCost) -> bool:
        """Return True if a cost is within the budget."""
        spent: float = getattr(cost, self.kind)
        return spent <= self.limit

    def excess(self, calls: int, written: int, tokens: int) -> float:
        """Return calls, or tokens written by the cloud, beyond what the budget grants one caption."""
        return calls - self.limit if self.kind == "calls" else written - self.limit * tokens


def calibrated_strategy(strategy: Strategy) -> Strategy:
    """Return the strategy at the lowest level of its gate, and without fields that change no call and no token.

    Under gates risk and token the cloud gets the same requests, however the draft tokens are split into rounds.
    """
    lowest = gate_at(strategy.gate, LEVEL_RANGES[strategy.gate.name].low)
    return replace(
        strategy, gate=lowest, k=1, draft_stop=None, draft_ahead=0, prefill=Strategy.prefill, drafter="model"
    )


def trace_endings(trace: Trace, gate: Gate) -> Endings:
    """Return the endings of a caption that was decoded losslessly under gate risk.

    A request because the risk exceeded the gate's limit B is no ending: it is sent at every f.
    """
    endings: list[Ending] = []
    final = calls = written = 0
    for _, event in trace.events:
        if isinstance(event, Verified):
            risk = total_risk(event.draft.scores)
            tokens = (*trace.tokens[:final], *event.draft.tokens)
            if risk <= gate.threshold:
                endings.append(Ending(risk, calls, written, len(tokens), tokens == trace.tokens))
            calls += 1
        elif isinstance(event, Confirmed):
            final += event.count
        elif isinstance(event, Committed):
            final += len(event.tokens) * event.is_final
            written += len(event.tokens) * (event.origin in ("correction", "bonus"))
    return (*endings, Ending(-math.inf, calls, written, len(trace.tokens), True))


def ending_at(endings: Endings, level: float) -> Ending:
    """Return the ending at which a caption is let go at a send level."""
    return next(ending for ending in endings if ending.risk <= level)


def own_score(endings: Endings) -> float:
    """Return s: the smallest risk at which a caption is let go while it differs from the cloud's own, or inf."""
    return min((ending.risk for ending in endings if not ending.is_own), default=math.inf)


def own_place(n: int, own: float) -> int:
    """Return k = floor(alpha (n + 1)) for alpha = 1 - own. `own` counts as the decimal number that it prints as."""
    return math.floor((1 - Fraction(repr(own))) * (n + 1))


def own_level(scores: Sequence[float], own: float) -> float:
    """Return the send level at which a caption is the cloud's own with chance `own` or more, in (0, 1).

    The level is below 0, and decoding lossless, if there are too few scores: fewer than 1 / (1 - own) - 1.
    """
    place = own_place(len(scores), own)
    return min(math.nextafter(sorted(scores)[place - 1], -math.inf), NEVER_SEND) if place else ALWAYS_SEND


def level_costs(captions: Sequence[Endings]) -> list[LevelCost]:
    """Return the costs of captions at each send level that changes them, from lossless up to the edge's own choice."""
    risks = {ending.risk for endings in captions for ending in endings if ending.risk >= 0}
    costs = []
    for level in (ALWAYS_SEND, *sorted(risks)):
        last = [ending_at(endings, level) for endings in captions]
        calls, written, tokens = (sum(getattr(end, name) for end in last) for name in ("calls", "written", "tokens"))
        costs.append(LevelCost(level, calls / len(last), written / tokens))
    return costs


def budget_level(costs: Iterable[LevelCost], budget: Budget) -> float:
    """Return the lowest level within a budget. Its captions are the nearest to the cloud's.

    Raise ValueError if no level is within it.
    """
    costs = list(costs)
    levels = [cost.level for cost in costs if budget.is_kept(cost)]
    if not levels:
        least: float = min(getattr(cost, budget.kind) for cost in costs)
        raise ValueError(f"{budget.limit:g} is less than any level of this gate needs, {least:.3g}: give a larger one")
    return min(levels)


@dataclass
class LevelFeedback:
    """A level that follows a budget without a calibration: it moves after each caption.

    It rises by `step` for each call or token that a caption spent beyond the budget, and falls by as much for each one
    less. `state` is the level before it is limited to the range. Any T captions have a mean excess of at most
    (high - low + step * largest excess) / (step T), if captions at the level `high` spend nothing. The argument is that
    of adaptive conformal inference (Gibbs and Candes, arXiv:2106.00170).
    """

    budget: Budget
    state: float
    range: LevelRange

    @property
    def level(self) -> float:
        """The level of the next caption."""
        return min(max(self.state, self.range.low), self.range.high)

    def observe_counts(self, counts: Counts) -> None:
        """Move the level after a caption with these counts."""
        self.observe(counts.cloud_calls, counts.written, counts.tokens)

    def observe(self, calls: int, written: int, tokens: int) -> None:
        """Move the level after a caption.

        The state may exceed `high` by the width of the range, and captions must then save as much. It never falls below
        `low`, so what captions save there is not spent later.
        """
        low, high, step = self.range
        moved = self.state + step * self.budget.excess(calls, written, tokens)
        self.state = min(max(moved, low), 2 * high - low)


def start_feedback(budget: Budget, gate: Gate) -> LevelFeedback:
    """Return the feedback of a run, which begins at the level of a gate of `LEVEL_RANGES`."""
    levels = LEVEL_RANGES[gate.name]
    return LevelFeedback(budget, max(gate_level(gate), levels.low), levels)
