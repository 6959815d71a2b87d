"""The headers of a request, as raw bytes to a real server: one meaning for every reader, and no foreign web page."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.headers import (
    SINGLE_HEADERS,
    HeaderProblem,
    find_ambiguity,
    find_foreign_page,
    parse_bearer,
    parse_media_type,
)
from edgecloud_sd.cloud.server import create_app
from tests.support.asgi import KEY, Edge, run_scene
from tests.support.serving import ToyEngine, served

BODY = b'{"base":0,"tokens":[3],"draft":[],"check":1}'
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = f"Content-Length: {len(BODY)}"
POST = ["POST /v1/sessions/none/verify HTTP/1.1", "Host: any", "Content-Type: application/json"]
GET = ["GET /v1/model HTTP/1.1", "Host: any"]
BEARER = f"Authorization: Bearer {KEY}"


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """Yield the ports of a server with a key and of one without."""
    with ExitStack() as stack:
        urls = [stack.enter_context(served(ToyEngine(), keys=keys)) for keys in ([KEY], [])]
        with_key, without_key = (int(str(urlsplit(url).port)) for url in urls)
        yield with_key, without_key


def ask(port: int, lines: Sequence[str], body: bytes = b"", newline: str = "\r\n") -> tuple[int, bytes, bool]:
    """Return the status, the whole answer and whether the server closes the connection after it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, connection.makefile("rb") as answer:
        connection.sendall(newline.join([*lines, "", ""]).encode("latin-1") + body)
        head = b"".join(iter(answer.readline, b"\r\n"))
        length = next((int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length")), 0)
        content = answer.read(0 if lines[0].startswith("HEAD") else length)
        is_closed = b"connection: close" in head.lower()
        if is_closed:
            content += answer.read()  # to the end of the connection
        return int(head.split()[1]), head + b"\r\n" + content, is_closed


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        ([*POST, BEARER, LENGTH, "Transfer-Encoding: chunked"], CHUNKED, 400),
        ([*POST, BEARER, "Transfer-Encoding: chunked", LENGTH], CHUNKED, 400),
        ([*GET, BEARER, "Content-Length: 0", "transfer-encoding: CHUNKED"], b"0\r\n\r\n", 400),
        ([*POST, LENGTH, "Transfer-Encoding: chunked"], CHUNKED, 400),  # without a key
        (["GET /health HTTP/1.1", "Host: any", "Content-Length: 0", "Transfer-Encoding: chunked"], b"0\r\n\r\n", 400),
        ([POST[0].replace("1.1", "1.0"), *POST[1:], BEARER, "Transfer-Encoding: chunked"], CHUNKED, 400),
        ([*POST, BEARER, LENGTH, "Content-Length: 3"], BODY, 400),
        ([*POST, BEARER, f"{LENGTH}, 3"], BODY, 400),
        ([*POST, BEARER, f"Content-Length: +{len(BODY)}"], BODY, 400),
        ([*POST, BEARER, "Content-Length: 0x2c"], BODY, 400),
        *[
            ([*POST, BEARER, f"Transfer-Encoding{encoding}"], CHUNKED, 400)
            for encoding in (": gzip", ": gzip, chunked", ": chunked, identity", " : chunked", ": \x0bchunked", ": x")
        ],
        ([*POST, BEARER, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], CHUNKED, 400),
        ([*POST, BEARER, "X: a\rContent-Length: 3", LENGTH], BODY, 400),
        ([*POST, BEARER, "X: a\x00", LENGTH], BODY, 400),
        ([GET[0], BEARER], b"", 400),  # no host
        ([*GET, "Host: any", BEARER], b"", 400),
        ([*GET, "Host: other", BEARER], b"", 400),
        ([*POST, "Content-Type: application/json", BEARER, LENGTH], BODY, 400),
        ([*POST, "Content-Type: application/octet-stream", BEARER, LENGTH], BODY, 400),
        ([*GET, BEARER, BEARER], b"", 400),
        ([*GET, BEARER, "authorization: Bearer other"], b"", 400),
        ([*GET, "Authorization: Basic b3RoZXI=", BEARER], b"", 400),
    ],
)
def test_a_request_that_has_two_meanings_is_refused_and_its_connection_closed(
    lines: list[str], body: bytes, status: int, ports: tuple[int, int]
) -> None:
    followed = body + b"GET /health HTTP/1.1\r\nHost: any\r\n\r\n"  # the request that a smuggler would hide
    answered, answer, is_closed = ask(ports[0], lines, followed)
    assert (answered, is_closed) == (status, True)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("lines", "body", "newline"),
    [
        ([*POST, BEARER, LENGTH], BODY, "\r\n"),
        ([*POST, BEARER, "Transfer-Encoding: Chunked"], CHUNKED, "\r\n"),
        # RFC 9110 and 9112 allow a reader to take these, because all who do so read the same.
        ([*POST, BEARER, LENGTH, LENGTH], BODY, "\r\n"),
        ([*POST, BEARER, f"{LENGTH}, {len(BODY)}"], BODY, "\r\n"),
        ([*POST, LENGTH, "Authorization: Bearer", f" {KEY}"], BODY, "\r\n"),
        ([*POST, BEARER, LENGTH], BODY, "\n"),
    ],
)
def test_a_request_with_one_meaning_reaches_its_route(
    lines: list[str], body: bytes, newline: str, ports: tuple[int, int]
) -> None:
    status, answer, is_closed = ask(ports[0], lines, body, newline)
    assert (status, is_closed) == (404, False)
    assert b"no such session" in answer


def test_a_client_of_http_1_0_is_answered_once(ports: tuple[int, int]) -> None:
    for lines in (["GET /health HTTP/1.0"], ["GET /health HTTP/1.0", "Host: any"]):
        assert ask(ports[0], lines)[::2] == (200, True)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/v1/model", "/metrics", "/openapi.json"])
def test_head_has_the_headers_of_get_and_no_body(path: str, ports: tuple[int, int]) -> None:
    answers = [ask(ports[0], [f"{method} {path} HTTP/1.1", "Host: any", BEARER]) for method in ("GET", "HEAD")]
    (_, got, _), (status, head, _) = answers
    assert status == 200
    assert head.endswith(b"\r\n\r\n")
    heads = [answer.partition(b"\r\n\r\n")[0].splitlines() for answer in (got, head)]
    assert [line.partition(b":")[0] for line in heads[0]] == [line.partition(b":")[0] for line in heads[1]]


LOCAL_HOSTS = ("localhost", "LocalHost:8700", "127.0.0.1", "127.9.8.7:80", "[::1]", "[::1]:8700", "localhost:")
FOREIGN_HOSTS = (
    *("evil.example", "evil.example:8700", "localhost.evil.example", "127.0.0.1.evil.example", "localhosts", ""),
    *("0.0.0.0", "[::]", "10.0.0.1:8700", "me@localhost", "evil.example@localhost", "localhost:80:80", "localhost/x"),
    *("::1", "[::1", "127.1", "2130706433", "\xffexample"),
)
LOCAL_ORIGINS = tuple(f"{scheme}://{host}" for scheme in ("http", "https") for host in LOCAL_HOSTS)
FOREIGN_ORIGINS = (
    *(f"http://{host}" for host in FOREIGN_HOSTS),
    *("null", "", "localhost", "file://", "ftp://localhost", "chrome-extension://localhost", "http:localhost"),
    *("http://localhost, http://evil.example", "http://evil.example http://localhost"),
)


@pytest.mark.parametrize("host", LOCAL_HOSTS)
@pytest.mark.parametrize("origin", [None, *LOCAL_ORIGINS[:3]])
def test_pages_of_this_machine_reach_a_server_without_keys(host: str, origin: str | None) -> None:
    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    assert find_foreign_page(headers) is None


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        *[("host", value, 421) for value in FOREIGN_HOSTS],
        *[("origin", value, 403) for value in FOREIGN_ORIGINS],
    ],
)
def test_pages_of_other_hosts_do_not(name: str, value: str, status: int) -> None:
    host = [] if name == "host" else [(b"host", b"localhost")]
    problem = find_foreign_page([*host, (name.encode(), value.encode("latin-1"))])
    assert problem is not None
    assert problem.status == status
    assert problem.detail.startswith(f"{name} ")


def test_a_server_without_keys_refuses_a_rebound_name_and_a_server_with_keys_does_not(ports: tuple[int, int]) -> None:
    rebound = ["GET /v1/model HTTP/1.1", "Host: evil.example:8700", BEARER]
    from_page = ["GET /health HTTP/1.1", "Host: localhost", "Origin: http://evil.example", BEARER]
    for lines, status in ((rebound, 421), (from_page, 403)):
        assert ask(ports[0], lines)[::2] == (200, False)
        answered, answer, is_closed = ask(ports[1], lines)
        assert (answered, is_closed) == (status, True)
        assert b"a server without keys answers only to localhost" in answer
    for host in ("localhost", "127.0.0.1"):
        connection = Connection(f"http://{host}:{ports[1]}")
        assert connection.identity.name == "toy"
        connection.close()


def test_a_server_that_other_machines_may_reach_without_a_key_has_any_name() -> None:
    async def scene() -> None:
        for allow_remote, status in ((True, 200), (False, 421)):
            app = create_app(ToyEngine(), allow_remote=allow_remote)
            response = await Edge(app, None).request("GET", "/health", headers=[(b"host", b"evil.example")])
            assert response.status == status

    run_scene(scene())


@given(st.lists(st.sampled_from([*SINGLE_HEADERS, b"accept", b"x"]), max_size=9), st.sampled_from(["1.0", "1.1"]))
def test_every_header_with_one_meaning_stands_once(names: list[bytes], version: str) -> None:
    is_repeated = any(names.count(name) > 1 for name in SINGLE_HEADERS)
    is_encoded = b"transfer-encoding" in names
    has_two_meanings = is_repeated or (is_encoded and (b"content-length" in names or version == "1.0"))
    problem = find_ambiguity(version, [(name, b"1") for name in names])
    assert (problem is not None) == has_two_meanings
    assert problem is None or isinstance(problem, HeaderProblem)


@pytest.mark.parametrize(
    ("header", "media_type"),
    [
        ("application/json", "application/json"),
        (" Application/JSON ; charset=utf-8", "application/json"),
        ("application/json;", "application/json"),
        ("application/octet-stream+json", "application/octet-stream+json"),
        ("text/plain, application/json", "text/plain, application/json"),
        ("", ""),
    ],
)
def test_a_media_type_is_compared_without_case_and_parameters(header: str, media_type: str) -> None:
    assert parse_media_type(header) == media_type


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"Bearer k", b"k"),
        (b"bearer   k", b"k"),
        (b"BEARER k=/+.-_~", b"k=/+.-_~"),
        *[(header, b"") for header in (b"", b"k", b"Bearer", b"Bearer ", b"Bearerk", b"Bearer\tk", b"Basic k")],
        *[(header, b"") for header in (b"Bearer k k", b" Bearer k", b"Bearer k, Bearer k")],
    ],
)
def test_a_key_follows_the_scheme_and_one_blank_or_more(header: bytes, key: bytes) -> None:
    assert parse_bearer(header) == key
