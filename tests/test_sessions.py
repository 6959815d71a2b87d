"""Whose sessions are whose, and which goes when there is no room."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.cloud.sessions import NoRoom, OpenSession, SessionClosed, Sessions
from edgecloud_sd.events import Verdict
from edgecloud_sd.stopping import Stopping


class Fake:
    """A verification that counts how often it was closed."""

    closed = 0
    waited = False

    def wait(self) -> None:
        self.waited = True

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        return Verdict(0, 0)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        return iter(())

    def close(self) -> None:
        self.closed += 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(held: OpenSession) -> None:
    assert asyncio.run(held.lock.acquire())


def test_a_session_is_found_by_its_owner_alone() -> None:
    sessions = Sessions(2, 1.0)
    held = OpenSession("a", 0, 1)
    assert sessions.add(held) is None
    assert sessions.get("a", held.name) is held
    for owner, name in [("b", held.name), ("a", "nothing")]:
        with pytest.raises(KeyError):
            sessions.get(owner, name)


def test_names_are_of_128_random_bits() -> None:
    names = {OpenSession("a", 0, 1).name for _ in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {22}  # base64 of 16 bytes


def test_room_is_made_by_the_least_recently_used_of_ones_own() -> None:
    clock = Clock()
    sessions = Sessions(3, 1.0, clock)
    first, second, others = OpenSession("a", 0, 1), OpenSession("a", 0, 1), OpenSession("b", 0, 1)
    for clock.now, held in enumerate((others, first, second)):
        sessions.add(held)
    clock.now = 4
    sessions.get("a", first.name)
    assert sessions.add(OpenSession("a", 0, 1)) is second
    assert second.gone
    with pytest.raises(KeyError):
        sessions.get("a", second.name)
    assert not others.gone


def test_who_holds_most_makes_room_for_another_even_at_work() -> None:
    clock = Clock()
    sessions = Sessions(3, 1.0, clock)
    held = [OpenSession("flood", 0, 1) for _ in range(3)]
    for clock.now, each in enumerate(held):
        sessions.add(each)
    work(held[0])
    assert sessions.add(OpenSession("b", 0, 1)) is held[1]  # rather one that is idle
    work(held[2])
    with pytest.raises(NoRoom):
        sessions.add(OpenSession("flood", 0, 1))  # but nobody throws out what they are at work on themselves
    assert sessions.add(OpenSession("c", 0, 1)) is held[0]


def test_without_a_session_one_gets_somebodys_idle_one_and_no_busy_one() -> None:
    sessions = Sessions(2, 1.0)
    held = [OpenSession("a", 0, 1), OpenSession("b", 0, 1)]
    for each in held:
        sessions.add(each)
    work(held[0])
    newcomer = OpenSession("c", 0, 1)
    assert sessions.add(newcomer) is held[1]
    work(newcomer)
    with pytest.raises(NoRoom, match="all 2 sessions that could make room are at work"):
        sessions.add(OpenSession("d", 0, 1))
    assert len(sessions) == 2


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30))
def test_nobody_loses_a_session_to_one_who_would_hold_as_much(limit: int, adds: list[tuple[str, bool]]) -> None:
    clock = Clock()
    sessions = Sessions(limit, 1.0, clock)
    there: list[OpenSession] = []
    for owner, busy in adds:
        clock.now += 1
        counts = Counter(each.owner for each in there)
        new = OpenSession(owner, 0, 1)
        try:
            out = sessions.add(new)
        except NoRoom:
            assert len(there) == limit
            # no starving: only who works on all their own, or comes to a house full of equals, has to wait
            assert max(counts.values()) <= counts[owner] + 1
            assert all(each.lock.locked() for each in there if each.owner == owner or not counts[owner])
            continue
        there.append(new)
        if busy:
            work(new)
        if out:
            there.remove(out)
            mine, theirs = counts[owner], counts[out.owner]
            assert out.owner == owner or theirs > mine
            assert not out.lock.locked() or theirs > mine + 1
        assert len(sessions) == len(there) <= limit
        assert all(sessions.get(each.owner, each.name) is each for each in there)
        for each in there:  # `get` is a use
            clock.now += 1
            each.used = clock.now


def test_the_unused_are_taken_out_and_those_at_work_are_not() -> None:
    clock = Clock()
    sessions = Sessions(3, 10.0, clock)
    unused, used, busy = OpenSession("a", 0, 1), OpenSession("a", 0, 1), OpenSession("a", 0, 1)
    for held in (unused, used, busy):
        sessions.add(held)
    work(busy)
    clock.now = 9
    sessions.get("a", used.name)
    assert sessions.idle() == []
    clock.now = 11
    assert sessions.idle() == [unused]
    assert unused.gone
    assert len(sessions) == 2


def test_no_call_begins_on_a_session_that_went() -> None:
    held, fake = OpenSession("a", 0, 1), Fake()
    held.open(lambda: fake)
    assert fake.waited  # what a client is told is open is prefilled
    assert held.call(lambda verification: verification.verify(0, [1], [])) == Verdict(0, 0)
    Sessions(1, 1.0).drop(held)  # before it is closed, which may have to wait
    with pytest.raises(SessionClosed):
        held.call(lambda verification: verification.verify(0, [1], []))
    held.close()
    held.close()
    assert fake.closed == 1
    with pytest.raises(SessionClosed):
        held.call(lambda verification: verification.verify(0, [1], []))
    with pytest.raises(SessionClosed):
        held.open(lambda: fake)


def test_closing_waits_for_the_call_that_runs() -> None:
    held, fake = OpenSession("a", 0, 1), Fake()
    held.open(lambda: fake)
    begun, end = threading.Event(), threading.Event()

    def call(verification: object) -> int:
        begun.set()
        assert end.wait(5)
        return fake.closed

    closed_during: list[int] = []
    calling = threading.Thread(target=lambda: closed_during.append(held.call(call)))
    closing = threading.Thread(target=held.close)
    calling.start()
    assert begun.wait(5)
    closing.start()
    closing.join(0.05)
    end.set()
    for each in (calling, closing):
        each.join(5)
    assert closed_during == [0]
    assert fake.closed == 1
