"""The prompts that are open on the server: how many and how large, whose they are, and which goes for want of room."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from edgecloud_sd import wire
from edgecloud_sd.verifier import Verification

_T = TypeVar("_T")
FRAMES_A_SECOND = 100  # of the log-mel spectrogram


@dataclass(frozen=True)
class ServiceLimits:
    """What one server takes on."""

    max_sessions: int = 64
    idle_timeout: float = 300.0  # s
    max_audio_seconds: float = 60.0
    max_tokens: int = 4096  # of a prompt and its caption together, and so of a session's cache

    @property
    def max_frames(self) -> int:
        return int(self.max_audio_seconds * FRAMES_A_SECOND)

    def largest_prompt(self, mel_bins: int) -> int:
        """Bytes of one with the longest audio."""
        return 8 + wire.MAX_HEADER + 2 * mel_bins * self.max_frames + 4 * self.max_tokens


class SessionClosed(Exception):
    """A session that was taken away while a call of it waited."""


class NoRoom(Exception):
    """Every session that might go is at work."""


@dataclass(eq=False)
class OpenSession:
    """One open prompt. `context` is what the cloud and its edge both know to be committed."""

    owner: str
    begun: int  # check of the prompt
    prompt_tokens: int
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # which nobody can guess
    context: list[int] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one request at a time
    used: float = 0.0
    gone: bool = False  # no call may begin any more
    _verification: Verification | None = None
    _alone: threading.Lock = field(default_factory=threading.Lock)  # a call outlives a request that is cancelled

    def open(self, begin: Callable[[], Verification]) -> None:
        """Returns when the prompt is prefilled. Blocks, as the two below. Gone for a session taken away before."""
        with self._alone:
            if self.gone:
                raise SessionClosed
            self._verification = begin()
            self._verification.wait()

    def call(self, what: Callable[[Verification], _T]) -> _T:
        """Gone for a session that was taken away before."""
        with self._alone:
            if self.gone or self._verification is None:
                raise SessionClosed
            return what(self._verification)

    def close(self) -> None:
        """When the call that runs has ended, give back what the session occupies."""
        self.gone = True
        with self._alone:
            closing, self._verification = self._verification, None
            if closing is not None:
                closing.close()


class Sessions:
    """At most `limit`, each gone after `idle` seconds without a call. `clock` gives seconds."""

    def __init__(self, limit: int, idle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._idle = idle
        self._clock = clock
        self._held: dict[str, OpenSession] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, held: OpenSession) -> OpenSession | None:
        """Take a session in, and out the one that has to be closed for it, if any: none but a client that holds more
        than the new one's owner then will loses one to it, even one at work. Without such a client, the owner loses
        its own least recently used, or whoever did not use theirs for longest where the owner has none. Full where
        all of those are at work.
        """
        out = self._least(held.owner) if len(self._held) >= self._limit else None
        if out:
            self.drop(out)
        held.used = self._clock()
        self._held[held.name] = held
        return out

    def _least(self, owner: str) -> OpenSession:
        counts = Counter(each.owner for each in self._held.values())
        most = max(counts.values())
        greedy = most > counts[owner] + 1
        if greedy:
            there = [each for each in self._held.values() if counts[each.owner] == most]
        else:
            there = [each for each in self._held.values() if each.owner == owner or not counts[owner]]
        may = [each for each in there if greedy or not each.lock.locked()]
        if not may:
            raise NoRoom(f"all {len(there)} sessions that could make room are at work")
        return min(may, key=lambda each: (each.lock.locked(), each.used))

    def get(self, owner: str, name: str) -> OpenSession:
        """KeyError for a session that is not there, and just so for one of somebody else's."""
        held = self._held[name]
        if held.owner != owner:
            raise KeyError(name)
        held.used = self._clock()
        return held

    def drop(self, held: OpenSession) -> None:
        """Nobody finds it any more. Nothing happens for one that is out already."""
        held.gone = True
        self._held.pop(held.name, None)

    def idle(self) -> list[OpenSession]:
        """Take out those that have not been used for too long."""
        since = self._clock() - self._idle
        out = [each for each in self._held.values() if each.used < since and not each.lock.locked()]
        for each in out:
            self.drop(each)
        return out
