"""Sessions: their owners, and the one that is closed to make room."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgecloud_sd.cloud import sessions as sessions_module
from edgecloud_sd.cloud.sessions import RECENT_USE, UNUSED_TIMEOUT, NoRoom, OpenSession, Sessions, UnknownSession
from edgecloud_sd.events import Verdict
from edgecloud_sd.steps import Steps
from edgecloud_sd.stopping import Stopping
from tests.support.asgi import run_scene


class FakeVerification:
    """A verification that counts its calls of `close`."""

    times_closed = 0

    def wait(self) -> None:
        pass

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        return Verdict(0, 0)

    def verify_steps(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Steps[Verdict]:
        yield from ()
        return Verdict(0, 0)

    def feed_steps(self, output: Sequence[int]) -> Steps[None]:
        yield from ()

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        return iter(())

    def close(self) -> None:
        self.times_closed += 1


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_busy(session: OpenSession) -> None:
    """Lock a session as a running request does."""
    assert asyncio.run(session.lock.acquire())


def test_only_the_owner_finds_a_session() -> None:
    sessions = Sessions(2, 1.0)
    session = OpenSession("a", 0, 1)
    assert sessions.add(session) is None
    assert sessions.get("a", session.name) is session
    for owner, name in [("b", session.name), ("a", "nothing")]:
        with pytest.raises(UnknownSession):
            sessions.get(owner, name)


def test_names_have_128_random_bits() -> None:
    names = {OpenSession("a", 0, 1).name for _ in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {22}  # base64 of 16 bytes


def test_the_owners_least_recently_used_session_makes_room_unless_it_is_in_recent_use() -> None:
    clock = Clock()
    sessions = Sessions(3, 300.0, clock)
    first, second, other = OpenSession("a", 0, 1), OpenSession("a", 0, 1), OpenSession("b", 0, 1)
    for clock.now, session in enumerate((other, first, second)):
        sessions.add(session)
        sessions.get(session.owner, session.name)
    clock.now = 4
    sessions.get("a", first.name)
    clock.now = 2 + RECENT_USE - 0.5
    with pytest.raises(NoRoom, match="all 3 sessions are in use: try again in 1 s"):
        sessions.add(OpenSession("a", 0, 1))
    clock.now = 2 + RECENT_USE
    assert sessions.add(OpenSession("a", 0, 1)) is second
    assert second.is_closed
    with pytest.raises(UnknownSession):
        sessions.get("a", second.name)
    assert not other.is_closed  # the least recently used one, but of a client with fewer sessions


def test_a_session_that_nobody_has_used_makes_room_first() -> None:
    clock = Clock()
    sessions = Sessions(2, 300.0, clock)
    used, unused = OpenSession("a", 0, 1), OpenSession("a", 0, 1)
    for clock.now, session in enumerate((used, unused)):
        sessions.add(session)
    sessions.get("a", used.name)
    clock.now = 1 + RECENT_USE
    assert sessions.add(OpenSession("a", 0, 1)) is unused


def test_the_client_with_most_sessions_makes_room_even_if_they_are_busy() -> None:
    clock = Clock()
    sessions = Sessions(3, 300.0, clock)
    flood = [OpenSession("flood", 0, 1) for _ in range(3)]
    for clock.now, session in enumerate(flood):
        sessions.add(session)
    make_busy(flood[0])
    assert sessions.add(OpenSession("b", 0, 1)) is flood[1]  # an idle session goes first
    make_busy(flood[2])
    with pytest.raises(NoRoom):
        sessions.add(OpenSession("flood", 0, 1))  # a client does not close its own busy sessions
    assert sessions.add(OpenSession("c", 0, 1)) is flood[0]


def test_a_client_without_a_session_takes_one_that_is_not_in_recent_use() -> None:
    clock = Clock()
    sessions = Sessions(2, 300.0, clock)
    busy, idle, newcomer = (OpenSession(owner, 0, 1) for owner in "abc")
    for session in (busy, idle):
        sessions.add(session)
    make_busy(busy)
    clock.now = RECENT_USE
    assert sessions.add(newcomer) is idle
    with pytest.raises(NoRoom) as refusal:
        sessions.add(OpenSession("d", 0, 1))
    assert refusal.value.seconds == RECENT_USE
    assert len(sessions) == 2


@pytest.mark.parametrize(
    ("ends", "now", "expected"),
    [
        ([], 1.0, 1.0),  # the others are as old as this time, and may last as long again
        ([], 6.0, 4.0),  # until the session of an edge that went away at 0 s is no longer in recent use
        ([0.0, 3.0], 3.0, 1.5),  # a session ends each 1.5 s
        ([1.9, 2.0], 2.0, 1.0),  # at least 1 s
    ],
)
def test_a_refused_client_learns_when_there_may_be_room(ends: list[float], now: float, expected: float) -> None:
    clock = Clock()
    sessions = Sessions(2, 300.0, clock)
    ended = [OpenSession("a", 0, 1) for _ in ends]
    for session in (*ended, OpenSession("a", 0, 1), OpenSession("a", 0, 1))[:2]:
        sessions.add(session)
    for clock.now, session in zip(ends, ended, strict=True):
        sessions.remove(session)
        sessions.add(OpenSession("a", 0, 1))
    clock.now = now
    with pytest.raises(NoRoom) as refusal:
        sessions.add(OpenSession("a", 0, 1))
    assert refusal.value.seconds == pytest.approx(expected)


class SessionsMachine(RuleBasedStateMachine):
    """Clients that open, use, stream, close and leave sessions in any order, with the sessions that must be open."""

    @initialize(limit=st.integers(1, 5))
    def start(self, limit: int) -> None:
        self.limit, self.clock = limit, Clock()
        self.sessions = Sessions(limit, 300.0, self.clock)
        self.expected: list[OpenSession] = []

    def is_recent(self, session: OpenSession) -> bool:
        return session.is_in_use or self.clock.now - session.last_used < RECENT_USE

    @rule(owner=st.sampled_from("abcd"))
    def open(self, owner: str) -> None:
        counts = Counter(session.owner for session in self.expected)
        new = OpenSession(owner, 0, 1)
        try:
            evicted = self.sessions.add(new)
        except NoRoom:
            assert len(self.expected) == self.limit
            # Nobody is refused below its fair share, nor while a session is left that it may take.
            assert max(counts.values()) <= counts[owner] + 1
            left = [s for s in self.expected if not self.is_recent(s)]
            assert all(s.owner != owner and counts[s.owner] <= counts[owner] for s in left)
            return
        self.expected.append(new)
        if evicted:
            assert len(self.expected) == self.limit + 1
            own, others = counts[owner], counts[evicted.owner]
            assert evicted.owner == owner or others > own
            fair_share = self.limit / len({*counts, owner})
            assert not self.is_recent(evicted) or (others > own + 1 and others > fair_share)
            self.expected.remove(evicted)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), action=st.sampled_from(["use", "stream", "end_stream", "close"]))
    def touch(self, data: st.DataObject, action: str) -> None:
        session = data.draw(st.sampled_from(self.expected))
        if action == "close":
            self.sessions.remove(session)
            self.expected.remove(session)
        elif action == "stream" and not session.is_in_use:
            make_busy(session)
        elif action == "end_stream" and session.is_in_use:
            session.lock.release()
        else:
            assert self.sessions.get(session.owner, session.name) is session

    @rule(seconds=st.sampled_from([0.1, 3.0, RECENT_USE, UNUSED_TIMEOUT, 300.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for session in self.sessions.remove_idle():
            assert not self.is_recent(session)
            self.expected.remove(session)

    @invariant()
    def no_more_than_the_limit_are_open(self) -> None:
        assert len(self.sessions) == len(self.expected) <= self.limit
        assert not any(session.is_closed for session in self.expected)


TestSessionsMachine = SessionsMachine.TestCase


async def begin(sessions: Sessions, owner: str, check: int = 0) -> asyncio.Task[OpenSession | None]:
    """Start to admit a session, and return when it is in the line."""
    task = asyncio.create_task(sessions.admit(OpenSession(owner, check, 1)))
    await asyncio.sleep(0.002)
    return task


def test_waiting_opens_are_served_by_need_and_then_in_turn() -> None:
    async def scene() -> None:
        sessions = Sessions(3, 300.0)
        opened = {owner: OpenSession(owner, 0, 1) for owner in "abc"}
        for session in opened.values():
            sessions.add(session)
        second_of_b, gone, d, e = [await begin(sessions, owner) for owner in "bfde"]
        gone.cancel()
        for ending, served, waiting in [("a", d, e), ("c", e, second_of_b), ("b", second_of_b, None)]:
            sessions.remove(opened[ending])
            assert await served is None
            assert waiting is None or not waiting.done()
        assert len(sessions) == 3
        assert not sessions._waiting

    run_scene(scene())


def test_an_open_that_was_refused_keeps_its_place_if_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        clock = Clock()
        sessions = Sessions(1, 300.0, clock)
        session = OpenSession("a", 0, 1)
        sessions.add(session)
        monkeypatch.setattr(sessions_module, "ROOM_WAIT", 0.01)
        for check in (1, 2):  # only the first will come back
            with pytest.raises(NoRoom):
                await sessions.admit(OpenSession("a", check, 1))
            clock.now += 0.2
        monkeypatch.setattr(sessions_module, "ROOM_WAIT", 60.0)
        later = await begin(sessions, "a", 3)
        sessions.remove(session)
        await asyncio.sleep(0.002)
        assert not later.done()  # the place is for the refused one, which is due soon
        refused = await begin(sessions, "a", 1)
        assert await refused is None
        clock.now += 60
        sessions.remove(next(iter(sessions._by_name.values())))
        assert await later is None  # the second refused one did not come back in time

    run_scene(scene())


def test_an_open_takes_free_room_at_last_even_if_a_refused_one_has_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        monkeypatch.setattr(sessions_module, "ROOM_WAIT", 0.02)
        sessions = Sessions(1, 300.0, Clock())
        session = OpenSession("a", 0, 1)
        sessions.add(session)
        with pytest.raises(NoRoom):
            await sessions.admit(OpenSession("a", 1, 1))
        sessions.remove(session)
        assert await sessions.admit(OpenSession("a", 2, 1)) is None

    run_scene(scene())


def test_idle_sessions_are_removed_and_busy_ones_stay() -> None:
    clock = Clock()
    sessions = Sessions(3, 10.0, clock)
    unused, used, busy = OpenSession("a", 0, 1), OpenSession("a", 0, 1), OpenSession("a", 0, 1)
    for session in (unused, used, busy):
        sessions.add(session)
    make_busy(busy)
    clock.now = 9
    sessions.get("a", used.name)
    assert sessions.remove_idle() == []
    clock.now = 11
    assert sessions.remove_idle() == [unused]
    assert unused.is_closed
    assert len(sessions) == 2


def test_a_session_that_nobody_has_used_is_removed_earlier() -> None:
    clock = Clock()
    sessions = Sessions(3, 300.0, clock)
    unused, used = OpenSession("a", 0, 1), OpenSession("a", 0, 1)
    for session in (unused, used):
        sessions.add(session)
    sessions.get("a", used.name)
    clock.now = UNUSED_TIMEOUT + 1
    assert sessions.remove_idle() == [unused]
    clock.now = 301
    assert sessions.remove_idle() == [used]


def test_no_call_starts_on_a_removed_session() -> None:
    session, fake = OpenSession("a", 0, 1), FakeVerification()
    session.verification = fake
    assert session.call(lambda: session.opened.verify(0, [1], [])) == Verdict(0, 0)
    Sessions(1, 1.0).remove(session)  # at once, because `close` may have to wait
    with pytest.raises(UnknownSession):
        session.call(lambda: None)
    session.close()
    session.close()
    assert fake.times_closed == 1
    with pytest.raises(UnknownSession):
        session.call(lambda: None)
    with pytest.raises(UnknownSession):
        _ = session.opened


def test_closing_waits_for_the_running_call() -> None:
    session, fake = OpenSession("a", 0, 1), FakeVerification()
    session.verification = fake
    has_started, may_end = threading.Event(), threading.Event()

    def call() -> int:
        has_started.set()
        assert may_end.wait(60)
        return fake.times_closed

    closed_during_call: list[int] = []
    calling = threading.Thread(target=lambda: closed_during_call.append(session.call(call)))
    closing = threading.Thread(target=session.close)
    calling.start()
    assert has_started.wait(60)
    closing.start()
    closing.join(0.05)  # time for a wrong close to run
    may_end.set()
    for thread in (calling, closing):
        thread.join(60)
    assert closed_during_call == [0]
    assert fake.times_closed == 1


def test_the_idle_time_starts_at_the_end_of_the_last_request() -> None:
    clock = Clock()
    sessions = Sessions(1, 10.0, clock)
    session = OpenSession("a", 0, 1)
    sessions.add(session)

    async def stream(seconds: float) -> None:
        sessions.get("a", session.name)
        with suppress(asyncio.CancelledError):
            async with sessions.use(session):
                clock.now += seconds
                assert sessions.remove_idle() == []
                raise asyncio.CancelledError  # the client goes away

    asyncio.run(stream(19))
    clock.now += 10
    assert sessions.remove_idle() == []
    clock.now += 1
    assert sessions.remove_idle() == [session]


def test_a_call_that_its_request_has_left_behind_keeps_its_session() -> None:
    clock = Clock()
    sessions = Sessions(1, 10.0, clock)
    session = OpenSession("a", 0, 1)
    sessions.add(session)

    def call() -> list[OpenSession]:
        clock.now += 60
        return sessions.remove_idle()

    assert session.call(call) == []
    assert sessions.remove_idle() == [session]
