"""Whose call runs next: clients take turns, so that one who asks for much waits behind itself, not before all."""

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
    """What a call gave, how long it waited for its turn and how long it took: s."""

    result: _T
    queued: float
    took: float


class FairQueue:
    """Runs blocking calls of the engine on `concurrency` threads. The caller limits how many may wait."""

    def __init__(self, concurrency: int) -> None:
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="engine")
        self._free = concurrency
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their turns
        self._last = ""  # whose turn it was

    async def run(self, client: str, call: Callable[[], _T]) -> Completed[_T]:
        """`call()` when it is the client's turn. Once begun it holds its thread to its end, cancelled or not."""
        asked = time.perf_counter()
        await self._turn(client)
        begun = time.perf_counter()
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        running.add_done_callback(self._next)
        result = await asyncio.shield(running)
        return Completed(result, begun - asked, time.perf_counter() - begun)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if self._free:
            self._free -= 1
            self._last = client
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()  # it had just been given
            raise

    def _next(self, ended: asyncio.Future[Any] | None = None) -> None:
        if ended is not None and not ended.cancelled():
            ended.exception()  # whoever waited was told, or is gone
        while self._waiting:
            # whoever came while a call ran goes before the next call of the same client
            client = next((each for each in self._waiting if each != self._last), self._last)
            mine = self._waiting.pop(client)
            turn = mine.popleft()
            if mine:
                self._waiting[client] = mine  # behind all others
            if not turn.done():
                self._last = client
                turn.set_result(None)
                return
        self._free += 1
