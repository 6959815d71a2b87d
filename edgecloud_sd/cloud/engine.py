"""What computes on the server: a model behind the `Verifier` protocol, and what a client has to know of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.models.frontend import Traits, frontend_traits
from edgecloud_sd.models.pairs import DUMMY, REAL
from edgecloud_sd.verifier import LocalVerifier, Verifier

if TYPE_CHECKING:
    from edgecloud_sd.cloud.vllm_engine import VLLMModel
    from edgecloud_sd.models.hf import HFModel

ENGINE_NAMES = ("transformers", "vllm")


@dataclass(frozen=True)
class Identity:
    """Which model answers, without a path: what a client compares with its own side, and what its results state."""

    name: str
    engine: str
    dtype: str
    device: str
    vocab_size: int  # of the vocabulary: ids are below it
    max_length: int  # tokens of prompt and caption together, at most
    max_rank: int  # of rule rank(r)
    traits: Traits
    weights: str = ""  # digest of the checkpoint's; `DUMMY` where they are random, empty where it has no files
    synthetic: bool = True  # whether it judges by rule synthetic(p)

    @property
    def fingerprint(self) -> str:
        """The same for the same model in the same number format, whichever process serves it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def refusal(self, rule: Rule) -> str:
        """Why this engine cannot judge by a rule; empty where it can."""
        if isinstance(rule, Rank):
            fits = rule.r <= self.max_rank
            return "" if fits else f"the cloud's engine judges by rank {self.max_rank} at most, not {rule.r}"
        return "" if self.synthetic else f"the cloud's engine judges by greedy and rank(r) alone, not by {rule.text}"


class Engine(Protocol):
    """A loaded model that verifies for many edges."""

    @property
    def identity(self) -> Identity: ...

    @property
    def concurrency(self) -> int:
        """How many calls it takes at once."""

    def verifier(self, rule: Rule) -> Verifier: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Transformers:
    """A model of this process, one forward pass at a time."""

    model: HFModel
    dtype: str
    weights: str = REAL
    concurrency: int = 1

    @property
    def identity(self) -> Identity:
        from edgecloud_sd.models import memory

        config = self.model.thinker.config.text_config
        return Identity(
            name=Path(self.model.name).name,
            engine="transformers",
            dtype=self.dtype,
            device=self.model.thinker.device.type,
            vocab_size=self.model.vocab_size,
            max_length=config.max_position_embeddings,
            max_rank=self.model.vocab_size,
            traits=frontend_traits(self.model),
            weights=DUMMY if self.weights == DUMMY else memory.weights_digest(self.model.name),
        )

    def verifier(self, rule: Rule) -> Verifier:
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

        from edgecloud_sd.models import memory

        return Identity(
            name=Path(self.model.name).name,
            engine="vllm",
            dtype=self.dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            vocab_size=self.model.vocab_size,
            max_length=self.model.max_length,
            max_rank=self.model.max_rank,
            traits=self.traits,
            weights=memory.weights_digest(self.model.name),
            synthetic=False,
        )

    @property
    def concurrency(self) -> int:
        return self.model.concurrency

    def verifier(self, rule: Rule) -> Verifier:
        return self.model.verifier(rule)

    def close(self) -> None:
        self.model.close()


def load_engine(
    name: str, checkpoint: str, device: str, dtype: str, flags: dict[str, object], weights: str = REAL
) -> Engine:
    """The engine `name` on a checkpoint. ValueError or OSError for what cannot be loaded.

    vLLM finds its devices itself, and `flags` are its engine arguments.
    """
    from edgecloud_sd.models import load

    if name == "vllm":
        from edgecloud_sd.cloud import vllm_engine

        if weights != REAL:
            raise ValueError(f"--weights: {weights} is for --engine {ENGINE_NAMES[0]}")
        front = load.load_frontend(checkpoint)
        return VLLM(vllm_engine.load_vllm(checkpoint, dtype, flags), frontend_traits(front), dtype)
    if flags:
        raise ValueError(f"--engine-option: {next(iter(flags))} is for --engine vllm")
    return Transformers(load.load_model(checkpoint, device, dtype, weights), dtype, weights)
