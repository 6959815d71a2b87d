"""The queue in front of the model: clients take turns, so a client with many calls delays only its own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Completed(Generic[_T]):
    """The result of a call, its seconds in the queue and its seconds on a thread."""

    result: _T
    queue_seconds: float
    run_seconds: float


class FairQueue:
    """A queue that runs blocking calls on `concurrency` threads and serves its clients in turn.

    The queue has no limit of its own: the caller limits how many calls wait.
    """

    def __init__(self, concurrency: int) -> None:
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="engine")
        self._free_threads = concurrency
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # key: client; in the order of their turns
        self._last_client = ""  # the client of the latest turn

    async def run(self, client: str, call: Callable[[], _T]) -> Completed[_T]:
        """Run `call` on a thread when the client's turn comes, and return its result.

        A call that has started keeps its thread until it ends, even if this coroutine is cancelled.
        """
        arrival = time.perf_counter()
        await self._wait_for_turn(client)
        start = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        running.add_done_callback(self._give_next_turn)
        result = await asyncio.shield(running)
        return Completed(result, start - arrival, time.perf_counter() - start)

    def close(self) -> None:
        """Accept no more calls. Running calls end on their own."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, client: str) -> None:
        if self._free_threads:
            self._free_threads -= 1
            self._last_client = client
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_next_turn()  # this call had just received the turn and will not use it
            raise

    def _give_next_turn(self, ended_call: asyncio.Future[Any] | None = None) -> None:
        if ended_call is not None and not ended_call.cancelled():
            ended_call.exception()  # reading it stops asyncio's warning if the caller of `run` has gone
        while self._waiting:
            # A client that arrived during a call goes before the next call of the same client.
            client = next((name for name in self._waiting if name != self._last_client), self._last_client)
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # at the end: behind all other clients
            if not turn.done():
                self._last_client = client
                turn.set_result(None)
                return
        self._free_threads += 1
