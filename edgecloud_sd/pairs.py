"""Pairs: an edge and a cloud checkpoint with one tokenizer, by name or by their two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgecloud_sd.models.hf import HFModel

DTYPES = ("float32", "float16", "bfloat16", "float64")  # torch's names
POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"


@dataclass(frozen=True)
class Pair:
    """Two checkpoints: folders, or names on the hub. `name` stands in benchmark ids."""

    name: str
    edge: str
    cloud: str


PAIRS = {
    "pocket": Pair("pocket", str(POCKET_WEIGHTS / "edge"), str(POCKET_WEIGHTS / "cloud")),
    "qwen2.5-omni": Pair("qwen2.5-omni", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"),
}


def find(name: str, edge_model: str | None = None, cloud_model: str | None = None) -> Pair:
    """The pair `name`, with either checkpoint replaced. ValueError, naming the known pairs, for an unknown name."""
    if name not in PAIRS:
        raise ValueError(f"unknown pair {name!r}: choose one of {', '.join(PAIRS)}, or give both models")
    pair = PAIRS[name]
    if edge_model is None and cloud_model is None:
        return pair
    edge, cloud = edge_model or pair.edge, cloud_model or pair.cloud
    return Pair(f"{Path(edge).name}+{Path(cloud).name}", edge, cloud)


def check_tokenizers(edge: HFModel, cloud: HFModel) -> None:
    """ValueError unless both sides mean the same by every id. Row counts may differ: both Qwens pad theirs."""
    if edge.tokenizer.get_vocab() != cloud.tokenizer.get_vocab():
        raise ValueError(f"{edge.name} and {cloud.name} have different tokenizers, so they are not a pair")
