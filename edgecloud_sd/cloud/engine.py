"""What computes on the server: a model behind the `Verifier` protocol, and what a client has to know of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgecloud_sd.acceptance import Rank
from edgecloud_sd.models import memory
from edgecloud_sd.pairs import Traits, traits
from edgecloud_sd.verifier import LocalVerifier, Verifier

if TYPE_CHECKING:
    from edgecloud_sd.cloud.vllm_engine import VLLMModel
    from edgecloud_sd.models.hf import HFModel

NAMES = ("transformers", "vllm")


@dataclass(frozen=True)
class Identity:
    """Which model answers, without a path: what a client compares with its own side, and what its results state."""

    name: str
    engine: str
    dtype: str
    device: str
    rows: int  # of the vocabulary: ids are below it
    positions: int  # tokens of prompt and caption together, at most
    max_rank: int  # of rule rank(r)
    traits: Traits
    weights: str = ""  # digest of the checkpoint's; empty where it has no files

    @property
    def fingerprint(self) -> str:
        """The same for the same model in the same number format, whichever process serves it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Engine(Protocol):
    """A loaded model that verifies for many edges."""

    @property
    def identity(self) -> Identity: ...

    @property
    def slots(self) -> int:
        """How many calls it takes at once."""

    def verifier(self, rule: Rank) -> Verifier: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Transformers:
    """A model of this process, one forward pass at a time."""

    model: HFModel
    dtype: str
    slots: int = 1

    @property
    def identity(self) -> Identity:
        config = self.model.thinker.config.text_config
        return Identity(
            name=Path(self.model.name).name,
            engine="transformers",
            dtype=self.dtype,
            device=self.model.thinker.device.type,
            rows=config.vocab_size,
            positions=config.max_position_embeddings,
            max_rank=config.vocab_size,
            traits=traits(self.model),
            weights=memory.digest(self.model.name),
        )

    def verifier(self, rule: Rank) -> Verifier:
        return LocalVerifier(self.model, rule)

    def close(self) -> None:
        """Nothing runs on."""


@dataclass(frozen=True)
class VLLM:
    """vLLM on this machine's GPUs, or its processor, as many calls at once as it batches."""

    model: VLLMModel
    traits: Traits
    dtype: str

    @property
    def identity(self) -> Identity:
        import torch

        return Identity(
            name=Path(self.model.name).name,
            engine="vllm",
            dtype=self.dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            rows=self.model.rows,
            positions=self.model.positions,
            max_rank=self.model.max_rank,
            traits=self.traits,
            weights=memory.digest(self.model.name),
        )

    @property
    def slots(self) -> int:
        return self.model.slots

    def verifier(self, rule: Rank) -> Verifier:
        return self.model.verifier(rule)

    def close(self) -> None:
        self.model.close()


def load(name: str, checkpoint: str, device: str, dtype: str, flags: dict[str, object]) -> Engine:
    """The engine `name` on a checkpoint. ValueError or OSError for what cannot be loaded.

    vLLM finds its devices itself, and `flags` are its engine arguments.
    """
    from edgecloud_sd.models import hf

    if name == "vllm":
        from edgecloud_sd.cloud import vllm_engine

        front = hf.load_frontend(checkpoint)
        return VLLM(vllm_engine.load(checkpoint, dtype, flags), traits(front), dtype)
    if flags:
        raise ValueError(f"--engine-option: {next(iter(flags))} is for --engine vllm")
    return Transformers(hf.load(checkpoint, device, dtype), dtype)
