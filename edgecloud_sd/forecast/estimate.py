"""Estimates from traces: the workload of a strategy and the costs of a machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from edgecloud_sd.events import Committed, Drafted, Escalated, Event, Opened, Span, Trace, Verified
from edgecloud_sd.forecast.model import Workload
from edgecloud_sd.measure import metrics
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.profile import Costs, Profile


def estimate_workload(traces: Sequence[Trace], strategy: Strategy) -> Workload | None:
    """Return the workload of speculative traces, or None if nothing was verified.

    If the draft length varies (adaptive k, or a draft stop), the workload's k is the mean length of the drafts without
    tokens drafted ahead. Traces that the edge finished alone after a fault of the cloud are left out.
    """
    traces = [trace for trace in traces if metrics.degraded_reason(trace) is None]
    acceptance = metrics.acceptance_by_position(traces)
    counts = sum((metrics.counts(trace) for trace in traces), metrics.Counts())
    if not acceptance or not counts.cloud_call_rate:
        return None
    k = None if strategy.draft_stop else strategy.k
    sent = [event.sent for trace in traces for _, event in trace.events if isinstance(event, Escalated)]
    # the first uplink payload of a generation is its prompt, if the generation sent it
    uplinks = [[span.size for span in trace.spans if span.part == "uplink" and span.size] for trace in traces]
    prompts = [sizes[0] for sizes in uplinks if sizes]
    return Workload(
        k=k or _mean_length(traces),
        acceptance_by_position=tuple(acceptance),
        gate_rate=counts.cloud_call_rate,
        scores_per_token=strategy.scores_per_token,
        sent_with_draft=sum(sent) / len(sent),
        tokens_per_generation=counts.tokens / len(traces),
        prompt_bytes=round(sum(prompts) / len(prompts)) if prompts else 0,
        has_eager_prefill=strategy.prefill == "eager",
        draft_ahead=strategy.draft_ahead,
        is_lossless=strategy.is_lossless,
        bonus_guess_rate=metrics.bonus_guess_rate(traces) or 0.0,
    )


def _mean_length(traces: Sequence[Trace]) -> int:
    """Return the mean length of the drafts without tokens drafted ahead, at least 1."""
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
    parts, passes = _Sums(), _Sums()  # keys: parts of the breakdown; tokens of the cloud's forward pass
    corrections = 0
    for trace in traces:
        is_alone = not any(isinstance(event, Drafted) for _, event in trace.events)
        opened = next((seconds for seconds, event in trace.events if event == Opened("cloud")), None)
        corrections += metrics.counts(trace).correction
        for span in trace.spans:
            # the edge hides a part of the cloud's prefill and of its queue
            is_hidden = span.part == "cloud_queue" and (opened is None or span.end <= opened)
            if span.part in ("features", "edge_prefill", "draft", "gate", "rollback") or (
                span.part == "cloud_queue" and (is_alone or not is_hidden)
            ):
                parts.add(span.part, span.seconds)
        if is_alone and opened is not None:
            parts.add("cloud_prefill", sum(span.seconds for span in trace.spans if span.part == "cloud_prefill"))
        for tokens, seconds in _cloud_passes(trace):
            passes.add(tokens, seconds)
    if not parts.calls["draft"] or not passes.calls[1]:
        return None
    return Profile(
        name,
        edge=Costs(parts.mean("edge_prefill"), ((1, parts.mean("draft")),)),
        cloud=Costs(parts.mean("cloud_prefill"), _rising_means(passes)),
        features=parts.mean("features"),
        gate=parts.mean("gate"),
        queue=parts.mean("cloud_queue"),
        correction=parts.seconds["rollback"] / corrections if corrections else 0.0,
    )


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
