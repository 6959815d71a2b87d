"""What the property tests draw: toy models that disagree as much as a pair can, prompts, gates and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate
from edgecloud_sd import prefill as opening
from edgecloud_sd.decoder import Decoding, decode
from edgecloud_sd.events import Event, Prepared, Prompt, Trace
from edgecloud_sd.session import Model, check_truncation
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import LocalVerifier
from tests.support.toy import ToyModel, random_table

VOCABULARY = 7  # small, so that drafts are often right, ties are common and EOS turns up anywhere


@dataclass(frozen=True)
class Scene:
    """A toy pair on one prompt, with where to stop."""

    edge: ToyModel
    cloud: ToyModel
    prompt: Prompt
    stopping: Stopping


@st.composite
def tables(draw: st.DrawFn) -> torch.Tensor:
    """Logits, some of them rounded so that many are equal."""
    table = random_table(VOCABULARY, draw(st.integers(0, 10_000)))
    return table.round() if draw(st.booleans()) else table


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    cloud = draw(tables())
    # how far the edge is from the cloud: nowhere, near, anywhere
    other = draw(tables())
    distance = draw(st.sampled_from([0.0, 0.3, 1.0]))
    edge = cloud + distance * (other - cloud)
    eos = frozenset(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=2)))
    prompt = Prompt(tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))))
    stopping = Stopping(eos, draw(st.integers(1, 24)))
    return Scene(ToyModel(edge, eos), ToyModel(cloud, eos), prompt, stopping)


ks = st.integers(1, 9)
ranks = st.integers(1, VOCABULARY).map(acceptance.Rank)
rates = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
synthetics = st.lists(rates, min_size=1, max_size=3).map(lambda found: acceptance.Synthetic(tuple(found)))
gates = st.one_of(
    st.sampled_from([gate.ALWAYS, gate.NEVER]),
    st.floats(0.01, 2.0, allow_nan=False).map(gate.entropy_gate),
)


@st.composite
def stops(draw: st.DrawFn, chosen: gate.Gate) -> gate.DraftStop | None:
    """What may end a draft early under a gate."""
    text = draw(st.sampled_from(["none", "none", "entropy", "entropy={}", "margin={}"]))
    return gate.parse_draft_stop(text.format(draw(st.floats(0.01, 1.0))), chosen)


def speculative(scene: Scene, k: int, chosen: gate.Gate = gate.ALWAYS) -> Decoding:
    return Decoding("speculative", scene.stopping, k, chosen)


@dataclass(frozen=True)
class Case:
    """One way to decode a scene."""

    scene: Scene
    how: Decoding
    rule: acceptance.Rank
    open: str = "eager"

    def play(self, stage: Harness) -> Trace:
        """With the longer drafts of drafting ahead where no token depends on how drafts are cut."""
        how = replace(self.how, is_lossless=self.how.gate == gate.ALWAYS and self.rule == acceptance.GREEDY)
        return play(self.scene.prompt, self.scene.edge, self.scene.cloud, how, stage, self.rule, self.open)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scene = draw(scenes())
    mode = draw(st.sampled_from(["speculative", "speculative", "cloud", "edge"]))
    if mode != "speculative":
        return Case(scene, Decoding(mode, scene.stopping), draw(ranks), draw(st.sampled_from(opening.PREFILL_TIMES)))
    chosen = draw(gates)
    ahead = draw(st.sampled_from([0, 0, 1, 3, 9]))
    how = replace(speculative(scene, draw(ks), chosen), stop=draw(stops(chosen)), ahead=ahead)
    return Case(scene, how, draw(ranks), draw(st.sampled_from(opening.PREFILL_TIMES)))


def play(
    prompt: Prompt,
    edge: Model,
    cloud: Model,
    how: Decoding,
    stage: Harness,
    rule: acceptance.Rule = acceptance.GREEDY,
    when: str = "eager",
) -> Trace:
    """What `Captioner.trace` does, on any two models."""

    def events() -> Iterator[Event]:
        verifier = stage.linked(LocalVerifier(stage.cloud(cloud), rule))
        if how.mode == "speculative":
            verifier = stage.opened(verifier, when)
        built = stage.prepared(lambda: prompt)
        yield Prepared(len(built.ids))
        begin = stage.begin_verdict if how.ahead else None
        on_stage = replace(how, gate=stage.gate(how.gate), stop=stage.stop(how.stop), begin=begin)
        yield from decode(built, on_stage, stage.edge(edge), verifier)

    return stamp(events(), stage.watch)


seconds = st.integers(0, 1000).map(lambda n: n / 997)  # of any size, and rarely a sum of powers of two


@st.composite
def costs(draw: st.DrawFn, points: int = 4) -> Costs:
    """A table of up to `points` passes, never cheaper for more tokens."""
    rises = draw(st.lists(st.tuples(st.integers(1, 4), seconds), max_size=points - 1))
    return Costs(draw(seconds), tuple(_sums([(1, 0.01 + draw(seconds)), *rises])))


def _sums(steps: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    return itertools.accumulate(steps, lambda before, step: (before[0] + step[0], before[1] + step[1]))


def profiles(edge_points: int = 4) -> st.SearchStrategy[Profile]:
    return st.builds(
        Profile, st.just("drawn"), costs(edge_points), costs(), features=seconds, gate=seconds, queue=seconds
    )


# a link without an end to its bandwidth shows what else there is to the last digit
any_link = st.sampled_from([*links.LINKS.values(), Link("wide", rtt=0.05, up=math.inf, down=math.inf, jitter=0.01)])


def steady(link: Link) -> Link:
    """The same link without jitter."""
    return replace(link, jitter=0.0) if link.jitter else link


@dataclass(frozen=True)
class Scripted:
    """Says 0 at every place of the output but 1 at those in `wrong`, whatever went before.

    `UNSURE` escalates a draft that holds a place in `unsure`.
    """

    wrong: frozenset[int] = frozenset()
    unsure: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()

    def open(self, prompt: Prompt) -> ScriptedSession:
        return ScriptedSession(self)


UNSURE = gate.Gate("scripted", 0.5, lambda row: float(row[2]))


class ScriptedSession:
    def __init__(self, model: Scripted) -> None:
        self._model = model
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        places = range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens.extend(tokens)
        wrong, unsure = self._model.wrong, self._model.unsure
        return torch.tensor([[5.0, 9.0 * (place in wrong), 1.0 * (place in unsure)] for place in places])

    def truncate(self, length: int) -> None:
        check_truncation(length, len(self.tokens))
        del self.tokens[length:]
