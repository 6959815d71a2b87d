"""Numbers from traces: one pure function a metric, its formula in its docstring. Undefined is None, never 0.

Over several clips a ratio is a ratio of sums, not a mean of ratios.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgecloud_sd.records import Committed, Drafted, Escalated, Opened, Prepared, Trace, Verified

Text = Callable[[Sequence[int]], str]  # the tokenizer's decoding


def ttft(trace: Trace, decode: Text) -> float | None:
    """s, request -> first committed token whose text is not empty; None where the caption is empty."""
    seen: list[int] = []
    for seconds, event in trace.events:
        if isinstance(event, Committed):
            seen.extend(event.tokens)
            if decode(seen).strip():
                return seconds
    return None


def e2e(trace: Trace) -> float | None:
    """s, request -> last committed token; None where nothing was committed."""
    times = [seconds for seconds, event in trace.events if isinstance(event, Committed)]
    return times[-1] if times else None


def tpot(n: int, first: float | None, last: float | None) -> float | None:
    """s a token after the first: (e2e - ttft) / (N - 1) for N >= 2, else None."""
    return (last - first) / (n - 1) if first is not None and last is not None and n >= 2 else None


def otps(n: int, first: float | None, last: float | None) -> float | None:
    """Tokens a second after the first: (N - 1) / (e2e - ttft) for N >= 2, None where undefined."""
    each = tpot(n, first, last)
    return 1 / each if each else None


def opening(trace: Trace, side: str) -> float | None:
    """s for the side's audio encoder and prefill: its `Opened` minus the event before; None where not opened."""
    before = 0.0
    for seconds, event in trace.events:
        if isinstance(event, Opened) and event.side == side:
            return seconds - before
        before = seconds
    return None


def features(trace: Trace) -> float | None:
    """s for computing the features of the samples, which were read before: the moment of `Prepared`."""
    return next((seconds for seconds, event in trace.events if isinstance(event, Prepared)), None)


@dataclass(frozen=True)
class Counts:
    """What a caption's tokens and rounds were. Adds up over clips.

    Conservation: tokens = local + accepted + correction + bonus + cloud; drafted = local + accepted + discarded.
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
    def mean_accepted_length(self) -> float | None:
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
    def edge_share(self) -> float | None:
        """local / N."""
        return _ratio(self.local, self.tokens)

    @property
    def waste(self) -> float | None:
        """discarded / drafted."""
        return _ratio(self.discarded, self.drafted)


def counts(trace: Trace) -> Counts:
    """Tokens by origin, rounds and cloud calls of one caption."""
    origins: Counter[str] = Counter()
    rounds = cloud_calls = drafted = verified = 0
    for _, event in trace.events:
        if isinstance(event, Committed):
            origins[event.origin] += len(event.tokens)
        elif isinstance(event, Drafted):
            rounds += 1
            drafted += len(event.draft.tokens)
        elif isinstance(event, Escalated):
            cloud_calls += 1
        elif isinstance(event, Verified):
            verified += len(event.draft.tokens)
    return Counts(
        tokens=origins.total(), rounds=rounds, cloud_calls=cloud_calls, drafted=drafted, verified=verified, **origins
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


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
