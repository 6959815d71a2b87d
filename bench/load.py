"""Many edges on one cloud: N edges replay recorded drafts at once, to measure the server's throughput and fairness.

An edge is a thread that replays whole captions, each in a session of its own. It opens a prompt, sends each draft as
soon as the draft before is answered, and closes. Edges spend no time on drafting, so the benchmark measures the server.
A latency is the time of a call at its edge, the client's own work included.

All edges use one key, so they are one client to the server. They share one `Connection`, whose pool gives each call in
flight a socket of its own. `cloud.fair_queue` serves the calls of one client in order of arrival. The fairness measured
here is the fairness of that queue and of the steps before it, not the fairness between clients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from bench import tables
from bench.cases import data_parts, model_parts
from edgecloud_sd.config import Settings
from edgecloud_sd.events import Escalated, Output, Prompt, Span, Trace, Verdict, Verified
from edgecloud_sd.grid import strategies
from edgecloud_sd.measure.metrics import degraded_reason
from edgecloud_sd.measure.summary import Metric
from edgecloud_sd.models import pairs
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.timing.clock import real
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, Verifier

_T = TypeVar("_T")
LOAD_CLIPS = 6  # recorded at most
START_TIMEOUT = 60.0  # s for all threads to start
LOADS = ((1, 4, 2), (4, 3, 1), (16, 2, 1))  # (edges, captions per edge, rounds), each about 100 verifications in all

LOAD_METRICS = {
    "verifications": Metric("1/s", "higher", "verifications per second, all edges together"),
    "p50": Metric("s", "lower", "latency of a verification at its edge: median"),
    "p99": Metric("s", "lower", "latency of a verification at its edge: 99th percentile, linearly interpolated"),
    "prefill": Metric("s", "lower", "latency of opening a prompt at its edge: median"),
    "queue": Metric("s", "lower", "time of a verification in the server's queue, as the server reports it: mean"),
    "fairness": Metric(
        "1/N to 1",
        "higher",
        "Jain's index over the edges' verifications per second, until the first edge is done; mean over replays",
    ),
    "slowest": Metric(
        "0 to 1",
        "higher",
        "verifications per second, slowest edge / fastest edge, until the first edge is done; mean over replays",
    ),
    "model_share": Metric(
        "of wall time",
        None,
        "time of all calls without queue and network; about 1 for a busy model; includes the edges' own work",
    ),
    "differing": Metric(
        "verdicts", "lower", "verdicts unlike the recorded ones; a failure where float32 promises that none differs"
    ),
}
# heading -> name in LOAD_METRICS, format, factor
LOAD_COLUMNS = {
    "verifications/s": ("verifications", ".1f", 1.0),
    "p50 ms": ("p50", ".1f", 1e3),
    "p99 ms": ("p99", ".1f", 1e3),
    "fairness": ("fairness", ".3f", 1.0),
    "slowest / fastest": ("slowest", ".2f", 1.0),
    "queue ms": ("queue", ".1f", 1e3),
    "prefill ms": ("prefill", ".1f", 1e3),
}


@dataclass(frozen=True)
class LoadCase:
    """One benchmark: `edges` edges, each of which replays `clips` captions, `rounds` times."""

    id: str
    edges: int
    clips: int
    rounds: int
    language: str


def list_load_cases(settings: Settings) -> list[LoadCase]:
    """Return the load cases of a run in its first language, or none.

    The load needs speculative cells that escalate, the real clock, and --cloud-url or the pocket pair.

    Without a server the pocket pair alone gets one: this process has the cloud's model in memory already, and a second
    copy of a large one may not fit.
    """
    has_server = bool(settings.cloud_url) or settings.run_pair == pairs.PAIRS["pocket"]
    is_escalating = any(strategy.is_speculative and strategy.asks_cloud for strategy in strategies(settings))
    if not is_escalating or settings.clock == "virtual" or not has_server:
        return []
    elsewhere = [] if settings.cloud_url in (None, AUTO) else ["elsewhere"]
    language = settings.language[0]
    models, data = model_parts(settings), data_parts(settings, language)
    return [
        LoadCase("-".join(["load", *models, str(edges), *elsewhere, *data]), edges, clips, rounds, language)
        for edges, clips, rounds in LOADS
    ]


@dataclass(frozen=True)
class RecordedRound:
    """A draft after a context, and the cloud's verdict on it."""

    context: tuple[int, ...]
    draft: tuple[int, ...]
    verdict: Verdict


@dataclass(frozen=True)
class RecordedCaption:
    """The requests of one caption to the cloud, with their verdicts."""

    clip: str
    prompt: Prompt
    rounds: tuple[RecordedRound, ...]


class LoadError(Exception):
    """A missing, late or wrong answer to an edge. The message names the edge, the clip and the round."""


def record_rounds(clip: str, prompt: Prompt, trace: Trace) -> RecordedCaption:
    """Return the escalated rounds of a trace. Raise LoadError for a caption that the edge had to finish alone."""
    reason = degraded_reason(trace)
    if reason is not None:
        raise LoadError(f"{clip}: the cloud failed while its drafts were recorded: {reason}")
    rounds: list[RecordedRound] = []
    output = Output()
    context: tuple[int, ...] = ()
    for _, event in trace.events:
        if isinstance(event, Escalated):
            context = (prompt.last, *output.tokens[: output.final])
        elif isinstance(event, Verified):
            rounds.append(RecordedRound(context, event.draft.tokens, event.verdict))
        output.see(event)
    return RecordedCaption(clip, prompt, tuple(rounds))


def assign_captions(captions: Sequence[RecordedCaption], edges: int, count: int) -> list[list[RecordedCaption]]:
    """Return `count` captions for each edge. Each edge starts with another one, so that neighbours differ."""
    count = min(count, len(captions))
    return [[captions[(edge + place) % len(captions)] for place in range(count)] for edge in range(edges)]


@dataclass(frozen=True)
class Call:
    """An answered call of an edge, in s: a verification, or the opening of a prompt.

    `model` is the time of the call without queue and network: the server's model, and the edge's own work on the call.
    """

    is_verification: bool
    start: float
    end: float
    queue: float
    model: float
    is_as_recorded: bool = True


@dataclass(frozen=True)
class Replay:
    """The calls of each edge, in order. All edges started together at `start`."""

    start: float
    edges: tuple[tuple[Call, ...], ...]

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last answer."""
        return max(calls[-1].end for calls in self.edges) - self.start

    @property
    def rates(self) -> list[float]:
        """Verifications per second of each edge, until the first edge is done: afterwards the load is lower."""
        end = min(calls[-1].end for calls in self.edges)
        counts = [sum(call.is_verification and call.end <= end for call in calls) for calls in self.edges]
        return [count / (end - self.start) for count in counts]


def replay_rounds(
    assignments: Sequence[Sequence[RecordedCaption]],
    make_verifier: Callable[[Harness], Verifier],
    is_exact: bool = True,
) -> Replay:
    """Replay the captions of all edges at once, each edge on a thread, after a common start.

    Raise LoadError for a call that is not answered at its first attempt. If `is_exact`, also raise it for a verdict
    that differs from the recorded one.
    """
    starts: list[float] = []
    barrier = threading.Barrier(len(assignments), lambda: starts.append(real()), START_TIMEOUT)
    is_over = threading.Event()

    def run_edge(number: int) -> tuple[Call, ...]:
        calls: list[Call] = []
        barrier.wait()
        try:
            for caption in assignments[number]:
                if is_over.is_set():
                    break
                calls += _replay_caption(caption, make_verifier, f"edge {number}, clip {caption.clip}", is_exact)
        except BaseException:
            is_over.set()
            raise
        return tuple(calls)

    with ThreadPoolExecutor(len(assignments), "edge") as threads:
        try:
            edges = [threads.submit(run_edge, number) for number in range(len(assignments))]
            wait(edges)
        finally:
            is_over.set()
    return Replay(starts[0], tuple(edge.result() for edge in edges))  # `result` raises the error of an edge


def _replay_caption(
    caption: RecordedCaption, make_verifier: Callable[[Harness], Verifier], where: str, is_exact: bool
) -> list[Call]:
    recorder = _CallRecorder(is_exact)
    verification = make_verifier(recorder.harness).open(caption.prompt)
    try:
        recorder.run(f"{where}, prefill", verification.wait, None)
        base = 0
        for number, recorded in enumerate(caption.rounds):
            verify = partial(verification.verify, base, recorded.context[base:], recorded.draft)
            verdict = recorder.run(f"{where}, round {number}", verify, recorded.verdict)
            # after another verdict (in half precision), the cloud's context has tokens that the recording has not
            base = len(recorded.context) + verdict.accepted if verdict == recorded.verdict else 0
    finally:
        verification.close()
    return recorder.calls


@dataclass
class _CallRecorder:
    """The timed and checked calls of one caption."""

    is_exact: bool
    harness: Harness = field(default_factory=Harness)
    calls: list[Call] = field(default_factory=list)

    def run(self, where: str, call: Callable[[], _T], recorded: _T) -> _T:
        """Return the result of `call`, which must be `recorded` (None for a prefill). Raise LoadError for a failure."""
        before = len(self.harness.watch.spans)
        start = real()
        try:
            result = call()
        except CloudFault as fault:
            raise LoadError(f"{where}: {fault}") from fault
        end = real()
        spans = self.harness.watch.spans[before:]
        if any(span.part == "faults" for span in spans):
            raise LoadError(f"{where}: was not answered at the first attempt")
        if self.is_exact and result != recorded:
            raise LoadError(f"{where}: the answer is {result}, not {recorded} as in the recording")
        queue = sum_seconds(spans, "cloud_queue")
        model = end - start - sum_seconds(spans, "network") - queue
        self.calls.append(Call(recorded is not None, start, end, queue, model, result == recorded))
        return result


def sum_seconds(spans: Sequence[Span], part: str) -> float:
    """Return the seconds of all spans of one part."""
    return sum(span.seconds for span in spans if span.part == part)


def compute_load_metrics(replays: Sequence[Replay]) -> dict[str, float]:
    """Return the LOAD_METRICS, by name, over several replays of one load."""
    calls = list(chain.from_iterable(calls for replay in replays for calls in replay.edges))
    verifications = [call for call in calls if call.is_verification]
    seconds = sum(replay.seconds for replay in replays)
    latencies = [call.end - call.start for call in verifications]
    rates = [replay.rates for replay in replays]
    values = {
        "verifications": len(verifications) / seconds,
        "p50": compute_percentile(latencies, 50),
        "p99": compute_percentile(latencies, 99),
        "prefill": compute_percentile([call.end - call.start for call in calls if not call.is_verification], 50),
        "queue": float(np.mean([call.queue for call in verifications])),
        "fairness": float(np.mean([compute_fairness(edge_rates) for edge_rates in rates])),
        "slowest": float(np.mean([min(edge_rates) / max(edge_rates) for edge_rates in rates])),
        "model_share": sum(call.model for call in calls) / seconds,
        "differing": float(sum(not call.is_as_recorded for call in calls)),
    }
    return {name: values[name] for name in LOAD_METRICS}


def compute_percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, linearly interpolated between the two nearest values, as numpy does by default."""
    return float(np.percentile(values, percent))


def compute_fairness(rates: Sequence[float]) -> float:
    """Return Jain's index (Jain, Chiu and Hawe, 1984): 1 for n equal rates, 1/n if all but one are 0."""
    return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))


def render_load(loads: Mapping[str, tuple[LoadCase, Mapping[str, float]]]) -> str:
    """Return a table with one row per load, and a note for each load whose verdicts differ from the recording."""
    rows = [
        [
            name,
            str(load.edges),
            *(format(factor * metrics[metric], form) for metric, form, factor in LOAD_COLUMNS.values()),
        ]
        for name, (load, metrics) in loads.items()
    ]
    notes = [
        f"- {name}: {metrics['differing']:.0f} verdicts differ from the recorded ones, as half precision allows"
        for name, (_, metrics) in loads.items()
        if metrics["differing"]
    ]
    return "\n".join([tables.grid(rows, ["case", "edges", *LOAD_COLUMNS]), *notes])
