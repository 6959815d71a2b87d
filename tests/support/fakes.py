"""Fakes that several tests share: scripted models, and a cloud of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.cloud.local import local_verifier
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.gate import Gate
from edgecloud_sd.session import Model, check_truncation
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import Verifier


class FakeCloud:
    """The parts of a cloud that a generation does not use."""

    local_parameters: int = 0

    @property
    def identity(self) -> Identity:
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class ModelCloud(FakeCloud):
    """A cloud that runs any model in this process."""

    model: Model

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        return local_verifier(self.model, rule, harness, wants_rest)


@dataclass(frozen=True)
class VerifierCloud(FakeCloud):
    """A cloud that uses one verifier for every rule."""

    inner: Verifier

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        return harness.timed_verifier(self.inner)


@dataclass(frozen=True)
class Slow:
    """A call that is done when `answers` yields True. It runs when the loop waits for its result."""

    call: Callable[[], Verdict]
    answers: Iterator[bool]
    waited: list[bool]

    def done(self) -> bool:
        return next(self.answers, False)

    def result(self) -> Verdict:
        self.waited.append(True)
        return self.call()


@dataclass(frozen=True)
class Scripted:
    """A model whose most likely token is 0, and 1 at the places of the output in `wrong`, in every context.

    The gate `UNSURE` escalates a draft that has a place in `unsure`.
    """

    wrong: frozenset[int] = frozenset()
    unsure: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()

    def open(self, prompt: Prompt) -> ScriptedSession:
        return ScriptedSession(self)


UNSURE = Gate("scripted", 0.5, lambda row: float(row[2]))


class ScriptedSession:
    """The session of a scripted model."""

    def __init__(self, model: Scripted) -> None:
        self._model = model
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        places = range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens.extend(tokens)
        wrong, unsure = self._model.wrong, self._model.unsure
        return torch.tensor([[5.0, 9.0 * (place in wrong), 1.0 * (place in unsure)] for place in places])

    def truncate(self, length: int) -> None:
        check_truncation(length, len(self.tokens))
        del self.tokens[length:]
