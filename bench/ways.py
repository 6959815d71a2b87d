"""The ways to decode that `bench.tune --pareto` compares: lines of strategies that differ in one value, and bounds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from edgecloud_sd.acceptance import GREEDY, PUBLISHED_RANK, Rank, Rule
from edgecloud_sd.events import Draft
from edgecloud_sd.gate import Gate, entropy_gate
from edgecloud_sd.strategy import Strategy

GateMaker = Callable[[Sequence[int], Sequence[int], str], Gate]  # see `perfect_gate`
THRESHOLDS = (math.inf, 1.5, 1.2, 0.9, 0.6, 0.3, 0.1)  # nats; inf is gate never
RANKS = (50, 20, 10, 5, 2, 1)
LENGTHS = (64, 16, 8, 4, 2, 1)
MOST_CALLS = (1, 2, 3, math.inf)  # calls a caption of the perfect gate
PUBLISHED_THRESHOLD = 1.5
PERFECT, RANDOM = "perfect gate", "random gate"


@dataclass(frozen=True)
class ParetoWay:
    """A way to decode. `label` is its value on its line. A bound makes its gate for each caption."""

    line: str
    label: str
    strategy: Strategy
    make_gate: GateMaker | None = None
    mark: str = ""  # the name of a way that a reader looks for


EDGE, CLOUD = (
    ParetoWay("edge", "", Strategy("edge"), mark="edge"),
    ParetoWay("cloud", "", Strategy("cloud"), mark="cloud"),
)


@dataclass(frozen=True)
class DecidingGate(Gate):
    """A gate that a function decides, which may know more than any edge does."""

    decide: Callable[[Draft], bool] = bool

    def __call__(self, draft: Draft, is_end: bool = False) -> bool:
        """Return True if the draft goes to the cloud."""
        return self.decide(draft)


def perfect_gate(most_calls: float, committed: Sequence[int], target: Sequence[int], seed: str) -> Gate:
    """Return the gate that escalates the drafts that the cloud would correct, up to `most_calls` of a caption.

    `committed` grows while the caption is decoded, and `target` is the cloud's own caption.
    """
    calls = itertools.count()

    def is_wrong(draft: Draft) -> bool:
        own = tuple(target[len(committed) : len(committed) + len(draft.tokens)])
        return draft.tokens != own and next(calls) < most_calls

    return DecidingGate("always", -math.inf, decide=is_wrong)


def random_gate(rate: float, committed: Sequence[int], target: Sequence[int], seed: str) -> Gate:
    """Return the gate that escalates a share `rate` of the drafts, drawn from `seed`."""
    generator = random.Random(seed)
    return DecidingGate("always", -math.inf, decide=lambda draft: generator.random() < rate)


def list_ways(own: Sequence[Strategy] = ()) -> list[ParetoWay]:
    """Return the ways of every line but that of the random gate, then a way for each of a run's `own` strategies."""
    ways = [EDGE, CLOUD]
    ways += _entropy_line(Rank(PUBLISHED_RANK), 3) + _entropy_line(GREEDY, 3) + _entropy_line(GREEDY, 1)
    ways += [ParetoWay("rank rule, gate always, k 4", f"r {r}", Strategy(rule=Rank(r), k=4)) for r in RANKS]
    ways += [ParetoWay("lossless", f"k {k}", Strategy(k=k), mark="lossless k 4" if k == 4 else "") for k in LENGTHS]
    ways += [
        ParetoWay(PERFECT, f"calls <= {most:g}", Strategy(k=4), partial(perfect_gate, most)) for most in MOST_CALLS
    ]
    return ways + [ParetoWay("as given", strategy.label, strategy) for strategy in own]


def random_ways(rates: Sequence[float]) -> list[ParetoWay]:
    """Return the line of the random gate, with the rates of escalation that the perfect gate had."""
    return [ParetoWay(RANDOM, f"{rate:.1%} of drafts", Strategy(k=4), partial(random_gate, rate)) for rate in rates]


def _entropy_line(rule: Rule, k: int) -> list[ParetoWay]:
    published = (PUBLISHED_THRESHOLD, Rank(PUBLISHED_RANK), 3)
    return [
        ParetoWay(
            f"entropy gate, {rule.text}, k {k}",
            f"H {threshold:g}",
            Strategy(gate=entropy_gate(threshold), rule=rule, k=k),
            mark="published" if (threshold, rule, k) == published else "",
        )
        for threshold in THRESHOLDS
    ]
