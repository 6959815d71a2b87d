"""The bounded log of a server."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import ExitStack

import pytest

from edgecloud_sd.cloud.log import RepeatFilter, bounded_log
from tests.support.asgi import run_scene
from tests.support.descriptors import soft_limit


def test_accept_errors_are_logged_once_and_connections_accepted_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", 0.01)

    async def scene() -> None:
        accepted = asyncio.Semaphore(0)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.release()
            writer.close()

        with bounded_log():
            server = await asyncio.start_server(accept, "127.0.0.1", 0)
            with ExitStack() as stack:
                for _ in range(3):
                    client = stack.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex(server.sockets[0].getsockname())
                free = os.dup(0)
                os.close(free)
                with soft_limit(free):
                    await asyncio.sleep(0.1)
                    assert accepted.locked()
                for _ in range(3):
                    await accepted.acquire()
            await asyncio.sleep(0.02)  # asyncio still has a try to accept for each error
            server.close()
            asyncio.get_running_loop().call_exception_handler({"message": "another error"})

    run_scene(scene())
    assert [record.getMessage() for record in caplog.records] == [
        "a connection cannot be accepted now ([Errno 24] Too many open files): raise ulimit -n",
        "another error",
    ]


@pytest.mark.parametrize("name", ["connections", "service"])
def test_a_warning_of_the_room_is_logged_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        with bounded_log():
            for number in range(9):
                logging.getLogger(f"edgecloud_sd.cloud.{name}").warning("call %d failed", number)

    run_scene(scene())
    assert [record.getMessage() for record in caplog.records] == ["call 0 failed"]


def test_a_repeated_warning_is_counted_and_an_error_never_dropped() -> None:
    seconds = 0.0
    repeats = RepeatFilter(lambda: seconds)

    def passes(level: int, text: str) -> str | None:
        record = logging.LogRecord("name", level, "file", 1, text, ("value",), None)
        return record.getMessage() if repeats.filter(record) else None

    assert passes(logging.WARNING, "one %s") == "one value"
    assert passes(logging.WARNING, "two %s") == "two value"
    assert [passes(logging.WARNING, "one %s") for _ in range(99)] == [None] * 99
    assert passes(logging.ERROR, "one %s") == passes(logging.ERROR, "one %s") == "one value"
    seconds = 10.0
    assert passes(logging.WARNING, "one %s") == "one value (99 more like it in 10 s)"
    seconds = 25.0
    assert passes(logging.WARNING, "one %s") == "one value"
