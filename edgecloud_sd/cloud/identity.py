"""The identity of a target model, which both sides compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgecloud_sd import wire
from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.events import Prompt
from edgecloud_sd.models.pairs import DUMMY
from edgecloud_sd.models.traits import Traits
from edgecloud_sd.stopping import LengthLimit

FRAMES_PER_SECOND = 100  # in the log-mel spectrogram


@dataclass(frozen=True)
class Identity:
    """A target model, without a path. The edge compares it with its own side, and results record it.

    The fields that do not compare are limits of the server. They are no part of the model.
    """

    name: str
    engine: str
    dtype: str
    device: str
    vocab_size: int
    max_length: int  # tokens of prompt and output together
    max_rank: int  # the largest r of rule rank(r)
    traits: Traits
    weights: str = ""  # `checkpoint.weights_digest`: begins with `DUMMY` if they are random, empty without files
    synthetic: bool = True  # the engine has rule synthetic(p)
    max_tokens: int | None = field(default=None, compare=False)  # prompt and output together; None without a server
    max_audio_seconds: float | None = field(default=None, compare=False)
    max_draft: int | None = field(default=None, compare=False)  # tokens of one draft

    @property
    def fingerprint(self) -> str:
        """Return a digest that is the same in every process with this model in this number format."""
        return _digest({name: value for name, value in asdict(self).items() if name in _MODEL_FIELDS})

    @property
    def check(self) -> str:
        """Return a digest of every field and of the version of all messages.

        It exposes an identity that was damaged on its way, or that is of another version.
        """
        return _digest({**asdict(self), "messages": wire.VERSION})

    @property
    def length_limits(self) -> tuple[LengthLimit, ...]:
        """Return the limits of prompt and output: the model's, and the server's own if there is one."""
        remedy = "give the server another --engine-option max_model_len" if self.engine == "vllm" else ""
        model = LengthLimit(self.max_length, f"the maximum length of the cloud's model {self.name}", remedy)
        if self.max_tokens is None:
            return (model,)
        return model, LengthLimit(
            self.max_tokens, "the limit --max-tokens of the cloud's server", "start that server with a higher one"
        )

    def check_audio(self, prompt: Prompt) -> None:
        """Raise ValueError for a prompt with more audio than the server takes."""
        seconds = 0.0 if prompt.features is None else prompt.features.shape[1] / FRAMES_PER_SECOND
        if self.max_audio_seconds is not None and seconds > self.max_audio_seconds:
            raise ValueError(
                f"features: {seconds:g} s of audio exceed the limit --max-audio-seconds of the cloud's server, "
                f"{self.max_audio_seconds:g} s: cut the clip, or start that server with a higher one"
            )

    def check_draft(self, tokens: int) -> None:
        """Raise ValueError for a draft of more tokens than the server takes."""
        if self.max_draft is not None and tokens > self.max_draft:
            raise ValueError(
                f"a draft of {tokens} tokens exceeds the limit of the cloud's server, {self.max_draft} tokens: "
                f"use a --k and a --draft-ahead of at most {self.max_draft}"
            )

    @property
    def has_dummy_weights(self) -> bool:
        """Return whether the weights are random."""
        return self.weights.startswith(DUMMY)

    def refusal(self, rule: Rule) -> str:
        """Return why this engine does not have a rule, or an empty text if it does."""
        if isinstance(rule, Rank):
            fits = rule.r <= self.max_rank
            return "" if fits else f"rule {rule.text}: the cloud's engine has rank(r) up to r = {self.max_rank}"
        return "" if self.synthetic else f"rule {rule.text}: the cloud's engine has only greedy and rank(r)"


_MODEL_FIELDS = frozenset(field.name for field in fields(Identity) if field.compare)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
