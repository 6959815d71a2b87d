"""Sessions: their owners, and the one that is closed to make room."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.cloud.sessions import UNUSED_TIMEOUT, NoRoom, OpenSession, Sessions, UnknownSession
from edgecloud_sd.events import Verdict
from edgecloud_sd.steps import Steps
from edgecloud_sd.stopping import Stopping


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


def test_the_owners_least_recently_used_session_makes_room() -> None:
    clock = Clock()
    sessions = Sessions(3, 1.0, clock)
    first, second, other = OpenSession("a", 0, 1), OpenSession("a", 0, 1), OpenSession("b", 0, 1)
    for clock.now, session in enumerate((other, first, second)):
        sessions.add(session)
    clock.now = 4
    sessions.get("a", first.name)
    assert sessions.add(OpenSession("a", 0, 1)) is second
    assert second.is_closed
    with pytest.raises(UnknownSession):
        sessions.get("a", second.name)
    assert not other.is_closed


def test_the_client_with_most_sessions_makes_room_even_if_they_are_busy() -> None:
    clock = Clock()
    sessions = Sessions(3, 1.0, clock)
    flood = [OpenSession("flood", 0, 1) for _ in range(3)]
    for clock.now, session in enumerate(flood):
        sessions.add(session)
    make_busy(flood[0])
    assert sessions.add(OpenSession("b", 0, 1)) is flood[1]  # an idle session goes first
    make_busy(flood[2])
    with pytest.raises(NoRoom):
        sessions.add(OpenSession("flood", 0, 1))  # a client does not close its own busy sessions
    assert sessions.add(OpenSession("c", 0, 1)) is flood[0]


def test_a_client_without_a_session_takes_an_idle_one_and_no_busy_one() -> None:
    sessions = Sessions(2, 1.0)
    busy, idle, newcomer = (OpenSession(owner, 0, 1) for owner in "abc")
    for session in (busy, idle):
        sessions.add(session)
    make_busy(busy)
    assert sessions.add(newcomer) is idle
    make_busy(newcomer)
    with pytest.raises(NoRoom, match="all 2 sessions that could make room are running a call: try again"):
        sessions.add(OpenSession("d", 0, 1))
    assert len(sessions) == 2


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30))
def test_no_client_loses_a_session_to_one_that_then_has_as_many(limit: int, adds: list[tuple[str, bool]]) -> None:
    clock = Clock()
    sessions = Sessions(limit, 1.0, clock)
    expected: list[OpenSession] = []
    for owner, is_busy in adds:
        clock.now += 1
        counts = Counter(session.owner for session in expected)
        new = OpenSession(owner, 0, 1)
        try:
            evicted = sessions.add(new)
        except NoRoom:
            assert len(expected) == limit
            # A client waits only if no other has many more sessions and all that it could take are busy.
            assert max(counts.values()) <= counts[owner] + 1
            assert all(s.lock.locked() for s in expected if s.owner == owner or not counts[owner])
            continue
        expected.append(new)
        if is_busy:
            make_busy(new)
        if evicted:
            expected.remove(evicted)
            own, others = counts[owner], counts[evicted.owner]
            assert evicted.owner == owner or others > own
            assert not evicted.lock.locked() or others > own + 1
        assert len(sessions) == len(expected) <= limit
        assert all(sessions.get(session.owner, session.name) is session for session in expected)
        for session in expected:  # `get` counts as a use
            clock.now += 1
            session.last_used = clock.now


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
