"""The engines of the server: a model behind the `Verifier` protocol, and the identity that a client compares."""

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
    """The model of a server, without a path. A client compares it with its own side and records it in its results."""

    name: str
    engine: str
    dtype: str
    device: str
    vocab_size: int
    max_length: int  # tokens of prompt and output together
    max_rank: int  # the largest r of rule rank(r)
    traits: Traits
    weights: str = ""  # digest of the checkpoint's weights; `DUMMY` if they are random, empty without files
    synthetic: bool = True  # the engine has rule synthetic(p)

    @property
    def fingerprint(self) -> str:
        """Return a digest that is the same in every process with this model in this number format."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def refusal(self, rule: Rule) -> str:
        """Return why this engine does not have a rule, or an empty text if it does."""
        if isinstance(rule, Rank):
            fits = rule.r <= self.max_rank
            return "" if fits else f"rule {rule.text}: the cloud's engine has rank(r) up to r = {self.max_rank}"
        return "" if self.synthetic else f"rule {rule.text}: the cloud's engine has only greedy and rank(r)"


class Engine(Protocol):
    """A loaded model that verifies for many edges."""

    @property
    def identity(self) -> Identity:
        """Return the identity of the model. This may read its whole checkpoint."""

    @property
    def concurrency(self) -> int:
        """Return the number of calls that the engine can run at once."""

    def verifier(self, rule: Rule) -> Verifier:
        """Return a verifier with this acceptance rule."""

    def close(self) -> None:
        """Stop the engine and free its model."""


@dataclass(frozen=True)
class Transformers:
    """A model in this process that runs one forward pass at a time."""

    model: HFModel
    dtype: str
    weights: str = REAL
    concurrency: int = 1

    @property
    def identity(self) -> Identity:
        """Return the identity, with the digest of the checkpoint."""
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
        """Return a verifier on this model."""
        return LocalVerifier(self.model, rule)

    def close(self) -> None:
        """Do nothing: the model goes with this object."""


@dataclass(frozen=True)
class VLLM:
    """A model under vLLM on the GPUs or the CPU of this machine, with one call per place in vLLM's batch."""

    model: VLLMModel
    traits: Traits
    dtype: str

    @property
    def identity(self) -> Identity:
        """Return the identity, with the digest of the checkpoint."""
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
        """Return the number of requests in one batch."""
        return self.model.concurrency

    def verifier(self, rule: Rule) -> Verifier:
        """Return a verifier. Raise ValueError for a rule that needs more logits than vLLM returns."""
        return self.model.verifier(rule)

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self.model.close()


def load_engine(
    name: str, checkpoint: str, device: str, dtype: str, flags: dict[str, object], weights: str = REAL
) -> Engine:
    """Return the engine `name` with a checkpoint loaded.

    `flags` are engine arguments of vLLM, which chooses its devices itself. Raise ValueError for a bad option and
    OSError for a checkpoint that cannot be loaded.
    """
    from edgecloud_sd.models import load

    if name == "vllm":
        from edgecloud_sd.cloud import vllm_engine

        if weights != REAL:
            raise ValueError(f"--weights: {weights} works only with --engine {ENGINE_NAMES[0]}")
        front = load.load_frontend(checkpoint)
        return VLLM(vllm_engine.load_vllm(checkpoint, dtype, flags), frontend_traits(front), dtype)
    if flags:
        raise ValueError(f"--engine-option: {next(iter(flags))} works only with --engine vllm")
    return Transformers(load.load_model(checkpoint, device, dtype, weights), dtype, weights)
