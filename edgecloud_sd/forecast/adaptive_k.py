"""Adaptive k (`--k auto`): the length of the next draft, from the times and verdicts of the rounds so far.

The observed times make a cost profile and the verdicts make a workload. The forecast then gives the k at which a token
takes the least time. Statistics belong to a run; the state of one generation belongs to that generation.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock

from edgecloud_sd.events import Ahead, Committed, Degraded, Drafted, Escalated, Event, Opened, Trace, Verified
from edgecloud_sd.forecast.estimate import count_discarded
from edgecloud_sd.forecast.model import MAX_K, Workload, fastest_k
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import Clock
from edgecloud_sd.timing.link import NO_LINK
from edgecloud_sd.timing.profile import Costs, Profile

FIRST_K = 4  # before anything is observed
# Each new value multiplies the weight of the values before it by this factor: the weight halves in 14 and in 34 values.
# Costs need few values and may change. Acceptance needs many values.
COST_DECAY, CHANCE_DECAY = 0.95, 0.98
# The assumed rate at which a token is accepted if those before it were, and the number of verdicts that weigh as much.
# The rate is higher than usual, so that longer drafts are tried. While no draft reaches a position, the weight of its
# verdicts decays, so that long drafts are tried again.
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.95, 6.0
SHARED_DEVICE_SLOWDOWN = 1.25  # an edge step slowed by more beside the cloud's prefill shares its processor
SEARCH_SHARE = 0.01  # share of a generation's time that the search for draft lengths may take
MAX_CHANGE = 2  # tokens by which a search within a generation may change the length
MIN_GATE_RATE = 1e-3  # the smallest gate rate that a forecast is computed for


@dataclass
class DecayingMean:
    """The mean of values whose weight decays with each new value, and a line through them.

    The fields are the weighted sums of 1, x, y, x^2 and x y, for values `y` at `x`.
    """

    decay: float = CHANCE_DECAY
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, y: float, x: float = 0.0, n: float = 1.0) -> None:
        """Add `n` values that sum to `y`, each at `x`."""
        self.n = self.decay * self.n + n
        self.x = self.decay * self.x + n * x
        self.y = self.decay * self.y + y
        self.xx = self.decay * self.xx + n * x * x
        self.xy = self.decay * self.xy + x * y

    @property
    def mean(self) -> float:
        """The mean, or 0 without a value."""
        return self.y / self.n if self.n else 0.0

    @property
    def slope(self) -> float:
        """The slope by least squares, or 0 if it falls or if every x was equal."""
        spread = self.xx - self.x * self.x / self.n
        return max((self.xy - self.x * self.y / self.n) / spread, 0.0) if spread > 1e-6 * self.xx else 0.0

    def at(self, x: float) -> float:
        """Return the line's value at `x`, at least 0."""
        return max(self.mean + self.slope * (x - self.x / self.n), 0.0)


def _cost() -> DecayingMean:
    return DecayingMean(COST_DECAY)


@dataclass
class AdaptiveK:
    """The statistics of one strategy over a run. Threads may share it. `for_generation` starts one generation.

    `draft_ahead`, `is_lossless` and `has_eager_prefill` are the strategy's (see `Workload`).
    """

    draft_ahead: int = 0
    is_lossless: bool = True
    has_eager_prefill: bool = True
    correction: float = 0.0  # seconds of a correction in the cost profile of the clock
    step: DecayingMean = field(default_factory=_cost)  # seconds of an edge pass, scores included, by tokens fed
    step_beside_prefill: DecayingMean = field(default_factory=_cost)  # the same while the cloud prefills
    trip: DecayingMean = field(default_factory=_cost)  # seconds from sending a draft to its verdict, by tokens fed
    cloud_delay: DecayingMean = field(default_factory=_cost)  # seconds from the edge's prefill to the cloud's
    sent: DecayingMean = field(default_factory=DecayingMean)  # committed tokens sent with a draft
    drafted: DecayingMean = field(default_factory=DecayingMean)  # length of the drafts without tokens drafted ahead
    escalated: DecayingMean = field(default_factory=DecayingMean)  # 1 for a round that was escalated, 0 for any other
    repeated: DecayingMean = field(default_factory=DecayingMean)  # passes that a discarded token saved later
    guessed: DecayingMean = field(default_factory=DecayingMean)  # 1 for a right guess of a bonus, 0 for a wrong one
    accepted: list[DecayingMean] = field(default_factory=list)  # per position in a draft: 1 if accepted, 0 if rejected
    rounds: int = 0
    last_k: int = field(default=FIRST_K, compare=False)
    lock: RLock = field(default_factory=RLock, compare=False, repr=False)

    @classmethod
    def for_strategy(cls, strategy: Strategy, correction: float = 0.0) -> AdaptiveK:
        """Return empty statistics for a strategy, whose corrections take `correction` seconds at the edge."""
        return cls(strategy.draft_ahead, strategy.is_lossless, strategy.prefill == "eager", correction)

    def for_generation(self) -> DraftLengths:
        """Return the state of a new generation, which adds to these statistics."""
        return DraftLengths(self)

    def replay(self, trace: Trace) -> None:
        """Add a generation that was decoded before."""
        generation = self.for_generation()
        for (before, last), (seconds, event) in itertools.pairwise(trace.events):
            is_corrected = isinstance(last, Committed) and last.origin == "correction"
            generation.see(event, seconds - before - (self.correction if is_corrected else 0.0))

    @property
    def edge_costs(self) -> Costs:
        """The edge's passes; fitted to all, or to those beside the cloud's prefill if there are no others."""
        passes = self.step if self.step.n else self.step_beside_prefill
        return Costs(0.0, ((1, passes.at(1)), (2, passes.at(2))) if passes.n else ((1, 0.0),))

    def acceptance(self) -> tuple[float, ...]:
        """Return p_i for i from 1 to `MAX_K`: the product of the rates up to position i (Kaplan and Meier 1958).

        The rate of a position counts the verdicts that reached it, and `PRIOR_WEIGHT` more at `PRIOR_ACCEPTANCE`.
        """
        not_reached = [DecayingMean()] * (MAX_K - len(self.accepted))
        rates = (
            (position.y + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (position.n + PRIOR_WEIGHT)
            for position in [*self.accepted, *not_reached]
        )
        return tuple(itertools.accumulate(rates, operator.mul))

    def fastest(self, near: int | None = None) -> int:
        """Return the fastest k among all (for the first draft of a generation), or among those close to `near`.

        A search among all takes as long as some edge steps. At least one draft must have been verified before.
        The first draft may be longer, because drafting costs no time while the cloud still prefills. This does not
        apply on a shared processor, where the edge delays the cloud.
        """
        trips = [self.trip.at(n) for n in (1, 2)]
        costs = Profile("observed", self.edge_costs, Costs(0.0, tuple(enumerate(trips, 1))), correction=self.correction)
        workload = Workload(
            k=max(round(self.drafted.mean), 1),
            acceptance_by_position=self.acceptance(),
            gate_rate=min(max(self.escalated.mean, MIN_GATE_RATE), 1.0),  # rounding may exceed 1
            sent_with_draft=self.sent.mean,
            draft_ahead=self.draft_ahead,
            is_lossless=self.is_lossless,
            bonus_guess_rate=(self.guessed.y + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (self.guessed.n + PRIOR_WEIGHT),
            repeat_rate=min(self.repeated.mean, 1.0),
        )
        if near is not None:
            candidates = range(max(near - MAX_CHANGE, 1), min(near + MAX_CHANGE, MAX_K) + 1)
            return fastest_k(costs, NO_LINK, workload, candidates)
        is_shared = self.step_beside_prefill.mean > SHARED_DEVICE_SLOWDOWN * costs.edge.step
        return fastest_k(costs, NO_LINK, workload, free_seconds=0.0 if is_shared else self.cloud_delay.mean)


class DraftLengths:
    """The draft lengths of one generation, and its state between two events."""

    def __init__(self, run: AdaptiveK) -> None:
        self.run = run
        self._k = run.last_k
        # length of the first draft: 0 before it, then its length while the cloud may prefill, then None
        self._first_length: int | None = None
        self._first_seconds = 0.0  # seconds of the first draft
        self._round = 0  # number of the current round in the run
        self._seconds = 0.0  # seconds since the last event that was not Ahead
        self._fed = 0  # tokens sent with the draft, the draft included
        self._ahead: Ahead | None = None  # beside the verification under way
        self._discarded = 0  # tokens that the last verdict discarded
        self._is_stepwise = True  # each pass of the last draft fed one token
        self._is_alone = False  # the cloud failed, and the edge finishes alone

    def choose_k(self) -> int:
        """Return the length of the next draft."""
        return self._k

    def observe(self, events: Iterable[Event], clock: Clock) -> Iterator[Event]:
        """Yield the events as they come and learn from them. The consumer's own time does not count.

        The next length is searched for after the edge's prefill and after each verdict. A search after a
        verdict is skipped while the last search has taken more than `SEARCH_SHARE` of the time since it began.
        """
        before = clock()
        next_search = 0.0
        for event in events:
            self.see(event, clock() - before)
            yield event
            before = clock()
            is_start = event == Opened("edge")
            if self.run.trip.n and (is_start or (isinstance(event, Verified) and before >= next_search)):
                self._k = self.run.last_k = self.fastest()  # before the next draft starts
                searched = clock()
                next_search, before = before + (searched - before) / SEARCH_SHARE, searched

    def fastest(self) -> int:
        """Return the fastest length for the next draft."""
        with self.run.lock:
            return self.run.fastest(None if self._first_length == 0 else self._k)

    def see(self, event: Event, seconds: float) -> None:
        """Learn from an event that came `seconds` after the one before."""
        with self.run.lock:
            self._see(event, seconds)

    def _see(self, event: Event, seconds: float) -> None:
        self._seconds += seconds
        self._see_start(event, seconds)
        if isinstance(event, Drafted):
            self._add_passes(seconds, event.passes)
            self._is_stepwise = set(event.passes) <= {1}
            if self._discarded:
                self.run.repeated.add(len(event.draft.tokens) - event.ahead - len(event.passes), n=self._discarded)
            if not event.ahead:
                self.run.drafted.add(len(event.draft.tokens))
            if not self._is_alone:
                self.run.escalated.add(0.0)
                self.run.rounds += 1
                self._round = self.run.rounds
            self._ahead, self._discarded = None, 0
        elif isinstance(event, Escalated):
            # this round was added as 0 and now counts as 1, with its weight after the rounds of other generations
            self.run.escalated.y += CHANCE_DECAY ** (self.run.rounds - self._round)
            self.run.sent.add(event.sent)
            self._fed = event.sent + len(event.draft.tokens)
        elif isinstance(event, Ahead):
            if self._is_stepwise:  # else a wide pass of the draft may have made some of these tokens
                self._add_passes(seconds, (1,) * event.made)
            self._ahead = event
        elif isinstance(event, Verified):
            self._see_verdict(event)
        elif isinstance(event, Degraded):
            self._is_alone = True
        if not isinstance(event, Ahead):
            self._seconds = 0.0

    def _see_verdict(self, event: Verified) -> None:
        run, accepted = self.run, event.verdict.accepted
        run.trip.add(self._seconds, self._fed)
        reached = min(accepted + 1, len(event.draft.tokens))
        run.accepted += [DecayingMean() for _ in range(reached - len(run.accepted))]
        for position, rate in enumerate(run.accepted):
            rate.add(float(position < accepted), n=float(position < reached))
        guess = self._ahead.guess if self._ahead else None
        if guess is not None and accepted == len(event.draft.tokens):
            run.guessed.add(float(event.right(guess)))
        self._discarded = count_discarded(event, self._ahead)

    def _see_start(self, event: Event, seconds: float) -> None:
        """Learn when the cloud is ready. If the edge did not wait for it, the cloud is assumed ready a step earlier."""
        if isinstance(event, Opened) and event.side == "edge":
            self._first_length, self._is_alone = 0, False
        elif isinstance(event, Drafted) and self._first_length == 0:
            self._first_length, self._first_seconds = len(event.draft.tokens), seconds
        elif isinstance(event, Opened) and self._first_length and self.run.has_eager_prefill:
            step = self.run.edge_costs.step
            waited = seconds if seconds > step / 2 else -step
            self.run.cloud_delay.add(max(self._first_seconds + waited, 0.0))
        elif not isinstance(event, Escalated):
            self._first_length = None

    def _add_passes(self, seconds: float, passes: Sequence[int]) -> None:
        """Learn from forward passes of the edge that took `seconds` together, and from the tokens fed in them."""
        if passes:
            is_beside_prefill = self._first_length and self.run.has_eager_prefill
            costs = self.run.step_beside_prefill if is_beside_prefill else self.run.step
            costs.add(seconds, sum(passes) / len(passes), len(passes))
