"""Under damage to any byte between edge and cloud, a caption is right or is declared as failed, and in good time.

`EDGECLOUD_SD_SCHEDULES=1500 pytest -m slow tests/test_byte_faults.py` runs so many schedules and prints their outcomes.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from random import Random
from urllib.request import urlopen

import pytest
import torch

from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.cloud.retry import PATIENCE
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Committed, Degraded, Prompt, Trace
from edgecloud_sd.measure.shadow import shadow_verify
from edgecloud_sd.pipeline import Pipeline, Request, generation_events
from edgecloud_sd.pocket.clips import make_clip
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, LocalVerifier
from tests.support.byte_proxy import ByteFault, ByteProxy, Damage
from tests.support.serving import served
from tests.support.strategies import final_tokens

pytestmark = pytest.mark.slow

SCHEDULES = int(os.environ.get("EDGECLOUD_SD_SCHEDULES", "40"))
TIMEOUT = 0.5  # s for one request
DEADLINE = 60.0  # s for one caption, which no schedule may reach even on a busy machine
MAX_NEW_TOKENS = 10
LIMITS = ServiceLimits(idle_timeout=2.0)
ENTROPY = gate.entropy_gate(0.7)
STRATEGIES = {
    "cloud": Strategy("cloud"),
    "speculative": Strategy(k=3, prefill="lazy"),
    "eager": Strategy(k=5),
    "draft-ahead": Strategy(k=3, draft_ahead=6),
    "entropy": Strategy(gate=ENTROPY, k=3),
    "rank": Strategy(gate=ENTROPY, rule=Rank(3), k=2, prefill="lazy"),
    "never": Strategy(gate=gate.NEVER),
    "revise": Strategy(k=8, revise="context"),
    "risk": Strategy(gate=gate.risk_gate(0.9, 0.1), k=8, revise="aligned"),
    "token": Strategy(gate=gate.parse_gate("token", 0.7), k=3),  # verifies empty drafts
}


@dataclass(frozen=True)
class Schedule:
    """A caption, the way to decode it, the mode of `--on-cloud-fault`, and the damages."""

    seed: int
    strategy: str
    clip: int
    mode: str
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class Reference:
    """A caption without faults: its ids, its shadow verification, and the bytes up (True) and down (False)."""

    tokens: tuple[int, ...]
    hindsight: object
    volumes: dict[bool, int]


@dataclass
class World:
    """The pocket pair, and its cloud behind a proxy."""

    pipeline: Pipeline
    prompts: list[Prompt]
    proxy: ByteProxy
    references: dict[tuple[str, int], Reference] = field(default_factory=dict)

    @property
    def stopping(self) -> Stopping:
        return Stopping(self.pipeline.edge.eos, MAX_NEW_TOKENS)

    def reference(self, name: str, clip: int) -> Reference:
        """Return the caption of a clip without faults, decoded on the first call."""
        if (name, clip) not in self.references:
            schedule, proxy = Schedule(0, name, clip, "wait", ()), self.proxy
            proxy.plan(())
            connection = Connection(proxy.url)
            try:
                trace = caption(self, schedule, connection)
                hindsight = ask_shadow(self, schedule, connection, trace)
                volumes = {is_upward: proxy.volumes[0, is_upward] for is_upward in (True, False)}
            finally:
                connection.close()
            self.references[name, clip] = Reference(trace.tokens, hindsight, volumes)
        return self.references[name, clip]

    def metrics(self) -> str:
        host, port = self.proxy.upstream
        with urlopen(f"http://{host}:{port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def world(pipeline: Pipeline) -> Iterator[World]:
    assert isinstance(pipeline.cloud, LocalCloud)
    clips = [make_clip("evaluation", index) for index in range(3)]
    prompts = [pipeline.prompt(Request(clip.samples, language="english")) for clip in clips]
    with served(pipeline.cloud, LIMITS) as url, ByteProxy(url) as proxy:
        yield World(pipeline, prompts, proxy)


def caption(world: World, schedule: Schedule, connection: Connection) -> Trace:
    """Return the trace of a caption, decoded as a pipeline does."""
    strategy, harness = STRATEGIES[schedule.strategy], Harness()
    events = generation_events(
        lambda: world.prompts[schedule.clip],
        strategy,
        world.stopping,
        world.pipeline.edge,
        connection,
        harness,
        finish_alone=schedule.mode == "edge",
    )
    with torch.inference_mode():
        return stamp(events, harness.watch)


def ask_shadow(world: World, schedule: Schedule, connection: Connection, trace: Trace) -> object:
    """Return the result of shadow verification of local tokens."""
    if schedule.strategy not in ("entropy", "never"):
        return None
    with torch.inference_mode():
        strategy = STRATEGIES[schedule.strategy]
        verifier = connection.verifier(strategy.rule, Harness())
        return shadow_verify(trace, world.prompts[schedule.clip], verifier, strategy.gate)


def draw_schedule(world: World, seed: int) -> Schedule:
    """Draw one to four damages within the bytes of the caption, or one damage that hits every connection."""
    random = Random(seed)
    name, clip = random.choice(list(STRATEGIES)), random.randrange(len(world.prompts))
    mode = random.choice(list(PATIENCE))
    volumes = world.reference(name, clip).volumes

    def draw_damage(connection: int, kinds: Sequence[ByteFault]) -> Damage:
        is_upward = random.random() < 0.5
        place = int(volumes[is_upward] * random.random() ** random.choice((1, 3)))  # the first messages are shorter
        return Damage(random.choice(kinds), connection, is_upward, place, random.choice((1, 1, 2, 7, 40, 300)))

    if random.random() < 0.2:
        damage = draw_damage(0, [kind for kind in ByteFault if kind is not ByteFault.STALLED])  # which takes long
        damages = [replace(damage, connection=number) for number in range(40)]
    else:
        damages = [draw_damage(number, list(ByteFault)) for number in (0, 0, 1, 2)[: random.choice((1, 1, 2, 3, 4))]]
    return Schedule(seed, name, clip, mode, tuple(damages))


def check(world: World, schedule: Schedule) -> str:
    """Run a schedule and return its outcome. Fail for a wrong caption and an undeclared failure."""
    world.proxy.plan(schedule.damages, schedule.seed)
    connection = Connection(world.proxy.url, None, TIMEOUT, PATIENCE[schedule.mode], sleep=lambda seconds: None)
    expected = world.reference(schedule.strategy, schedule.clip)
    trace = None
    try:
        trace = caption(world, schedule, connection)
        marks = [place for place, (_, event) in enumerate(trace.events) if isinstance(event, Degraded)]
        if marks:
            check_end_alone(world, schedule, trace, marks[0])
            return "finished by the edge"
        assert trace.tokens == expected.tokens, schedule
        assert ask_shadow(world, schedule, connection, trace) == expected.hindsight, schedule
        return "right"
    except CloudFault:
        return "declared failure" if trace is None else "right, shadow declared as failed"
    finally:
        world.proxy.plan(())
        connection.close()


def check_end_alone(world: World, schedule: Schedule, trace: Trace, mark: int) -> None:
    """Check a caption that the edge finished alone after the event `mark`."""
    assert schedule.mode == "edge", schedule
    start, final = Trace(trace.events[:mark]).tokens, final_tokens(event for _, event in trace.events[:mark])
    expected = world.reference(schedule.strategy, schedule.clip).tokens
    assert final == expected[: len(final)], schedule
    rest = [event for _, event in trace.events[mark:] if isinstance(event, Committed)]
    assert {event.origin for event in rest} <= {"local"}, schedule
    if STRATEGIES[schedule.strategy].revise != "none":
        return  # the edge goes on with the target's last opinions
    with torch.inference_mode():
        alone = LocalVerifier(world.pipeline.edge, GREEDY).open(world.prompts[schedule.clip])
        assert trace.tokens == (*start, *alone.generate(world.stopping, start)), schedule


def test_no_caption_is_wrong_under_damage_to_any_byte(
    world: World, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    longest, start = 0.0, time.monotonic()
    thread = ThreadPoolExecutor(1)  # not as a context, which would wait for a caption that hangs
    with caplog.at_level(logging.WARNING):
        for seed in range(SCHEDULES):
            schedule = draw_schedule(world, seed)
            before, begin = world.proxy.injected.copy(), time.monotonic()
            outcome = thread.submit(check, world, schedule).result(DEADLINE)
            longest = max(longest, time.monotonic() - begin)
            injected = world.proxy.injected - before
            for name in (schedule.mode, schedule.strategy, *(kind.name for kind in injected)):
                outcomes[name][outcome] += 1
            outcomes["all" if injected else "no damage met"][outcome] += 1
    thread.shutdown()
    with capsys.disabled():
        print(f"\n{SCHEDULES} schedules in {time.monotonic() - start:.0f} s, the longest {longest:.1f} s")
        for name, counts in outcomes.items():
            print(f"{name:20}", ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))
    assert not caplog.records
    sessions_must_end = time.monotonic() + DEADLINE
    while "\nedgecloud_sessions 0.0\n" not in world.metrics():
        assert time.monotonic() < sessions_must_end, "a session outlives its idle timeout"
        time.sleep(0.1)
    assert not re.search(r'status="5', world.metrics())
