"""Many edges on one cloud: N of them replay recorded drafts at once. What each is answered, how soon, and how evenly.

An edge is a thread that replays whole captions, each in a session of its own: it opens a prompt, sends each draft as
soon as the one before is answered, and closes. So it is the server that is measured, under edges that draft in no time.
A latency is what an edge sees around its call, the client's own work included.

All edges show the server one key, which makes them one client to it, and share one `Connection`, whose pool gives each
call in flight a connection of its own. `cloud.turns` serves the calls of one client in the order in which they come:
the fairness measured here is that of this queue and of what lies before it, not that of turns between clients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from bench import tables
from bench.cases import LANGUAGE_CODES
from edgecloud_sd.config import Settings
from edgecloud_sd.events import Committed, Escalated, Prompt, Span, Trace, Verdict, Verified
from edgecloud_sd.measure.metrics import degraded
from edgecloud_sd.measure.summary import Metric
from edgecloud_sd.models import pairs
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.timing.clock import real
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, Verifier

_T = TypeVar("_T")
LOAD_CLIPS = 6  # that drafts are recorded of, at most
STARTING = 60.0  # s, at most, for the threads to be there

LOAD_METRICS = {
    "verifications": Metric("1/s", "higher", "verifications answered, of all edges together"),
    "p50": Metric("s", "lower", "a verification, as its edge sees it: median"),
    "p99": Metric("s", "lower", "a verification, as its edge sees it: 99th percentile, linear between two"),
    "opening": Metric("s", "lower", "a prompt opened, as its edge sees it: median"),
    "queue": Metric("s", "lower", "a verification's wait for its turn, as the server says: mean"),
    "fairness": Metric(
        "1/N to 1",
        "higher",
        "Jain's index over the edges' verifications a second, counted until the first edge is done; mean over replays",
    ),
    "slowest": Metric("0 to 1", "higher", "the slowest edge's verifications a second / the fastest's, counted so too"),
    "model_share": Metric(
        "of wall time",
        None,
        "calls less queue and network; about 1 where the model never rests, an edge's own work in it",
    ),
    "differing": Metric(
        "verdicts", "lower", "unlike the recorded ones; where float32 promises that none is, a failure"
    ),
}
# heading -> name in FIGURES, format, factor
LOAD_COLUMNS = {
    "verifications/s": ("verifications", ".1f", 1.0),
    "p50 ms": ("p50", ".1f", 1e3),
    "p99 ms": ("p99", ".1f", 1e3),
    "fairness": ("fairness", ".3f", 1.0),
    "slowest / fastest": ("slowest", ".2f", 1.0),
    "queue ms": ("queue", ".1f", 1e3),
    "opening ms": ("opening", ".1f", 1e3),
}


@dataclass(frozen=True)
class LoadCase:
    """One benchmark: so many edges, each of which replays `clips` captions, `rounds` times over."""

    id: str
    edges: int
    clips: int
    rounds: int
    language: str


def load_cases(settings: Settings) -> list[LoadCase]:
    """What a run asks for: nothing without speculative cells or on a virtual clock, and one language, the first.

    It takes a server. Where none is given one is started, beside the cloud that this process holds in memory already:
    only for the pocket pair, which is small.
    """
    pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights)
    small = pair == pairs.PAIRS["pocket"]
    if "speculative" not in settings.mode or settings.clock == "virtual" or not (settings.cloud_url or small):
        return []
    elsewhere = [] if settings.cloud_url in (None, AUTO) else ["elsewhere"]
    language = settings.language[0]
    return [
        LoadCase(
            "-".join(["load", pair.name, str(edges), *elsewhere, LANGUAGE_CODES[language]]),
            edges,
            clips,
            rounds,
            language,
        )
        # the more edges, the fewer captions each: together some hundred verifications
        for edges, clips, rounds in ((1, 4, 2), (4, 3, 1), (16, 2, 1))
    ]


@dataclass(frozen=True)
class RecordedRound:
    """A draft after a context, and the cloud's verdict on it."""

    context: tuple[int, ...]
    draft: tuple[int, ...]
    verdict: Verdict


@dataclass(frozen=True)
class RecordedCaption:
    """What one caption asked of the cloud."""

    clip: str
    prompt: Prompt
    rounds: tuple[RecordedRound, ...]


class LoadError(Exception):
    """An edge was not answered as it should be: the message names edge, clip and round."""


def record_rounds(clip: str, prompt: Prompt, trace: Trace) -> RecordedCaption:
    """Lost for a caption that the edge had to finish alone."""
    why = degraded(trace)
    if why is not None:
        raise LoadError(f"{clip}: the cloud failed while its drafts were recorded: {why}")
    rounds: list[RecordedRound] = []
    committed = [prompt.last]
    context: tuple[int, ...] = ()
    for _, event in trace.events:
        if isinstance(event, Escalated):
            context = tuple(committed)
        elif isinstance(event, Verified):
            rounds.append(RecordedRound(context, event.draft.tokens, event.verdict))
        elif isinstance(event, Committed):
            committed += event.tokens
    return RecordedCaption(clip, prompt, tuple(rounds))


def shares(clips: Sequence[RecordedCaption], edges: int, each: int) -> list[list[RecordedCaption]]:
    """The captions of each edge: each begins at another, so that neighbours ask for different things."""
    return [[clips[(edge + place) % len(clips)] for place in range(min(each, len(clips)))] for edge in range(edges)]


@dataclass(frozen=True)
class Call:
    """One that was answered: times in s. `model` is what is neither queue nor network, as the server tells them apart:
    its model's time, and the edge's own work on the call."""

    verify: bool  # or the opening of a prompt
    start: float
    end: float
    queue: float
    model: float
    same: bool = True  # whether the verdict is the recorded one


@dataclass(frozen=True)
class Replay:
    """The calls of each edge, in their order. `start`: when all edges were let go."""

    start: float
    edges: tuple[tuple[Call, ...], ...]

    @property
    def seconds(self) -> float:
        """To the last answer."""
        return max(calls[-1].end for calls in self.edges) - self.start

    @property
    def rates(self) -> list[float]:
        """Each edge's verifications a second for as long as all edges are at work: afterwards they have it easier."""
        end = min(calls[-1].end for calls in self.edges)
        return [sum(call.verify and call.end <= end for call in calls) / (end - self.start) for calls in self.edges]


def replay_rounds(
    shares: Sequence[Sequence[RecordedCaption]], verifier: Callable[[Harness], Verifier], exact: bool = True
) -> Replay:
    """All edges at once, each on a thread, let go together. Lost for a call that is not answered, or not at the first
    attempt; and where `exact`, for a verdict that is not the recorded one."""
    started: list[float] = []
    ready = threading.Barrier(len(shares), lambda: started.append(real()), STARTING)
    over = threading.Event()

    def edge(number: int) -> tuple[Call, ...]:
        calls: list[Call] = []
        ready.wait()
        try:
            for each in shares[number]:
                if over.is_set():
                    break
                calls += _caption(each, verifier, f"edge {number}, clip {each.clip}", exact)
        except BaseException:
            over.set()
            raise
        return tuple(calls)

    with ThreadPoolExecutor(len(shares), "edge") as threads:
        try:
            running = [threads.submit(edge, number) for number in range(len(shares))]
            wait(running)
        finally:
            over.set()
    edges = tuple(each.result() for each in running)  # raises what an edge has raised
    return Replay(started[0], edges)


def _caption(clip: RecordedCaption, verifier: Callable[[Harness], Verifier], where: str, exact: bool) -> list[Call]:
    stage = Harness()
    calls: list[Call] = []

    def timed(where: str, call: Callable[[], _T], expected: _T) -> _T:
        noted = len(stage.watch.spans)
        start = real()
        try:
            result = call()
        except CloudFault as fault:
            raise LoadError(f"{where}: {fault}") from fault
        end = real()
        spans = stage.watch.spans[noted:]
        queue = spent(spans, "cloud_queue")
        if any(span.part == "faults" for span in spans):
            raise LoadError(f"{where}: was not answered at the first attempt")
        if exact and result != expected:
            raise LoadError(f"{where}: the answer is {result}, not {expected} as it was when recorded")
        model = end - start - spent(spans, "network") - queue
        calls.append(Call(expected is not None, start, end, queue, model, result == expected))
        return result

    verification = verifier(stage).open(clip.prompt)
    try:
        timed(f"{where}, opening", verification.wait, None)
        known = 0
        for number, each in enumerate(clip.rounds):
            new = each.context[known:]

            def verify(base: int = known, new: Sequence[int] = new, draft: Sequence[int] = each.draft) -> Verdict:
                return verification.verify(base, new, draft)

            given = timed(f"{where}, round {number}", verify, each.verdict)
            # where it is another (in half precision), the cloud counts on what is not in the recording
            known = len(each.context) + given.accepted if given == each.verdict else 0
    finally:
        verification.close()
    return calls


def spent(spans: Sequence[Span], part: str) -> float:
    """Seconds."""
    return sum(span.end - span.start for span in spans if span.part == part)


def load_metrics(replays: Sequence[Replay]) -> dict[str, float]:
    """By the names of FIGURES, over several replays of one load."""
    calls = list(chain.from_iterable(calls for each in replays for calls in each.edges))
    verifications = [call for call in calls if call.verify]
    seconds = sum(each.seconds for each in replays)
    latencies = [call.end - call.start for call in verifications]
    rates = [each.rates for each in replays]
    found = {
        "verifications": len(verifications) / seconds,
        "p50": percentile(latencies, 50),
        "p99": percentile(latencies, 99),
        "opening": percentile([call.end - call.start for call in calls if not call.verify], 50),
        "queue": float(np.mean([call.queue for call in verifications])),
        "fairness": float(np.mean([fairness(each) for each in rates])),
        "slowest": float(np.mean([min(each) / max(each) for each in rates])),
        "model_share": sum(call.model for call in calls) / seconds,
        "differing": float(sum(not call.same for call in calls)),
    }
    return {name: found[name] for name in LOAD_METRICS}


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest values: numpy's default, the inclusive method of `statistics`."""
    return float(np.percentile(values, percent))


def fairness(rates: Sequence[float]) -> float:
    """Jain's index (Jain, Chiu and Hawe, 1984): 1 where all get the same, 1/n where one gets all."""
    return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))


def render_load(loads: Mapping[str, tuple[LoadCase, Mapping[str, float]]]) -> str:
    """One row a load, and what is to be said of one whose verdicts were others than when recorded."""
    lines = [
        [
            name,
            str(load.edges),
            *(format(factor * found[figure], form) for figure, form, factor in LOAD_COLUMNS.values()),
        ]
        for name, (load, found) in loads.items()
    ]
    notes = [
        f"- {name}: {found['differing']:.0f} verdicts are not the recorded ones, as half precision allows"
        for name, (_, found) in loads.items()
        if found["differing"]
    ]
    return "\n".join([tables.grid(lines, ["case", "edges", *LOAD_COLUMNS]), *notes])
