"""The open prompts of a server: their number and size, their owners, and the session that goes when room is needed."""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import anyio

from edgecloud_sd import wire
from edgecloud_sd.cloud.identity import FRAMES_PER_SECOND
from edgecloud_sd.steps import Steps
from edgecloud_sd.verifier import SteppedVerification

_T = TypeVar("_T")
# Seconds without a second request after which a new session is closed, because its client may never have received its
# name. An edge asks later only if its own prefill takes so long, and then it opens the prompt again.
UNUSED_TIMEOUT = 60.0
# Seconds after its last request for which a session is in recent use. A slow edge drafts for a few seconds between two
# verifications, and it would have to prefill its prompt again.
RECENT_USE = 10.0
# Seconds for which an open waits for room before it is refused. An edge that opens its next prompt while its DELETE of
# the last one is on its way needs milliseconds, and a caption of another edge often ends within this time. It is less
# than the 2 s after which an edge that may finish alone gives up, so that the edge learns that the cloud is full.
ROOM_WAIT = 1.5
LATE = 0.5  # seconds after its due time for which a refused open is still expected


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

    seconds = 1.0  # to wait before the next attempt, if that may succeed


class UnknownSession(ServiceError):
    """A session that the client does not have.

    The message is the same for a session that never existed, one that was closed, and one of another client.
    """

    def __init__(self) -> None:
        super().__init__("no such session: open the prompt again")


class NoRoom(ServiceError):
    """A new session for which no other session can be closed yet."""

    def __init__(self, sessions: int, seconds: float) -> None:
        super().__init__(f"all {sessions} sessions are in use: try again in {math.ceil(seconds)} s")
        self.seconds = seconds  # until there may be room


@dataclass(eq=False)
class OpenSession:
    """One open prompt on the server."""

    owner: str  # the client
    prompt_check: int  # CRC-32, see `edgecloud_sd.wire`
    prompt_tokens: int
    begin: Callable[[], Steps[SteppedVerification]]  # encodes and prefills the prompt
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # 128 random bits, so nobody guesses it
    context: list[int] = field(default_factory=list)  # committed tokens that both sides know
    output_tokens: int = 0  # tokens after the prompt that the cache may contain
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # for one request at a time
    waits_since: float = 0.0  # the first time that its client asked for room, in seconds on the clock of `Sessions`
    last_used: float = 0.0  # the end of the latest request so far, in seconds on the clock of `Sessions`
    is_used: bool = False  # a second request has named the session, so the client has received its name
    is_closed: bool = False  # no call may start
    verification: SteppedVerification | None = None  # None until its prompt is prefilled, and after a failure
    # A call goes on after its request was cancelled and has released `lock`: this lock keeps the next call waiting.
    _call_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokens(self) -> int:
        """The tokens that the cache may contain, audio positions included."""
        return self.prompt_tokens + self.output_tokens

    @property
    def is_in_use(self) -> bool:
        """True while a request runs, or a call that its request has left behind."""
        return self.lock.locked() or self._call_lock.locked()

    def open_steps(self) -> Steps[SteppedVerification]:
        """Return the verification, and prefill the prompt in steps first if there is none."""
        if self.verification is None:
            self.verification = yield from self.begin()
        return self.verification

    def call(self, use: Callable[[], _T]) -> _T:
        """Return `use()`, which may block. Raise UnknownSession if the session was closed before.

        A failure drops the verification, because its cache may contain half of a forward pass.
        """
        with self._call_lock:
            if self.is_closed:
                raise UnknownSession
            try:
                return use()
            except BaseException:
                self._drop_verification()
                raise

    def close(self) -> None:
        """Free the memory of the session. Block until its running call has ended."""
        self.is_closed = True
        with self._call_lock:
            self._drop_verification()

    def _drop_verification(self) -> None:
        verification, self.verification = self.verification, None
        if verification is not None:
            verification.close()


class _Refusal(NamedTuple):
    """A refused open: the time of its first attempt, and the time at which it was told to come back."""

    since: float
    due: float


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
        self._waiting: list[OpenSession] = []  # opens that wait for room
        self._refused: dict[tuple[str, int], _Refusal] = {}  # key: owner and prompt check
        self._has_changed = asyncio.Event()  # a session or a waiting open has gone
        self._ends: deque[float] = deque(maxlen=16)  # when the latest sessions ended that did not make room

    def __len__(self) -> int:
        return len(self._by_name)

    async def admit(self, session: OpenSession) -> OpenSession | None:
        """Do the work of `add`, but wait up to `ROOM_WAIT` seconds for room.

        The open whose client has the fewest sessions is served first, then the one that has waited for the longest.
        An open that was refused keeps its place if it comes back when it was told to.
        """
        session.waits_since = self._recall_refusal(session)
        self._waiting.append(session)
        deadline = anyio.current_time() + ROOM_WAIT
        try:
            while True:
                self._has_changed.clear()
                left = deadline - anyio.current_time()
                try:
                    return self.add(session, after_refused=left > 0)
                except NoRoom as error:
                    refusal = error
                if left <= 0:
                    due = self._clock() + math.ceil(refusal.seconds)
                    self._refused[session.owner, session.prompt_check] = _Refusal(session.waits_since, due)
                    raise refusal
                with anyio.move_on_after(min(left, 1.0)):  # a session may fall out of recent use meanwhile
                    await self._has_changed.wait()
        finally:
            self._waiting.remove(session)
            self._has_changed.set()

    def add(self, session: OpenSession, after_refused: bool = False) -> OpenSession | None:
        """Add a session, and return the session that was removed to make room, if any.

        A session is in recent use while a request runs, and for `RECENT_USE` seconds after it. Without room for this
        session and for the opens that wait before it, one of these makes room:

        1. The sessions of the client with the most, if it has at least two more than the owner. It then has more than
           its fair share of all sessions, so recent use protects none of them.
        2. Otherwise, the sessions that are not in recent use, of the owner and of clients with more sessions.

        The first are those that are not in use, then those that nobody has used since they were opened, then the least
        recently used. With `after_refused`, opens that were refused and should come back soon go before this one as
        well. Raise NoRoom without a candidate.
        """
        counts = Counter(other.owner for other in self._by_name.values())
        before = self._count_before(session, counts, after_refused)
        room = self._limit - len(self._by_name)
        evicted = None
        if room <= before:
            evicted = self._choose_evicted(session.owner, counts) if room == 0 else None
            if evicted is None:
                raise NoRoom(len(self._by_name), self._estimate_room(session.owner, counts, before))
            evicted.is_closed = True
            del self._by_name[evicted.name]
        session.last_used = self._clock()
        self._by_name[session.name] = session
        return evicted

    def _recall_refusal(self, session: OpenSession) -> float:
        """Return the time since which this open waits, which may have been refused before."""
        now = self._clock()
        self._refused = {key: refusal for key, refusal in self._refused.items() if refusal.due + ROOM_WAIT > now}
        return self._refused.pop((session.owner, session.prompt_check), _Refusal(now, now)).since

    def _count_before(self, session: OpenSession, counts: Counter[str], after_refused: bool) -> int:
        """Return how many opens that wait go before this one.

        With `after_refused`, refused opens count too, from `ROOM_WAIT` seconds before they should come back. Only one
        of each other client counts, so that no client can hold up others with opens that never come back.
        """
        now = self._clock()
        if session not in self._waiting:
            session.waits_since = now
        places = [(counts[other.owner], other.waits_since) for other in self._waiting]
        if after_refused:
            absent: dict[tuple[str, int], float] = {}
            for (owner, check), refusal in self._refused.items():
                if -LATE <= refusal.due - now <= ROOM_WAIT:
                    key = (owner, check if owner == session.owner else 0)
                    absent[key] = min(refusal.since, absent.get(key, now))
            places += [(counts[owner], since) for (owner, _), since in absent.items()]
        return sum(place < (counts[session.owner], session.waits_since) for place in places)

    def _choose_evicted(self, owner: str, counts: Counter[str]) -> OpenSession | None:
        now, highest = self._clock(), max(counts.values())
        sessions = self._by_name.values()
        if highest > counts[owner] + 1:
            candidates = [session for session in sessions if counts[session.owner] == highest]
        else:
            candidates = [s for s in sessions if s.owner == owner or counts[s.owner] > counts[owner]]
            candidates = [s for s in candidates if not s.is_in_use and now - s.last_used >= RECENT_USE]

        def order(session: OpenSession) -> tuple[bool, bool, float]:
            return session.is_in_use, session.is_used or now - session.last_used < RECENT_USE, session.last_used

        return min(candidates, key=order, default=None)

    def _estimate_room(self, owner: str, counts: Counter[str], before: int) -> float:
        """Return the seconds until a session may make room, or until enough of them end at the rate so far."""
        now = self._clock()
        ages = [
            0.0 if session.is_in_use else now - session.last_used
            for session in self._by_name.values()
            if session.owner == owner or counts[session.owner] > counts[owner]
        ]
        first = min((session.waits_since for session in self._by_name.values()), default=now)
        first = self._ends[0] if self._ends else first
        until_end = (now - first) / max(len(self._ends), 1) * (before + 1)
        return max(min(RECENT_USE - max(ages, default=0.0), until_end), 1.0)

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
        if self._by_name.pop(session.name, None):
            self._ends.append(self._clock())
            self._has_changed.set()

    def find_largest(self, asker: OpenSession) -> OpenSession | None:
        """Return the largest session but `asker` of the client whose sessions have the most tokens, or None.

        The owner of `asker` counts as the larger one of two equal clients.
        """
        tokens: Counter[str] = Counter()
        for session in self._by_name.values():
            tokens[session.owner] += session.tokens
        owner = max(tokens, key=lambda name: (tokens[name], name == asker.owner), default="")
        candidates = [s for s in self._by_name.values() if s.owner == owner and s is not asker]
        return max(candidates, key=lambda session: session.tokens, default=None)

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
