"""The engines of the server: transformers, which is a `LocalCloud`, and vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.models.pairs import REAL, checkpoint_name
from edgecloud_sd.models.traits import Traits, frontend_traits
from edgecloud_sd.verifier import SteppedVerifier

if TYPE_CHECKING:
    from edgecloud_sd.cloud.vllm_engine import VLLMModel

ENGINE_NAMES = ("transformers", "vllm")


class Engine(Protocol):
    """A loaded model that verifies for many edges."""

    @property
    def identity(self) -> Identity:
        """Return the identity of the model. This may read its whole checkpoint."""

    @property
    def concurrency(self) -> int:
        """Return the number of calls that the engine can run at once."""

    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> SteppedVerifier:
        """Return a verifier with this acceptance rule. It works in steps, between which the server takes turns.

        Its verdicts have a rest if `wants_rest` is True.
        """

    def close(self) -> None:
        """Stop the engine and free its model."""


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

        from edgecloud_sd.models import checkpoint

        return Identity(
            name=checkpoint_name(self.model.name),
            engine="vllm",
            dtype=self.dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            vocab_size=self.model.vocab_size,
            max_length=self.model.max_length - 1,  # vLLM generates one more token after a draft that ends the output
            max_rank=self.model.max_rank,
            traits=self.traits,
            weights=checkpoint.weights_digest(self.model.name),
            synthetic=False,
        )

    @property
    def concurrency(self) -> int:
        """Return the number of requests in one batch."""
        return self.model.concurrency

    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> SteppedVerifier:
        """Return a verifier. Raise ValueError for a rule that needs more logits than vLLM returns."""
        return self.model.verifier(rule, wants_rest)

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
    if name == "vllm":
        from edgecloud_sd.cloud import vllm_engine
        from edgecloud_sd.models import load

        if weights != REAL:
            raise ValueError(f"--weights: {weights} works only with --engine {ENGINE_NAMES[0]}")
        front = load.load_frontend(checkpoint)
        if front.settings.values:  # vLLM applies its processors to new tokens alone, not to the tokens of a draft
            raise ValueError(
                f"{checkpoint}: {', '.join(front.settings.values)} of its generation_config.json cannot be applied "
                f"with --engine vllm: use --engine {ENGINE_NAMES[0]}, or remove them"
            )
        return VLLM(vllm_engine.load_vllm(checkpoint, dtype, flags), frontend_traits(front), dtype)
    if flags:
        raise ValueError(f"--engine-option: {next(iter(flags))} works only with --engine vllm")
    engine = LocalCloud(checkpoint, device, dtype, weights)
    _ = engine.model  # a server loads its model before it listens
    return engine
