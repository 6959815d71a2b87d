"""A TCP proxy between client and server that damages the bytes on their way, at planned places, and knows no HTTP."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection
HISTORY = 20_000  # bytes of each direction that may come again
STARTS = {
    True: re.compile(rb"(?=(?:POST|GET|DELETE) /)"),
    False: re.compile(rb"(?=HTTP/1\.1 \d)"),
}  # where a message begins


class ByteFault(Enum):
    """A fault at one place in the bytes of one direction."""

    FLIPPED = "one bit is flipped"
    DROPPED = "some bytes are missing"
    DOUBLED = "some bytes come twice"
    INSERTED = "random bytes are inserted"
    SWAPPED = "two runs of bytes change places"
    ENDED = "the connection is closed"
    HALF_ENDED = "one direction is closed"
    RESET = "the connection is reset"
    DELAYED = "the bytes stop for a moment"
    STALLED = "the bytes stop for longer than the client waits"
    SPLICED = "an earlier message of this direction is inserted"
    REPLACED = "an earlier message of this direction replaces as many bytes"
    SENT_AGAIN = "an earlier request reaches the server once more, on a connection of its own"


@dataclass(frozen=True)
class Damage:
    """A fault after `offset` bytes in one direction of the n-th connection since the plan."""

    kind: ByteFault
    connection: int
    is_upward: bool
    offset: int
    size: int  # bytes that it changes, where it changes several


class Ended(Exception):
    """The end of a connection."""

    is_reset = False


class ByteProxy:
    """A proxy in front of the server at `upstream`, which injects the planned damages and counts them."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (str(parts.hostname), int(parts.port or 80))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.injected: Counter[ByteFault] = Counter()
        self.volumes: Counter[tuple[int, bool]] = Counter()  # bytes by connection and direction
        self._history = {True: bytearray(), False: bytearray()}
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._plan_ended = threading.Event()
        self.plan(())

    def plan(self, damages: Sequence[Damage], seed: int = 0) -> None:
        """End the connections that are open, and inject these damages from now on."""
        self._plan_ended.set()
        while any(thread.is_alive() for thread in self._threads[1:]):
            for end in list(self._open):  # again, because a connection may have been accepted in between
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._threads[-1].join(0.05)
        del self._threads[1:]
        self._plan_ended = threading.Event()
        self._damages = tuple(damages)
        self.random = random.Random(seed)
        self.volumes.clear()
        self._connections = 0

    def __enter__(self) -> ByteProxy:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.plan(())
        self._listening.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="byte-proxy")  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(near)
            number, self._connections = self._connections, self._connections + 1
            self._start(self._serve, near, number)

    def _serve(self, near: socket.socket, number: int) -> None:
        with near, socket.create_connection(self.upstream) as far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(far)
            up, down = (Direction(self, number, is_upward, self._damages) for is_upward in (True, False))
            upward = threading.Thread(target=self._relay, args=(near, far, up), name="byte-proxy")
            upward.start()
            self._relay(far, near, down)
            upward.join()
            self._open -= {near, far}

    def _relay(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        try:
            while data := source.recv(65536):
                direction.pass_on(data, sink)
            sink.shutdown(socket.SHUT_WR)
        except (OSError, Ended) as error:
            for end in (source, sink):
                with suppress(OSError):  # a reset end sends nothing more: closing it sends the reset
                    end.shutdown(socket.SHUT_RD if isinstance(error, Ended) and error.is_reset else socket.SHUT_RDWR)

    def note(self, number: int, is_upward: bool, data: bytes) -> None:
        """Remember bytes as they were sent, before any damage."""
        self.volumes[number, is_upward] += len(data)
        self._history[is_upward] += data
        del self._history[is_upward][:-HISTORY]

    def draw_message(self, is_upward: bool) -> bytes:
        """Return an earlier message of a direction, or what is left of it."""
        messages = [part for part in STARTS[is_upward].split(bytes(self._history[is_upward]))[1:] if part]
        return self.random.choice(messages) if messages else b""

    def wait(self, seconds: float | None = None) -> None:
        """Wait for some time, or until the plan ends."""
        self._plan_ended.wait(seconds)

    def send_again(self) -> None:
        """Send an earlier request on a connection of its own, and drop its answer."""
        with suppress(OSError), socket.create_connection(self.upstream, 0.3) as again:
            again.sendall(self.draw_message(is_upward=True))
            time.sleep(0.02)
            again.recv(65536)


class Direction:
    """The bytes of one direction of a connection."""

    def __init__(self, proxy: ByteProxy, number: int, is_upward: bool, damages: Sequence[Damage]) -> None:
        self._proxy = proxy
        self._number = number
        self._is_upward = is_upward
        planned = [damage for damage in damages if (damage.connection, damage.is_upward) == (number, is_upward)]
        self._damages = sorted(planned, key=lambda damage: damage.offset)
        self._passed = 0

    def pass_on(self, data: bytes, sink: socket.socket) -> None:
        """Send the bytes on, with the damage at its place. Raise Ended if nothing more may pass."""
        self._proxy.note(self._number, self._is_upward, data)
        while self._damages and self._damages[0].offset < self._passed + len(data):
            damage = self._damages.pop(0)
            place = max(damage.offset - self._passed, 0)
            sink.sendall(data[:place])
            self._passed += place
            self._proxy.injected[damage.kind] += 1
            data = self._damaged(damage, data[place:], sink)
        sink.sendall(data)
        self._passed += len(data)

    def _damaged(self, damage: Damage, data: bytes, sink: socket.socket) -> bytes:
        proxy, kind, size = self._proxy, damage.kind, damage.size
        if kind is ByteFault.STALLED:
            proxy.wait()
            raise Ended
        if kind is ByteFault.DELAYED:
            proxy.wait(0.02)
        elif kind is ByteFault.SENT_AGAIN:
            proxy.send_again()
        elif kind in (ByteFault.ENDED, ByteFault.RESET):
            end = Ended()
            if kind is ByteFault.RESET:
                sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.is_reset = True
            raise end
        elif kind is ByteFault.HALF_ENDED:
            sink.shutdown(socket.SHUT_WR)
        return {
            ByteFault.FLIPPED: bytes([data[0] ^ 1 << size % 8]) + data[1:],
            ByteFault.DROPPED: data[size:],
            ByteFault.DOUBLED: data[:size] + data,
            ByteFault.INSERTED: proxy.random.randbytes(size) + data,
            ByteFault.SWAPPED: data[size : 2 * size] + data[:size] + data[2 * size :],
        }.get(kind) or self._spliced(kind, data)

    def _spliced(self, kind: ByteFault, data: bytes) -> bytes:
        if kind not in (ByteFault.SPLICED, ByteFault.REPLACED):
            return data
        message = self._proxy.draw_message(self._is_upward)
        return message + (data if kind is ByteFault.SPLICED else data[len(message) :])
