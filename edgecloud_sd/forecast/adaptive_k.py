"""`--k auto`: the length of the next draft, from what the rounds so far have taken and what the cloud has kept.

The costs seen make a profile, the verdicts a workload, and the oracle says at which k a token takes the least time.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from edgecloud_sd.events import Ahead, Degraded, Drafted, Escalated, Event, Opened, Trace, Verified
from edgecloud_sd.forecast import model as oracle
from edgecloud_sd.forecast.model import Workload
from edgecloud_sd.timing import link
from edgecloud_sd.timing.clock import Clock
from edgecloud_sd.timing.profile import Costs, Profile

FIRST_K = 4  # before anything is known
# Of the weight of a sum, at each thing that is added to it: half is forgotten after 14 and after 34. What a pass or a
# trip takes is known from a few, and may change; what the cloud keeps takes many to tell.
COST_DECAY, CHANCE_DECAY = 0.95, 0.98
# The chance that a token is kept where those before it were, as believed at each place in a draft until so many were
# seen there. It is better than most, so that longer drafts are tried before they are thought worse; and what a place
# has shown fades while no draft reaches it, so that they are tried again.
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.95, 6.0
SHARED_DEVICE_SLOWDOWN = 1.25  # times as long as usual: a step beside an opening that it shares a processor with
SEARCH_SHARE = 0.01  # of a caption's time, for the length of its drafts
MAX_CHANGE = 2  # of the length of a caption's draft to that of the one before it, at most
MIN_GATE_RATE = 1e-3  # share of escalated rounds below which none is believed


@dataclass
class DecayingMean:
    """Of what was added, the later the more it counts: a sum keeps so much of its weight at each thing that is added.
    `y` against `x` makes a straight line, never a falling one."""

    keeps: float = CHANCE_DECAY
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, y: float, x: float = 0.0, n: float = 1.0) -> None:
        """`n` things that are `y` in all, at `x` each."""
        keeps = self.keeps
        self.n = keeps * self.n + n
        self.x = keeps * self.x + n * x
        self.y = keeps * self.y + y
        self.xx = keeps * self.xx + n * x * x
        self.xy = keeps * self.xy + x * y

    @property
    def mean(self) -> float:
        return self.y / self.n if self.n else 0.0

    @property
    def slope(self) -> float:
        """By least squares; 0 where every x was the same, or larger ones took less."""
        spread = self.xx - self.x * self.x / self.n
        return max((self.xy - self.x * self.y / self.n) / spread, 0.0) if spread > 1e-6 * self.xx else 0.0

    def at(self, x: float) -> float:
        """The line's value, not below 0."""
        return max(self.mean + self.slope * (x - self.x / self.n), 0.0)


@dataclass
class AdaptiveK:
    """What one way to decode has shown, over all its captions so far. Called, it says how long the next draft may be.

    `ahead`, `strict`, `eager`: as `Workload`. What the edge drafts while a cloud that is opened beside it is not ready
    costs no time, so that the first draft of a caption may be longer; but not where a step is slower beside an opening,
    for then both share a processor, and the edge makes the cloud late.
    """

    ahead: int = 0
    is_lossless: bool = True
    eager: bool = True
    step: DecayingMean = field(
        default_factory=partial(DecayingMean, COST_DECAY)
    )  # s of an edge's step, its gate's statistic included
    beside: DecayingMean = field(
        default_factory=partial(DecayingMean, COST_DECAY)
    )  # the same beside the opening of the cloud
    trip: DecayingMean = field(
        default_factory=partial(DecayingMean, COST_DECAY)
    )  # s from a draft sent to its verdict, by tokens fed
    sent: DecayingMean = field(default_factory=DecayingMean)  # committed tokens that go with a draft
    drafted: DecayingMean = field(default_factory=DecayingMean)  # tokens of a draft for which none were made ahead
    escalated: DecayingMean = field(
        default_factory=DecayingMean
    )  # 1 for each round that went to the cloud, 0 for the others
    kept: list[DecayingMean] = field(
        default_factory=list
    )  # by place in a draft: 1 where its token was kept, 0 where rejected
    guessed: DecayingMean = field(
        default_factory=DecayingMean
    )  # 1 for each right guess of a bonus, 0 for each wrong one
    opening: DecayingMean = field(
        default_factory=partial(DecayingMean, COST_DECAY)
    )  # s that the cloud is ready after the edge
    _first: int | None = None  # tokens of the first draft, while nothing else has happened; 0 before it
    _begun: float = 0.0  # s that they took
    _round: float = 0.0  # s since the draft was sent
    _fed: int = 0
    _guess: int | None = None
    _alone: bool = False  # whether the edge finishes a caption that the cloud has failed
    _k: int = field(default=FIRST_K, compare=False)

    def see(self, event: Event, seconds: float) -> None:
        """`seconds`: since the event before."""
        self._round += seconds
        self._open(event, seconds)
        if isinstance(event, Drafted):
            self._drafted(seconds, len(event.draft.tokens) - event.ahead)
            if not event.ahead:
                self.drafted.add(len(event.draft.tokens))
            if not self._alone:
                self.escalated.add(0.0)
            self._guess = None
        elif isinstance(event, Escalated):
            self.escalated.y += 1
            self.sent.add(event.sent)
            self._fed = event.sent + len(event.draft.tokens)
        elif isinstance(event, Ahead):
            self._drafted(seconds, event.made)
            self._guess = event.guess
        elif isinstance(event, Verified):
            self.trip.add(self._round, self._fed)
            reached = min(event.verdict.accepted + 1, len(event.draft.tokens))
            self.kept += [DecayingMean() for _ in range(reached - len(self.kept))]
            for place, kept in enumerate(self.kept):
                kept.add(float(place < event.verdict.accepted), n=float(place < reached))
            if self._guess is not None and event.verdict.accepted == len(event.draft.tokens):
                self.guessed.add(float(event.right(self._guess)))
        elif isinstance(event, Degraded):
            self._alone = True
        if not isinstance(event, Ahead):
            self._round = 0.0

    def look(self, events: Iterable[Event], clock: Clock) -> Iterator[Event]:
        """The events as they come, seen. Whoever they are handed on to takes no time of theirs.

        After the caption's first, a length is looked for where that takes less than `SEARCH_SHARE` of the time since
        the last: so each round, but in rounds of a few ms.
        """
        before = clock()
        again = 0.0
        for event in events:
            self.see(event, clock() - before)
            yield event
            before = clock()
            opened = event == Opened("edge")
            if self.trip.n and (opened or (isinstance(event, Verified) and before >= again)):
                self._k = self.fastest()  # here, where the time that it takes is no draft's
                looked = clock()
                again, before = before + (looked - before) / SEARCH_SHARE, looked

    def look_back(self, trace: Trace) -> None:
        """A caption that was decoded before."""
        for (before, _), (seconds, event) in itertools.pairwise(trace.events):
            self.see(event, seconds - before)

    def __call__(self) -> int:
        return self._k

    def fastest(self) -> int:
        """The length, as far as is known. Something must have been verified.

        Within a caption only lengths near the one before are looked at: to look at all takes as long as some steps.
        """
        tokens = [self.trip.at(n) for n in (1, 2)]
        costs = Profile("seen", Costs(0.0, ((1, self._step),)), Costs(0.0, tuple(enumerate(tokens, 1))))
        work = Workload(
            k=max(round(self.drafted.mean), 1),
            accepted=self.acceptance(),
            gate_rate=max(self.escalated.mean, MIN_GATE_RATE),
            sent=self.sent.mean,
            ahead=self.ahead,
            is_lossless=self.is_lossless,
            guess=(self.guessed.y + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (self.guessed.n + PRIOR_WEIGHT),
        )
        if self._first != 0:
            among = range(max(self._k - MAX_CHANGE, 1), min(self._k + MAX_CHANGE, oracle.MAX_K) + 1)
            return oracle.fastest_k(costs, link.NO_LINK, work, among)
        shared = self.beside.mean > SHARED_DEVICE_SLOWDOWN * self._step
        return oracle.fastest_k(costs, link.NO_LINK, work, free=0.0 if shared else self.opening.mean)

    def acceptance(self) -> tuple[float, ...]:
        """p_i by the product of the chances to be kept of those that were reached (Kaplan and Meier 1958).

        Each chance is drawn towards `PRIOR_ACCEPTANCE` by `PRIOR_WEIGHT`.
        """
        unseen = [DecayingMean()] * (oracle.MAX_K - len(self.kept))
        chances = (
            (place.y + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (place.n + PRIOR_WEIGHT) for place in [*self.kept, *unseen]
        )
        return tuple(itertools.accumulate(chances, operator.mul))

    def _open(self, event: Event, seconds: float) -> None:
        """What the opening shows. A cloud that was not waited for was ready before, let us say by one step."""
        if isinstance(event, Opened) and event.side == "edge":
            self._first, self._alone = 0, False
        elif isinstance(event, Drafted) and self._first == 0:
            self._first, self._begun = len(event.draft.tokens), seconds
        elif isinstance(event, Opened) and self._first and self.eager:
            waited = seconds if seconds > self._step / 2 else -self._step
            self.opening.add(max(self._begun + waited, 0.0))
        elif not isinstance(event, Escalated):
            self._first = None

    def _drafted(self, seconds: float, new: int) -> None:
        if new:
            (self.beside if self._first and self.eager else self.step).add(seconds, n=new)

    @property
    def _step(self) -> float:
        return (self.step if self.step.n else self.beside).mean
