"""The log of a server, in which clients can cause only a bounded number of lines."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgecloud_sd.cloud import connections, service

_logger = logging.getLogger(__name__)
REPEAT_SECONDS = 10.0  # between two lines of the log about the same kind of event


class RepeatFilter(logging.Filter):
    """A filter that passes a repeated warning once per `REPEAT_SECONDS`, with the number that it has dropped.

    `clock` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._passed: dict[object, tuple[float, int]] = {}  # time of the last line, and the number dropped since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written to the log."""
        if record.levelno != logging.WARNING:
            return True
        now = self._clock()
        last, dropped = self._passed.get(record.msg, (-math.inf, 0))
        if now - last < REPEAT_SECONDS:
            self._passed[record.msg] = (last, dropped + 1)
            return False
        self._passed[record.msg] = (now, 0)
        if dropped:
            record.msg = f"{record.msg} ({dropped} more like it in {now - last:.0f} s)"
        return True


@contextmanager
def bounded_log() -> Iterator[None]:
    """Bound the warnings that clients can cause: of the event loop, of uvicorn, and of this room."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context["message"].startswith("socket.accept()"):
            _logger.warning("a connection cannot be accepted now (%s): raise ulimit -n", context["exception"])
        else:
            loop.default_exception_handler(context)

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(handle)
    repeat_filter = RepeatFilter()
    names = (__name__, connections.__name__, service.__name__, "uvicorn.error", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(repeat_filter)
    try:
        yield
    finally:
        loop.set_exception_handler(None)
        for logger in loggers:
            logger.removeFilter(repeat_filter)
