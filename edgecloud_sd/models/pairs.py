"""Pairs of an edge and a cloud checkpoint with the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

REAL, DUMMY = WEIGHTS = ("real", "dummy")  # dummy weights are random: see models/dummy.py
POCKET_WEIGHTS = Path(__file__).parents[1] / "pocket" / "weights"


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, each a folder or a name on the hub.

    `name` is part of every benchmark id. It ends in "-dummy" for dummy weights.
    """

    name: str
    edge: str
    cloud: str
    weights: str = REAL


PAIRS = {
    "pocket": Pair("pocket", str(POCKET_WEIGHTS / "edge"), str(POCKET_WEIGHTS / "cloud")),
    "qwen2.5-omni": Pair("qwen2.5-omni", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"),
}


def checkpoint_name(checkpoint: str | Path) -> str:
    """Return the name of a checkpoint: the last part of its name, or of its real folder however that is spelt."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else path.name


def find_pair(name: str, edge_model: str | None = None, cloud_model: str | None = None, weights: str = REAL) -> Pair:
    """Return the pair `name`, with either checkpoint replaced if one is given, and with these weights.

    Raise ValueError with the known names for an unknown one.
    """
    if name not in PAIRS:
        raise ValueError(f"unknown pair {name!r}: choose one of {', '.join(PAIRS)}, or give both models")
    edge, cloud = edge_model or PAIRS[name].edge, cloud_model or PAIRS[name].cloud
    unnamed = Pair(f"{checkpoint_name(edge)}+{checkpoint_name(cloud)}", edge, cloud)
    pair = next((pair for pair in PAIRS.values() if (edge, cloud) == (pair.edge, pair.cloud)), unnamed)
    return pair if weights == REAL else replace(pair, name=f"{pair.name}-{weights}", weights=weights)
