"""The cloud's part: verify a draft in one forward pass, or generate alone. Callers cannot tell where it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from edgecloud_sd.acceptance import Rule, uniform
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.session import Model, Session, open_steps, sync, sync_steps
from edgecloud_sd.steps import RowLimit, Steps, no_limit, run_steps
from edgecloud_sd.stopping import Stopping


class CloudFault(Exception):
    """The cloud did not answer for as long as it was worth trying. The message says how it failed."""

    breaker_mark = ""  # a mark of `events.BREAKER_MARKS` if the failure opened the breaker or met it open


class Verification(Protocol):
    """One prompt at the cloud. Every method but `close` raises CloudFault if a remote cloud does not answer."""

    def wait(self) -> None:
        """Return when the prompt is encoded and prefilled. `open` may return before that."""

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Verify `draft` after a context: the first `base` tokens that the cloud holds, then `tokens`.

        The context has at least one token, and the draft may be empty: the verdict is then the target's own token.
        `base` is absolute, so a repeated call gives the same verdict. Raise ValueError if `base` exceeds the tokens
        that the cloud knows to be committed.
        """

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Yield the cloud's own greedy tokens after `output`, one by one, the last one included."""

    def close(self) -> None:
        """Free the memory of the prompt. Never raise."""


class Verifier(Protocol):
    """A place that opens prompts on the cloud's side."""

    def open(self, prompt: Prompt) -> Verification:
        """Begin with a prompt. `Verification.wait` returns when the prompt is prefilled."""


class SteppedVerification(Verification, Protocol):
    """A verification on a server, which runs other clients' work between two steps.

    An abandoned call may leave part of its work in the cache. Later calls then have base 0.
    """

    def verify_steps(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Steps[Verdict]:
        """Verify as `verify` does."""

    def feed_steps(self, output: Sequence[int]) -> Steps[None]:
        """Do the work of `generate` that comes before its first token."""


class SteppedVerifier(Verifier, Protocol):
    """A verifier on a server."""

    def open_steps(self, prompt: Prompt) -> Steps[SteppedVerification]:
        """Open a prompt and prefill it."""


@dataclass(frozen=True)
class LocalVerifier:
    """A model in this process as the cloud, with one acceptance rule. Its steps are passes within `limit`.

    Its verdicts have a rest if `wants_rest` is True.
    """

    model: Model
    rule: Rule
    limit: RowLimit = no_limit
    wants_rest: bool = False

    def open(self, prompt: Prompt) -> LocalVerification:
        """Encode and prefill the prompt."""
        return LocalVerification(self, self.model.open(prompt), prompt)

    def open_steps(self, prompt: Prompt) -> Steps[LocalVerification]:
        """Encode and prefill the prompt in steps."""
        session = yield from open_steps(self.model, prompt, self.limit)
        return LocalVerification(self, session, prompt)


class LocalVerification:
    """Verification on a session of this process."""

    def __init__(self, verifier: LocalVerifier, session: Session, prompt: Prompt) -> None:
        self._verifier = verifier
        self._limit = verifier.limit
        self._session = session
        self._prompt = prompt
        self._committed = 0  # cached tokens that the edge knows to be committed

    def wait(self) -> None:
        """Return at once: `open` has prefilled the prompt."""

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Verify in one forward pass over `tokens` and `draft`, if it is within the limit."""
        return run_steps(self.verify_steps(base, tokens, draft))

    def verify_steps(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Steps[Verdict]:
        """Verify in passes within the limit."""
        check_base(base, self._committed)
        context = [*self._session.tokens[:base], *tokens, *draft]
        first = base + len(tokens)
        uniforms = (uniform(self._seed, place) for place in range(first, first + len(draft)))
        logits = yield from sync_steps(self._session, context, len(draft) + 1, self._limit, len(self._prompt.ids) - 1)
        verdict = self._verifier.rule(draft, logits, uniforms, self._verifier.wants_rest)
        self._committed = first + verdict.accepted
        return verdict

    @cached_property
    def _seed(self) -> bytes:
        return prompt_seed(self._prompt)

    def feed_steps(self, output: Sequence[int]) -> Steps[None]:
        """Feed the context but its last token, which `generate` feeds."""
        self._committed = 0
        if output:
            context = [self._prompt.last, *output[:-1]]
            yield from sync_steps(self._session, context, 1, self._limit, len(self._prompt.ids) - 1)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Yield greedy tokens."""
        output = list(output)
        self._committed = 0  # the cache will hold tokens that the edge does not know
        while stopping.reason(output) is None:
            token = int(sync(self._session, [self._prompt.last, *output])[-1].argmax())
            output.append(token)
            yield token

    def close(self) -> None:
        """Empty the cache."""
        self._committed = 0
        self._session.truncate(0)


@dataclass(frozen=True)
class FailedVerifier:
    """A cloud that failed before its first call. Each use of it raises that fault."""

    fault: CloudFault

    def open(self, prompt: Prompt) -> FailedVerifier:
        """Return this object, which is a verification too."""
        return self

    def wait(self) -> None:
        """Raise the fault."""
        raise self.fault

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Raise the fault."""
        raise self.fault

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Raise the fault."""
        raise self.fault

    def close(self) -> None:
        """Do nothing."""


def prompt_seed(prompt: Prompt) -> bytes:
    """Return 16 bytes that identify the prompt. They are equal on both sides of a link."""
    digest = hashlib.blake2b(np.asarray(prompt.ids, dtype="<i4").tobytes(), digest_size=16)
    if prompt.features is not None:
        digest.update(prompt.features.numpy().astype("<f2").tobytes())  # features cross a link in half precision
    return digest.digest()


def check_base(base: int, committed: int) -> None:
    """Raise the ValueError of `Verification.verify`."""
    if not 0 <= base <= committed:
        raise ValueError(f"the edge counts on {base} committed tokens here, and {committed} are known")
