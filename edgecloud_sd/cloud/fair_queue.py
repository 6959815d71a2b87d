"""The queue in front of the model: clients share it by the cost of their calls, so a client delays only its own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Completed(Generic[_T]):
    """The result of a call, its seconds in the queue and its seconds on a thread."""

    result: _T
    queue_seconds: float
    run_seconds: float


class _Turn(NamedTuple):
    """A call that waits."""

    cost: float
    has_come: asyncio.Future[None]


class FairQueue:
    """A queue that runs blocking calls on `concurrency` threads and shares them equally by the cost of the calls.

    The next call is of the waiting client that has used the least: start-time fair queueing (Goyal, Vin and Cheng
    1996). Deficit round robin (Shreedhar and Varghese 1996) gives the same shares, but its quantum lets a client with
    small calls run many of them in a row. A client that arrives has used as much as the client of the latest turn, so
    it has neither debt nor credit. Two clients that wait never differ by more than one call of each. A call no larger
    than the others waits for at most one call of each other client.

    The queue has no limit of its own: the caller limits how many calls wait, and how long one runs. `on_turn` is called
    by the task of each call whose turn has come.
    """

    def __init__(self, concurrency: int, on_turn: Callable[[], None] = lambda: None) -> None:
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="engine")
        self._on_turn = on_turn
        self._free_threads = concurrency
        self._waiting: dict[str, deque[_Turn]] = {}  # key: client; the client of the latest turn is last
        self._used: dict[str, float] = {}  # key: client; cost of its calls, counted from what others had used
        self._now = 0.0  # `_used` of the client of the latest turn, before that turn

    async def run(self, client: str, call: Callable[[], _T], cost: float = 1.0) -> Completed[_T]:
        """Run `call` on a thread when the client's turn comes, and return its result.

        A call that has started keeps its thread until it ends, even if this coroutine is cancelled.
        """
        arrival = time.perf_counter()
        await self._wait_for_turn(client, cost)
        self._on_turn()
        start = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        running.add_done_callback(self._give_next_turn)
        result = await asyncio.shield(running)
        return Completed(result, start - arrival, time.perf_counter() - start)

    def close(self) -> None:
        """Accept no more calls. Running calls end on their own."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, client: str, cost: float) -> None:
        if client not in self._waiting:
            self._used[client] = max(self._used.get(client, 0.0), self._now)
        if self._free_threads:
            self._free_threads -= 1
            self._charge(client, cost)
            return
        turn = _Turn(cost, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn.has_come
        except asyncio.CancelledError:
            if turn.has_come.done() and not turn.has_come.cancelled():
                self._used[client] = self._used.get(client, self._now) - cost
                self._give_next_turn()  # this call had just received the turn and will not use it
            raise

    def _charge(self, client: str, cost: float) -> None:
        self._now = max(self._used[client], self._now)
        self._used[client] += cost
        self._used = {name: used for name, used in self._used.items() if used > self._now or name in self._waiting}

    def _give_next_turn(self, ended_call: asyncio.Future[Any] | None = None) -> None:
        if ended_call is not None and not ended_call.cancelled():
            ended_call.exception()  # reading it stops asyncio's warning if the caller of `run` has gone
        while self._waiting:
            client = min(self._waiting, key=self._used.__getitem__)
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # at the end: behind all clients that have used as much
            if not turn.has_come.done():
                self._charge(client, turn.cost)
                turn.has_come.set_result(None)
                return
        self._free_threads += 1
