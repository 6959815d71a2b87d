"""Clients take turns on the engine's threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.cloud.fair_queue import FairQueue
from tests.support.asgi import play, until


class Work:
    """Calls that note when they run, and last until they are let go."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.ended: list[str] = []
        self.go = threading.Event()

    def call(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.order.append(name)
            assert self.go.wait(5)
            self.ended.append(name)
            return name

        return work


def test_one_who_asks_for_much_waits_behind_itself() -> None:
    async def scene() -> None:
        turns, work = FairQueue(1), Work()
        names = ["a0", "a1", "a2", "a3", "b0", "c0", "b1"]  # as they come
        tasks = []
        for name in names:
            tasks.append(asyncio.create_task(turns.run(name[0], work.call(name))))
            await asyncio.sleep(0)
        work.go.set()
        assert [(await task).result for task in tasks] == names
        assert work.order == ["a0", "b0", "a1", "c0", "b1", "a2", "a3"]
        turns.close()

    play(scene())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.lists(st.sampled_from("abc"), min_size=1, max_size=15), st.data())
def test_all_are_run_each_client_in_its_order_and_never_too_many_at_once(
    slots: int, owners: list[str], data: st.DataObject
) -> None:
    fails = data.draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners)))
    lock, now, most = threading.Lock(), 0, 0
    order: list[int] = []

    def call(number: int) -> None:
        nonlocal now, most
        with lock:
            order.append(number)
            now += 1
            most = max(now, most)
        time.sleep(0.0002)
        with lock:
            now -= 1
        if fails[number]:
            raise LookupError(number)

    async def scene() -> None:
        turns = FairQueue(slots)
        asked = [turns.run(owner, lambda number=number: call(number)) for number, owner in enumerate(owners)]  # type: ignore[misc]
        got = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(each, LookupError) for each in got] == fails
        assert turns._free == slots
        turns.close()

    play(scene())
    assert most <= slots
    assert sorted(order) == list(range(len(owners)))
    if slots == 1:
        for owner in set(owners):
            mine = [number for number in order if owners[number] == owner]
            assert mine == sorted(mine)
        # whoever waits is overtaken by nobody twice
        for number, owner in enumerate(owners):
            before = [owners[each] for each in order[1 : order.index(number)]]
            mine_before = before.count(owner)
            for other in set(owners) - {owner}:
                assert before.count(other) <= mine_before + 1


def test_what_waits_and_is_cancelled_leaves_its_place() -> None:
    async def scene() -> None:
        turns, work = FairQueue(1), Work()
        running, waiting, last = (
            asyncio.create_task(turns.run("a", work.call(name))) for name in ("running", "waiting", "last")
        )
        await until(lambda: bool(work.order))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        work.go.set()
        assert (await last).result == "last"
        assert (await running).queued < (await last).queued
        assert work.order == ["running", "last"]
        turns.close()

    play(scene())


def test_what_is_cancelled_with_its_turn_just_given_passes_it_on() -> None:
    async def scene() -> None:
        turns = FairQueue(1)
        turns._free = 0
        first, second = (asyncio.create_task(turns._turn("a")) for _ in range(2))
        await asyncio.sleep(0)
        turns._next()
        first.cancel()  # its turn is given, and it has not yet run on
        await asyncio.wait_for(second, 1)
        assert first.cancelled()
        turns.close()

    play(scene())


def test_a_running_call_that_is_cancelled_keeps_its_thread_to_the_end() -> None:
    async def scene() -> None:
        turns, work = FairQueue(1), Work()
        running = asyncio.create_task(turns.run("a", work.call("running")))
        await until(lambda: bool(work.order))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        after = asyncio.create_task(turns.run("b", work.call("after")))
        await asyncio.sleep(0.02)
        assert work.order == ["running"]
        work.go.set()
        assert (await after).queued > 0.015  # the turn was not its own before
        assert work.ended == ["running", "after"]
        turns.close()

    play(scene())


def test_the_time_in_the_queue_is_told_from_the_time_at_work() -> None:
    async def scene() -> None:
        turns = FairQueue(1)
        first, second = await asyncio.gather(
            turns.run("a", lambda: time.sleep(0.05)), turns.run("a", lambda: time.sleep(0.02))
        )
        assert first.queued < 0.04 < 0.05 <= first.took
        assert second.queued >= 0.045
        assert second.took >= 0.02
        turns.close()

    play(scene())
