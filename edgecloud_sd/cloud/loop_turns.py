"""Turns on the event loop: a client with many requests delays the requests of others, and the model, only a little."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

RECENT = 1.0  # seconds after a turn for which its client counts as present


class LoopTurns:
    """Turns for the work of requests beside the model, such as parsing, which blocks the event loop.

    A client gets one turn at a time. If others are present, it then pauses for as long as the loop was busy. So it uses
    at most half of the loop, and of the interpreter's lock, which the model's thread needs as well. Clients do not wait
    for each other, and a client alone does not pause.
    """

    def __init__(self) -> None:
        # Its callers keep a lock alive: those that wait, and the timer that releases it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._present: dict[str, float] = {}  # key: client; the time of its latest turn, the oldest first

    async def wait(self, client: str) -> None:
        """Return in the client's turn, which lasts until the caller waits for something else."""
        lock = self._locks.get(client)
        if lock is None:
            lock = self._locks[client] = asyncio.Lock()
        await lock.acquire()
        start = asyncio.get_running_loop().time()
        self._note(client, start)
        asyncio.get_running_loop().call_soon(self._end_turn, lock, start)

    def _note(self, client: str, now: float) -> None:
        self._present.pop(client, None)
        self._present[client] = now
        while self._present[oldest := next(iter(self._present))] < now - RECENT:
            del self._present[oldest]

    def _end_turn(self, lock: asyncio.Lock, start: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(loop.time() - start if len(self._present) > 1 else 0.0, lock.release)
