"""The open prompts of a server: their number and size, their owners, and the session that goes when room is needed."""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from edgecloud_sd import wire
from edgecloud_sd.cloud.identity import FRAMES_PER_SECOND
from edgecloud_sd.verifier import SteppedVerification

_T = TypeVar("_T")
# Seconds without a second request after which a new session is closed, because its client may never have received its
# name. An edge asks later only if its own prefill takes so long, and then it opens the prompt again.
UNUSED_TIMEOUT = 60.0


@dataclass(frozen=True)
class ServiceLimits:
    """The limits of one server."""

    max_sessions: int = 64
    idle_timeout: float = 300.0  # seconds
    max_audio_seconds: float = 60.0  # per prompt
    max_tokens: int = 4096  # prompt and output together, which bounds the KV cache of a session
    max_draft: int = wire.MAX_DRAFT  # tokens of one draft

    def __post_init__(self) -> None:
        if self.max_tokens > wire.MAX_IDS:
            raise ValueError(
                f"--max-tokens: must be at most {wire.MAX_IDS}, which fit a message, not {self.max_tokens}"
            )

    @property
    def max_frames(self) -> int:
        """Return the frames of the longest audio."""
        return math.ceil(self.max_audio_seconds * FRAMES_PER_SECOND)

    @property
    def max_message_bytes(self) -> int:
        """Return the size in bytes of the longest JSON message, with spaces, because the event loop has to parse it."""
        return 12 * (self.max_tokens + self.max_draft) + 1024

    def max_prompt_bytes(self, mel_bins: int) -> int:
        """Return the size in bytes of a prompt with the longest audio and the most tokens."""
        return 8 + wire.MAX_HEADER + 2 * mel_bins * self.max_frames + 4 * self.max_tokens


class ServiceError(Exception):
    """A request that the service refuses. The client may read the message."""


class UnknownSession(ServiceError):
    """A session that the client does not have.

    The message is the same for a session that never existed, one that was closed, and one of another client.
    """

    def __init__(self) -> None:
        super().__init__("no such session: open the prompt again")


class NoRoom(ServiceError):
    """A new session for which no other session can be closed, because all of them are running a call."""


@dataclass(eq=False)
class OpenSession:
    """One open prompt on the server."""

    owner: str  # the client
    prompt_check: int  # CRC-32, see `edgecloud_sd.wire`
    prompt_tokens: int
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # 128 random bits, so nobody guesses it
    context: list[int] = field(default_factory=list)  # committed tokens that both sides know
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # for one request at a time
    last_used: float = 0.0  # the end of the latest request so far, in seconds on the clock of `Sessions`
    is_used: bool = False  # a second request has named the session, so the client has received its name
    is_closed: bool = False  # no call may start
    verification: SteppedVerification | None = None  # None until its prompt is prefilled
    # A call goes on after its request was cancelled and has released `lock`: this lock keeps the next call waiting.
    _call_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def opened(self) -> SteppedVerification:
        """The verification of the prompt."""
        if self.verification is None:
            raise UnknownSession
        return self.verification

    @property
    def is_in_use(self) -> bool:
        """True while a request runs, or a call that its request has left behind."""
        return self.lock.locked() or self._call_lock.locked()

    def call(self, use: Callable[[], _T]) -> _T:
        """Return `use()`, which may block. Raise UnknownSession if the session was closed before."""
        with self._call_lock:
            if self.is_closed:
                raise UnknownSession
            return use()

    def close(self) -> None:
        """Free the memory of the session. Block until its running call has ended."""
        self.is_closed = True
        with self._call_lock:
            verification, self.verification = self.verification, None
            if verification is not None:
                verification.close()


class Sessions:
    """At most `limit` open sessions, each removed `idle_timeout` seconds after the end of its last request.

    A session that nobody has used since it was opened is removed after `UNUSED_TIMEOUT` seconds, if that is earlier.
    `clock` returns seconds.
    """

    def __init__(self, limit: int, idle_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._clock = clock
        self._by_name: dict[str, OpenSession] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, session: OpenSession) -> OpenSession | None:
        """Add a session, and return the session that was removed to make room, if any.

        The least recently used of these candidates is removed:

        1. The sessions of the client with the most, if it has at least two more than the owner. Idle ones go first.
        2. Otherwise, the owner's own idle sessions.
        3. If the owner has no session, the idle sessions of all clients.

        Raise NoRoom without a candidate.
        """
        evicted = self._choose_evicted(session.owner) if len(self._by_name) >= self._limit else None
        if evicted:
            self.remove(evicted)
        session.last_used = self._clock()
        self._by_name[session.name] = session
        return evicted

    def _choose_evicted(self, owner: str) -> OpenSession:
        counts = Counter(session.owner for session in self._by_name.values())
        highest = max(counts.values())
        is_unfair = highest > counts[owner] + 1
        if is_unfair:
            candidates = [session for session in self._by_name.values() if counts[session.owner] == highest]
        else:
            candidates = [s for s in self._by_name.values() if s.owner == owner or not counts[owner]]
        removable = [session for session in candidates if is_unfair or not session.is_in_use]
        if not removable:
            raise NoRoom(f"all {len(candidates)} sessions that could make room are running a call: try again")
        return min(removable, key=lambda session: (session.is_in_use, session.last_used))

    def get(self, owner: str, name: str) -> OpenSession:
        """Return the owner's session of this name and note its use. Raise UnknownSession if the owner has none."""
        session = self._by_name.get(name)
        if session is None or session.owner != owner:
            raise UnknownSession
        session.last_used = self._clock()
        session.is_used = True
        return session

    @asynccontextmanager
    async def use(self, session: OpenSession) -> AsyncIterator[None]:
        """Lock a session for one request, whose end starts the idle time: a stream may be longer than the timeout."""
        async with session.lock:
            try:
                yield
            finally:
                session.last_used = self._clock()

    def remove(self, session: OpenSession) -> None:
        """Remove a session, so that no call on it may start. A session may be removed twice."""
        session.is_closed = True
        self._by_name.pop(session.name, None)

    def remove_idle(self) -> list[OpenSession]:
        """Remove and return the sessions whose last request ended longer ago than their timeout."""
        now, unused_timeout = self._clock(), min(UNUSED_TIMEOUT, self._idle_timeout)

        def is_idle(session: OpenSession) -> bool:
            timeout = self._idle_timeout if session.is_used else unused_timeout
            return session.last_used < now - timeout and not session.is_in_use

        idle = [session for session in self._by_name.values() if is_idle(session)]
        for session in idle:
            self.remove(session)
        return idle
