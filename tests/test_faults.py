"""Under all faults between edge and cloud, no caption is lost and none is silently wrong.

A proxy between a real server and a real client injects faults by random schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY, Rule
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Committed, Degraded, Finished, Output, Prompt, Trace, Verdict
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, LocalVerifier, Verification, Verifier
from tests.support.fakes import FakeCloud
from tests.support.proxy import SLOW, STREAMED, Fault, Proxy
from tests.support.serving import ToyEngine, served
from tests.support.strategies import (
    VOCABULARY,
    Scene,
    final_tokens,
    gates,
    ks,
    prefills,
    ranks,
    revisions,
    scenes,
    synthetics,
)
from tests.support.toy import ToyModel, random_table

pytestmark = pytest.mark.slow

TIMEOUT = 0.1  # s for one request, so that a hung one costs a test little
FOREVER = 200.0  # s of patience
HARMLESS = {Fault.TWICE_FIRST, Fault.TWICE_SECOND, Fault.COPY_LATE}  # the client gets the right answer


@dataclass(frozen=True)
class World:
    """A server's engine, and the proxy in front of the server."""

    engine: ToyEngine
    proxy: Proxy


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    engine = ToyEngine()
    limits = ServiceLimits(max_sessions=10_000)  # faults lose many, and a new one would wait for room
    with served(engine, limits) as url, Proxy(url) as proxy:
        yield World(engine, proxy)


def faults(kinds: Sequence[Fault]) -> st.SearchStrategy[list[Fault]]:
    """Draw one to eight faults. At most one of them is slow, and rarely."""
    fast = st.sampled_from([kind for kind in kinds if kind not in SLOW])
    slow = st.sampled_from([kind for kind in kinds if kind in SLOW])
    one_slow = st.builds(lambda one, others: [one, *others], slow, st.lists(fast, max_size=7)).flatmap(st.permutations)
    several = st.lists(fast, min_size=1, max_size=8)
    return st.integers(0, 9).flatmap(lambda drawn: one_slow if drawn == 7 else several)


UNSTREAMED = [kind for kind in Fault if kind not in STREAMED]


@dataclass(frozen=True)
class Plan:
    """One caption over HTTP, with the faults on its way."""

    scene: Scene
    strategy: Strategy
    faults: list[Fault]
    seed: int
    knows_identity: bool  # the client has the server's identity before the first fault
    finish_alone: bool = False


LOSSLESS_GATES = st.sampled_from([gate.ALWAYS, gate.risk_gate(), gate.risk_gate(0.9)])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    scene = draw(scenes())
    kind = draw(st.sampled_from(["lossless", "lossless", "lossy", "cloud", "cloud"]))
    strategy = Strategy("cloud")
    if kind != "cloud":
        is_lossy = kind == "lossy"
        chosen, rule = (draw(gates), draw(ranks | synthetics)) if is_lossy else (draw(LOSSLESS_GATES), GREEDY)
        strategy = Strategy("speculative", chosen, rule, draw(ks), draft_ahead=draw(st.sampled_from([0, 6])))
        strategy = replace(strategy, prefill=draw(prefills), revise=draw(revisions), look_back=draw(st.booleans()))
    kinds = [*STREAMED, *UNSTREAMED] if kind == "cloud" else UNSTREAMED
    return Plan(scene, strategy, draw(faults(kinds)), draw(st.integers(0, 2**16)), draw(st.booleans()))


@dataclass(frozen=True)
class RecordingVerifier:
    """A verifier that records the CloudFaults of its calls."""

    verifier: Verifier
    cloud_faults: list[CloudFault]

    def open(self, prompt: Prompt) -> Verification:
        return RecordingVerification(self.verifier.open(prompt), self.cloud_faults)


class RecordingVerification:
    """A verification that records the CloudFaults of its calls."""

    def __init__(self, verification: Verification, cloud_faults: list[CloudFault]) -> None:
        self._verification = verification
        self._cloud_faults = cloud_faults
        self.close = verification.close
        self.generate = verification.generate

    def wait(self) -> None:
        self._record(self._verification.wait)

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        verdict: list[Verdict] = []
        self._record(lambda: verdict.append(self._verification.verify(base, tokens, draft)))
        return verdict[0]

    def _record(self, call: Callable[[], None]) -> None:
        try:
            call()
        except CloudFault as fault:
            self._cloud_faults.append(fault)
            raise


@dataclass(frozen=True)
class RecordingCloud(FakeCloud):
    """A connection that records the faults that it gives up for."""

    connection: Connection
    cloud_faults: list[CloudFault]

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        return RecordingVerifier(self.connection.verifier(rule, harness, wants_rest), self.cloud_faults)


def caption(plan: Plan, connection: Connection, cloud_faults: list[CloudFault] | None = None) -> Trace:
    """Return the trace of the plan's caption, decoded as a pipeline does."""
    harness, scene = Harness(), plan.scene
    cloud = connection if cloud_faults is None else RecordingCloud(connection, cloud_faults)
    finish_alone = plan.finish_alone
    events = generation_events(
        lambda: scene.prompt, plan.strategy, scene.stopping, scene.edge, cloud, harness, finish_alone=finish_alone
    )
    return stamp(events, harness.watch)


def tokens_without_faults(plan: Plan) -> tuple[int, ...]:
    """Return the caption as decoded in this process."""
    scene, strategy = plan.scene, plan.strategy
    verifier = LocalVerifier(scene.cloud, strategy.rule, wants_rest=strategy.wants_rest)
    return stamp(decode(scene.prompt, plan.strategy, scene.stopping, scene.edge, verifier)).tokens


def run(
    world: World, plan: Plan, patience: float, cloud_faults: list[CloudFault] | None = None, timeout: float = TIMEOUT
) -> Trace:
    """Return the trace of the caption over HTTP, with the planned faults."""
    world.engine.model = plan.scene.cloud
    world.proxy.plan(())
    connection = Connection(world.proxy.url, None, timeout, patience, sleep=lambda seconds: None)
    try:
        if plan.knows_identity:
            connection.identity = (
                world.engine.identity
            )  # not fetched, because TIMEOUT may be too short on a busy machine
        world.proxy.plan(plan.faults, plan.seed)
        return caption(plan, connection, cloud_faults)
    finally:
        connection.close()


def check_breakdown(trace: Trace) -> None:
    """Check that no time is counted twice and that none is missing."""
    end = 0.0
    for span in trace.spans:
        assert end <= span.start + 1e-9
        assert span.start <= span.end <= trace.seconds + 1e-9
        end = span.end
    breakdown = latency_breakdown(trace)
    assert all(seconds >= -1e-9 for seconds in breakdown.parts.values())
    assert breakdown.seconds == pytest.approx(trace.seconds)


def test_no_caption_is_wrong_under_200_schedules_of_faults(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.proxy.injected.clear()
    fault_counts = []

    @settings(max_examples=200)
    @given(plans())
    def schedule(plan: Plan) -> None:
        before = world.proxy.injected.total()
        trace = run(world, plan, FOREVER)
        assert trace.tokens == tokens_without_faults(plan)
        assert not any(isinstance(event, Degraded) for _, event in trace.events)
        check_breakdown(trace)
        fault_counts.append(world.proxy.injected.total() - before)

    for kind in Fault:  # the drawn schedules may miss one
        strategy = Strategy("cloud") if kind in STREAMED else LOSSLESS_PLAN.strategy
        schedule = example(replace(LOSSLESS_PLAN, strategy=strategy, faults=[Fault.TWICE_FIRST, kind]))(schedule)
    schedule()
    with capsys.disabled():
        counts = ", ".join(f"{kind.name} {world.proxy.injected[kind]}" for kind in Fault)
        print(f"\n{len(fault_counts)} schedules, {sum(fault_counts)} faults: {counts}")
    assert len(fault_counts) >= 200
    assert {kind for kind in Fault if not world.proxy.injected[kind]} == set()


@settings(max_examples=60)
@given(plans(), st.sampled_from([0.0, 0.1, 0.5]))
def test_an_edge_that_may_finish_alone_finishes_every_caption(world: World, plan: Plan, patience: float) -> None:
    plan = replace(plan, strategy=lossless(plan.strategy), knows_identity=True, finish_alone=True)
    cloud_faults: list[CloudFault] = []
    trace = run(world, plan, patience, cloud_faults)
    events = [event for _, event in trace.events]
    marks = [place for place, event in enumerate(events) if isinstance(event, Degraded)]
    assert len(marks) == len(cloud_faults) <= 1
    check_breakdown(trace)
    expected = tokens_without_faults(plan)
    if not marks:
        assert trace.tokens == expected
        return
    (mark,) = marks
    assert events[mark] == Degraded(str(cloud_faults[0]))
    start, final = Output.after(events[:mark]).tokens, final_tokens(events[:mark])
    assert final == expected[: len(final)]
    assert {event.origin for event in events[mark:] if isinstance(event, Committed)} == {"local"}
    if plan.strategy.revise == "none":  # otherwise the edge goes on with the target's last opinions
        assert trace.tokens == finish_alone(plan.scene, start)
    assert events[-1] == Finished(plan.scene.stopping.reason(trace.tokens) or "length")


def lossless(strategy: Strategy) -> Strategy:
    """Return a lossless speculative strategy with the other fields of another."""
    chosen = strategy.gate if strategy.is_lossless else gate.ALWAYS
    return replace(strategy, mode="speculative", gate=chosen, rule=GREEDY)


def finish_alone(scene: Scene, start: Sequence[int]) -> tuple[int, ...]:
    """Return the caption that the edge alone continues after `start`."""
    output = list(start)
    while scene.stopping.reason(output) is None:
        output.append(int(scene.edge.logits([*scene.prompt.ids, *output]).argmax()))
    return tuple(output)


@settings(max_examples=60)
@given(plans())
def test_without_patience_the_first_fault_ends_the_caption(world: World, plan: Plan) -> None:
    kinds = [kind for kind in plan.faults if kind not in (*STREAMED, *SLOW)]
    plan = replace(plan, strategy=lossless(plan.strategy), knows_identity=True, faults=kinds)
    before = world.proxy.injected.copy()
    try:
        trace = run(world, plan, patience=0.0, timeout=10.0)  # a pause of a busy machine is no fault
    except CloudFault as fault:
        assert str(fault).startswith("the cloud failed: ")  # noqa: PT017 - the plan may have no fault that counts
        assert world.proxy.injected != before
    else:
        assert trace.tokens == tokens_without_faults(plan)
        # an old answer may belong to the very same request
        assert set(world.proxy.injected - before) <= {*HARMLESS, Fault.STALE}


CLOUD = random_table(VOCABULARY, 0)
SCENE = Scene(
    edge=ToyModel(CLOUD + 0.3 * (random_table(VOCABULARY, 1) - CLOUD), frozenset()),  # sometimes right
    cloud=ToyModel(CLOUD, frozenset()),
    prompt=Prompt((1, 2, 3)),
    stopping=Stopping(frozenset(), 12),
)
LOSSLESS_PLAN = Plan(SCENE, Strategy("speculative", prefill="lazy"), [], 0, knows_identity=True)


@pytest.mark.parametrize("mode", ["speculative", "cloud"])
@pytest.mark.parametrize("kind", [kind for kind in UNSTREAMED if kind not in HARMLESS])
def test_a_fault_without_end_exhausts_patience(world: World, kind: Fault, mode: str) -> None:
    strategy = LOSSLESS_PLAN.strategy if mode == "speculative" else Strategy("cloud")
    before = world.proxy.injected[kind]
    patience = 5.0 if kind not in SLOW else 0.4
    with pytest.raises(CloudFault, match=r"failed( \d+ times, the last time with)?: "):
        run(world, replace(LOSSLESS_PLAN, strategy=strategy, faults=[kind] * 500), patience)
    # delays double from 0.05 s, so about eight make 5 s; two more attempts need no delay when the session is lost
    assert 1 + (kind not in SLOW) <= world.proxy.injected[kind] - before <= 14


@pytest.mark.parametrize("kind", STREAMED)
def test_a_stream_that_breaks_again_and_again_is_continued_while_it_yields_tokens(world: World, kind: Fault) -> None:
    plan = replace(LOSSLESS_PLAN, strategy=Strategy("cloud"), faults=[Fault.TWICE_FIRST, *[kind] * 8])
    assert run(world, plan, FOREVER).tokens == tokens_without_faults(plan)


@pytest.mark.parametrize("mode", ["speculative", "cloud"])
def test_the_time_and_the_bytes_of_failed_attempts_are_counted(world: World, mode: str) -> None:
    strategy = LOSSLESS_PLAN.strategy if mode == "speculative" else Strategy("cloud")
    plan = replace(LOSSLESS_PLAN, strategy=strategy)
    plain = run(world, plan, FOREVER, timeout=10.0)
    assert latency_breakdown(plain).parts["faults"] == 0
    faulty = run(world, replace(plan, faults=[Fault.TWICE_FIRST, Fault.LOST]), FOREVER, timeout=10.0)
    check_breakdown(faulty)
    assert latency_breakdown(faulty).parts["faults"] > 0
    sent = [span.size for span in plain.spans if span.part == "uplink" and span.size]
    sent_with_faults = [span.size for span in faulty.spans if span.part == "uplink" and span.size]
    assert sent_with_faults == [sent[0], sent[1], *sent[1:]]
    # only the first answer, with the name of the session, may have another size
    received = [[span.size for span in trace.spans if span.part == "downlink"][1:] for trace in (plain, faulty)]
    assert received[0] == received[1]
    wire_bytes = metrics.wire_bytes(faulty)
    assert wire_bytes is not None
    assert wire_bytes[0] == sum(sent_with_faults)


def move(source: str, target: str, take: int, *, to_start: bool) -> Callable[[Any], Any]:
    """Return an edit that moves the first (0) or last (-1) id of one list to an end of another."""

    def edit(message: Any) -> Any:
        if message.get(source) and target in message:
            token = message[source].pop(take)
            message[target].insert(0 if to_start else len(message[target]), token)
        return message

    return edit


def change(name: str, by: int) -> Callable[[Any], Any]:
    """Return an edit that adds to an integer."""
    return lambda message: message | {name: message[name] + by} if name in message else message


def replace_ids(name: str, ids: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    """Return an edit that puts other ids in place of a list."""
    return lambda message: message | {name: ids(message[name])} if message.get(name) else message


EDITS = {
    "draft to tokens": ("speculative", move("draft", "tokens", 0, to_start=False)),
    "tokens to draft": ("speculative", move("tokens", "draft", -1, to_start=True)),
    "output to eos": ("cloud", move("output", "eos", -1, to_start=True)),
    "eos to output": ("cloud", move("eos", "output", 0, to_start=False)),
    "a draft without its first id": ("speculative", replace_ids("draft", lambda ids: ids[1:])),
    "a draft with its last id twice": ("speculative", replace_ids("draft", lambda ids: [*ids, ids[-1]])),
    "a draft in reverse": ("speculative", replace_ids("draft", lambda ids: [*ids[::-1], 0])),
    "another end": ("cloud", replace_ids("eos", lambda ids: [0])),
    "another limit": ("cloud", change("max_new_tokens", -3)),
    "a later base": ("speculative", change("base", 1)),
    "another count": ("speculative", change("accepted", 1)),
    "another token": ("speculative", change("token", 1)),
    "another token in a stream": ("cloud", change("token", 1)),
    "another session": ("speculative", replace_ids("session", lambda name: name[::-1])),
}


def edited_tokens(world: World, plan: Plan, edit: Callable[[Any], Any], rate: float) -> tuple[int, ...] | None:
    """Return the caption if this share of the messages is edited, or None if it is declared as failed."""
    random = Random(0)
    world.proxy.edit = lambda message: edit(message) if random.random() < rate else message
    try:
        return run(world, plan, FOREVER if rate < 1 else 5.0, timeout=10.0).tokens
    except CloudFault:
        return None
    finally:
        world.proxy.edit = None


@pytest.mark.parametrize(("mode", "edit"), EDITS.values(), ids=EDITS)
def test_a_middle_box_that_edits_messages_makes_no_caption_wrong(
    world: World, mode: str, edit: Callable[[Any], Any]
) -> None:
    for seed in range(3):
        table = random_table(VOCABULARY, seed)
        edge = ToyModel(table + 0.3 * (random_table(VOCABULARY, seed + 10) - table), frozenset())
        scene = Scene(edge, ToyModel(table, frozenset()), Prompt((1, 2, 3)), Stopping(frozenset({6}), 12))
        strategy = Strategy("cloud") if mode == "cloud" else LOSSLESS_PLAN.strategy
        faults = [Fault.STREAM_CUT] * 3  # so that a request to generate has output
        plan = replace(LOSSLESS_PLAN, scene=scene, strategy=strategy, faults=faults if mode == "cloud" else [])
        expected = tokens_without_faults(plan)
        assert edited_tokens(world, plan, edit, 1.0) in (None, expected)
        assert edited_tokens(world, plan, edit, 0.3) == expected


@pytest.mark.parametrize("mode", ["speculative", "cloud"])
def test_a_middle_box_that_only_writes_json_in_another_way_costs_no_attempt(world: World, mode: str) -> None:
    strategy = Strategy("cloud") if mode == "cloud" else LOSSLESS_PLAN.strategy
    plan = replace(LOSSLESS_PLAN, strategy=strategy)
    world.proxy.edit = lambda message: dict(reversed(message.items()))
    try:
        trace = run(world, plan, 0.0, timeout=10.0)
    finally:
        world.proxy.edit = None
    assert trace.tokens == tokens_without_faults(plan)
    assert latency_breakdown(trace).parts["faults"] == 0
