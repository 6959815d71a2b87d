"""The cloud's application without a socket, for several clients at once, on an engine that records its calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fastapi import FastAPI
from starlette.types import ASGIApp, Message

from edgecloud_sd import wire
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.cloud.server import create_app
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.serving import ToyEngine
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, ToySession, random_table

KEY, OTHER_KEY = "k" * 43, "o" * 43
AUDIO = VOCABULARY - 1  # the audio placeholder


@dataclass
class SpyModel:
    """A toy model that records each call and runs `before_call` first, with which a test can wait or raise."""

    model: ToyModel = field(default_factory=lambda: ToyModel(random_table(VOCABULARY, 0), frozenset()))
    before_call: Callable[[str], None] = lambda call: None
    calls: list[str] = field(default_factory=list)
    sessions: list[SpySession] = field(default_factory=list)

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def record(self, call: str) -> None:
        self.calls.append(call)
        self.before_call(call)

    def open(self, prompt: Prompt) -> SpySession:
        self.record("open")
        self.sessions.append(SpySession(self.model.open(prompt), self))
        return self.sessions[-1]


class SpySession:
    """A session of a `SpyModel`."""

    def __init__(self, session: ToySession, spy: SpyModel) -> None:
        self._session = session
        self._spy = spy
        self.is_closed = False

    @property
    def tokens(self) -> list[int]:
        return self._session.tokens

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        self._spy.record("extend")
        return self._session.extend(tokens)

    def truncate(self, length: int) -> None:
        self.is_closed = length == 0
        self._session.truncate(length)


@dataclass
class SpyEngine(ToyEngine):
    """An engine on a `SpyModel`, with an audio placeholder in its vocabulary."""

    model: SpyModel = field(default_factory=SpyModel)

    @property
    def identity(self) -> Identity:
        toy = super().identity
        return replace(toy, traits=replace(toy.traits, audio_token=AUDIO))


@dataclass(frozen=True)
class Response:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass(frozen=True)
class Edge:
    """A client of an application, identified by its key. It goes away when `is_gone` is set."""

    app: ASGIApp
    key: str | None = KEY
    is_gone: asyncio.Event | None = None

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        content_type: str = JSON,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        read: Callable[[bytes], Awaitable[bool]] | None = None,
        may_fail: bool = False,
    ) -> Response:
        """Send a request and return its response.

        `read` receives each part of the response's body; the client goes away when it returns False. With `may_fail`,
        an error of the application ends the response, as a server would cut the connection. No response has status 0.
        """
        path, _, query = path.partition("?")
        chunks = [body] if isinstance(body, bytes) else list(body)
        requests: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
            for number, chunk in enumerate(chunks, start=1)
        ]
        is_gone = self.is_gone or asyncio.Event()
        responses: list[Message] = []

        async def receive() -> Message:
            if requests:
                return requests.pop(0)
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            responses.append(message)
            if read and message["type"] == "http.response.body" and not await read(message.get("body", b"")):
                is_gone.set()

        authorization = [(b"authorization", f"Bearer {self.key}".encode())] if self.key else []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [*authorization, (b"content-type", content_type.encode()), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        try:
            await self.app(scope, receive, send)
        except Exception:
            if not may_fail:
                raise
        if not responses:
            return Response(0, {}, b"")
        start = responses[0]
        return Response(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in responses[1:]),
        )

    async def open(self, prompt: Prompt | None = None, rule: str = "greedy", wants_rest: bool = False) -> EdgeSession:
        prompt = prompt or Prompt((1, 2, 3))
        body = wire.encode_prompt(prompt)
        check = wire.prompt_checksum(body, rule, wants_rest)
        rest = "&rest=1" if wants_rest else ""
        response = await self.request("POST", f"/v1/sessions?rule={rule}{rest}&check={check}", body, OCTETS)
        assert response.status == 201, response
        return EdgeSession(self, response.json["session"], prompt, check)


@dataclass(frozen=True)
class EdgeSession:
    """A session as its client sees it."""

    edge: Edge
    name: str
    prompt: Prompt
    prompt_check: int

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.name}"

    async def verify(self, context: Sequence[int], base: int, draft: Sequence[int], /, **changes: object) -> Response:
        """Send a request to verify, with `changes` to its fields."""
        message = message_fields(wire.build_verify_request(self.prompt_check, context, base, draft))
        return await self.edge.request("POST", f"{self.path}/verify", json.dumps(message | changes).encode())

    async def generate(
        self, limit: int, output: Sequence[int] = (), read: Callable[[bytes], Awaitable[bool]] | None = None
    ) -> Response:
        body = wire.dumps(wire.build_generate_request(self.prompt_check, output, (), limit))
        return await self.edge.request("POST", f"{self.path}/generate", body, read=read, may_fail=True)

    async def close(self) -> Response:
        return await self.edge.request("DELETE", self.path)


def message_fields(message: Any) -> dict[str, Any]:
    """Return the fields of a message of `edgecloud_sd.wire`, as its JSON has them."""
    fields: dict[str, Any] = json.loads(wire.dumps(message))
    return fields


@asynccontextmanager
async def running_app(
    engine: ToyEngine | None = None, limits: ServiceLimits | None = None, keys: Sequence[str] = (KEY, OTHER_KEY)
) -> AsyncIterator[FastAPI]:
    """Yield an application while its lifespan runs."""
    app = create_app(engine or SpyEngine(), limits, keys)
    async with app.router.lifespan_context(app):
        yield app


def run_scene(scene: Coroutine[Any, Any, None], seconds: float = 60.0) -> None:
    """Run a coroutine. Fail if it is still running after `seconds`."""

    async def bounded() -> None:
        await asyncio.wait_for(scene, seconds)

    asyncio.run(bounded())


async def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition is true. `run_scene` limits the time."""
    while not condition():
        await asyncio.sleep(0.001)
