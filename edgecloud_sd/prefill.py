"""The moment at which the cloud prefills a prompt: beside the edge's own prefill, or at the first escalation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import Verification, Verifier

PREFILL_TIMES = ("eager", "lazy")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Pending(Protocol[_T_co]):
    """A call in the background: a `concurrent.futures.Future`, or its like on a virtual clock."""

    def done(self) -> bool:
        """Return True if `result` returns without waiting."""

    def result(self) -> _T_co:
        """Wait for the call. Return its result, or raise its exception."""


Background = Callable[[Callable[[], _T]], Pending[_T]]  # starts a call in the background


@dataclass(frozen=True)
class EagerPrefill:
    """A verifier that opens a prompt at once, in the background. The first escalation waits for it."""

    verifier: Verifier
    background: Background[Verification]

    def open(self, prompt: Prompt) -> Verification:
        """Start to open the prompt."""
        verification = _DeferredVerification(self.verifier, prompt)
        verification.start(self.background)
        return verification


@dataclass(frozen=True)
class LazyPrefill:
    """A verifier that opens a prompt at the first escalation. A prompt that never escalates is never sent."""

    verifier: Verifier

    def open(self, prompt: Prompt) -> Verification:
        """Return a verification that has not sent anything yet."""
        return _DeferredVerification(self.verifier, prompt)


class _DeferredVerification:
    """A verification that opens its prompt in the background, or when it is first used."""

    def __init__(self, verifier: Verifier, prompt: Prompt) -> None:
        self._verifier = verifier
        self._prompt = prompt
        self._pending: Pending[Verification] | None = None
        self._verification: Verification | None = None  # set as soon as there is something to close
        self._is_ready = False
        self._is_closed = False

    def start(self, background: Background[Verification]) -> None:
        self._pending = background(self._open)

    def wait(self) -> None:
        self._ready()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        return self._ready().verify(base, tokens, draft)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        return self._ready().generate(stopping, output)

    def close(self) -> None:
        """Tell a background call to stop early, wait for it, and ignore its failure.

        Without the wait the call would still run during the next generation.
        """
        self._is_closed = True
        pending, self._pending = self._pending, None
        self._close_opened()
        if pending:
            with suppress(Exception):
                pending.result()
            self._close_opened()

    def _ready(self) -> Verification:
        pending, self._pending = self._pending, None  # the time of a background call is recorded by its first wait
        if pending:
            pending.result()
        elif not self._is_ready:
            self._open()
        assert self._verification is not None
        return self._verification

    def _open(self) -> Verification:
        self._verification = self._verifier.open(self._prompt)
        if not self._is_closed:
            self._verification.wait()
            self._is_ready = True
        return self._verification

    def _close_opened(self) -> None:
        if self._verification is not None:
            self._verification.close()
