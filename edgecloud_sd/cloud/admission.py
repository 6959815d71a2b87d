"""The checks on a request before the application reads it: its key, the client's number of requests, size and time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import anyio
import anyio.lowlevel
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgecloud_sd import wire
from edgecloud_sd.cloud.headers import find_ambiguity, find_foreign_page, parse_bearer, parse_media_type
from edgecloud_sd.cloud.loop_turns import LoopTurns

_logger = logging.getLogger(__name__)
HEALTH_PATHS = ("/health", "/health/live", "/health/ready")  # need no key
BODY_SECONDS = 30.0  # for a body to arrive, and a second more for so many bytes that have arrived:
BODY_BYTES_PER_SECOND = 1024  # the slowest uplink that is waited for; the prompt of a 60 s clip has 1.5 MB
LINGER_SECONDS = 2.0  # for the rest of a refused request, before its connection closes
LINGER_BYTES = 2**21  # dropped of it: more than the buffers of the systems on the way hold


class Refusal(Response):
    """An error before the application has read the request."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        message = wire.build_refusal(status, detail, retry_after=(headers or {}).get("Retry-After", ""))
        super().__init__(wire.dumps(message), status, headers, wire.JSON)


class ClosingRefusal(Refusal):
    """An error after which the connection closes, because the rest of its request may never arrive.

    The rest is dropped for a short time first. A connection that closes at once can destroy the answer on its way.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer, drop the rest of the request, and let the server close."""
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with anyio.move_on_after(LINGER_SECONDS):
            dropped = 0
            while dropped < LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
                dropped += len(message["body"])
        await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True)
class Admission:
    """Middleware that admits requests and puts the client into the scope as `client_name`.

    The client's name is a digest of its key, or its address if the server has no keys. The middleware also logs an
    error of the application; the client learns nothing about it. The scope also gets the check of the request, as
    `received`, and the list `if_unanswered`, for functions to call if the response is not sent whole.
    """

    app: ASGIApp
    keys: Sequence[str]
    only_loopback: bool  # refuse the requests of web pages of other hosts
    max_prompt_bytes: int  # limit for a body of octets
    max_message_bytes: int  # limit for any other body
    max_requests: int  # limit for one client at once
    count_response: Callable[[str, int], None]  # receives the route's name and the status of every response
    _running_requests: Counter[str] = field(default_factory=Counter)  # number by client
    _turns: LoopTurns = field(default_factory=LoopTurns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to the application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_answering = False

        async def send_counted(message: Message) -> None:
            nonlocal is_answering
            if message["type"] == "http.response.start":
                is_answering = True
                self.count_response(getattr(scope.get("route"), "name", "other"), message["status"])
            await send(message)

        try:
            await self._admit(scope, receive, send_counted)
        except Exception:
            if is_answering:
                raise  # so that the server cuts the connection, because the response is incomplete
            _logger.exception("a request failed")
            await Refusal(500, "internal error")(scope, receive, send_counted)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        client = self._identify_client(scope, headers)
        turn_name = client or _read_address(scope)
        await self._turns.wait(turn_name)
        receive = self._receive_in_turns(turn_name, receive)
        problem = find_ambiguity(scope.get("http_version", "1.1"), scope["headers"])
        if self.only_loopback:
            problem = problem or find_foreign_page(scope["headers"])
        if problem:
            return await ClosingRefusal(problem.status, problem.detail)(scope, receive, send)
        if scope["path"] in HEALTH_PATHS:
            return await self._forward(scope, 0, receive, send)
        if client is None:
            detail = "this call needs a key: send it as a bearer token"
            refusal = ClosingRefusal(401, detail, {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        if self._running_requests[client] >= self.max_requests:
            detail = f"this client has {self.max_requests} requests running, the most allowed: try again"
            return await Refusal(429, detail, {"Retry-After": "1"})(scope, receive, send)
        is_prompt = parse_media_type(headers.get(b"content-type", b"").decode("latin-1")) == wire.OCTETS
        scope["client_name"] = client
        with self._count_running(client):
            max_bytes = self.max_prompt_bytes if is_prompt else self.max_message_bytes
            return await self._forward(scope, max_bytes, receive, send)

    def _receive_in_turns(self, client: str, receive: Receive) -> Receive:
        """Return a function that receives each further part of a body in a turn of its own."""
        has_more = False

        async def receive_part() -> Message:
            nonlocal has_more
            if has_more:
                await self._turns.wait(client)
            message = await receive()
            has_more = message.get("more_body", False)
            return message

        return receive_part

    @contextmanager
    def _count_running(self, client: str) -> Iterator[None]:
        self._running_requests[client] += 1
        try:
            yield
        finally:
            self._running_requests[client] -= 1
            if not self._running_requests[client]:
                del self._running_requests[client]

    async def _forward(self, scope: Scope, max_bytes: int, receive: Receive, send: Send) -> None:
        """Pass a request on when its whole body has arrived. Drop it if its client goes away before.

        A DELETE is carried out all the same, because clients that end do not wait for its answer.
        """
        is_close = scope["method"] == "DELETE"
        body = bytearray()
        refusal = None
        more_body = True
        with anyio.move_on_after(BODY_SECONDS if max_bytes else LINGER_SECONDS) as time_limit:
            while more_body and not refusal:
                message = await receive()
                if message["type"] != "http.request" and not is_close:
                    return None
                chunk, more_body = message.get("body", b""), message.get("more_body", False)
                body += chunk
                time_limit.deadline += len(chunk) / BODY_BYTES_PER_SECOND
                if len(body) > max_bytes:
                    refusal = ClosingRefusal(413, f"the body is larger than {max_bytes} bytes")
        if more_body and not refusal:
            detail = f"the body came slower than {BODY_BYTES_PER_SECOND} bytes per second: try again"
            refusal = ClosingRefusal(408, detail)
        if refusal:
            return await refusal(scope, receive if more_body else _end_request, send)
        media_type = dict(scope["headers"]).get(b"content-type", b"")
        scope["received"] = wire.request_checksum(
            scope["method"], scope["path"], scope["query_string"], media_type, bytes(body)
        )
        if is_close:
            return await self.app(scope, receive, send)
        return await run_while_connected(self.app, scope, bytes(body), receive, send)

    @cached_property
    def _digests(self) -> list[bytes]:
        return [hashlib.sha256(key.encode()).digest() for key in self.keys]

    def _identify_client(self, scope: Scope, headers: dict[bytes, bytes]) -> str | None:
        """Return the client's name, or None for a wrong key.

        Every key is compared, each in constant time, so that the time of a response reveals nothing about a key.
        """
        if not self.keys:
            return _read_address(scope)
        digest = hashlib.sha256(parse_bearer(headers.get(b"authorization", b""))).digest()
        client = None
        for key_digest in self._digests:
            if hmac.compare_digest(digest, key_digest):
                client = key_digest.hex()
        return client


def _read_address(scope: Scope) -> str:
    address = scope.get("client")
    return str(address[0]) if address else "local"


async def run_while_connected(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run an application on a request whose body has arrived, and cancel it when the client goes away.

    Call the functions that it has put into the list `if_unanswered` of the scope, unless its whole response was sent.
    """
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    undo: list[Callable[[], None]] = scope.setdefault("if_unanswered", [])
    client_has_gone, is_answered = asyncio.Event(), False

    async def replay() -> Message:
        if messages:
            return messages.pop()
        await client_has_gone.wait()
        return {"type": "http.disconnect"}

    async def send_unless_gone(message: Message) -> None:
        nonlocal is_answered
        await anyio.lowlevel.checkpoint()  # a client that has just gone cancels the request here
        await send(message)
        is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def watch(running: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not is_answered:
            client_has_gone.set()
            running.cancel()

    with anyio.CancelScope() as running:
        watching = asyncio.create_task(watch(running))  # a task group would wrap the errors of the application
        try:
            await app(scope, replay, send_unless_gone)
        finally:
            watching.cancel()
            for call in () if is_answered else undo:
                call()


async def _end_request() -> Message:
    return {"type": "http.disconnect"}
