"""The deadlines and caps of connections, on a real server with short ones."""

from __future__ import annotations

import http.client
import logging
import math
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from edgecloud_sd.cloud import admission, connections
from edgecloud_sd.cloud.connections import (
    ConnectionLimits,
    OpenConnections,
    Wait,
    find_network,
)
from edgecloud_sd.cloud.server import create_app
from tests.support.asgi import KEY, OTHER_KEY
from tests.support.serving import ToyEngine, running_server

SHORT = 0.1  # s, for each deadline
LONG = 30.0  # s, for a deadline that must not be reached
SHORT_DEADLINES = dict.fromkeys(connections.DEADLINES, SHORT)
LONG_DEADLINES = dict.fromkeys(connections.DEADLINES, LONG)
GET = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /v1/sessions?rule=greedy&check=1 HTTP/1.1\r\nHost: here\r\nContent-Type: application/octet-stream\r\n"
WITH_KEY = POST + f"Authorization: Bearer {OTHER_KEY}\r\n".encode()
HANG = b"GET /hang HTTP/1.1\r\nHost: here\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LONG_BODY = b"Content-Length: 99999\r\n\r\n"

# The first bytes of an attack, the bytes that follow now and then, and the statuses that the attacker gets.
ATTACKS: dict[str, tuple[bytes, bytes, list[int]]] = {
    "silent": (b"", b"", []),
    "half a request line": (b"GET /hea", b"", []),
    "half the headers": (GET[:-2], b"", []),
    "headers that drip": (GET[:-2] + b"X: ", b"x", []),
    "empty lines": (b"\r\n", b"\r\n", [400]),
    "a hello of TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", [400]),
    "a header line without an end": (GET[:-2] + b"X: " + b"x" * 70_000, b"x", [400]),
    "no key, then silent": (b"GET /v1/model HTTP/1.1\r\nHost: here\r\n\r\n", b"", [401]),
    "no key, and a body that drips": (POST + LONG_BODY, b"x", [401]),
    "no key, and chunks that drip": (POST + CHUNKED, b"1\r\nx\r\n", [401]),
    "a body without a byte": (WITH_KEY + LONG_BODY, b"", [408]),
    "a body that drips": (WITH_KEY + LONG_BODY, b"x", [408]),
    "a chunk that never begins": (WITH_KEY + CHUNKED, b"0", [408]),
    "too large a body, which goes on": (WITH_KEY + CHUNKED + b"ff0000\r\n" + b"x" * 500_000, b"x", [413]),
    "a body where none belongs": (GET[:-2] + LONG_BODY, b"", [408]),
    "idle after an answer": (GET, b"", [200]),
    "half of the next request": (GET + GET[:9], b"", [200]),
    "pipelined, then silent": (GET * 5, b"", [200] * 5),
    "a chunk that is none": (WITH_KEY + CHUNKED + b"zz\r\n", b"", [400]),
    "no body of a HEAD": (GET.replace(b"GET", b"HEAD")[:-2] + CHUNKED + b"zz\r\n", b"", []),
    "bytes after the last request": (b"GET /hang HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n", b"zz", [400]),
    "chunks of a byte": (WITH_KEY + CHUNKED + b"1\r\nx\r\n" * 40_000, b"x", [400]),
    "chunks that are names": (POST + CHUNKED + b"1;%b\r\nx\r\n" % (b"x" * 99) * 99, b"x", [400]),
    "trailers without an end": (WITH_KEY + CHUNKED + b"0\r\n" + b"X:\r\n" * 50_000 + b"\r\n", b"x", [400]),
    "headers of 200 KB": (GET[:-2] + b"X:\r\n" * 50_000 + b"\r\n", b"x", [400]),
    "a header too many": (2 * (GET[:-2] + b"X:\r\n" * 99 + b"\r\n") + GET[:-2] + b"X:\r\n" * 100, b"", [200, 200, 400]),
    "websockets": (GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", b"", [200]),
}


@contextmanager
def attacker(url: str, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """Yield a connection to a server."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), 10, (source, 0)) as connection:
        yield connection


def ask_politely(url: str, source: str = "127.0.0.1") -> int:
    """Return the status of a request with the key on a connection of its own."""
    client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10, source_address=(source, 0))
    client.request("GET", "/v1/model", headers={"Authorization": f"Bearer {KEY}"})
    status = client.getresponse().status
    client.close()
    return status


def read_until_closed(attackers: dict[str, socket.socket]) -> dict[str, list[int]]:
    """Return the statuses that each attacker gets until its connection closes. They drip all the time."""
    received = dict.fromkeys(attackers, b"")
    is_open = dict.fromkeys(attackers, True)
    for attack in attackers.values():
        attack.setblocking(False)
    end = time.monotonic() + LONG
    while any(is_open.values()):
        assert time.monotonic() < end, [name for name in is_open if is_open[name]]
        time.sleep(SHORT / 20)
        for name, attack in attackers.items():
            with suppress(BlockingIOError):
                try:
                    data = attack.recv(2**16)
                    received[name] += data
                    is_open[name] &= bool(data)
                except ConnectionError:
                    is_open[name] = False
            with suppress(OSError):
                attack.send(ATTACKS[name][1])
    return {name: [int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:]] for name, data in received.items()}


def hanging_app(inner: ASGIApp) -> ASGIApp:
    """Return an application whose path /large has 16 MB, and whose path /hang has no answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == "/hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        elif scope.get("path") == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in range(16):
                await send({"type": "http.response.body", "body": b"x" * 10**6, "more_body": part < 15})
        else:
            await inner(scope, receive, send)

    return app


@pytest.fixture(scope="module")
def short_server() -> Iterator[tuple[str, OpenConnections]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(admission, "BODY_SECONDS", SHORT)
        patched.setattr(admission, "LINGER_SECONDS", SHORT)
        app = hanging_app(create_app(ToyEngine(), keys=[KEY, OTHER_KEY]))
        with running_server(app, ConnectionLimits(SHORT_DEADLINES)) as server:
            yield server


@pytest.fixture(scope="module")
def small_server() -> Iterator[tuple[str, OpenConnections]]:
    app = hanging_app(create_app(ToyEngine(), keys=[KEY]))
    with running_server(app, ConnectionLimits(LONG_DEADLINES, 4, 2)) as server:
        yield server


def has_waits(open_connections: OpenConnections, waits: list[Wait]) -> bool:
    """Return whether the connections of a server wait for these events."""
    return [connection.wait for connection in open_connections] == waits


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition is true."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """Return the records of errors that uvicorn and asyncio will log."""
    logger = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(logger, "level", logging.ERROR)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    return caplog.records


def test_every_attacker_is_answered_and_closed_and_a_polite_client_served(
    short_server: tuple[str, OpenConnections], errors: list[logging.LogRecord]
) -> None:
    url, open_connections = short_server
    with ExitStack() as stack, ThreadPoolExecutor(1) as threads:
        attackers = {name: stack.enter_context(attacker(url)) for name in ATTACKS}
        for name, attack in attackers.items():
            attack.sendall(ATTACKS[name][0])
        polite = threads.submit(ask_politely, url)
        assert read_until_closed(attackers) == {name: statuses for name, (_, _, statuses) in ATTACKS.items()}
        assert polite.result() == 200
    wait_for(lambda: not len(open_connections))
    assert not errors  # no client causes a traceback


def test_bytes_that_are_no_http_end_a_request_that_is_answered_already(
    short_server: tuple[str, OpenConnections], errors: list[logging.LogRecord]
) -> None:
    with attacker(short_server[0]) as connection, connection.makefile("rb") as answer:
        connection.sendall(POST + CHUNKED)
        assert answer.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        connection.sendall(b"zz\r\n")
        assert answer.read().endswith(b"}")
    assert not errors


def test_a_reader_that_stalls_is_cut_off_and_one_that_reads_is_not(short_server: tuple[str, OpenConnections]) -> None:
    url, open_connections = short_server
    with attacker(url) as stalled, attacker(url) as reader:
        for connection in (stalled, reader):
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        assert sum(len(data) for data in iter(lambda: reader.recv(2**20), b"")) > 16 * 10**6
        wait_for(lambda: not len(open_connections))


@pytest.mark.parametrize("behind", [b"\r\n", GET, GET * 5_000], ids=["empty line", "request", "many requests"])
def test_a_client_is_gone_whatever_it_has_sent_behind_its_request(
    short_server: tuple[str, OpenConnections], behind: bytes
) -> None:
    url, open_connections = short_server
    with attacker(url) as connection:
        connection.sendall(HANG)
        wait_for(partial(has_waits, open_connections, [Wait.ANSWER]))
        connection.sendall(behind)
    wait_for(lambda: not len(open_connections))


@pytest.mark.slow
def test_the_connection_that_waits_longest_makes_room_for_a_new_one(small_server: tuple[str, OpenConnections]) -> None:
    url, open_connections = small_server
    with ExitStack() as stack:
        others = [stack.enter_context(attacker(url, "127.0.0.2")) for _ in range(2)]
        silent = deque(stack.enter_context(attacker(url)) for _ in range(2))
        wait_for(lambda: len(open_connections) == 4)
        for _ in range(9):
            assert ask_politely(url) == 200
            assert silent.popleft().recv(1) == b""
            silent.append(stack.enter_context(attacker(url)))
            wait_for(lambda: len(open_connections) == 4)
        for other in others:  # no address that has room for its own connections takes it from another
            other.sendall(GET)
            assert other.recv(100).startswith(b"HTTP/1.1 200")
        assert ask_politely(url, "127.0.0.3") == 200
    wait_for(lambda: not len(open_connections))


@pytest.mark.slow
def test_an_upload_of_a_client_with_a_key_is_not_closed_for_clients_without(
    small_server: tuple[str, OpenConnections],
) -> None:
    url, open_connections = small_server
    upload = WITH_KEY.replace(OTHER_KEY.encode(), KEY.encode()) + b"Content-Length: 1\r\n\r\n"
    body_of_health = GET[:-2] + LONG_BODY
    with attacker(url) as client, ExitStack() as stack:
        client.sendall(upload)
        wait_for(lambda: has_waits(open_connections, [Wait.ADMITTED_BODY]))
        for first, wait in ((b"", Wait.FIRST_BYTE), (body_of_health, Wait.BODY), (POST + LONG_BODY, Wait.REST)) * 3:
            stack.enter_context(attacker(url)).sendall(first)
            wait_for(partial(has_waits, open_connections, [Wait.ADMITTED_BODY, wait]))
        client.sendall(b"x")
        assert client.recv(100).startswith(b"HTTP/1.1 422")
    wait_for(lambda: not len(open_connections))


@pytest.mark.slow
def test_a_connection_beyond_a_cap_is_refused_if_all_others_are_served(
    small_server: tuple[str, OpenConnections],
) -> None:
    url, open_connections = small_server
    with ExitStack() as stack:
        for number, source in enumerate(("127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"), start=1):
            stack.enter_context(attacker(url, source)).sendall(HANG)
            wait_for(partial(has_waits, open_connections, [Wait.ANSWER] * number))
        for source in ("127.0.0.1", "127.0.0.3"):  # over the cap of an address, and over that of all
            with attacker(url, source) as late, late.makefile("rb") as answer:
                assert answer.read().startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n")
    wait_for(lambda: not len(open_connections))
    assert ask_politely(url) == 200


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),
    ],
)
def test_a_network_of_ipv6_counts_as_one_address(one: str, other: str, are_one: bool) -> None:
    assert (find_network(one) == find_network(other)) is are_one


def test_the_caps_fit_the_limit_on_open_files(caplog: pytest.LogCaptureFixture) -> None:
    limits = ConnectionLimits()
    assert limits.fit(math.inf, 50) == limits.fit(65536, 50) == limits
    assert not caplog.records
    lowered = limits.fit(256, 50)
    assert 60 < lowered.connections < 200
    assert lowered.address_connections == lowered.connections // 2
    assert "limit of 256 open files leaves" in caplog.text
    with pytest.raises(OSError, match=r"limit of 100 open files leaves none.*ulimit -n"):
        limits.fit(100, 20)


@pytest.mark.slow
def test_silent_connections_beyond_the_limit_on_open_files_lock_nobody_out(tmp_path: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"{KEY}\n")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 256)); "
    code += "from edgecloud_sd.cloud import __main__ as cli; cli.main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--api-key-file", str(keys)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.kill)
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        for _ in range(400):
            stack.enter_context(attacker(url))
        for _ in range(20):
            assert ask_politely(url) == 200
    assert "limit of 256 open files leaves" in log.read_text()
    assert log.stat().st_size < 1000
