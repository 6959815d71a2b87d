"""Hypothesis strategies: toy models that disagree as much as a pair can, prompts, gates, rules, links and profiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate
from edgecloud_sd.events import Event, Output, Prompt, Trace
from edgecloud_sd.gate import parse_gate
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.prefill import PREFILL_TIMES
from edgecloud_sd.revise import REVISE_NAMES
from edgecloud_sd.session import Model
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from tests.support.fakes import ModelCloud
from tests.support.toy import ToyModel, random_table

VOCABULARY = 7  # small, so that drafts are often right, ties are common and EOS turns up anywhere


@dataclass(frozen=True)
class Scene:
    """A toy pair on one prompt, with a stopping rule."""

    edge: ToyModel
    cloud: ToyModel
    prompt: Prompt
    stopping: Stopping


@st.composite
def tables(draw: st.DrawFn) -> torch.Tensor:
    """Draw a table of logits. Some are rounded, so that many logits are equal."""
    table = random_table(VOCABULARY, draw(st.integers(0, 10_000)))
    return table.round() if draw(st.booleans()) else table


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Draw a toy pair on one prompt."""
    cloud = draw(tables())
    # the edge is the cloud, or near it, or any model
    distance = draw(st.sampled_from([0.0, 0.3, 1.0]))
    edge = cloud + distance * (draw(tables()) - cloud)
    eos = frozenset(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=2)))
    prompt = Prompt(tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))))
    stopping = Stopping(eos, draw(st.integers(1, 24)))
    return Scene(ToyModel(edge, eos), ToyModel(cloud, eos), prompt, stopping)


logit_rows = st.lists(st.floats(-20, 20), min_size=2, max_size=12).map(
    lambda row: torch.tensor(row, dtype=torch.float64)
)
ks = st.integers(1, 9)
ranks = st.integers(1, VOCABULARY).map(acceptance.Rank)
rates = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
synthetics = st.lists(rates, min_size=1, max_size=3).map(lambda values: acceptance.Synthetic(tuple(values)))
shares = st.floats(0.01, 1.0)
gates = st.one_of(
    st.sampled_from([gate.ALWAYS, gate.NEVER]),
    st.builds(parse_gate, st.sampled_from(["entropy", "logprob", "token", "token(logprob)"]), st.floats(0.01, 2.0)),
    st.builds(parse_gate, st.sampled_from(["margin", "token(margin)"]), shares),
    st.builds(gate.risk_gate, shares | st.just(1.0), st.sampled_from([-1.0, -1.0, 0.0, 0.3, 0.9]), shares),
)
prefills = st.sampled_from(PREFILL_TIMES)
revisions = st.sampled_from(REVISE_NAMES)


@st.composite
def draft_stops(draw: st.DrawFn, chosen: gate.Gate) -> gate.DraftStop | None:
    """Draw a draft stop for strategies of this gate, or None."""
    text = draw(st.sampled_from(["none", "none", "entropy", "entropy={}", "margin={}"]))
    return gate.parse_draft_stop(text.format(draw(st.floats(0.01, 1.0))), chosen)


def speculative(k: int, chosen: gate.Gate = gate.ALWAYS, rule: acceptance.Rule = acceptance.GREEDY) -> Strategy:
    """Return a speculative strategy, lossless without further arguments."""
    return Strategy("speculative", chosen, rule, k)


@st.composite
def speculations(draw: st.DrawFn) -> Strategy:
    """Draw any speculative strategy with a fixed k and a rule by rank."""
    chosen = draw(gates)
    stop, ahead = draw(draft_stops(chosen)), draw(st.sampled_from([0, 0, 1, 3, 9]))
    return Strategy(
        *("speculative", chosen, draw(ranks), draw(ks), stop, ahead),
        *(draw(prefills), draw(revisions), draw(st.booleans())),
    )


@dataclass(frozen=True)
class Case:
    """A scene and one way to decode it. `rule` is the rule of shadow verification, for every mode."""

    scene: Scene
    strategy: Strategy
    rule: acceptance.Rank = acceptance.GREEDY

    def play(self, harness: Harness) -> Trace:
        """Decode the scene."""
        scene = self.scene
        return play(scene.prompt, scene.edge, scene.cloud, self.strategy, scene.stopping, harness)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a scene and any way to decode it."""
    mode = draw(st.sampled_from(["speculative", "speculative", "cloud", "edge"]))
    strategy = draw(speculations()) if mode == "speculative" else Strategy(mode)
    rule = strategy.rule if mode == "speculative" else draw(ranks)
    assert isinstance(rule, acceptance.Rank)
    return Case(draw(scenes()), strategy, rule)


def final_tokens(events: Iterable[Event]) -> tuple[int, ...]:
    """Return the ids that no later event may take back, in order."""
    output = Output.after(events)
    return tuple(output.tokens[: output.final])


def play(prompt: Prompt, edge: Model, cloud: Model, strategy: Strategy, stopping: Stopping, harness: Harness) -> Trace:
    """Decode as a pipeline does, on any two models."""
    events = generation_events(lambda: prompt, strategy, stopping, edge, ModelCloud(cloud), harness)
    return stamp(events, harness.watch)


# these are rarely sums of powers of two, so a rounding error shows
seconds = st.integers(0, 1000).map(lambda n: n / 997)


@st.composite
def costs(draw: st.DrawFn, points: int = 4) -> Costs:
    """Draw the costs of passes over up to `points` numbers of tokens. More tokens never cost less."""
    rises = draw(st.lists(st.tuples(st.integers(1, 4), seconds), max_size=points - 1))
    return Costs(draw(seconds), tuple(_sums([(1, 0.01 + draw(seconds)), *rises])))


def _sums(steps: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    return itertools.accumulate(steps, lambda before, step: (before[0] + step[0], before[1] + step[1]))


def profiles(edge_points: int = 4) -> st.SearchStrategy[Profile]:
    """Return a strategy for cost profiles."""
    return st.builds(
        Profile,
        st.just("drawn"),
        costs(edge_points),
        costs(),
        features=seconds,
        gate=seconds,
        queue=seconds,
        correction=seconds,
    )


# a link of infinite bandwidth leaves only delays that are known to the last digit
any_link = st.sampled_from([*links.LINKS.values(), Link("wide", rtt=0.05, up=math.inf, down=math.inf, jitter=0.01)])


def steady(link: Link) -> Link:
    """Return the link without jitter."""
    return replace(link, jitter=0.0) if link.jitter else link
