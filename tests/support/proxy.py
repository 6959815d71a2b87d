"""A TCP proxy between client and server that reads whole HTTP messages and injects planned faults.

It simulates all failures between the two sides, restarts of the server included. It counts the faults that it really
injected, so that a test can check that they took place.
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
from typing import Any, BinaryIO
from urllib.parse import urlsplit


class Fault(Enum):
    """A fault of one request or of its answer."""

    REFUSED = "connection closed before anything is read"
    LOST = "connection closed after the request was executed"
    HUNG = "request executed, and no answer for longer than the client waits"
    BYTES = "answer is random bytes"
    HTML = "answer is HTML, with status 200"
    SHAPE = "answer is JSON of another shape"
    DIGIT = "answer with one digit changed"
    SHORT = "answer whose body breaks off"
    STALE = "answer is the one to the request before"
    ERROR_500 = "500"
    ERROR_502 = "502"
    ERROR_503 = "503"
    ERROR_429 = "429"
    TWICE_FIRST = "request executed twice, answered by the first"
    TWICE_SECOND = "request executed twice, answered by the second"
    COPY_LATE = "request executed, and once more after the next one"
    LATE = "connection closed, and the request executed after the next one"
    DAMAGED = "request with one byte changed"
    RESTARTED = "server loses every session"
    STREAM_CUT = "stream cut in the middle"
    STREAM_ENDED = "stream ended in the middle, as if it were complete"
    STREAM_DIGIT = "stream with one digit changed"
    STREAM_HUNG = "stream that stalls for longer than the client waits"


SLOW = (Fault.HUNG, Fault.STREAM_HUNG)  # each costs the client its timeout
STREAMED = (Fault.STREAM_CUT, Fault.STREAM_ENDED, Fault.STREAM_DIGIT, Fault.STREAM_HUNG)
ERRORS = {Fault.ERROR_500: 500, Fault.ERROR_502: 502, Fault.ERROR_503: 503, Fault.ERROR_429: 429}
REQUEST_FAULTS = (
    *(Fault.DAMAGED, Fault.RESTARTED, Fault.LATE, Fault.COPY_LATE),
    *(Fault.TWICE_FIRST, Fault.TWICE_SECOND),
)
REPLACED = (*ERRORS, Fault.LOST, Fault.HUNG, Fault.BYTES, Fault.HTML, Fault.SHAPE)  # the server's answer is dropped
SHAPES = (b"[]", b"{}", b"null", b'{"accepted":true,"token":"0","check":1e3}', b'{"session":7}', b"[" * 9999)
LONGEST_HANG = 10.0  # s: no client of a test waits that long


class PeerClosed(Exception):
    """The closing of a connection by the other end."""


@dataclass(frozen=True)
class Request:
    """A whole HTTP request."""

    head: bytes  # with the empty line
    body: bytes

    @property
    def line(self) -> str:
        """The method and the path."""
        return self.head.split(b" HTTP/", 1)[0].decode()


@dataclass
class Answer:
    """An HTTP answer. `pieces` are the body, or the chunks of a stream as they arrive."""

    head: bytes
    chunked: bool
    pieces: Iterator[bytes]

    def read(self) -> Answer:
        """Return the same answer with all of its pieces in memory."""
        return Answer(self.head, self.chunked, iter(list(self.pieces)))


class Proxy:
    """A proxy in front of the server at `upstream`. Each planned fault hits the first request that it fits.

    A request that closes a session always passes: the client sends it once and ignores a failure. With a `prefix`,
    the proxy serves paths that start with it, and sends them on without it. `edit` returns the JSON that the proxy puts
    in place of that of a request, an answer or a line of a stream.
    """

    def __init__(self, upstream: str, prefix: str = "", edit: Callable[[Any], Any] | None = None) -> None:
        self.set_upstream(upstream)
        self.edit = edit
        self._prefix = prefix.encode()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}{prefix}"
        self.injected: Counter[Fault] = Counter()
        self.requests: list[Request] = []  # read since the last plan
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.plan(())

    def set_upstream(self, upstream: str) -> None:
        """Send the requests of new connections to the server at `upstream`."""
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))

    def drop_connections(self) -> None:
        """Close every open connection of a client."""
        for client in list(self._open):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def plan(self, faults: Sequence[Fault], seed: int = 0, place: int | None = None) -> None:
        """Inject these faults from now on, in this order, each once.

        `seed` draws the position of the damage in a message; `place` sets the line of a stream instead.
        """
        with self._lock:
            self._faults = deque(faults)
            self._random = random.Random(seed)
            self._place = place
            self._late: list[Request] = []
            self._last_answer: bytes | None = None
            self._sessions: set[str] = set()
            self.requests.clear()

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self.drop_connections()
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy")
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [thread]
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
                    fault = self._next_fault(client.recv(200, socket.MSG_PEEK).split(b"\r\n", 1)[0])
                    if fault is Fault.REFUSED:
                        self._count(fault)
                        return
                    request = self._without_prefix(read_request(inbound))
                    with self._lock:
                        self.requests.append(request)
                        late, self._late = self._late, []
                    try:
                        self._answer(client, upstream, request, fault)
                    finally:
                        for late_request in late:
                            self._execute(late_request)
        except (OSError, PeerClosed):
            pass
        finally:
            upstream.close()
            self._open.discard(client)

    def _without_prefix(self, request: Request) -> Request:
        method, _, rest = request.head.partition(b" ")
        if not rest.startswith(self._prefix + b"/"):
            raise PeerClosed
        return Request(b"%b %b" % (method, rest.removeprefix(self._prefix)), request.body)

    def _next_fault(self, line: bytes) -> Fault | None:
        """Return the planned fault of the request that begins with this line, or None."""
        if line.startswith(b"DELETE"):
            return None
        with self._lock:
            for fault in self._faults:
                if can_hit(fault, line):
                    self._faults.remove(fault)
                    return fault
        return None

    def _count(self, fault: Fault) -> None:
        with self._lock:
            self.injected[fault] += 1

    def _execute(self, request: Request) -> Answer:
        """Return the whole answer to a request on a connection of its own."""
        upstream = Upstream(self._upstream)
        try:
            return upstream.ask(request).read()
        finally:
            upstream.close()

    def _close_sessions(self) -> None:
        with self._lock:
            sessions, self._sessions = self._sessions, set()
        for session in sessions:
            self._execute(Request(f"DELETE /v1/sessions/{session} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(), b""))

    def _answer(self, client: socket.socket, upstream: Upstream, request: Request, fault: Fault | None) -> None:
        """Pass the request on and answer it, with the damage of `fault` to either."""
        if fault in REQUEST_FAULTS:
            self._count(fault)
        if fault is Fault.DAMAGED:
            request = Request(request.head, self._flip_bit(request.body))
        elif fault is Fault.RESTARTED:
            self._close_sessions()
        elif fault in (Fault.LATE, Fault.COPY_LATE):
            self._late.append(request)
            if fault is Fault.LATE:
                raise PeerClosed
        request = Request(*self._edited(request.head, request.body))
        first = self._execute(request) if fault in (Fault.TWICE_FIRST, Fault.TWICE_SECOND) else None
        answer = self._edited_answer(upstream.ask(request))
        if fault is Fault.TWICE_FIRST and first is not None:
            answer.read()
            answer = first
        if fault in REPLACED or (fault is Fault.STALE and self._last_answer is not None):
            self._count(fault)
            answer.read()
            self._send_replacement(client, fault)
        elif answer.chunked:
            self._stream(client, answer, fault)
        else:
            self._send_whole(client, request, answer, fault)

    def _edited(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Return a head and a body of which `edit` has changed the JSON."""
        if self.edit is None or not body.startswith(b"{"):
            return head, body
        body = json.dumps(self.edit(json.loads(body))).encode() + b"\n" * body.endswith(b"\n")
        return re.sub(rb"(?i)(content-length): *\d+", rb"\1: %d" % len(body), head), body

    def _edited_answer(self, answer: Answer) -> Answer:
        if self.edit is None:
            return answer
        if answer.chunked:
            return Answer(answer.head, True, (self._edited(b"", piece)[1] for piece in answer.pieces))
        head, body = self._edited(answer.head, b"".join(answer.pieces))
        return Answer(head, False, iter([body]))

    def _send_replacement(self, client: socket.socket, fault: Fault) -> None:
        """Send what `fault` puts in place of the server's answer. Raise PeerClosed if the connection must end."""
        if fault in ERRORS:
            client.sendall(http_answer(ERRORS[fault], b"<html>come back later</html>", "text/html"))
        elif fault is Fault.HTML:
            client.sendall(http_answer(200, b"<html>sign in to this network</html>", "text/html"))
        elif fault is Fault.SHAPE:
            client.sendall(http_answer(200, self._random.choice(SHAPES)))
        elif fault is Fault.STALE:
            client.sendall(self._last_answer or b"")
        else:
            if fault is Fault.HUNG:
                self._hang(client)
            if fault is Fault.BYTES:
                client.sendall(self._random.randbytes(self._random.choice([1, 30, 3000])))
            raise PeerClosed

    def _send_whole(self, client: socket.socket, request: Request, answer: Answer, fault: Fault | None) -> None:
        """Send an answer that is no stream, with the damage of `fault` to its body."""
        body = b"".join(answer.pieces)
        if fault is Fault.SHORT:
            self._count(fault)
            client.sendall(answer.head + body[: self._random.randrange(len(body))])
            raise PeerClosed
        if fault is Fault.DIGIT:
            self._count(fault)
            client.sendall(answer.head + self._change_digit(body))
        else:
            self._note_session(request, body)
            self._send(client, Answer(answer.head, False, iter([body])))

    def _stream(self, client: socket.socket, answer: Answer, fault: Fault | None) -> None:
        """Send a stream piece by piece, with the damage of `fault` at the drawn piece."""
        if fault not in STREAMED:
            return self._send(client, answer)
        self._count(fault)
        client.sendall(answer.head)
        untouched = self._random.randrange(5) if self._place is None else self._place
        pieces = list(answer.pieces)
        for place, piece in enumerate(pieces):
            if place >= min(untouched, len(pieces) - 1):
                if fault is Fault.STREAM_DIGIT:
                    piece = self._change_digit(piece)
                elif fault is Fault.STREAM_ENDED:
                    break
                elif fault is Fault.STREAM_HUNG:
                    self._hang(client)
                else:
                    client.sendall(http_chunk(piece)[: self._random.randrange(len(piece) + 1)])
                    raise PeerClosed
                untouched = len(pieces)
            client.sendall(http_chunk(piece))
        return client.sendall(http_chunk(b""))

    def _send(self, client: socket.socket, answer: Answer) -> None:
        client.sendall(answer.head)
        sent = answer.head
        for piece in answer.pieces:
            data = http_chunk(piece) if answer.chunked else piece
            client.sendall(data)
            sent += data
        if answer.chunked:
            client.sendall(http_chunk(b""))
            sent += http_chunk(b"")
        with self._lock:
            self._last_answer = sent

    def _hang(self, client: socket.socket) -> None:
        """Wait until the client closes its end, then raise PeerClosed."""
        client.settimeout(LONGEST_HANG)
        client.recv(1)
        raise PeerClosed

    def _note_session(self, request: Request, body: bytes) -> None:
        if request.head.startswith(b"POST /v1/sessions?"):
            with suppress(ValueError, KeyError), self._lock:
                self._sessions.add(json.loads(body)["session"])

    def _flip_bit(self, body: bytes) -> bytes:
        place = self._random.randrange(len(body))
        return body[:place] + bytes([body[place] ^ 1 << self._random.randrange(7)]) + body[place + 1 :]

    def _change_digit(self, body: bytes) -> bytes:
        place = self._random.choice([match.start() for match in re.finditer(rb"\d", body)])
        other = self._random.choice([digit for digit in b"0123456789" if digit != body[place]])
        return body[:place] + bytes([other]) + body[place + 1 :]


class Upstream:
    """A connection to the server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def ask(self, request: Request) -> Answer:
        """Send a request, and return its answer, of which only the head was read."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._file = self._socket.makefile("rb")
        self._socket.sendall(request.head + request.body)
        head = read_head(self._file)
        if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            return Answer(head, True, self._chunks())
        return Answer(head, False, iter([self._file.read(content_length(head))]))

    def close(self) -> None:
        if self._socket is not None:
            self._file.close()
            self._socket.close()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            self._file.readline()
        self._file.readline()


def can_hit(fault: Fault, line: bytes) -> bool:
    """Return True if the fault can hit a request that begins with this line."""
    streamed = b"/generate " in line
    if fault in STREAMED:
        return streamed
    if fault is Fault.RESTARTED:
        return b"/v1/sessions/" in line
    if fault is Fault.DAMAGED:
        return line.startswith(b"POST")
    return not (streamed and fault in (Fault.SHORT, Fault.DIGIT))


def read_request(file: BinaryIO) -> Request:
    """Return the next request. Raise PeerClosed if it breaks off."""
    head = read_head(file)
    return Request(head, file.read(content_length(head)))


def read_head(file: BinaryIO) -> bytes:
    """Return a head with its empty line. Raise PeerClosed if it breaks off."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        if not line:
            raise PeerClosed
        head += line
    return head


def content_length(head: bytes) -> int:
    """Return the value of the Content-Length header, or 0 without one."""
    match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(match[1]) if match else 0


def http_chunk(piece: bytes) -> bytes:
    """Return one chunk of a chunked body. An empty piece gives the last chunk."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def http_answer(status: int, body: bytes, content: str = "application/json") -> bytes:
    """Return a whole answer that is the last on its connection."""
    head = [
        f"HTTP/1.1 {status} Any",
        f"Content-Type: {content}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
