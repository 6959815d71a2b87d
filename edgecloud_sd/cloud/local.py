"""The seam to the cloud: a `Cloud` is a model in this process, or a service elsewhere. Callers cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, overload

from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.models.pairs import REAL, checkpoint_name
from edgecloud_sd.models.traits import frontend_traits
from edgecloud_sd.session import Model
from edgecloud_sd.steps import limit_rows, limit_rows_on_gpu
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier, Verifier

if TYPE_CHECKING:
    from edgecloud_sd.models.hf import HFModel


class Cloud(Protocol):
    """The target model, wherever it runs. `LocalCloud` and `client.Connection` meet this protocol."""

    @property
    def identity(self) -> Identity:
        """The name, traits, dtype, vocabulary size and fingerprint. Raise CloudFault if the cloud fails."""

    @property
    def local_parameters(self) -> int:
        """The number of parameters that this process computes with: 0 for a service elsewhere."""

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        """Return the verifier of one generation, timed by its harness. Raise ValueError for a rule that it lacks.

        Its verdicts have a rest if `wants_rest` is True.
        """

    def close(self) -> None:
        """Release connections. Never raise."""


def local_verifier(model: Model, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
    """Return a model of this process as a verifier, behind the harness's link."""
    verifier = LocalVerifier(harness.cloud(model), rule, wants_rest=wants_rest)
    return harness.timed_verifier(harness.linked(verifier))


@dataclass(frozen=True)
class LocalCloud:
    """A checkpoint in this process as the cloud. It loads when it is first needed.

    Raise the errors of `models.load.load_model` when it loads.
    """

    checkpoint: str
    device: str = "cpu"
    dtype: str = "float32"
    weights: str = REAL
    concurrency: int = 1  # forward passes at once

    @cached_property
    def model(self) -> HFModel:
        """The loaded model."""
        from edgecloud_sd.models.load import load_model  # help texts must not wait for torch

        return load_model(self.checkpoint, self.device, self.dtype, self.weights)

    @cached_property
    def identity(self) -> Identity:
        """The model's name, traits, dtype, vocabulary size and fingerprint."""
        from edgecloud_sd.models import checkpoint

        return Identity(
            name=checkpoint_name(self.checkpoint),
            engine="transformers",
            dtype=self.dtype,
            device=self.model.thinker.device.type,
            vocab_size=self.model.vocab_size,
            max_length=self.model.max_length,
            max_rank=self.model.vocab_size,
            traits=frontend_traits(self.model),
            weights=checkpoint.weights_digest(self.checkpoint, self.weights),
        )

    @property
    def local_parameters(self) -> int:
        """The number of parameters of the model."""
        count: int = self.model.thinker.num_parameters()
        return count

    @overload
    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier: ...
    @overload
    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> LocalVerifier: ...
    def verifier(self, rule: Rule, harness: Harness | None = None, wants_rest: bool = False) -> Verifier:
        """Return the verifier of one generation, timed by its harness.

        Without one, return a server's verifier. The server measures its calls itself, and runs them in steps.
        """
        if harness:
            return local_verifier(self.model, rule, harness, wants_rest)
        is_on_cpu = self.model.text.device.type == "cpu"
        return LocalVerifier(self.model, rule, limit_rows if is_on_cpu else limit_rows_on_gpu, wants_rest)

    def close(self) -> None:
        """Do nothing: the memory goes with this object."""
