"""The cloud's part: verify a draft in one forward pass, or generate alone. Nobody above can tell where it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from edgecloud_sd.acceptance import Rule, uniform
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.session import Model, Session, sync
from edgecloud_sd.stopping import Stopping


class CloudFault(Exception):
    """The cloud could not be had, for as long as it was worth trying: the message says how it failed."""


class Verification(Protocol):
    """One prompt, opened on the cloud's side. CloudFault where the cloud is elsewhere and cannot be had."""

    def wait(self) -> None:
        """Returns when the prompt is encoded and prefilled, which `open` may have left to be done meanwhile."""

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Judge `draft` after a context whose first `base` tokens the cloud holds already and whose rest is `tokens`.

        `base` is absolute, so a repeated call gives the same verdict. ValueError for a base beyond
        what the cloud knows to be committed.
        """

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """The cloud's own greedy tokens after what is `output` already, one by one, the last included."""

    def close(self) -> None:
        """Give back what the prompt occupies. Never fails."""


class Verifier(Protocol):
    """Opens prompts on the cloud's side."""

    def open(self, prompt: Prompt) -> Verification:
        """Begin on a prompt; `Verification.wait` says when it is done."""


@dataclass(frozen=True)
class LocalVerifier:
    """A model in this process as the cloud, with one acceptance rule."""

    model: Model
    rule: Rule

    def open(self, prompt: Prompt) -> LocalVerification:
        return LocalVerification(self.model.open(prompt), prompt, self.rule)


class LocalVerification:
    """Verification on a session of this process."""

    def __init__(self, session: Session, prompt: Prompt, rule: Rule) -> None:
        self._session = session
        self._prompt = prompt
        self._rule = rule
        self._agreed = 0  # how much of the cache the edge knows to be committed

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """One forward pass over `tokens` and `draft` together."""
        check_base(base, self._agreed)
        context = [*self._session.tokens[:base], *tokens, *draft]
        first = base + len(tokens)
        uniforms = (uniform(self._seed, place) for place in range(first, first + len(draft)))
        verdict = self._rule(draft, sync(self._session, context, rows=len(draft) + 1), uniforms)
        self._agreed = first + verdict.accepted
        return verdict

    @cached_property
    def _seed(self) -> bytes:
        return prompt_seed(self._prompt)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Greedy decoding by the same session code."""
        written = list(output)
        self._agreed = 0  # the cache will hold what nobody has agreed upon
        while stopping.reason(written) is None:
            token = int(sync(self._session, [self._prompt.last, *written])[-1].argmax())
            written.append(token)
            yield token

    def close(self) -> None:
        """Empty the cache; the memory goes with this object."""
        self._agreed = 0
        self._session.truncate(0)


def prompt_seed(prompt: Prompt) -> bytes:
    """16 bytes that stand for a clip and what is asked of it, the same on both sides of a link."""
    said = hashlib.blake2b(np.asarray(prompt.ids, dtype="<i4").tobytes(), digest_size=16)
    if prompt.features is not None:
        said.update(prompt.features.numpy().astype("<f2").tobytes())  # as it crosses
    return said.digest()


def check_base(base: int, agreed: int) -> None:
    """The ValueError that `Verification.verify` promises."""
    if not 0 <= base <= agreed:
        raise ValueError(f"the edge counts on {base} committed tokens here, and {agreed} are known")
