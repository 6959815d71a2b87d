"""A TCP proxy between client and server that reads whole HTTP messages and harms them as it is told.

It stands for everything that can go wrong in between, the server's own restarts included. It counts what it has really
done, so that a test can tell that it was tested by something.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to one request or to its answer."""

    REFUSED = "connection closed before anything is read"
    LOST = "connection closed after the request was executed"
    HUNG = "request executed, and no answer for longer than the client waits"
    BYTES = "answer is random bytes"
    HTML = "answer is HTML, with status 200"
    SHAPE = "answer is JSON of another shape"
    DIGIT = "answer with one digit changed"
    SHORT = "answer whose body breaks off"
    STALE = "answer is the one before"
    ERROR_500 = "500"
    ERROR_502 = "502"
    ERROR_503 = "503"
    ERROR_429 = "429"
    TWICE_FIRST = "request executed twice, answered by the first"
    TWICE_SECOND = "request executed twice, answered by the second"
    COPY_LATE = "request executed, and once more after the next one"
    LATE = "connection closed, and the request executed after the next one"
    DAMAGED = "request with one byte changed"
    RESTARTED = "the server has forgotten every session"
    STREAM_CUT = "stream cut in the middle"
    STREAM_ENDED = "stream ended in the middle, as if that were all"
    STREAM_DIGIT = "stream with one digit changed"
    STREAM_HUNG = "stream that says no more, for longer than the client waits"


SLOW = (Fault.HUNG, Fault.STREAM_HUNG)  # cost the client's timeout each
STREAMED = (Fault.STREAM_CUT, Fault.STREAM_ENDED, Fault.STREAM_DIGIT, Fault.STREAM_HUNG)
ERRORS = {Fault.ERROR_500: 500, Fault.ERROR_502: 502, Fault.ERROR_503: 503, Fault.ERROR_429: 429}
LONGEST_HANG = 10.0  # s: clients have gone long before


class Gone(Exception):
    """The other end has closed."""


@dataclass(frozen=True)
class Request:
    head: bytes  # with the empty line
    body: bytes

    @property
    def line(self) -> str:
        """Method and path."""
        return self.head.split(b" HTTP/", 1)[0].decode()


@dataclass
class Answer:
    """`pieces` are the body, or the chunks of a stream as they come."""

    head: bytes
    chunked: bool
    pieces: Iterator[bytes]

    def read(self) -> Answer:
        """All of it, at once."""
        return Answer(self.head, self.chunked, iter(list(self.pieces)))


class Proxy:
    """In front of the server at `upstream`. Each fault planned befalls one request, the first that it fits.

    Only what closes a session is let through: it is sent once, and its failure would matter to nobody.
    """

    def __init__(self, upstream: str) -> None:
        self.move(upstream)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.injected: Counter[Fault] = Counter()
        self.requests: list[Request] = []  # that were read since the last plan
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.plan(())

    def move(self, upstream: str) -> None:
        """In front of another server, for connections that are made from now on."""
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))

    def drop(self) -> None:
        """Close every connection that stands."""
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def plan(self, faults: Sequence[Fault], seed: int = 0, place: int | None = None) -> None:
        """What to do from now on, then nothing. `seed` draws where a message is harmed, `place` says it of a stream."""
        with self._lock:
            self._faults = deque(faults)
            self._random = random.Random(seed)
            self._place = place
            self._late: list[Request] = []
            self._before: bytes | None = None  # the last answer as it was sent
            self._sessions: set[str] = set()
            self.requests.clear()

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self.drop()
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy")
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        upstream = Upstream(self._upstream)
        try:
            with client, client.makefile("rb") as inbound:
                while client.recv(1, socket.MSG_PEEK):
                    fault = self._next(client.recv(200, socket.MSG_PEEK).split(b"\r\n", 1)[0])
                    if fault is Fault.REFUSED:
                        self._done(fault)
                        return
                    request = read_request(inbound)
                    with self._lock:
                        self.requests.append(request)
                        due, self._late = self._late, []
                    try:
                        self._answer(client, upstream, request, fault)
                    finally:
                        for each in due:
                            self._execute(each)
        except (OSError, Gone):
            pass
        finally:
            upstream.close()
            self._open.discard(client)

    def _next(self, line: bytes) -> Fault | None:
        """For a request that begins with this line."""
        if line.startswith(b"DELETE"):
            return None
        with self._lock:
            for fault in self._faults:
                if fits(fault, line):
                    self._faults.remove(fault)
                    return fault
        return None

    def _done(self, fault: Fault) -> None:
        with self._lock:
            self.injected[fault] += 1

    def _execute(self, request: Request) -> Answer:
        """On a connection of its own, to the end."""
        upstream = Upstream(self._upstream)
        try:
            return upstream.ask(request).read()
        finally:
            upstream.close()

    def _forget(self) -> None:
        with self._lock:
            sessions, self._sessions = self._sessions, set()
        for session in sessions:
            self._execute(Request(f"DELETE /v1/sessions/{session} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode(), b""))

    def _answer(self, client: socket.socket, upstream: Upstream, request: Request, fault: Fault | None) -> None:
        """Do what the fault says, or pass everything on where it does not fit the request."""
        if fault is Fault.DAMAGED:
            self._done(fault)
            request = Request(request.head, self._flipped(request.body))
        elif fault is Fault.RESTARTED:
            self._done(fault)
            self._forget()
        elif fault is Fault.LATE:
            self._done(fault)
            self._late.append(request)
            raise Gone
        elif fault is Fault.COPY_LATE:
            self._done(fault)
            self._late.append(request)
        elif fault in (Fault.TWICE_FIRST, Fault.TWICE_SECOND):
            self._done(fault)
            first = self._execute(request)
        answer = upstream.ask(request)
        if fault is Fault.TWICE_FIRST:
            answer.read()
            answer = first
        if fault in ERRORS:
            self._done(fault)
            answer.read()
            return client.sendall(said(ERRORS[fault], b"<html>come back later</html>", "text/html"))
        if fault is Fault.LOST:
            self._done(fault)
            answer.read()
            raise Gone
        if fault is Fault.HUNG:
            self._done(fault)
            answer.read()
            self._hang(client)
        if fault is Fault.BYTES:
            self._done(fault)
            answer.read()
            client.sendall(self._random.randbytes(self._random.choice([1, 30, 3000])))
            raise Gone
        if fault is Fault.HTML:
            self._done(fault)
            answer.read()
            return client.sendall(said(200, b"<html>sign in to this network</html>", "text/html"))
        if fault is Fault.SHAPE:
            self._done(fault)
            answer.read()
            shapes = [
                b"[]",
                b"{}",
                b"null",
                b'{"accepted":true,"token":"0","check":1e3}',
                b'{"session":7}',
                b"[" * 9999,
            ]
            return client.sendall(said(200, self._random.choice(shapes)))
        if fault is Fault.STALE and self._before is not None:
            self._done(fault)
            answer.read()
            return client.sendall(self._before)
        if answer.chunked:
            return self._stream(client, answer, fault)
        body = b"".join(answer.pieces)
        if fault is Fault.SHORT:
            self._done(fault)
            client.sendall(answer.head + body[: self._random.randrange(len(body))])
            raise Gone
        if fault is Fault.DIGIT:
            self._done(fault)
            return client.sendall(answer.head + self._miscounted(body))
        self._note(request, body)
        return self._send(client, Answer(answer.head, False, iter([body])))

    def _stream(self, client: socket.socket, answer: Answer, fault: Fault | None) -> None:
        """Piece by piece as it comes."""
        if fault not in STREAMED:
            return self._send(client, answer)
        self._done(fault)
        client.sendall(answer.head)
        untouched = self._random.randrange(5) if self._place is None else self._place
        pieces = list(answer.pieces)
        for place, piece in enumerate(pieces):
            if place >= min(untouched, len(pieces) - 1):
                if fault is Fault.STREAM_DIGIT:
                    piece = self._miscounted(piece)
                elif fault is Fault.STREAM_ENDED:
                    break
                elif fault is Fault.STREAM_HUNG:
                    self._hang(client)
                else:
                    client.sendall(framed(piece)[: self._random.randrange(len(piece) + 1)])
                    raise Gone
                untouched = len(pieces)
            client.sendall(framed(piece))
        return client.sendall(framed(b""))

    def _send(self, client: socket.socket, answer: Answer) -> None:
        client.sendall(answer.head)
        sent = answer.head
        for piece in answer.pieces:
            data = framed(piece) if answer.chunked else piece
            client.sendall(data)
            sent += data
        if answer.chunked:
            client.sendall(framed(b""))
            sent += framed(b"")
        with self._lock:
            self._before = sent

    def _hang(self, client: socket.socket) -> None:
        """Until the client closes."""
        client.settimeout(LONGEST_HANG)
        client.recv(1)
        raise Gone

    def _note(self, request: Request, body: bytes) -> None:
        if request.head.startswith(b"POST /v1/sessions?"):
            with suppress(ValueError, KeyError), self._lock:
                self._sessions.add(json.loads(body)["session"])

    def _flipped(self, body: bytes) -> bytes:
        place = self._random.randrange(len(body))
        return body[:place] + bytes([body[place] ^ 1 << self._random.randrange(7)]) + body[place + 1 :]

    def _miscounted(self, body: bytes) -> bytes:
        place = self._random.choice([found.start() for found in re.finditer(rb"\d", body)])
        other = self._random.choice([digit for digit in b"0123456789" if digit != body[place]])
        return body[:place] + bytes([other]) + body[place + 1 :]


class Upstream:
    """One connection to the server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def ask(self, request: Request) -> Answer:
        """Send it, and read the head of its answer."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._file = self._socket.makefile("rb")
        self._socket.sendall(request.head + request.body)
        head = read_head(self._file)
        if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            return Answer(head, True, self._chunks())
        return Answer(head, False, iter([self._file.read(length(head))]))

    def close(self) -> None:
        if self._socket is not None:
            self._file.close()
            self._socket.close()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            self._file.readline()
        self._file.readline()


def fits(fault: Fault, line: bytes) -> bool:
    """Whether a fault can befall a request that begins with this line."""
    streamed = b"/generate " in line
    if fault in STREAMED:
        return streamed
    if fault is Fault.RESTARTED:
        return b"/v1/sessions/" in line
    if fault is Fault.DAMAGED:
        return line.startswith(b"POST")
    return not (streamed and fault in (Fault.SHORT, Fault.DIGIT))


def read_request(file: BinaryIO) -> Request:
    head = read_head(file)
    return Request(head, file.read(length(head)))


def read_head(file: BinaryIO) -> bytes:
    """With the empty line. Gone where it breaks off."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        if not line:
            raise Gone
        head += line
    return head


def length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def framed(piece: bytes) -> bytes:
    """As one chunk; nothing is the last one."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def said(status: int, body: bytes, content: str = "application/json") -> bytes:
    """A whole answer, the last on its connection."""
    head = [f"HTTP/1.1 {status} Said", f"Content-Type: {content}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*head, "", ""]).encode() + body
