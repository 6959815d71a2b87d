"""Pairs: an edge and a cloud checkpoint with one tokenizer, by name or by their two checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgecloud_sd.models.hf import Frontend

DTYPES = ("float32", "float16", "bfloat16", "float64")  # torch's names
LOSSLESS_DTYPES = ("float32", "float64")  # in which strict output is promised token for token
QUANTISED_DTYPES = ("int8", "int4")  # of the weights alone, and of an edge's on a CPU alone
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


@dataclass(frozen=True)
class Traits:
    """What both sides of a pair have to have in common, wherever they run. Row counts may differ: both published Qwens
    pad their vocabularies, each in its own way."""

    tokenizer: str  # digest of every token and its id
    eos: tuple[int, ...]  # ids that end a caption, rising
    audio_token: int  # id of the audio placeholder
    mel_bins: int
    hop_length: int  # samples
    n_fft: int  # samples


def frontend_traits(side: Frontend) -> Traits:
    """Of a loaded side, or of its front end alone."""
    vocabulary = json.dumps(side.tokenizer.get_vocab(), sort_keys=True)
    return Traits(
        tokenizer=hashlib.sha256(vocabulary.encode()).hexdigest(),
        eos=tuple(sorted(side.eos)),
        audio_token=side.audio_token,
        mel_bins=side.extractor.feature_size,
        hop_length=side.extractor.hop_length,
        n_fft=side.extractor.n_fft,
    )


def check_pair(edge_name: str, edge: Traits, cloud_name: str, cloud: Traits) -> None:
    """ValueError unless both sides mean the same by every id, end at the same ids, and hear the same features."""
    names = {
        "tokenizers": ("tokenizer",),
        "end-of-caption ids": ("eos",),
        "audio placeholders": ("audio_token",),
        "mel spectrograms": ("mel_bins", "hop_length", "n_fft"),
    }
    for what, fields in names.items():
        if any(getattr(edge, field) != getattr(cloud, field) for field in fields):
            raise ValueError(f"{edge_name} and {cloud_name} have different {what}, so they are not a pair")
