"""A server that closes: each request is finished or refused, and the process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from edgecloud_sd import wire
from edgecloud_sd.cloud import admission, closing
from edgecloud_sd.events import Prompt
from tests.support.asgi import (
    OTHER_KEY,
    Edge,
    EdgeSession,
    Response,
    SpyEngine,
    SpyModel,
    run_scene,
    running_app,
    wait_until,
)
from tests.support.suite import ROOT

REFUSED = "the server is shutting down: try again"


@dataclass
class Gate:
    """A gate in front of the model: calls wait until `opened` is set."""

    opened: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def wait(self, call: str) -> None:
        if call == "extend":
            self.calls += 1
            assert self.opened.wait(60)


@asynccontextmanager
async def busy_app(gate: Gate) -> AsyncIterator[tuple[FastAPI, EdgeSession, asyncio.Task[Response]]]:
    """Yield an application, and a session with a verification that the model works on."""
    async with running_app(SpyEngine(model=SpyModel(before_call=gate.wait))) as app:
        session = await Edge(app).open()
        running = asyncio.create_task(session.verify([3], 0, [1]))
        await wait_until(lambda: gate.calls == 1)
        try:
            yield app, session, running
        finally:
            gate.opened.set()


def is_refused(response: Response) -> bool:
    """Return whether a response is the one of a server that closes."""
    headers = response.headers
    return (response.status, response.json["detail"]) == (503, REFUSED) and (
        (headers["retry-after"], headers["connection"]) == ("1", "close")
    )


async def send_half_a_body(app: FastAPI) -> Response:
    """Return the response to a request whose body never ends."""
    sent: list[Any] = []

    async def receive() -> Any:
        if not sent:
            sent.append(None)
            return {"type": "http.request", "body": b"{", "more_body": True}
        return await asyncio.Event().wait()

    async def forward(scope: Any, _: Any, send: Any) -> None:
        await app(scope, receive, send)

    return await Edge(forward).request("POST", "/v1/sessions/x/verify")


def send_each_call(app: FastAPI, session: EdgeSession) -> list[asyncio.Task[Response]]:
    """Start requests that wait for a turn on the model, for the session's lock, and for a body."""
    body = wire.encode_prompt(Prompt((1, 2)))
    path = f"/v1/sessions?rule=greedy&check={wire.prompt_checksum(body, 'greedy')}"
    prompt = Edge(app, OTHER_KEY).request("POST", path, body, wire.OCTETS)
    calls = (prompt, session.verify([3], 0, [2]), session.generate(3), session.close(), send_half_a_body(app))
    return [asyncio.create_task(call) for call in calls]


def test_only_a_call_that_the_model_has_started_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "FINISH_SECONDS", 60)
    monkeypatch.setattr(closing, "FINISH_SECONDS", 60)
    monkeypatch.setattr(admission, "LINGER_SECONDS", 0.02)

    async def scene() -> None:
        gate = Gate()
        async with busy_app(gate) as (app, session, running):
            waiting = send_each_call(app, session)
            await wait_until(lambda: len(app.state.requests._requests) == 1 + len(waiting))
            end = asyncio.create_task(app.state.requests.close())
            await wait_until(lambda: app.state.requests.is_closing)
            for call in (*waiting, *send_each_call(app, session)):
                assert is_refused(await call)
            assert (await Edge(app, None).request("GET", "/health")).status == 200
            assert not running.done()
            gate.opened.set()
            assert (await running).status == 200
            assert await end == 0

    run_scene(scene())


def test_a_call_that_does_not_finish_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "FINISH_SECONDS", 0.02)
    monkeypatch.setattr(admission, "LINGER_SECONDS", 0.02)

    async def scene() -> None:
        async with busy_app(Gate()) as (app, _, running):
            assert await app.state.requests.close() == 1
            assert is_refused(await running)

    run_scene(scene())


@pytest.mark.parametrize("finishes", [True, False])
def test_a_stream_is_finished_or_has_no_last_line(finishes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "FINISH_SECONDS", 60 if finishes else 0.02)

    async def scene() -> None:
        may_go_on, parts = threading.Event(), list[bytes]()

        def wait(call: str) -> None:
            assert not parts or may_go_on.wait(60)

        async def read(part: bytes) -> bool:
            parts.append(part)
            return True

        async with running_app(SpyEngine(model=SpyModel(before_call=wait))) as app:
            session = await Edge(app).open()
            stream = asyncio.create_task(session.generate(5, read=read))
            await wait_until(lambda: bool(parts))
            end = asyncio.create_task(app.state.requests.close())
            await wait_until(lambda: app.state.requests.is_closing)
            if finishes:
                may_go_on.set()
            lines = (await stream).lines
            assert await end == (not finishes)
            may_go_on.set()
        assert ("end" in lines[-1], len(lines) == 6) == (finishes, finishes)

    run_scene(scene())


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    server = closing.GracefulServer(uvicorn.Config(Edge), closing.RunningRequests())
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, statuses) == (True, [])
    server.handle_exit(signal.SIGINT, None)
    assert statuses == [130]


SLOW_SERVER = """
import sys, time
from edgecloud_sd.cloud import __main__ as cli, closing, engine
from tests.support.asgi import SpyEngine, SpyModel

class Engine(SpyEngine):
    def close(self):
        time.sleep(float(sys.argv[3]))

closing.FINISH_SECONDS, closing.EXIT_SECONDS = float(sys.argv[1]), 4.0
wait = lambda call: call == "extend" and (print("at work", flush=True), time.sleep(float(sys.argv[2])))
engine.load_engine = lambda *_: Engine(model=SpyModel(before_call=wait))
cli.main(["serve", "--port", "0", "--until-stdin-closes"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cause", "finish", "call", "close", "status"),
    [
        ("SIGTERM", 30.0, 1.0, 0.0, 200),
        ("SIGINT", 0.2, 60.0, 0.0, 503),
        ("stdin", 0.2, 60.0, 60.0, 503),
    ],
)
def test_a_server_ends_in_order_whatever_its_model_does(
    cause: str, finish: float, call: float, close: float, status: int
) -> None:
    arguments = [sys.executable, "-c", SLOW_SERVER, *map(str, (finish, call, close))]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stderr is not None
        url = server.stdout.readline().strip()
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(verify_over_http(url)))
        thread.start()
        assert server.stdout.readline() == "at work\n"
        start = time.monotonic()
        server.stdin.close() if cause == "stdin" else server.send_signal(getattr(signal, cause))
        assert server.wait(30) == 0
        assert time.monotonic() - start < 15
        thread.join()
        assert answers == [status]
        assert "Traceback" not in server.stderr.read()


def verify_over_http(url: str) -> int:
    """Open a session, and return the status of a verification."""
    import http.client
    from urllib.parse import urlsplit

    async def request(scope: Any, receive: Any, send: Any) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        target = f"{scope['path']}?{scope['query_string'].decode()}"
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        connection.request(scope["method"], target, (await receive())["body"], headers)
        answer = connection.getresponse()
        headers_sent = [(name.lower().encode(), value.encode()) for name, value in answer.getheaders()]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers_sent})
        await send({"type": "http.response.body", "body": answer.read()})
        connection.close()

    async def scene() -> int:
        session = await Edge(request).open()
        return (await session.verify([3], 0, [1])).status

    return asyncio.run(scene())
