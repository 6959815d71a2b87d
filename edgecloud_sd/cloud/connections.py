"""The connections of a server: deadlines for the client's end, and caps on their number.

Uvicorn reads and answers the requests. This module only watches how long a connection waits for its client.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from edgecloud_sd.cloud.admission import LINGER_SECONDS
from edgecloud_sd.cloud.closing import SEND_SECONDS
from edgecloud_sd.cloud.parsing import PARSED_BYTES, BoundedParser
from edgecloud_sd.cloud.transport import KEEP_ALIVE

_logger = logging.getLogger(__name__)
ACCEPTS_AT_ONCE = 1  # new connections per turn of the event loop: more would delay the requests of others
SPARE_DESCRIPTORS = 128  # for connections that are accepted and not yet closed, and for the model
PIPELINED_BYTES = 2**16  # from a client behind a request, before it has the answer
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Wait(Enum):
    """The event that a connection waits for."""

    FIRST_BYTE = "the first byte"
    HEADERS = "the rest of the headers"
    REST = "the rest of a request that is answered already"
    REQUEST = "another request"
    BODY = "a body"  # `Admission` has its deadline
    ADMITTED_BODY = "the body of an admitted client"  # and this one's
    READER = "the client to read its answer"
    ANSWER = "the answer of this server"


CLOSED_FIRST = (Wait.FIRST_BYTE, Wait.HEADERS, Wait.BODY, Wait.REST, Wait.REQUEST)  # for a new connection
CLOSED_NEXT = (Wait.ADMITTED_BODY, Wait.READER)  # if none of those waits
DEADLINES = {  # seconds of a wait after which its connection is closed
    Wait.FIRST_BYTE: 10.0,
    Wait.HEADERS: 10.0,  # from their first byte on, whatever follows
    Wait.REST: LINGER_SECONDS,
    Wait.REQUEST: KEEP_ALIVE + 15,  # longer than a client keeps its end
    Wait.READER: 30.0,  # from a full buffer of the system on, until nothing waits for room in it
}


@dataclass(frozen=True)
class ConnectionLimits:
    """The deadlines and the caps of one server."""

    deadlines: Mapping[Wait, float] = field(default_factory=lambda: DEADLINES)
    connections: int = 1024  # at once
    address_connections: int = 512  # at once, from one address: a proxy or 64 edges behind one NAT need fewer

    def fit(self, descriptors: float, used: int) -> ConnectionLimits:
        """Return limits that `descriptors` are enough for. Raise OSError if they leave room for no connection."""
        room = descriptors - used - SPARE_DESCRIPTORS
        if room >= self.connections:
            return self
        advice = "raise it with ulimit -n or LimitNOFILE"
        if room < 2:
            raise OSError(f"the limit of {descriptors} open files leaves none for connections: {advice}")
        _logger.warning(
            "the limit of %d open files leaves %d for connections at once, not %d: %s",
            *(descriptors, room, self.connections, advice),
        )
        return replace(self, connections=int(room), address_connections=min(self.address_connections, int(room) // 2))


class OpenConnections:
    """The open connections of one server, and the choice of those that close to make room for others."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._networks: dict[BoundedProtocol, str] = {}
        self._counts: Counter[str] = Counter()  # connections by network
        # Connections that may close, in the order in which their present wait began.
        self._candidates: tuple[dict[BoundedProtocol, None], ...] = ({}, {})

    def __len__(self) -> int:
        return len(self._networks)

    def __iter__(self) -> Iterator[BoundedProtocol]:
        return iter(list(self._networks))

    def enter(self, connection: BoundedProtocol, address: str) -> bool:
        """Add a connection, and close the one that waits longest if a cap requires it. Return False without room."""
        network = find_network(address)
        is_crowded = self._counts[network] >= self.limits.address_connections
        if is_crowded or len(self) >= self.limits.connections:
            closed = self._choose_closed(network if is_crowded else None)
            _logger.warning(
                "too many connections: %s",
                f"closed one that waited for {closed.wait.value}" if closed else "refused a new one",
            )
            if closed is None:
                return False
            self.leave(closed)
            closed.transport.abort()
        self._networks[connection] = network
        self._counts[network] += 1
        return True

    def note(self, connection: BoundedProtocol) -> None:
        """Note that the connection has begun its present wait."""
        if connection in self._networks:
            for waits, candidates in zip((CLOSED_FIRST, CLOSED_NEXT), self._candidates, strict=True):
                candidates.pop(connection, None)
                if connection.wait in waits:
                    candidates[connection] = None

    def leave(self, connection: BoundedProtocol) -> None:
        """Remove a connection. It may be removed twice, or never have entered."""
        network = self._networks.pop(connection, None)
        if network is not None:
            self._counts[network] -= 1
            if not self._counts[network]:
                del self._counts[network]
            for candidates in self._candidates:
                candidates.pop(connection, None)

    def _choose_closed(self, network: str | None) -> BoundedProtocol | None:
        """Return the connection that waits longest, in this network or anywhere."""
        for connection in chain(*self._candidates):
            if network in (None, self._networks[connection]):
                return connection
        return None


def find_network(address: str) -> str:
    """Return the address, or for IPv6 its network of 64 bits: a machine there has all of them."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address):
            return str(ip.ipv4_mapped or ip.packed[:8].hex())
    return address


class BoundedProtocol(H11Protocol):
    """An HTTP connection of uvicorn that ends when its client takes too long."""

    config: ServerConfig
    conn: BoundedParser

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = BoundedParser()
        self.wait = Wait.ANSWER
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch a connection, or refuse it if there is no room."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every byte that waits
        if self.config.open_connections.enter(self, self.client[0] if self.client else ""):
            self._follow()
        else:
            transport.write(BUSY)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        super().connection_lost(exc)
        self.config.open_connections.leave(self)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        for start in range(0, len(data), PARSED_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + PARSED_BYTES])
        self._follow()
        if self.wait is Wait.BODY:
            self.loop.call_soon(self._follow)  # the application has admitted or refused the request by then

    def handle_events(self) -> None:
        """Read the events so far, and read on behind a whole request: without a read, nobody notices a client's end.

        Uvicorn would not read on before the answer. A client that sends more than `PIPELINED_BYTES` meanwhile is cut.
        """
        super().handle_events()
        if self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY:
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > PIPELINED_BYTES:
                self.transport.abort()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP if no answer has begun, end the request that they are part of, and close."""
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        is_head = bool(self.scope) and self.scope["method"] == "HEAD"  # uvicorn would send its answer a body
        if self.conn.our_state is h11.IDLE or (self.conn.our_state is h11.SEND_RESPONSE and not is_head):
            super().send_400_response(self.conn.problem or msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Stop the answer, because the client does not read."""
        super().pause_writing()
        self._follow()

    def resume_writing(self) -> None:
        """Continue the answer."""
        super().resume_writing()
        self._follow()

    def _follow(self) -> None:
        """Start the deadline of a wait that is new. One that goes on keeps its deadline."""
        wait = self._read_wait()
        if wait is self.wait:
            return
        self.wait = wait
        self._stop_timer()
        seconds = self.config.open_connections.limits.deadlines.get(wait)
        if seconds is not None:
            # A transport that is closed instead would first send what the client does not read.
            self._timer = self.loop.call_later(seconds, self.transport.abort)
        self.config.open_connections.note(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _read_wait(self) -> Wait:
        theirs, ours = self.conn.their_state, self.conn.our_state
        if self.flow.write_paused:
            return Wait.READER
        if theirs is h11.SEND_BODY:
            if ours is not h11.SEND_RESPONSE:
                return Wait.REST
            return Wait.ADMITTED_BODY if "client_name" in self.scope else Wait.BODY  # `Admission` names the client
        if theirs is not h11.IDLE:
            return Wait.ANSWER
        if self.conn.trailing_data[0]:
            return Wait.HEADERS
        return Wait.REQUEST if self.cycle else Wait.FIRST_BYTE


class ServerConfig(uvicorn.Config):
    """The settings of uvicorn for this server."""

    def __init__(
        self,
        app: ASGIApp,
        limits: ConnectionLimits | None = None,
        log_level: str = "warning",
    ) -> None:
        self.open_connections = OpenConnections(limits or ConnectionLimits())
        super().__init__(
            app,
            http=BoundedProtocol,  # named, because uvicorn would choose httptools and uvloop if they are installed
            loop="asyncio",
            ws="none",
            backlog=ACCEPTS_AT_ONCE,
            log_level=log_level,
            access_log=False,
            server_header=False,
            date_header=False,
            # An address identifies a client without a key, so the client must not be able to set it in a header.
            proxy_headers=False,
            timeout_keep_alive=math.ceil(self.open_connections.limits.deadlines[Wait.REQUEST]),
            timeout_graceful_shutdown=SEND_SECONDS,
        )
