"""The end of a server: calls that the model works on may finish, all others are refused, and the process does end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

import anyio
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgecloud_sd.cloud.admission import HEALTH_PATHS, ClosingRefusal

_logger = logging.getLogger(__name__)
FINISH_SECONDS = 5.0  # for the calls that the model works on; Docker kills a container 10 s after it asks it to stop
SEND_SECONDS = 1  # for the last answers to reach their clients
EXIT_SECONDS = 8.0  # for the whole end; then the process ends whatever a library does


@dataclass(eq=False)
class RunningRequest:
    """A request that is not answered yet. `cancel` ends it."""

    cancel: Callable[[], None]
    has_started: bool = False  # the model has worked on it


_current: ContextVar[RunningRequest | None] = ContextVar("current_request", default=None)


def mark_started() -> None:
    """Note that the model begins to work on the request of this task, which a closing server then lets finish."""
    request = _current.get()
    if request:
        request.has_started = True


class RunningRequests:
    """The requests of a server that are not answered yet."""

    def __init__(self) -> None:
        self.is_closing = False
        self._requests: set[RunningRequest] = set()

    @contextmanager
    def admit(self) -> Iterator[anyio.CancelScope]:
        """Yield the scope in which a request runs. The scope is cancelled when the server closes too early for it."""
        with anyio.CancelScope() as scope:
            request = RunningRequest(scope.cancel)
            token = _current.set(request)
            self._requests.add(request)
            try:
                yield scope
            finally:
                self._requests.discard(request)
                _current.reset(token)

    async def close(self) -> int:
        """Cancel the requests that the model has not begun, and later the rest. Return the number of the rest."""
        self.is_closing = True
        for request in self._requests:
            if not request.has_started:
                request.cancel()
        with anyio.move_on_after(FINISH_SECONDS):
            await self._wait_until_answered()
        unfinished = len(self._requests)
        for request in self._requests:
            request.cancel()
        with anyio.move_on_after(SEND_SECONDS):
            await self._wait_until_answered()
        return unfinished

    async def _wait_until_answered(self) -> None:
        while self._requests:
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class ClosingGate:
    """Middleware that answers 503 to each request that a closing server does not finish, except health checks.

    If a part of the answer is sent already, the server cuts the connection instead.
    """

    app: ASGIApp
    requests: RunningRequests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to the application."""
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            return await self.app(scope, receive, send)
        is_answering = False

        async def send_noted(message: Message) -> None:
            nonlocal is_answering
            is_answering = True
            await send(message)

        if not self.requests.is_closing:
            with self.requests.admit() as running:
                await self.app(scope, receive, send_noted)
            if not running.cancelled_caught or is_answering:
                return None
        refusal = ClosingRefusal(503, "the server is shutting down: try again", {"Retry-After": "1"})
        return await refusal(scope, receive, send)


class GracefulServer(uvicorn.Server):
    """A uvicorn server that a signal ends in order, with status 0. A second signal ends its process at once."""

    def __init__(self, config: uvicorn.Config, requests: RunningRequests) -> None:
        super().__init__(config)
        self._requests = requests

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to close, or end the process if it closes already."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = self._requests.is_closing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer all requests and close all connections. The process ends even if this or a later step hangs."""
        deadline = threading.Timer(EXIT_SECONDS, os._exit, (0,))
        deadline.daemon = True
        deadline.start()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the calls that it cuts now are refused
        unfinished = await self._requests.close()
        if unfinished:
            _logger.warning("calls refused because they did not finish within %g s: %d", FINISH_SECONDS, unfinished)
        await super().shutdown(sockets)
