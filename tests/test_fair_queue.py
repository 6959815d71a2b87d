"""The queue of calls: clients take turns on the threads of the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
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
        assert work.started == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]
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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 64)), min_size=1, max_size=40))
def test_clients_that_wait_have_used_the_same_cost_but_for_a_call_of_each(calls: list[tuple[str, int]]) -> None:
    used = dict.fromkeys("abc", 0)
    left = Counter(client for client, _ in calls)
    largest = max(cost for _, cost in calls)

    def call(client: str, cost: int) -> None:
        used[client] += cost
        left[client] -= 1
        waiting = [used[other] for other in "abc" if left[other]]
        assert max(waiting, default=0) - min(waiting, default=0) <= 2 * largest

    async def scene() -> None:
        queue = FairQueue(1)
        queue._free_threads = 0  # until all calls wait
        tasks = [asyncio.create_task(queue.run(client, partial(call, client, cost), cost)) for client, cost in calls]
        await asyncio.sleep(0)
        queue._give_next_turn()
        await asyncio.gather(*tasks)
        queue.close()

    run_scene(scene())


@pytest.mark.parametrize("others", ["g", "gh"])
def test_a_small_call_waits_for_one_large_call_of_each_other_client(others: str) -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        work.may_end.set()

        def has_started(number: int) -> bool:
            return len(work.started) > number

        greedy = [asyncio.create_task(queue.run(name, work.call(name), 64)) for name in others * 20]
        for number in range(4):
            await wait_until(partial(has_started, 3 * number))
            before = len(work.started)
            await queue.run("polite", work.call("polite"), 5)
            assert len(work.started[before:]) <= len(others) + 2, work.started  # the last one may follow it
        await asyncio.gather(*greedy)
        assert queue._used.keys() <= {*others, "polite"}
        queue.close()

    run_scene(scene())


def test_a_client_that_arrives_late_has_neither_debt_nor_credit() -> None:
    async def scene() -> None:
        queue, work = FairQueue(1), Work()
        for number in range(5):
            work.may_end.set()
            await queue.run("a", work.call(f"alone{number}"), 100)
        work.may_end.clear()
        running = asyncio.create_task(queue.run("a", work.call("a0"), 10))
        await wait_until(lambda: "a0" in work.started)
        rest = [asyncio.create_task(queue.run(name[0], work.call(name), 10)) for name in ("a1", "b0", "b1", "b2", "a2")]
        await asyncio.sleep(0)
        work.may_end.set()
        await asyncio.gather(running, *rest)
        assert work.started[5:] == ["a0", "b0", "a1", "b1", "a2", "b2"]
        queue.close()

    run_scene(scene())


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
        first, second = (asyncio.create_task(queue._wait_for_turn("a", 1.0)) for _ in range(2))
        await asyncio.sleep(0)
        queue._give_next_turn()
        first.cancel()  # after its turn has come, and before it continues
        await second
        assert first.cancelled()
        assert queue._used["a"] == 1.0  # the cancelled call costs nothing
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
