"""What the property tests draw: toy models that disagree as much as a pair can, prompts, gates and limits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from edgecloud_sd import acceptance, gate
from edgecloud_sd.decoder import Decoding
from edgecloud_sd.models.toy import ToyModel, random_table
from edgecloud_sd.records import Prompt
from edgecloud_sd.stopping import Stopping

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
gates = st.one_of(
    st.sampled_from([gate.ALWAYS, gate.NEVER]),
    st.floats(0.01, 2.0, allow_nan=False).map(gate.entropy),
)


def speculative(scene: Scene, k: int, chosen: gate.Gate = gate.ALWAYS) -> Decoding:
    return Decoding("speculative", scene.stopping, k, chosen)
