"""The cloud's server without a socket: requests of several clients at once, and an engine that tells what it does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from fastapi import FastAPI
from starlette.types import ASGIApp, Message

from edgecloud_sd import wire
from edgecloud_sd.cloud.engine import Identity
from edgecloud_sd.cloud.server import create_app
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.serving import ToyEngine
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, ToySession, random_table

KEY, OTHER_KEY = "k" * 43, "o" * 43
AUDIO = VOCABULARY - 1  # the id that stands for audio


@dataclass
class Spy:
    """A toy model that notes each call, and does `before` it whatever a test wants: wait, or raise."""

    model: ToyModel = field(default_factory=lambda: ToyModel(random_table(VOCABULARY, 0), frozenset()))
    before: Callable[[str], None] = lambda call: None
    calls: list[str] = field(default_factory=list)
    sessions: list[SpySession] = field(default_factory=list)

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.before(call)

    def open(self, prompt: Prompt) -> SpySession:
        self.note("open")
        self.sessions.append(SpySession(self.model.open(prompt), self))
        return self.sessions[-1]


class SpySession:
    def __init__(self, session: ToySession, spy: Spy) -> None:
        self._session = session
        self._spy = spy
        self.closed = False

    @property
    def tokens(self) -> list[int]:
        return self._session.tokens

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        self._spy.note("extend")
        return self._session.extend(tokens)

    def truncate(self, length: int) -> None:
        self.closed = length == 0
        self._session.truncate(length)


@dataclass
class SpyEngine(ToyEngine):
    """On a spy, with an audio placeholder among its ids."""

    model: Spy = field(default_factory=Spy)

    @property
    def identity(self) -> Identity:
        toy = super().identity
        return replace(toy, traits=replace(toy.traits, audio_token=AUDIO))


@dataclass(frozen=True)
class Answer:
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
    """A client of an app, by its key."""

    app: ASGIApp
    key: str | None = KEY

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        content: str = JSON,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        read: Callable[[bytes], Awaitable[bool]] | None = None,
        server_fails: bool = False,
    ) -> Answer:
        """`read` is given each part of the answer's body, and tells whether the client stays for more."""
        path, _, query = path.partition("?")
        chunks = [body] if isinstance(body, bytes) else list(body)
        sent: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
            for number, chunk in enumerate(chunks, start=1)
        ]
        away = asyncio.Event()
        got: list[Message] = []

        async def receive() -> Message:
            if sent:
                return sent.pop(0)
            await away.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            got.append(message)
            if read and message["type"] == "http.response.body" and not await read(message.get("body", b"")):
                away.set()

        key = [(b"authorization", f"Bearer {self.key}".encode())] if self.key else []
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
            "headers": [*key, (b"content-type", content.encode()), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        try:
            await self.app(scope, receive, send)
        except Exception:
            if not server_fails:
                raise
        start = got[0]
        return Answer(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in got[1:]),
        )

    async def opened(self, prompt: Prompt | None = None, rule: str = "greedy") -> Opened:
        prompt = prompt or Prompt((1, 2, 3))
        body = wire.encode_prompt(prompt)
        begun = wire.prompt_checksum(body, rule)
        answer = await self.ask("POST", f"/v1/sessions?rule={rule}&check={begun}", body, OCTETS)
        assert answer.status == 201, answer
        return Opened(self, answer.json["session"], prompt, begun)


@dataclass(frozen=True)
class Opened:
    """A session as its client sees it."""

    edge: Edge
    name: str
    prompt: Prompt
    begun: int

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.name}"

    async def verify(self, context: Sequence[int], base: int, draft: Sequence[int], /, **but: object) -> Answer:
        request = wire.build_verify_request(self.begun, context, base, draft)
        return await self.edge.ask("POST", f"{self.path}/verify", json.dumps(asdict(request) | but).encode())

    async def generate(
        self, limit: int, output: Sequence[int] = (), read: Callable[[bytes], Awaitable[bool]] | None = None
    ) -> Answer:
        request = wire.build_generate_request(self.begun, output, (), limit)
        # where the server gives up in the middle, it does so by cutting the connection
        return await self.edge.ask("POST", f"{self.path}/generate", wire.dumps(request), read=read, server_fails=True)

    async def close(self) -> Answer:
        return await self.edge.ask("DELETE", self.path)


@asynccontextmanager
async def started(
    engine: ToyEngine | None = None, limits: ServiceLimits | None = None, keys: Sequence[str] = (KEY, OTHER_KEY)
) -> AsyncIterator[FastAPI]:
    app = create_app(engine or SpyEngine(), limits, keys)
    async with app.router.lifespan_context(app):
        yield app


def play(scene: Coroutine[Any, Any, None], most: float = 10.0) -> None:
    """Run it: what hangs fails after `most` seconds."""

    async def bounded() -> None:
        await asyncio.wait_for(scene, most)

    asyncio.run(bounded())


async def until(what: Callable[[], bool]) -> None:
    """Returns when it is so."""
    while not what():
        await asyncio.sleep(0.001)
