"""Numbers from traces: one pure function a metric, its formula in its docstring. Undefined is None, never 0.

Over several clips a ratio is a ratio of sums, not a mean of ratios.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.events import Ahead, Committed, Degraded, Drafted, Escalated, Opened, Prepared, Trace, Verified

DecodeText = Callable[[Sequence[int]], str]  # the tokenizer's decoding


def ttft(trace: Trace, decode: DecodeText) -> float | None:
    """s, request -> the first moment at which text is visible; None where the caption is empty.

    A character of which some bytes are still to come is no text.
    """
    seen = 0
    for seconds, n in chunks(trace):
        seen += n
        if decode(trace.tokens[:seen]).replace("\ufffd", "").strip():
            return seconds
    return None


def e2e(trace: Trace) -> float | None:
    """s, request -> last committed token; None where nothing was committed."""
    times = [seconds for seconds, event in trace.events if isinstance(event, Committed)]
    return times[-1] if times else None


def tpot(n: int, first: float | None, last: float | None) -> float | None:
    """s a token after the first: (e2e - ttft) / (N - 1) for N >= 2 that came at more than one moment, else None."""
    return (last - first) / (n - 1) if first is not None and last is not None and n >= 2 and last > first else None


def otps(n: int, first: float | None, last: float | None) -> float | None:
    """Tokens a second after the first: (N - 1) / (e2e - ttft) for N >= 2, None where undefined."""
    each = tpot(n, first, last)
    return 1 / each if each else None


def e2e_tps(n: int, last: float | None) -> float | None:
    """Tokens a second over the whole request: N / e2e."""
    return n / last if last else None


def chunks(trace: Trace) -> list[tuple[float, int]]:
    """(s, tokens) of each moment at which tokens became visible: a round's commit, or one token of a stream."""
    found: list[tuple[float, int]] = []
    joins = False  # what a round accepted and the cloud's token after it are shown together
    for seconds, event in trace.events:
        if isinstance(event, Committed):
            if joins:
                found[-1] = (seconds, found[-1][1] + len(event.tokens))
            else:
                found.append((seconds, len(event.tokens)))
            joins = event.origin == "accepted"
        else:
            joins = False
    return found


def after_first_chunk(trace: Trace) -> tuple[int, float] | None:
    """(tokens, s) after the first chunk: the pace of decoding, which tpot flatters by what came with the first token.

    None where there is one chunk or none.
    """
    moments = chunks(trace)
    return (sum(n for _, n in moments[1:]), moments[-1][0] - moments[0][0]) if len(moments) > 1 else None


def itl_per_chunk(trace: Trace) -> list[float]:
    """s between one chunk of visible tokens and the next: t_j - t_(j-1)."""
    moments = chunks(trace)
    return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(moments)]


def itl_per_token(trace: Trace) -> list[float]:
    """The same gaps, each divided by the tokens of the chunk that ended it: (t_j - t_(j-1)) / n_j."""
    return [gap / n for gap, (_, n) in zip(itl_per_chunk(trace), chunks(trace)[1:], strict=True)]


def prefill_seconds(trace: Trace, side: str) -> float | None:
    """s for the side's audio encoder and prefill: its `Opened` minus the event before; None where not opened."""
    before = 0.0
    for seconds, event in trace.events:
        if isinstance(event, Opened) and event.side == side:
            return seconds - before
        before = seconds
    return None


def feature_seconds(trace: Trace) -> float | None:
    """s for computing the features of the samples, which were read before: the moment of `Prepared`."""
    return next((seconds for seconds, event in trace.events if isinstance(event, Prepared)), None)


@dataclass(frozen=True)
class Counts:
    """What a caption's tokens and rounds were. Adds up over clips.

    Conservation: tokens = local + accepted + correction + bonus + cloud; drafted = local + accepted + discarded. A
    right guess of a bonus is the cloud's token, and not counted as drafted; a wrong one is, and discarded.
    """

    tokens: int = 0
    local: int = 0
    accepted: int = 0
    correction: int = 0
    bonus: int = 0
    cloud: int = 0
    rounds: int = 0
    cloud_calls: int = 0
    drafted: int = 0
    verified: int = 0
    ahead: int = 0  # made while a verdict was on its way, guesses included
    ahead_wasted: int = 0  # of those

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def discarded(self) -> int:
        """Drafted and thrown away."""
        return self.drafted - self.local - self.accepted

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / draft tokens sent for verification. Local tokens and corrections are neither."""
        return _ratio(self.accepted, self.verified)

    @property
    def mean_acceptance_length(self) -> float | None:
        """(accepted + correction + bonus) / cloud calls: what one verify call commits."""
        return _ratio(self.accepted + self.correction + self.bonus, self.cloud_calls)

    @property
    def correction_rate(self) -> float | None:
        """corrections / cloud calls."""
        return _ratio(self.correction, self.cloud_calls)

    @property
    def cloud_call_rate(self) -> float | None:
        """escalated rounds / rounds."""
        return _ratio(self.cloud_calls, self.rounds)

    @property
    def cloud_calls_per_token(self) -> float | None:
        """cloud calls / N, for a caption with rounds."""
        return _ratio(self.cloud_calls, self.tokens) if self.rounds else None

    @property
    def local_share(self) -> float | None:
        """local / N."""
        return _ratio(self.local, self.tokens)

    @property
    def covered_share(self) -> float | None:
        """(accepted + correction + bonus + cloud) / N: tokens that the cloud has seen or made."""
        return _ratio(self.tokens - self.local, self.tokens)

    @property
    def waste(self) -> float | None:
        """discarded / drafted."""
        return _ratio(self.discarded, self.drafted)

    @property
    def waste_ahead(self) -> float | None:
        """wasted / made of the tokens that were drafted ahead of a verdict, guesses of its bonus included."""
        return _ratio(self.ahead_wasted, self.ahead)


def counts(trace: Trace) -> Counts:
    """Tokens by origin, rounds and cloud calls of one caption."""
    origins: Counter[str] = Counter()
    rounds = cloud_calls = drafted = verified = ahead = 0
    kept = sum(event.right(guess) for event, guess in _guesses(trace))
    for _, event in trace.events:
        if isinstance(event, Committed):
            origins[event.origin] += len(event.tokens)
        elif isinstance(event, Drafted):
            rounds += 1
            drafted += len(event.draft.tokens)
            kept += event.ahead
        elif isinstance(event, Ahead):
            ahead += event.made
        elif isinstance(event, Escalated):
            cloud_calls += 1
        elif isinstance(event, Verified):
            verified += len(event.draft.tokens)
    return Counts(
        tokens=origins.total(),
        rounds=rounds,
        cloud_calls=cloud_calls,
        drafted=drafted + ahead - kept,
        verified=verified,
        ahead=ahead,
        ahead_wasted=ahead - kept,
        **origins,
    )


def acceptance_by_position(traces: Sequence[Trace]) -> list[float]:
    """p_i: of the verify calls whose draft had an i-th token, the share that accepted it."""
    offered: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for trace in traces:
        for _, event in trace.events:
            if isinstance(event, Verified):
                offered.update(range(len(event.draft.tokens)))
                kept.update(range(event.verdict.accepted))
    return [kept[i] / offered[i] for i in range(len(offered))]


def right_guesses(traces: Iterable[Trace]) -> float | None:
    """Of the drafts accepted whole beside which the edge had drafted ahead, the share whose bonus it had guessed."""
    right = whole = 0
    for event, guess in itertools.chain.from_iterable(map(_guesses, traces)):
        if guess is not None:
            whole += event.verdict.accepted == len(event.draft.tokens)
            right += event.right(guess)
    return _ratio(right, whole)


def _guesses(trace: Trace) -> Iterator[tuple[Verified, int | None]]:
    """The verdicts of a caption, each with what the edge had guessed of its bonus."""
    guess: int | None = None
    for _, event in trace.events:
        if isinstance(event, Ahead):
            guess = event.guess
        elif isinstance(event, Verified):
            yield event, guess
            guess = None


def wire_bytes(trace: Trace) -> tuple[int, int] | None:
    """Bytes (up, down) of one caption's messages; None where there was no link to cross."""
    sizes: Counter[str] = Counter()
    for span in trace.spans:
        sizes[span.part] += span.size
    return (sizes["uplink"], sizes["downlink"]) if "uplink" in sizes else None


def faults(trace: Trace) -> int:
    """Attempts on the cloud that failed."""
    return sum(span.part == "faults" for span in trace.spans)


def degraded(trace: Trace) -> str | None:
    """Why the edge finished the caption alone; None where it did not."""
    return next((event.reason for _, event in trace.events if isinstance(event, Degraded)), None)


@dataclass(frozen=True)
class Hindsight:
    """What the cloud says afterwards, off the clock, of one caption's drafts (`shadow.shadow_verify`).

    `missed`: local tokens that the rule would not have kept. `drafts`: of each round the gate's score (None where the
    gate reads none), whether it was escalated, and whether the cloud rejects a token of it.
    """

    missed: int
    drafts: tuple[tuple[float | None, bool, bool], ...]


def useless_escalations(traces: Sequence[Trace]) -> float | None:
    """Escalated drafts in which nothing was corrected / escalated drafts."""
    verified = [event for trace in traces for _, event in trace.events if isinstance(event, Verified)]
    return _ratio(sum(event.verdict.accepted == len(event.draft.tokens) for event in verified), len(verified))


def missed_corrections(looks: Sequence[Hindsight], local: int) -> float | None:
    """Local tokens that the cloud would have replaced / local tokens; None where it was not asked."""
    return None if not looks else _ratio(sum(look.missed for look in looks), local)


def auroc(looks: Sequence[Hindsight]) -> float | None:
    """Chance that a draft the cloud rejects has a higher gate score than one it accepts, ties counting half.

    P(s+ > s-) + P(s+ = s-) / 2 over all pairs (Mann-Whitney); None without scores, or without both kinds.
    """
    scored = [(score, rejected) for look in looks for score, _, rejected in look.drafts if score is not None]
    bad = np.array([score for score, rejected in scored if rejected])
    good = np.array([score for score, rejected in scored if not rejected])
    if not len(bad) or not len(good):
        return None
    return float((bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2)


def gap_closed(ours: float | None, edge: float | None, cloud: float | None, noise: float = 0.0) -> float | None:
    """(Q_spec - Q_edge) / (Q_cloud - Q_edge) of a quality Q; None where the gap is not larger than its `noise`."""
    if ours is None or edge is None or cloud is None or abs(cloud - edge) <= noise:
        return None
    return (ours - edge) / (cloud - edge)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; one clip alone has none."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.shown(".2f")

    def shown(self, form: str) -> str:
        """The figure and its bounds, each in a format."""
        known = self.low is not None and self.high is not None
        return f"{self.value:{form}} [" + (f"{self.low:{form}}, {self.high:{form}}]" if known else "one clip]")


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]], n: int, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """A statistic of `n` clips with its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    `statistic` takes indices of clips [..., n] and returns [...]. Clips are drawn with replacement, so what a clip has
    under both of two ways to decode stays paired. None where the statistic is undefined on the clips themselves; draws
    in which it is undefined are left out.
    """
    if not n:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.arange(n)))
        drawn = statistic(np.random.default_rng(seed).integers(0, n, (resamples, n)))
    if not np.isfinite(value):
        return None
    if n == 1:
        return Interval(value, None, None)
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    return Interval(value, float(low), float(high))


def speedup(baseline: Sequence[float], ours: Sequence[float]) -> Interval | None:
    """Seconds of the baseline / seconds of ours, summed over the same clips: above 1 is faster. None for no clips."""
    b, o = _paired(baseline, ours)
    return bootstrap(lambda at: b[at].sum(-1) / o[at].sum(-1), len(b))


def length_matched_speedup(baseline: Sequence[tuple[int, float]], ours: Sequence[tuple[int, float]]) -> Interval | None:
    """The length-matched speed-up, from each clip's (tokens, seconds) as `after_first_chunk` gives them.

    (sum of baseline seconds / sum of its tokens) / (sum of our seconds / sum of our tokens).
    """
    b, o = (values.reshape(-1, 2) for values in _paired(baseline, ours))

    def pace(of: NDArray[np.float64], at: NDArray[np.intp]) -> NDArray[np.float64]:
        per_token: NDArray[np.float64] = of[at, 1].sum(-1) / of[at, 0].sum(-1)
        return per_token

    return bootstrap(lambda at: pace(b, at) / pace(o, at), len(b))


def difference(baseline: Sequence[float], ours: Sequence[float]) -> Interval | None:
    """Mean over the same clips of ours - baseline: what a per-clip score changed by. None for no clips."""
    b, o = _paired(baseline, ours)
    return bootstrap(lambda at: (o[at] - b[at]).mean(-1), len(b))


def _paired(a: Sequence[object], b: Sequence[object]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} clips cannot be paired with {len(b)}")
    return np.asarray(a, dtype=float), np.asarray(b, dtype=float)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
