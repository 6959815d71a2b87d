"""Estimates from traces: the workload of a strategy and the costs of a machine."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from edgecloud_sd.events import Ahead, Committed, Drafted, Escalated, Event, Opened, Span, Trace, Verified
from edgecloud_sd.forecast.model import EdgeWork, ObservedCall, ObservedRounds, Workload
from edgecloud_sd.measure import metrics
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.profile import Costs, Profile


def estimate_workload(traces: Sequence[Trace], strategy: Strategy) -> Workload | None:
    """Return the workload of speculative traces, or None if nothing was verified.

    If the draft length varies (adaptive k, or a draft stop), the workload's k is the mean length of the drafts without
    tokens drafted ahead. If the gate ends drafts, it is the mean number of tokens drafted between two verdicts. Traces
    that the edge finished alone after a fault of the cloud are left out.
    """
    traces = [trace for trace in traces if metrics.degraded_reason(trace) is None]
    counts = sum((metrics.counts(trace) for trace in traces), metrics.Counts())
    acceptance = metrics.acceptance_by_position(traces)
    if not counts.answered_calls or not (acceptance or strategy.gate.sets_draft_length):
        return None
    has_own_lengths = strategy.gate.sets_draft_length
    rounds = sum(map(_count_stretches, traces)) if has_own_lengths else counts.rounds
    k = max(round(counts.drafted / rounds), 1) if has_own_lengths else _draft_length(traces, strategy)
    escalated = [event for trace in traces for _, event in trace.events if isinstance(event, Escalated)]
    calls = Counter(call for trace in traces for call in _observed_calls(trace))
    mean_sent = sum(event.sent for event in escalated) / len(escalated)
    # the first uplink payload of a generation is its prompt, if the generation sent it
    uplinks = [[span.size for span in trace.spans if span.part == "uplink" and span.size] for trace in traces]
    prompts = [sizes[0] for sizes in uplinks if sizes]
    return Workload(
        k=k,
        acceptance_by_position=tuple(acceptance) or (1.0,),  # an empty draft has no token that could be rejected
        gate_rate=counts.cloud_calls / rounds,
        scores_per_token=strategy.scores_per_token,
        sent_with_draft=sum(call.fed for call in calls.elements()) / calls.total() - k
        if has_own_lengths
        else mean_sent,
        tokens_per_generation=counts.tokens / len(traces),
        prompt_bytes=round(sum(prompts) / len(prompts)) if prompts else 0,
        has_eager_prefill=strategy.prefill == "eager",
        draft_ahead=strategy.draft_ahead,
        is_lossless=strategy.is_lossless,
        bonus_guess_rate=metrics.bonus_guess_rate(traces) or 0.0,
        repeat_rate=_repeat_rate(traces),
        has_own_lengths=has_own_lengths,
        observed=_observe_rounds(traces, k, rounds, calls),
    )


def _observe_rounds(traces: Sequence[Trace], k: int, rounds: int, calls: Counter[ObservedCall]) -> ObservedRounds:
    """Return the work of the traces per round."""
    escalations = [
        [(trace, moment) for moment, event in trace.events if isinstance(event, Escalated)] for trace in traces
    ]
    counts = sum(map(metrics.counts, traces), metrics.Counts())
    edge = _edge_work([(trace, trace.seconds) for trace in traces], rounds)
    beside = sum(call.scores_ahead for call in calls.elements()) / rounds
    return ObservedRounds(
        k=k,
        tokens=counts.tokens / rounds,
        edge=replace(edge, scores=edge.scores - beside),
        calls=tuple((call, number / rounds) for call, number in calls.items()),
        corrections=counts.correction / rounds,
        before_call=tuple(_edge_work(own[:1]) for own in escalations if own),
        generations=len(traces),
    )


def _edge_work(ends: Sequence[tuple[Trace, float]], rounds: int = 1) -> EdgeWork:
    """Return the edge's work in traces, each up to a moment, divided by `rounds`."""
    passes, scores = Counter[int](), 0
    for trace, end in ends:
        for moment, event in trace.events:
            if isinstance(event, Drafted) and moment <= end:
                passes.update(event.passes)
        scores += sum(span.part == "gate" and span.end <= end for span in trace.spans)
    return EdgeWork(tuple((fed, number / rounds) for fed, number in sorted(passes.items())), scores / rounds)


def _observed_calls(trace: Trace) -> Iterator[ObservedCall]:
    """Yield the calls of a trace, with the work of the edge between the start of each and its event `Ahead`."""
    call, before = ObservedCall(0), 0.0
    for moment, event in trace.events:
        if isinstance(event, Escalated):
            call = ObservedCall(event.sent + len(event.draft.tokens))
        elif isinstance(event, Ahead):
            parts = Counter(span.part for span in trace.spans if before < span.end <= moment)
            call = replace(call, steps_ahead=parts["draft"], scores_ahead=parts["gate"])
        elif isinstance(event, Verified):
            yield call
        before = moment


def _count_stretches(trace: Trace) -> int:
    """Return how often the edge drafted up to a verdict, or to the end."""
    kinds = [type(event) for _, event in trace.events if isinstance(event, Drafted | Verified)]
    return kinds.count(Verified) + (kinds[-1:] == [Drafted])


def _repeat_rate(traces: Sequence[Trace]) -> float:
    """Return the share of discarded draft tokens that saved the edge a pass when it drafted again."""
    saved = discarded = 0
    for trace in traces:
        ahead: Ahead | None = None
        for _, event in trace.events:
            if isinstance(event, Drafted):
                saved += len(event.draft.tokens) - event.ahead - len(event.passes)
            elif isinstance(event, Ahead):
                ahead = event
            elif isinstance(event, Verified):
                discarded += count_discarded(event, ahead)
                ahead = None
    return min(max(saved / discarded, 0.0), 1.0) if discarded else 0.0


def count_discarded(verified: Verified, ahead: Ahead | None) -> int:
    """Return how many tokens a verdict discards after the place of its own: of the draft, and of those ahead."""
    if verified.right(ahead.guess if ahead else None):
        return 0
    drafted = len(verified.draft.tokens) + (len(ahead.tokens) if ahead else 0)
    return max(drafted - verified.verdict.accepted - 1, 0)


def _draft_length(traces: Sequence[Trace], strategy: Strategy) -> int:
    """Return k, or the mean length of the drafts without tokens drafted ahead if it varies, at least 1."""
    if strategy.k and not strategy.draft_stop:
        return strategy.k
    drafts = [event for trace in traces for _, event in trace.events if isinstance(event, Drafted)]
    lengths = [len(event.draft.tokens) for event in drafts if not event.ahead]
    return max(round(sum(lengths) / len(lengths)), 1)


@dataclass
class _Sums:
    """Seconds and calls of each part of a generation, or of each length of a forward pass."""

    seconds: dict[str | int, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str | int, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, key: str | int, seconds: float) -> None:
        self.seconds[key] += seconds
        self.calls[key] += 1

    def mean(self, key: str | int) -> float:
        return self.seconds[key] / self.calls[key] if self.calls[key] else 0.0


def estimate_profile(traces: Iterable[Trace], name: str = "observed") -> Profile | None:
    """Return the cost profile that the traces of one run show, whatever clock timed them.

    Return None unless the edge drafted and the cloud generated alone, because nothing else shows the time of a step.
    A pass over more tokens is assumed to cost no less than one over fewer. Means that fall are pooled, weighted by
    their calls, until they rise (isotonic regression).
    """
    parts = _Sums()  # keys: parts of the breakdown
    edge_passes, passes = _Sums(), _Sums()  # keys: tokens fed in a forward pass of the edge, and of the cloud
    corrections = 0
    for trace in traces:
        is_alone = not any(isinstance(event, Drafted) for _, event in trace.events)
        opened = next((seconds for seconds, event in trace.events if event == Opened("cloud")), None)
        corrections += metrics.counts(trace).correction
        for span in trace.spans:
            # the edge hides a part of the cloud's prefill and of its queue
            is_hidden = span.part == "cloud_queue" and (opened is None or span.end <= opened)
            if span.part in ("features", "edge_prefill", "gate", "rollback") or (
                span.part == "cloud_queue" and (is_alone or not is_hidden)
            ):
                parts.add(span.part, span.seconds)
        if is_alone and opened is not None:
            parts.add("cloud_prefill", sum(span.seconds for span in trace.spans if span.part == "cloud_prefill"))
        for tokens, seconds in _edge_passes(trace):
            edge_passes.add(tokens, seconds)
        for tokens, seconds in _cloud_passes(trace):
            passes.add(tokens, seconds)
    if not edge_passes.calls or not passes.calls[1]:
        return None
    return Profile(
        name,
        edge=Costs(parts.mean("edge_prefill"), _rising_means(edge_passes)),
        cloud=Costs(parts.mean("cloud_prefill"), _rising_means(passes)),
        features=parts.mean("features"),
        gate=parts.mean("gate"),
        queue=parts.mean("cloud_queue"),
        correction=parts.seconds["rollback"] / corrections if corrections else 0.0,
    )


def _edge_passes(trace: Trace) -> Iterator[tuple[int, float]]:
    """Yield (tokens, seconds) of each forward pass of the edge after its prefill. A step ahead feeds one token."""
    spans = deque(span for span in trace.spans if span.part == "draft")
    for moment, event in trace.events:
        if isinstance(event, Drafted | Ahead):
            done = [spans.popleft() for span in tuple(spans) if span.end <= moment]
            fed = event.passes if isinstance(event, Drafted) else (1,) * len(done)
            yield from ((tokens, span.seconds) for tokens, span in zip(fed, done, strict=False))


def _cloud_passes(trace: Trace) -> Iterator[tuple[int, float]]:
    """Yield (tokens, seconds) of each forward pass of the cloud after its prefill."""
    spans = [span for span in trace.spans if span.part in ("verify", "cloud_decode")]
    fed = 0
    for moment, event in trace.events:
        if isinstance(event, Escalated):
            fed = event.sent + len(event.draft.tokens)
        if isinstance(event, Verified):
            yield fed, _take_until(spans, moment)
        elif _is_cloud_token(event):
            yield 1, _take_until(spans, moment)


def _is_cloud_token(event: Event) -> bool:
    return isinstance(event, Committed) and event.origin == "cloud"


def _take_until(spans: list[Span], moment: float) -> float:
    """Remove the spans that end by `moment` from the front, and return their seconds."""
    seconds = 0.0
    while spans and spans[0].end <= moment:
        seconds += spans.pop(0).seconds
    return seconds


def _rising_means(passes: _Sums) -> tuple[tuple[int, float], ...]:
    """Return (tokens, mean seconds), rising, by pooling neighbours whose means fall."""
    pools: list[tuple[float, int, list[int]]] = []  # seconds, calls, and the tokens of the pooled passes
    for tokens in sorted(key for key in passes.calls if isinstance(key, int)):
        pools.append((passes.seconds[tokens], passes.calls[tokens], [tokens]))
        while len(pools) > 1 and pools[-1][0] / pools[-1][1] < pools[-2][0] / pools[-2][1]:
            (s1, c1, t1), (s0, c0, t0) = pools.pop(), pools.pop()
            pools.append((s0 + s1, c0 + c1, t0 + t1))
    return tuple((tokens, seconds / calls) for seconds, calls, pooled in pools for tokens in pooled)
