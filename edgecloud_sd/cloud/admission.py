"""What a request has to pass before anything of it is read: its key, its client's share, its size, and its time."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgecloud_sd import wire

_logger = logging.getLogger(__name__)
OPEN_PATHS = ("/health",)  # to whoever asks
BODY_SECONDS = 60.0  # for a body to arrive


@dataclass(frozen=True)
class Admission:
    """Middleware. Puts who asks into the scope as `client_name`: a digest of its key, or its address where none is
    asked. What goes wrong further in is logged here, and the client told no more than that."""

    app: ASGIApp
    keys: Sequence[str]
    largest_prompt: int  # bytes of a body of octets
    largest_message: int  # bytes of any other
    at_once: int  # requests of one client
    answered: Callable[[str, int], None]  # told of every answer: the route's name, the status
    _working: Counter[str] = field(default_factory=Counter)  # requests of each client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.answered(getattr(scope.get("route"), "name", "other"), message["status"])
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except Exception:
            if started:
                raise  # whoever calls cuts the connection: what was sent is no whole answer
            _logger.exception("a request failed")
            await _refusal(500, "internal error")(scope, receive, counted)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        client = self._client(scope, headers)
        if scope["path"] in OPEN_PATHS:
            return await self._whole(scope, 0, receive, send)
        if client is None:
            return await _refusal(401, "needs a key", {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        if self._working[client] >= self.at_once:
            refusal = _refusal(429, f"more than {self.at_once} requests of this client at once", {"Retry-After": "1"})
            return await refusal(scope, receive, send)
        octets = headers.get(b"content-type", b"").lower().startswith(wire.OCTETS.encode())
        scope["client_name"] = client
        self._working[client] += 1
        try:
            await self._whole(scope, self.largest_prompt if octets else self.largest_message, receive, send)
        finally:
            self._working[client] -= 1
            if not self._working[client]:
                del self._working[client]

    async def _whole(self, scope: Scope, largest: int, receive: Receive, send: Send) -> None:
        """Pass a request on when its body of at most `largest` bytes is there. Without its client it is dropped."""
        body = bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if len(body) > largest:
                        return await _refusal(413, f"the body is larger than {largest} bytes")(scope, receive, send)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            return await _refusal(408, "the body did not arrive in time")(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)

    @cached_property
    def _digests(self) -> list[bytes]:
        return [hashlib.sha256(f"Bearer {key}".encode()).digest() for key in self.keys]

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str | None:
        """Every key is compared, each in constant time, so that no answer's time tells of a key."""
        if not self.keys:
            address = scope.get("client")
            return str(address[0]) if address else "local"
        given = hashlib.sha256(headers.get(b"authorization", b"")).digest()
        found = None
        for wanted in self._digests:
            if hmac.compare_digest(given, wanted):
                found = wanted.hex()
        return found


def _refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
