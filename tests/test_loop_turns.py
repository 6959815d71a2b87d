"""Turns on the event loop: one at a time for each client, with a pause after it if others are present."""

from __future__ import annotations

import asyncio
import gc
import time
from itertools import pairwise

import pytest

from edgecloud_sd.cloud import loop_turns
from edgecloud_sd.cloud.loop_turns import LoopTurns
from tests.support.asgi import run_scene

BUSY = 0.003  # seconds


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_client_pauses_as_long_as_its_turn_took_unless_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    monkeypatch.setattr(loop_turns, "RECENT", 0.0 if is_alone else 60.0)
    turns, starts = LoopTurns(), list[float]()

    async def work() -> None:
        await turns.wait("greedy")
        starts.append(time.perf_counter())
        time.sleep(BUSY)  # as parsing does

    async def scene() -> None:
        await turns.wait("polite")
        await asyncio.gather(*(work() for _ in range(6)))

    run_scene(scene())
    gaps = [later - start for start, later in pairwise(starts)]
    assert min(gaps) < 2 * BUSY if is_alone else min(gaps) >= 2 * BUSY


def test_clients_do_not_wait_for_each_other() -> None:
    async def scene() -> None:
        turns, order = LoopTurns(), list[str]()

        async def work(client: str) -> None:
            await turns.wait(client)
            order.append(client)

        await asyncio.gather(*(work(client) for client in "aaaabc"))
        assert "".join(order[:3]) == "abc"
        assert sorted(order) == list("aaaabc")

    run_scene(scene())


def test_a_cancelled_request_takes_no_turn_and_nothing_is_left() -> None:
    async def scene() -> None:
        turns = LoopTurns()
        await turns.wait("a")
        waiting, last = (asyncio.create_task(turns.wait("a")) for _ in range(2))
        await asyncio.sleep(0)
        waiting.cancel()
        await last
        assert waiting.cancelled()
        del waiting, last  # the traceback of a cancelled task refers to its lock
        await asyncio.sleep(0.01)
        gc.collect()
        assert not turns._locks

    run_scene(scene())
