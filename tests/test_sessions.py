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
from edgecloud_sd.steps import Steps, run_steps
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


def make_session(owner: str, check: int = 0, tokens: int = 1) -> OpenSession:
    """Return a session that is not open yet."""

    def begin() -> Steps[FakeVerification]:
        yield 1
        return FakeVerification()

    return OpenSession(owner, check, tokens, begin)


def make_busy(session: OpenSession) -> None:
    """Lock a session as a running request does."""
    assert asyncio.run(session.lock.acquire())


def test_only_the_owner_finds_a_session() -> None:
    sessions = Sessions(2, 1.0)
    session = make_session("a")
    assert sessions.add(session) is None
    assert sessions.get("a", session.name) is session
    for owner, name in [("b", session.name), ("a", "nothing")]:
        with pytest.raises(UnknownSession):
            sessions.get(owner, name)


def test_names_have_128_random_bits() -> None:
    names = {make_session("a").name for _ in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {22}  # base64 of 16 bytes


def test_the_owners_least_recently_used_session_makes_room_unless_it_is_in_recent_use() -> None:
    clock = Clock()
    sessions = Sessions(3, 300.0, clock)
    first, second, other = make_session("a"), make_session("a"), make_session("b")
    for clock.now, session in enumerate((other, first, second)):
        sessions.add(session)
        sessions.get(session.owner, session.name)
    clock.now = 4
    sessions.get("a", first.name)
    clock.now = 2 + RECENT_USE - 0.5
    with pytest.raises(NoRoom, match="all 3 sessions are in use: try again in 1 s"):
        sessions.add(make_session("a"))
    clock.now = 2 + RECENT_USE
    assert sessions.add(make_session("a")) is second
    assert second.is_closed
    with pytest.raises(UnknownSession):
        sessions.get("a", second.name)
    assert not other.is_closed  # the least recently used one, but of a client with fewer sessions


def test_a_session_that_nobody_has_used_makes_room_first() -> None:
    clock = Clock()
    sessions = Sessions(2, 300.0, clock)
    used, unused = make_session("a"), make_session("a")
    for clock.now, session in enumerate((used, unused)):
        sessions.add(session)
    sessions.get("a", used.name)
    clock.now = 1 + RECENT_USE
    assert sessions.add(make_session("a")) is unused


def test_the_client_with_most_sessions_makes_room_even_if_they_are_busy() -> None:
    clock = Clock()
    sessions = Sessions(3, 300.0, clock)
    flood = [make_session("flood") for _ in range(3)]
    for clock.now, session in enumerate(flood):
        sessions.add(session)
    make_busy(flood[0])
    assert sessions.add(make_session("b")) is flood[1]  # an idle session goes first
    make_busy(flood[2])
    with pytest.raises(NoRoom):
        sessions.add(make_session("flood"))  # a client does not close its own busy sessions
    assert sessions.add(make_session("c")) is flood[0]


def test_a_client_without_a_session_takes_one_that_is_not_in_recent_use() -> None:
    clock = Clock()
    sessions = Sessions(2, 300.0, clock)
    busy, idle, newcomer = (make_session(owner) for owner in "abc")
    for session in (busy, idle):
        sessions.add(session)
    make_busy(busy)
    clock.now = RECENT_USE
    assert sessions.add(newcomer) is idle
    with pytest.raises(NoRoom) as refusal:
        sessions.add(make_session("d"))
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
    ended = [make_session("a") for _ in ends]
    for session in (*ended, make_session("a"), make_session("a"))[:2]:
        sessions.add(session)
    for clock.now, session in zip(ends, ended, strict=True):
        sessions.remove(session)
        sessions.add(make_session("a"))
    clock.now = now
    with pytest.raises(NoRoom) as refusal:
        sessions.add(make_session("a"))
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
        new = make_session(owner)
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
    task = asyncio.create_task(sessions.admit(make_session(owner, check)))
    await asyncio.sleep(0.002)
    return task


def test_waiting_opens_are_served_by_need_and_then_in_turn() -> None:
    async def scene() -> None:
        sessions = Sessions(3, 300.0)
        opened = {owner: make_session(owner) for owner in "abc"}
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
        session = make_session("a")
        sessions.add(session)
        monkeypatch.setattr(sessions_module, "ROOM_WAIT", 0.01)
        for check in (1, 2):  # only the first will come back
            with pytest.raises(NoRoom):
                await sessions.admit(make_session("a", check))
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
        session = make_session("a")
        sessions.add(session)
        with pytest.raises(NoRoom):
            await sessions.admit(make_session("a", 1))
        sessions.remove(session)
        assert await sessions.admit(make_session("a", 2)) is None

    run_scene(scene())


def test_idle_sessions_are_removed_and_busy_ones_stay() -> None:
    clock = Clock()
    sessions = Sessions(3, 10.0, clock)
    unused, used, busy = make_session("a"), make_session("a"), make_session("a")
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
    unused, used = make_session("a"), make_session("a")
    for session in (unused, used):
        sessions.add(session)
    sessions.get("a", used.name)
    clock.now = UNUSED_TIMEOUT + 1
    assert sessions.remove_idle() == [unused]
    clock.now = 301
    assert sessions.remove_idle() == [used]


def test_no_call_starts_on_a_removed_session() -> None:
    session, fake = make_session("a"), FakeVerification()
    session.verification = fake
    assert session.call(lambda: run_steps(session.open_steps())) is fake
    Sessions(1, 1.0).remove(session)  # at once, because `close` may have to wait
    with pytest.raises(UnknownSession):
        session.call(lambda: None)
    session.close()
    session.close()
    assert fake.times_closed == 1
    with pytest.raises(UnknownSession):
        session.call(lambda: None)


def test_a_failed_call_drops_the_cache_and_the_next_one_opens_the_prompt_again() -> None:
    session = make_session("a")
    failed = session.call(lambda: run_steps(session.open_steps()))
    with pytest.raises(ZeroDivisionError):
        session.call(lambda: 1 // 0)
    assert isinstance(failed, FakeVerification)
    assert failed.times_closed == 1
    assert session.call(lambda: run_steps(session.open_steps())) not in (None, failed)


@pytest.mark.parametrize(
    ("asker", "sizes", "largest"),
    [
        (0, {"a": [1], "b": [5, 6, 2]}, 2),
        (0, {"a": [9], "b": [5, 6]}, 2),  # the client with the most tokens, not the largest session
        (0, {"a": [3, 9], "b": [5, 6]}, 1),  # the asker's own other session
        (0, {"a": [9, 2], "b": [5, 6]}, 1),  # the asker counts as larger
        (0, {"a": [9], "b": [5]}, None),  # the asker's own session is the one
    ],
)
def test_the_client_with_the_most_tokens_pays_for_the_memory(
    asker: int, sizes: dict[str, list[int]], largest: int | None
) -> None:
    sessions = Sessions(9, 300.0)
    opened = [make_session(owner, tokens=size) for owner in sizes for size in sizes[owner]]
    for session in opened:
        sessions.add(session)
    assert sessions.find_largest(opened[asker]) is (None if largest is None else opened[largest])
    opened[-1].output_tokens = 100
    assert sessions.find_largest(opened[asker]) is opened[-1]


def test_closing_waits_for_the_running_call() -> None:
    session, fake = make_session("a"), FakeVerification()
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
    session = make_session("a")
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
    session = make_session("a")
    sessions.add(session)

    def call() -> list[OpenSession]:
        clock.now += 60
        return sessions.remove_idle()

    assert session.call(call) == []
    assert sessions.remove_idle() == [session]
