"""The queue of calls: clients take turns on the threads of the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.cloud.fair_queue import FairQueue
from tests.support.asgi import run_scene, wait_until


class Work:
    """Calls that record when they run and end when `may_end` is set."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.may_end = threading.Event()

    def call(self, name: str) -> Callable[[], str]:
        def run() -> str:
            self.started.append(name)
            assert self.may_end.wait(60)
            self.ended.append(name)
            return name

        return run


def test_a_client_with_many_calls_delays_only_its_own() -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        names = ["a0", "a1", "a2", "a3", "b0", "c0", "b1"]  # in the order of their arrival
        tasks = []
        for name in names:
            tasks.append(asyncio.create_task(queue.run(name[0], work.call(name))))
            await asyncio.sleep(0)
        work.may_end.set()
        assert [(await task).result for task in tasks] == names
        assert work.started == ["a0", "b0", "a1", "c0", "b1", "a2", "a3"]
        queue.close()

    run_scene(scene())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.lists(st.sampled_from("abc"), min_size=1, max_size=15), st.data())
def test_every_call_runs_in_its_clients_order_and_within_the_number_of_threads(
    concurrency: int, owners: list[str], data: st.DataObject
) -> None:
    fails = data.draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners)))
    lock, running, most_running = threading.Lock(), 0, 0
    order: list[int] = []

    def call(number: int) -> None:
        nonlocal running, most_running
        with lock:
            order.append(number)
            running += 1
            most_running = max(running, most_running)
        time.sleep(0.0002)
        with lock:
            running -= 1
        if fails[number]:
            raise LookupError(number)

    async def scene() -> None:
        queue = FairQueue(concurrency)
        calls = [queue.run(owner, partial(call, number)) for number, owner in enumerate(owners)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, LookupError) for result in results] == fails
        assert queue._free_threads == concurrency
        queue.close()

    run_scene(scene())
    assert most_running <= concurrency
    assert sorted(order) == list(range(len(owners)))
    if concurrency == 1:
        for owner in set(owners):
            numbers = [number for number in order if owners[number] == owner]
            assert numbers == sorted(numbers)
        # No client overtakes a waiting call twice.
        for number, owner in enumerate(owners):
            earlier = [owners[other] for other in order[1 : order.index(number)]]
            for other_owner in set(owners) - {owner}:
                assert earlier.count(other_owner) <= earlier.count(owner) + 1


def test_a_cancelled_waiting_call_leaves_the_queue() -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        running, waiting, last = (
            asyncio.create_task(queue.run("a", work.call(name))) for name in ("running", "waiting", "last")
        )
        await wait_until(lambda: bool(work.started))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        work.may_end.set()
        assert (await last).result == "last"
        assert (await running).queue_seconds < (await last).queue_seconds
        assert work.started == ["running", "last"]
        queue.close()

    run_scene(scene())


def test_a_call_that_is_cancelled_with_its_turn_passes_the_turn_on() -> None:
    async def scene() -> None:
        queue = FairQueue(1)
        queue._free_threads = 0
        first, second = (asyncio.create_task(queue._wait_for_turn("a")) for _ in range(2))
        await asyncio.sleep(0)
        queue._give_next_turn()
        first.cancel()  # after its turn has come, and before it continues
        await second
        assert first.cancelled()
        queue.close()

    run_scene(scene())


def test_a_cancelled_running_call_keeps_its_thread_until_it_ends() -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        running = asyncio.create_task(queue.run("a", work.call("running")))
        await wait_until(lambda: bool(work.started))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        after = asyncio.create_task(queue.run("b", work.call("after")))
        await wait_until(lambda: "b" in queue._waiting)
        is_waiting = time.perf_counter()
        await asyncio.sleep(0.02)
        assert work.started == ["running"]
        waited = time.perf_counter() - is_waiting
        work.may_end.set()
        assert (await after).queue_seconds >= waited
        assert work.ended == ["running", "after"]
        queue.close()

    run_scene(scene())


def test_the_time_in_the_queue_is_separate_from_the_time_on_a_thread() -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        start = time.perf_counter()
        first = asyncio.create_task(queue.run("a", work.call("first")))
        await wait_until(lambda: bool(work.started))
        first_runs = time.perf_counter()
        second = asyncio.create_task(queue.run("a", lambda: time.sleep(0.02)))
        await wait_until(lambda: "a" in queue._waiting)
        second_waits = time.perf_counter()
        await asyncio.sleep(0.02)
        released = time.perf_counter()
        work.may_end.set()
        assert (await first).queue_seconds <= first_runs - start
        assert (await first).run_seconds >= released - first_runs
        assert (await second).queue_seconds >= released - second_waits
        assert (await second).run_seconds >= 0.02
        queue.close()

    run_scene(scene())
