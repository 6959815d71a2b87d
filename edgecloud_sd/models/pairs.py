"""Pairs: an edge and a cloud checkpoint with one tokenizer, by name or by their two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

REAL, DUMMY = WEIGHTS = ("real", "dummy")  # dummy ones are random: see models/dummy.py
POCKET_WEIGHTS = Path(__file__).parents[1] / "pocket" / "weights"


@dataclass(frozen=True)
class Pair:
    """Two checkpoints: folders, or names on the hub. `name` stands in benchmark ids, and says so of dummy weights."""

    name: str
    edge: str
    cloud: str
    weights: str = REAL


PAIRS = {
    "pocket": Pair("pocket", str(POCKET_WEIGHTS / "edge"), str(POCKET_WEIGHTS / "cloud")),
    "qwen2.5-omni": Pair("qwen2.5-omni", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"),
}


def find_pair(name: str, edge_model: str | None = None, cloud_model: str | None = None, weights: str = REAL) -> Pair:
    """The pair `name`, with either checkpoint replaced, or with dummy weights. ValueError, naming the known pairs, for
    an unknown name."""
    if name not in PAIRS:
        raise ValueError(f"unknown pair {name!r}: choose one of {', '.join(PAIRS)}, or give both models")
    edge, cloud = edge_model or PAIRS[name].edge, cloud_model or PAIRS[name].cloud
    own = Pair(f"{Path(edge).name}+{Path(cloud).name}", edge, cloud)
    found = next((known for known in PAIRS.values() if (edge, cloud) == (known.edge, known.cloud)), own)
    return found if weights == REAL else replace(found, name=f"{found.name}-{weights}", weights=weights)
