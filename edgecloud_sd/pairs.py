"""Pairs: an edge and a cloud checkpoint with one tokenizer, by name or by their two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
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
    edge, cloud = edge_model or pair.edge, cloud_model or pair.cloud
    for known in PAIRS.values():
        if (edge, cloud) == (known.edge, known.cloud):
            return known
    return Pair(f"{Path(edge).name}+{Path(cloud).name}", edge, cloud)


def check(edge: HFModel, cloud: HFModel) -> None:
    """ValueError unless both sides mean the same by every id, end at the same ids, and hear the same features.

    Row counts may differ: both published Qwens pad their vocabularies, each in its own way.
    """
    same: dict[str, Callable[[HFModel], object]] = {
        "tokenizers": lambda side: side.tokenizer.get_vocab(),
        "end-of-caption ids": lambda side: side.eos,
        "audio placeholders": lambda side: side.thinker.config.audio_token_id,
        "mel spectrograms": lambda side: (side.extractor.feature_size, side.extractor.hop_length, side.extractor.n_fft),
    }
    for what, of in same.items():
        if of(edge) != of(cloud):
            raise ValueError(f"{edge.name} and {cloud.name} have different {what}, so they are not a pair")
