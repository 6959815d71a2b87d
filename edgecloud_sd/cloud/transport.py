"""HTTP requests to a cloud server: single attempts, bounded in time and in bytes by the client alone.

An attempt that fails raises AttemptFailed if another one may succeed, and Refused if none can. `cloud.failures` decides
which, and `cloud.retry` when the next one is due.
"""

from __future__ import annotations

import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpcore2

from edgecloud_sd import wire
from edgecloud_sd.cloud.failures import Failure, classify_failure
from edgecloud_sd.cloud.retry import AttemptFailed, Refused
from edgecloud_sd.cloud.url import parse_url
from edgecloud_sd.host.limits import start_outside_limit

MODEL_PATH = "/v1/model"  # the path of the first request to a server
SESSIONS_PATH = "/v1/sessions"  # to open a session; each session has a path under it
KEEP_ALIVE = 60.0  # s for which the pool keeps an unused connection; the server keeps its end longer
CONNECT_TIMEOUT = 5.0  # s, and at most the time left to the request
POLL = 0.1  # s after which a call that waits for its answer, or for an address, looks if it is still wanted
LARGEST_ANSWER = 2**16  # bytes of an answer, or of one line of a stream: real ones have a few hundred
HTTP_ERRORS = (  # the errors of httpcore that the server or the network causes
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    httpcore2.ProxyError,
)


@dataclass(frozen=True)
class Answer:
    """The body of a successful answer, and its Server-Timing header."""

    content: bytes
    timing: str


class Transport:
    """A pool of HTTP connections to one server, for any number of threads.

    `timeout` is the seconds from the start of a request to the last byte of its answer. For a stream it is the seconds
    between two lines. A call may give fewer `seconds`. Raise ValueError for a malformed URL.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self.url = url
        self._timeout = timeout
        self._base = parse_url(url)
        self._headers = [(b"Host", self._base.host_header.encode())]
        if key:
            self._headers.append((b"Authorization", b"Bearer " + key.encode()))
        self._is_closed = False
        # httpcore follows no redirect, keeps no cookie, decompresses nothing and reads no proxy from the environment
        self._pool = httpcore2.ConnectionPool(
            ssl_context=_read_certificates() if self._base.scheme == "https" else None,
            max_connections=None,
            keepalive_expiry=KEEP_ALIVE,
            network_backend=_Backend(),
        )

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content: str = "",
        seconds: Callable[[], float] = lambda: math.inf,
    ) -> Answer:
        """Return the whole answer to one request, whose body has the media type `content`.

        `seconds` is called again while the call waits, so that another thread can end it.
        """
        deadline = _Deadline(lambda: min(seconds(), self._timeout))
        with self._request(method, path, body, content, deadline) as response:
            return Answer(_read_body(response), _timing_header(response))

    @contextmanager
    def stream(self, path: str, body: bytes, seconds: Callable[[], float]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Post a JSON request, and yield the answer's Server-Timing header and an iterator over its lines.

        `seconds` gives the time for each line, and can end the wait for it.
        """
        deadline = _Deadline(lambda: min(seconds(), self._timeout))
        with self._request("POST", path, body, wire.JSON, deadline) as response:
            yield _timing_header(response), _read_lines(response, deadline)

    def close(self) -> None:
        """Close all connections, including those on which another thread waits."""
        self._is_closed = True
        self._pool.close()

    @contextmanager
    def _request(
        self, method: str, path: str, body: bytes | None, content: str, deadline: _Deadline
    ) -> Iterator[httpcore2.Response]:
        if self._is_closed:
            raise Refused(f"{self.url}: this connection was closed; make a new one")
        base = self._base
        url = httpcore2.URL(scheme=base.scheme, host=base.host, port=base.port, target=base.path + path)
        headers = [*self._headers, (b"Content-Type", content.encode())] if content else self._headers
        timeouts = {"timeout": dict.fromkeys(("connect", "read", "write"), deadline)}
        name, _, query = path.partition("?")
        sent = wire.request_checksum(method, name, query.encode(), content.encode(), body or b"")
        names_session = path.startswith(f"{SESSIONS_PATH}/")
        classify = partial(
            classify_failure, sent=sent, is_first_contact=path == MODEL_PATH, names_session=names_session
        )
        try:
            with self._pool.stream(method, url, headers=headers, content=body, extensions=timeouts) as response:
                if not 200 <= response.status < 300:  # the readers of answers check their content too
                    problem = _read_problem_body(response)
                    failure = classify(response.status, problem, headers=_read_headers(response))
                    raise _as_exception(failure, response.status)
                yield response
        except HTTP_ERRORS as error:
            was_sent = not isinstance(error, httpcore2.ConnectError | httpcore2.ConnectTimeout)
            raise _as_exception(classify(error=error), type(error).__name__, was_sent) from None


def _read_certificates() -> ssl.SSLContext:
    """Return the settings of TLS. Raise ValueError if the certificates that the environment names cannot be read."""
    try:
        return httpcore2.default_ssl_context()
    except OSError as error:
        file = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR") or "of this system"
        raise ValueError(
            f"the trusted certificates {file} cannot be read ({error}): set SSL_CERT_FILE to a PEM file with them"
        ) from None


def _as_exception(failure: Failure, answer: int | str, was_sent: bool = True) -> AttemptFailed | Refused:
    """Return the exception for a failure, which is an answer with a status or an error with a name."""
    if failure.kind == "permanent" and failure.is_proven:
        return Refused(failure.reason)
    return AttemptFailed(
        failure.reason,
        session_is_lost=failure.kind == "reopen",
        context_differs=failure.kind == "resend",
        was_sent=was_sent,
        retry_after=failure.retry_after,
        final_answer=str(answer) if failure.kind == "permanent" else "",
        is_busy=answer == 429,
    )


def parse_server_timing(header: str, total: float) -> tuple[float, float]:
    """Return the (queue, model) seconds of this server's Server-Timing header.

    A missing or unreadable entry is 0. The sum is at most `total`: the client does not trust the server's clock.
    """
    entries = {}
    for entry in header.split(","):
        name, _, milliseconds = entry.partition(";dur=")
        with suppress(ValueError):
            seconds = float(milliseconds) / 1e3
            if math.isfinite(seconds):
                entries[name.strip()] = max(seconds, 0.0)
    model = min(entries.get("model", 0.0), total)
    return min(entries.get("queue", 0.0), total - model), model


def _read_problem_body(response: httpcore2.Response) -> bytes:
    """Return the body of an error, or nothing if it is longer than that of any real error."""
    try:
        return _read_body(response)
    except AttemptFailed:
        return b""


def _read_headers(response: httpcore2.Response) -> dict[str, str]:
    """Return the headers by their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


def _read_body(response: httpcore2.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise AttemptFailed(f"the answer is longer than {LARGEST_ANSWER} bytes")
    return bytes(body)


def _read_lines(response: httpcore2.Response, deadline: _Deadline) -> Iterator[bytes]:
    """Yield each line as it arrives. A last line without a newline was cut off, so it is dropped."""
    rest = b""
    for chunk in response.iter_stream():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if lines:
            deadline.renew()
        if len(rest) > LARGEST_ANSWER:
            raise AttemptFailed(f"a line of the answer is longer than {LARGEST_ANSWER} bytes")


def _timing_header(response: httpcore2.Response) -> str:
    return b",".join(value for name, value in response.headers if name.lower() == b"server-timing").decode("latin-1")


class _Deadline:
    """The moment by which a request must be done.

    httpcore applies a timeout to each read and each write, of which one answer may need any number. httpcore passes the
    timeout object on unchanged, so one deadline can bound them all.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self._seconds()

    def remaining(self, error: type[Exception]) -> float:
        """Return the seconds left, or raise `error` if the moment has passed."""
        seconds = min(self._end - time.monotonic(), self._seconds())
        if seconds <= 0:
            raise error("took too long")
        return seconds


class _Resolver:
    """Look-ups of host names with a time limit, which the operating system does not have.

    Look-ups of one name share a thread, so that those that hang do not pile up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], futures.Future[list[str]]] = {}

    def find_addresses(self, host: str, port: int, deadline: _Deadline) -> list[str]:
        """Return the addresses of a host in the order of the system. Raise ConnectTimeout or ConnectError."""
        with self._lock:
            future = self._running.get((host, port))
            if future is None:
                future = self._running[host, port] = futures.Future()
                thread = threading.Thread(target=self._resolve, args=(host, port, future), daemon=True)
                start_outside_limit(thread.start)
        try:
            while not future.done():
                futures.wait([future], min(deadline.remaining(httpcore2.ConnectTimeout), POLL))
        except httpcore2.ConnectTimeout:
            raise httpcore2.ConnectTimeout(f"the name {host} took too long to resolve") from None
        try:
            return future.result()
        except OSError as error:
            raise httpcore2.ConnectError(error) from error

    def _resolve(self, host: str, port: int, future: futures.Future[list[str]]) -> None:
        try:
            places: list[tuple[Any, ...]] = [
                place[4] for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            ]
            # a link-local address of IPv6 needs its interface, the last of four parts
            names = [f"{place[0]}%{place[3]}" if any(place[3:]) else str(place[0]) for place in places]
            future.set_result(list(dict.fromkeys(names)))
        except Exception as error:  # noqa: BLE001 - the future raises it for whoever waits
            future.set_exception(error)
        finally:
            with self._lock:
                del self._running[host, port]


class _Backend(httpcore2.NetworkBackend):
    """Sockets whose timeouts are `_Deadline` objects."""

    def __init__(self) -> None:
        self._resolver = _Resolver()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: Any = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that answers. An address takes at most its share of the time left."""
        addresses = self._resolver.find_addresses(host, port, timeout)
        failure: Exception = httpcore2.ConnectError(f"the name {host} has no address")
        for place, address in enumerate(addresses):
            share = timeout.remaining(httpcore2.ConnectTimeout) / (len(addresses) - place)
            try:
                connect = httpcore2.SyncBackend().connect_tcp
                return _Stream(connect(address, port, min(share, CONNECT_TIMEOUT), local_address, socket_options))
            except (httpcore2.ConnectTimeout, httpcore2.ConnectError) as error:
                failure = error
        raise failure


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        while True:
            seconds = min(timeout.remaining(httpcore2.ReadTimeout), POLL)
            with suppress(httpcore2.ReadTimeout):
                return self._stream.read(max_bytes, seconds)

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        """Send all bytes. httpcore would give each part that the socket takes the whole time."""
        connection = self._stream.get_extra_info("socket")
        rest = memoryview(buffer)
        while rest:
            seconds = timeout.remaining(httpcore2.WriteTimeout)
            try:
                connection.settimeout(seconds)  # fails if another thread has closed the connection
                rest = rest[connection.send(rest) :]
            except TimeoutError as error:
                raise httpcore2.WriteTimeout(error) from error
            except OSError as error:
                raise httpcore2.WriteError(error) from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore2.NetworkStream:
        seconds = min(timeout.remaining(httpcore2.ConnectTimeout), CONNECT_TIMEOUT)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
