"""When the cloud is opened on a prompt: beside the edge's own prefill, or only if a draft has to go there."""

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
    """A call that was begun: a `concurrent.futures.Future`, or its like on a virtual clock."""

    def done(self) -> bool:
        """Whether `result` need not wait."""

    def result(self) -> _T_co:
        """What the call returns, or raises what it has raised."""


Begin = Callable[[Callable[[], _T]], Pending[_T]]  # starts a call beside what follows


@dataclass(frozen=True)
class Eager:
    """Opens at once, in the background that `begin` gives, and is waited for at the first escalation."""

    verifier: Verifier
    begin: Begin[Verification]

    def open(self, prompt: Prompt) -> Verification:
        opening = _Opening(self.verifier, prompt)
        opening.begin(self.begin)
        return opening


@dataclass(frozen=True)
class Lazy:
    """Opens at the first escalation: a prompt that never escalates is never sent."""

    verifier: Verifier

    def open(self, prompt: Prompt) -> Verification:
        return _Opening(self.verifier, prompt)


class _Opening:
    def __init__(self, verifier: Verifier, prompt: Prompt) -> None:
        self._verifier = verifier
        self._prompt = prompt
        self._begun: Pending[Verification] | None = None
        self._verification: Verification | None = None  # there as soon as there is something to close
        self._open = False
        self._over = False

    def begin(self, begin: Begin[Verification]) -> None:
        self._begun = begin(self._opened)

    def wait(self) -> None:
        self._ready()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        return self._ready().verify(base, tokens, draft)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        return self._ready().generate(stopping, output)

    def close(self) -> None:
        """What was begun is waited for, after it was told that it need not go on: it must not run on into whatever
        comes next. How it failed is no matter any more."""
        self._over = True
        begun, self._begun = self._begun, None
        self._closed()
        if begun:
            with suppress(Exception):
                begun.result()
            self._closed()

    def _ready(self) -> Verification:
        begun, self._begun = self._begun, None  # waited for once: what it took and sent is noted then
        if begun:
            begun.result()
        elif not self._open:
            self._opened()
        assert self._verification is not None
        return self._verification

    def _opened(self) -> Verification:
        self._verification = self._verifier.open(self._prompt)
        if not self._over:
            self._verification.wait()
            self._open = True
        return self._verification

    def _closed(self) -> None:
        if self._verification is not None:
            self._verification.close()
