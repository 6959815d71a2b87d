"""The decoding of one clip in many ways: recalled logits, and the bounds of a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.decode_ways import KeptModel, RecallingSession, record_output
from bench.ways import perfect_gate, random_gate
from edgecloud_sd.events import Draft, Prompt
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.session import Session
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from tests.support.conformance import SessionMachine
from tests.support.fakes import ModelCloud
from tests.support.strategies import Scene, play, scenes
from tests.support.toy import ToyModel, random_table

TOY = ToyModel(random_table(3, seed=3), frozenset())
TOY_PROMPT = Prompt((1, 2, 1))


class RecallingMachine(SessionMachine):
    vocabulary = 3  # few ids, so that contexts come back
    tolerance = 0.0

    def open(self) -> Session:
        return RecallingSession(TOY.open(TOY_PROMPT))

    def oracle(self, tokens: list[int]) -> Tensor:
        head = TOY_PROMPT.ids[:-1]
        return torch.stack([TOY.logits([*head, *tokens[: i + 1]]) for i in range(len(tokens))])


RecallingMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)
TestRecallingSession = RecallingMachine.TestCase


def test_logits_are_computed_once_for_each_context() -> None:
    fed = []

    class CountingSession:
        def __init__(self) -> None:
            self.inner = TOY.open(TOY_PROMPT)
            self.tokens = self.inner.tokens

        def extend(self, tokens: Sequence[int]) -> Tensor:
            fed.append(len(tokens))
            return self.inner.extend(tokens)

        def truncate(self, length: int) -> None:
            self.inner.truncate(length)

    session = RecallingSession(CountingSession())
    session.extend([0, 1, 2])
    session.truncate(1)
    session.extend([1, 2])  # recalled
    session.extend([0])
    session.truncate(0)
    session.extend([0, 1, 2, 0, 1])
    assert fed == [3, 1, 1]


def test_a_prompt_is_opened_once_for_all_ways() -> None:
    model = KeptModel(TOY)
    first = model.open(TOY_PROMPT)
    first.extend([0])
    assert model.open(TOY_PROMPT) is first
    assert not first.tokens
    assert model.open(replace(TOY_PROMPT)) is not first


def decode_gated(scene: Scene, most_calls: float) -> tuple[tuple[int, ...], metrics.Counts, tuple[int, ...]]:
    """Return the output and the counts under the perfect gate, and the cloud's own output."""
    target = play(scene.prompt, scene.edge, scene.cloud, Strategy("cloud"), scene.stopping, Harness()).tokens
    output: list[int] = []
    strategy = Strategy(gate=perfect_gate(most_calls, output, target, ""), k=3)
    harness, cloud = Harness(), ModelCloud(scene.cloud)
    events = generation_events(lambda: scene.prompt, strategy, scene.stopping, scene.edge, cloud, harness)
    trace = stamp(record_output(events, output), harness.watch)
    return trace.tokens, metrics.counts(trace), target


@given(scenes())
def test_the_perfect_gate_writes_the_clouds_caption_with_corrections_alone(scene: Scene) -> None:
    output, counts, target = decode_gated(scene, float("inf"))
    assert output == target
    assert counts.bonus == 0
    assert counts.cloud_calls == counts.correction


@given(scenes(), st.integers(0, 3))
def test_the_perfect_gate_keeps_its_number_of_calls(scene: Scene, most_calls: int) -> None:
    _, counts, _ = decode_gated(scene, most_calls)
    _, unlimited, _ = decode_gated(scene, float("inf"))
    assert counts.cloud_calls == min(most_calls, unlimited.cloud_calls)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_random_gate_sends_its_share_of_drafts_and_repeats_it(rate: float) -> None:
    draft = Draft((0,))
    first, second = ([gate(draft) for _ in range(2000)] for gate in (random_gate(rate, [], (), "clip") for _ in "ab"))
    assert first == second
    assert sum(first) / 2000 == pytest.approx(rate, abs=0.05)
