"""Single HTTP attempts against any server: hostile answers are failures, bounded in time and in bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgecloud_sd import wire
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud import retry, transport
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import CONFIRMATIONS, Refused
from edgecloud_sd.cloud.transport import HTTP_ERRORS, LARGEST_ANSWER, parse_server_timing
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault
from tests.support.canned import (
    CALLS,
    CHUNKED_HEAD,
    KEY,
    OK_HEAD,
    PROMPT,
    PROMPT_CHECK,
    TOY,
    CannedServer,
    connected,
)
from tests.support.proxy import http_answer, http_chunk
from tests.support.serving import ToyEngine, served

Call = Callable[[Connection], object]
SHORT_TIMEOUT = 0.05  # s, for answers that are meant to be late
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def three_attempts(monkeypatch: pytest.MonkeyPatch) -> float:
    """Return a patience that is used up after three attempts, however slowly they run."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 60.0)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 60.0)
    return 30.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(ToyEngine(), keys=[KEY]) as url:
        yield url


@pytest.mark.parametrize("key", [None, "another-key-of-sixteen-characters"])
def test_a_wrong_key_is_refused_with_the_name_of_the_option(url: str, key: str | None) -> None:
    with connected(url, key=key) as connection, pytest.raises(Refused, match=r"401.*--cloud-key-file"):
        _ = connection.identity


def test_a_name_that_does_not_resolve_ends_a_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    with connected("http://cloud.invalid:1") as connection, pytest.raises(Refused, match="name does not resolve"):
        _ = connection.identity


def test_look_ups_that_hang_end_with_patience_and_share_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    release, lookups = threading.Event(), list[object]()

    def hang(*arguments: object, **options: object) -> None:
        lookups.append(arguments)
        release.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    with connected("http://cloud.invalid:1", patience=0.1, timeout=0.03) as connection:
        start = time.monotonic()
        with pytest.raises(CloudFault, match=r"failed \d+ times.*cloud.invalid took too long to resolve"):
            _ = connection.identity
        assert time.monotonic() - start < 1
        release.set()
    assert len(lookups) == 1


def test_the_next_address_of_a_name_is_tried_within_the_deadline(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(url.rpartition(":")[2])
    resolve = socket.getaddrinfo

    def resolve_to_two(host: str, *arguments: object, **options: object) -> object:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "cloud.invalid" else [host]  # nobody listens at the first
        return [place for name in hosts for place in resolve(name, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr("socket.getaddrinfo", resolve_to_two)
    with connected(f"http://cloud.invalid:{port}", patience=0.0) as connection:
        assert connection.identity.name == "toy"


def test_a_write_on_a_connection_that_another_thread_closed_is_a_failed_attempt() -> None:
    with socket.socket() as closed:
        pass
    stream = transport._Stream(SimpleNamespace(get_extra_info=lambda info: closed))  # type: ignore[arg-type]
    with pytest.raises(HTTP_ERRORS, match="Bad file descriptor"):
        stream.write(b"request", transport._Deadline(lambda: 1.0))


@pytest.mark.parametrize("status", [301, 304, 400, 401, 403, 404, 405, 413, 501, 511])
def test_one_damaged_status_ends_no_call(status: int) -> None:
    opened = http_answer(201, wire.dumps(wire.build_opened_message("open", TOY.fingerprint, PROMPT_CHECK)))
    damaged = http_answer(status, b'{"session":"open"}')
    with CannedServer(lambda number: opened if number == 2 else damaged) as server, connected(server.url) as connection:
        CALLS["open"](connection)
        assert len(server.heads) == CONFIRMATIONS


def test_another_service_in_place_of_the_cloud_ends_a_call_and_a_lost_session_does_not() -> None:
    lost = http_answer(404, b'{"detail":"the session does not exist"}')
    with CannedServer(lambda number: lost if number < 5 else http_answer(404, b"<html>")) as server:
        with connected(server.url) as connection, pytest.raises(Refused, match=r"is not an edgecloud_sd cloud"):
            CALLS["verify"](connection)
        assert len(server.heads) == 5 + CONFIRMATIONS


def test_a_server_without_tls_at_an_https_url_ends_a_call_at_once() -> None:
    def answer(listening: socket.socket) -> None:
        for _ in range(CONFIRMATIONS):
            client, _ = listening.accept()
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        threads.submit(answer, listening)
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        with connected(url) as connection, pytest.raises(Refused, match="agree on no TLS: check --cloud-url"):
            _ = connection.identity


def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content in (None, b"", b"no PEM"):
        file = tmp_path / "authority.pem"
        if content is not None:
            file.write_bytes(content)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        with pytest.raises(ValueError, match=r"authority\.pem cannot be read .*: set SSL_CERT_FILE"):
            Connection("https://127.0.0.1:1")


def test_the_wait_that_a_server_asks_for_is_slept() -> None:
    delays: list[float] = []
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    refusal = http_answer(401, b"")
    with CannedServer(lambda number: refusal if number else busy) as server:
        connection = Connection(server.url, patience=60.0, sleep=delays.append)
        with pytest.raises(Refused):
            _ = connection.identity
        connection.close()
    assert delays == [7.0]


def test_no_proxy_is_taken_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed_port = free.getsockname()[1]
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    with connected(url, patience=0.0) as connection:
        assert connection.identity.name == "toy"


def test_a_closed_connection_opens_no_other(url: str) -> None:
    with connected(url) as connection:
        assert connection.identity.name == "toy"
    with pytest.raises(Refused, match="closed"):
        connection.transport.call("GET", "/v1/model")


GARBAGE = {
    "nothing": b"",
    "noise": b"\x00\x9f\xffnoise",
    "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "http 0.9": b"{}",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "unknown status": b"HTTP/1.1 999 So\r\n\r\n",
    "switched protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "only preliminary": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "part of it": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\n{}",
    "nameless header": OK_HEAD + b": no name\r\n\r\n{}",
    "binary header": OK_HEAD + b"Server-Timing: \xff\xfe;dur=\xff\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": OK_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "negative length": OK_HEAD + b"Content-Length: -2\r\n\r\n{}",
    "endless length": OK_HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "malformed chunks": OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "no line": OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "compressed noise": OK_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "unknown text": OK_HEAD + b"Content-Type: application/json; charset=klingon\r\nContent-Length: 2\r\n\r\n{}",
    "no utf-8": OK_HEAD + b"Content-Length: 3\r\n\r\n\xc3\x28\n",
    "a surrogate": http_answer(201, b'{"session":"\\ud800","model":"m","check":1}\n'),
    "a number without end": http_answer(200, b'{"accepted":' + b"9" * 5000 + b',"token":1,"check":1}\n'),
    "no number": http_answer(200, b'{"accepted":NaN,"token":Infinity,"check":1e5}\n'),
    "nested": http_answer(200, b"[" * 60_000 + b"\n"),
}


@pytest.mark.slow
@every_call
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_failure_that_is_tried_again(name: str, call: Call, three_attempts: float) -> None:
    with (
        CannedServer(lambda number: GARBAGE[name]) as server,
        connected(server.url, patience=three_attempts) as connection,
    ):
        with pytest.raises(CloudFault, match="the cloud failed"):
            call(connection)
        assert len(server.heads) >= 2


@pytest.mark.parametrize("session", ["", "../model", "a b", "a\nb", "é", "x" * 65])
def test_a_session_name_that_is_unsafe_in_a_path_is_a_failure(session: str) -> None:
    answer = http_answer(201, wire.dumps(wire.build_opened_message(session, TOY.fingerprint, PROMPT_CHECK)))
    with CannedServer(lambda number: answer) as server, connected(server.url, patience=0.0) as connection:
        connection.identity = TOY
        verification = connection.verifier(GREEDY, Harness()).open(PROMPT)
        with pytest.raises(CloudFault, match="names no valid session"):
            verification.wait()


@every_call
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_target_gets_no_key(status: int, call: Call) -> None:
    with CannedServer(lambda number: http_answer(404, b"")) as target:
        redirect = f"HTTP/1.1 {status} Go\r\nLocation: {target.url}\r\nContent-Length: 0\r\n\r\n".encode()
        with (
            CannedServer(lambda number: redirect) as server,
            connected(server.url) as connection,
            pytest.raises(Refused, match=f"{status}, a redirect to {target.url}"),
        ):
            call(connection)
        assert len(server.heads) == CONFIRMATIONS
    assert target.heads == []


def test_no_cookie_is_kept(three_attempts: float) -> None:
    cookie = b"HTTP/1.1 503 Later\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"
    with CannedServer(lambda number: cookie) as server, connected(server.url, patience=three_attempts) as connection:
        with pytest.raises(CloudFault):
            _ = connection.identity
        assert len(server.heads) >= 2
        assert not any(b"cookie" in head.lower() for head in server.heads)


def test_the_detail_of_a_problem_is_shown_without_control_characters() -> None:
    body = json.dumps({"detail": "\x1b]0;title\x07\u202e" + "x" * 1000}).encode()
    with (
        CannedServer(lambda number: http_answer(503, body)) as server,
        connected(server.url, patience=0.0) as connection,
        pytest.raises(CloudFault) as caught,
    ):
        _ = connection.identity
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


ENDLESS = {
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096),
    "chunks": (CHUNKED_HEAD, http_chunk(b"x" * 4096)),
    "head": (OK_HEAD, b"X-Name: " + b"x" * 4096 + b"\r\n"),
    "problem": (b"HTTP/1.1 500 Oh\r\n\r\n", b"x" * 4096),
}


@every_call
@pytest.mark.parametrize("part", ENDLESS)
def test_an_endless_answer_is_left_after_a_bounded_number_of_bytes(part: str, call: Call) -> None:
    head, more = ENDLESS[part]
    most = 12 * 2**20  # bytes: far more than the buffers between the two ends

    def answer(number: int) -> Iterator[bytes]:
        yield head
        while server.sent_bytes < most:
            yield more

    with CannedServer(answer) as server, connected(server.url, patience=0.0) as connection, pytest.raises(CloudFault):
        call(connection)
    assert most / 100 > LARGEST_ANSWER
    assert server.sent_bytes < most


@every_call
@pytest.mark.parametrize("start", [b"", OK_HEAD, CHUNKED_HEAD], ids=["no answer", "half a head", "no line"])
def test_a_call_that_hangs_ends_with_patience_whatever_one_request_may_take(start: bytes, call: Call) -> None:
    is_over = threading.Event()

    def answer(number: int) -> Iterator[bytes]:
        yield start
        is_over.wait(10)

    with CannedServer(answer) as server, connected(server.url, patience=0.02, timeout=60.0) as connection:
        begin = time.monotonic()
        with pytest.raises(CloudFault, match="the cloud failed"):
            call(connection)
        assert time.monotonic() - begin < 0.5
        is_over.set()


TRICKLES = {
    "head": (OK_HEAD[:9], OK_HEAD[9:] + b"X-Name: " + b"x" * 10_000),
    "body": (OK_HEAD + b"Content-Length: 10000\r\n\r\n", b"x" * 10_000),
    "preliminary": (b"HTTP/1.1 ", b"100 Continue\r\n\r\n" + b"HTTP/1.1 100 Continue\r\n\r\n" * 400),
}


@pytest.mark.slow
@every_call
@pytest.mark.parametrize("part", TRICKLES)
def test_an_answer_that_trickles_is_left_at_the_deadline(part: str, call: Call) -> None:
    """Each byte comes soon enough, and all of them together far too late."""
    head, rest = TRICKLES[part]
    has_ended = False

    def answer(number: int) -> Iterator[bytes]:
        nonlocal has_ended
        yield head
        for byte in rest:
            time.sleep(SHORT_TIMEOUT / 10)
            yield bytes([byte])
        has_ended = True

    with (
        CannedServer(answer) as server,
        connected(server.url, patience=0.0, timeout=SHORT_TIMEOUT) as connection,
        pytest.raises(CloudFault, match=r"took too long|Timeout"),
    ):
        call(connection)
    assert not has_ended


@pytest.mark.parametrize(
    ("header", "queue", "model"),
    [
        ("", 0, 0),
        ("queue;dur=1.500,model;dur=250.000", 0.0015, 0.25),
        ("model;dur=250", 0, 0.25),
        (" model;dur=250 , queue;dur=0", 0, 0.25),
        ("queue;dur=nan,model;dur=inf", 0, 0),
        ("queue;dur=-5,model;dur=-1e9", 0, 0),
        ("queue;dur=1e99,model;dur=400", 0.6, 0.4),
        ("queue;dur=400,model;dur=1e99", 0, 1),
        ("queue;dur=700,model;dur=700", 0.3, 0.7),
        ("queue;dur=x;dur=3,;dur=7,model", 0, 0),
        ("\xff\x00,,;;==", 0, 0),
    ],
)
def test_the_times_that_a_server_reports_never_exceed_the_clients_own(header: str, queue: float, model: float) -> None:
    times = parse_server_timing(header, 1.0)
    assert times == pytest.approx((queue, model))
    assert sum(times) <= 1.0
