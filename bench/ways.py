"""The ways to decode that `bench.tune --pareto` compares: lines of strategies that differ in one value, and bounds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edgecloud_sd.acceptance import PUBLISHED_RANK, Rank
from edgecloud_sd.config import Settings
from edgecloud_sd.events import Draft
from edgecloud_sd.gate import Gate, entropy_gate, parse_gate
from edgecloud_sd.strategy import REVISE_LOSSLESS, Strategy

GateMaker = Callable[[Sequence[int], Sequence[int], str], Gate]  # see `perfect_gate`
THRESHOLDS = (1.5, 1.2, 0.9, 0.6, 0.3, 0.1)  # nats; above all entropies the line ends at the edge alone
RANKS = (50, 20, 10, 5, 2, 1)
WHOLE = 64  # draft tokens: a whole caption
LENGTHS = (WHOLE, 16, 8, 4, 2, 1)
SEND_LEVELS = (0.95, 0.9, 0.8, *Settings.send_above, 0.2, 0.05, REVISE_LOSSLESS.gate.send_above)
OPINION_RISKS = {"none": 0.0, "repeat": 0.01, "aligned": 0.02, "context": 0.02}  # keys are ways to revise
MOST_CALLS = (1, 2, 3, math.inf)  # calls a caption of the perfect gate
PUBLISHED_THRESHOLD = 1.5
PERFECT, RANDOM, GIVEN = "perfect gate", "random gate", "as given"


@dataclass(frozen=True)
class ParetoWay:
    """A way to decode. `label` is its value on its line. A way of a bound has a new gate for each caption."""

    line: str
    label: str
    strategy: Strategy
    make_gate: GateMaker | None = None
    mark: str = ""  # the name of a way that a reader looks for

    @property
    def name(self) -> str:
        """The value on the line, and the mark if there is one. A mark that contains the value stands alone."""
        if not self.mark:
            return self.label
        return self.mark if self.label in self.mark else f"{self.label} ({self.mark})"


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


def perfect_gate(most_calls: float, output: Sequence[int], target: Sequence[int], seed: str) -> Gate:
    """Return the gate that escalates the drafts that the cloud would correct, up to `most_calls` of a caption.

    `output` grows while the caption is decoded, and `target` is the cloud's own caption.
    """
    calls = itertools.count()

    def is_wrong(draft: Draft) -> bool:
        own = tuple(target[len(output) : len(output) + len(draft.tokens)])
        return draft.tokens != own and next(calls) < most_calls

    return DecidingGate("always", -math.inf, decide=is_wrong)


def random_gate(rate: float, output: Sequence[int], target: Sequence[int], seed: str) -> Gate:
    """Return the gate that escalates a share `rate` of the drafts, drawn from `seed`."""
    generator = random.Random(seed)
    return DecidingGate("always", -math.inf, decide=lambda draft: generator.random() < rate)


def list_ways(given: Sequence[Strategy] = ()) -> list[ParetoWay]:
    """Return the ways of every line but that of the random gate, then one for each strategy given by options."""
    ways = [EDGE, CLOUD]
    ways += _entropy_line(Strategy(rule=Rank(PUBLISHED_RANK), k=3))
    ways += _entropy_line(Strategy(k=3)) + _entropy_line(Strategy(k=1)) + _entropy_line(Strategy(k=1, look_back=True))
    ways += [
        ParetoWay("token gate", f"H {nats:g}", Strategy(gate=parse_gate("token", nats), k=WHOLE)) for nats in THRESHOLDS
    ]
    ways += [ParetoWay("rank rule, gate always, k 4", f"r {r}", Strategy(rule=Rank(r), k=4)) for r in RANKS]
    ways += [ParetoWay("lossless", f"k {k}", Strategy(k=k), mark="lossless, k 4" if k == 4 else "") for k in LENGTHS]
    ways += [way for revise, opinion_risk in OPINION_RISKS.items() for way in _risk_line(revise, opinion_risk)]
    ways += [ParetoWay(PERFECT, _call_limit(most), Strategy(k=4), partial(perfect_gate, most)) for most in MOST_CALLS]
    return ways + [ParetoWay(GIVEN, strategy.label, strategy) for strategy in given]


def random_ways(rates: Sequence[float]) -> list[ParetoWay]:
    """Return the line of the random gate, with the rates of escalation that the perfect gate had."""
    return [ParetoWay(RANDOM, f"{rate:.1%} of drafts", Strategy(k=4), partial(random_gate, rate)) for rate in rates]


def _call_limit(most: float) -> str:
    return "all calls" if most == math.inf else f"calls <= {most:g}"


def _risk_line(revise: str, opinion_risk: float) -> list[ParetoWay]:
    usual = REVISE_LOSSLESS
    (default_level,) = Settings.send_above
    marks = {default_level: "revise", usual.gate.send_above: "revise-lossless"}
    return [
        ParetoWay(
            f"risk gate, revise {revise}",
            "f < 0" if level < 0 else f"f {level:g}",
            replace(usual, gate=replace(usual.gate, send_above=level, opinion_risk=opinion_risk), revise=revise),
            mark=marks.get(level, "") if revise == usual.revise else "",
        )
        for level in SEND_LEVELS
    ]


def _entropy_line(base: Strategy) -> list[ParetoWay]:
    name = f"entropy gate, {base.rule.text}, k {base.k}{', look-back' * base.look_back}"
    ways = [
        ParetoWay(name, f"H {threshold:g}", replace(base, gate=entropy_gate(threshold))) for threshold in THRESHOLDS
    ]
    is_published = base == Strategy(rule=Rank(PUBLISHED_RANK), k=3)
    return [
        replace(way, mark="published" * (is_published and way.strategy.gate == entropy_gate(PUBLISHED_THRESHOLD)))
        for way in ways
    ]
