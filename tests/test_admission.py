"""The checks on a request before the application reads it, and the key file."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from edgecloud_sd.cloud import admission
from edgecloud_sd.cloud.admission import Admission
from edgecloud_sd.cloud.keys import parse_keys, read_key, read_keys, warn_if_others_can_read
from edgecloud_sd.cloud.loop_turns import LoopTurns
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import KEY, OTHER_KEY, Edge, run_scene, running_app, wait_until

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Inner:
    """An application that records the requests that reach it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.clients: list[str | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.append(scope.get("client_name"))
        self.bodies.append((await receive())["body"])
        await PlainTextResponse("through")(scope, receive, send)


class Protected:
    """An application behind `Admission`, with the responses that it counts."""

    def __init__(
        self,
        inner: App | None = None,
        keys: tuple[str, ...] = (KEY, OTHER_KEY),
        max_requests: int = 9,
        only_loopback: bool = False,
    ) -> None:
        self.inner = Inner()
        self.responses: list[tuple[str, int]] = []
        self.app = Admission(
            inner or self.inner,
            keys,
            only_loopback,
            100,
            10,
            max_requests,
            lambda *response: self.responses.append(response),
        )

    def edge(self, key: str | None = KEY) -> Edge:
        return Edge(self.app, key)


async def post(protected: Protected, receive: Receive, key: str = KEY) -> list[Message]:
    """Return the messages of the answer to a prompt whose body comes from `receive`."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", OCTETS.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    await protected.app(scope, receive, send)
    return sent


def test_only_the_health_of_the_server_needs_no_key() -> None:
    async def scene() -> None:
        protected = Protected()
        for key in (None, "", "k" * 42, "k" * 44, KEY.upper(), f"{KEY} "):
            for path in (
                "/v1/model",
                "/metrics",
                "/docs",
                "/openapi.json",
                "/nothing",
                "/",
                "/health/",
                "/Health",
                "/health/x",
            ):
                response = await protected.edge(key).request("GET", path)
                reason = "this call needs a key: send it as a bearer token"
                assert (response.status, response.json["detail"]) == (401, reason)
                assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/health", "/health/live", "/health/ready"):
                assert (await protected.edge(key).request("GET", path)).status == 200
        assert set(protected.inner.clients) == {None}
        for key in (KEY, OTHER_KEY):
            assert (await protected.edge(key).request("GET", "/nothing")).body == b"through"
        one, other = protected.inner.clients[-2:]
        assert one
        assert other
        assert one != other
        assert KEY not in f"{one}{other}"

    run_scene(scene())


def test_no_body_is_waited_for_without_the_key_and_the_connection_closes() -> None:
    async def scene() -> None:
        sent: list[Message] = []

        async def receive() -> Message:
            assert len(sent) == 2, "the body was read before the answer"
            assert sent[1]["body"]
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/sessions", "headers": [(b"content-length", b"9")]}
        await Protected().app(scope, receive, send)
        assert sent[0]["status"] == 401
        assert (b"connection", b"close") in sent[0]["headers"]
        assert sent[-1] == {"type": "http.response.body", "body": b""}

    run_scene(scene())


def test_every_request_is_compared_with_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    real = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        assert len(first) == len(second)
        compared.append(real(first, second))
        return compared[-1]

    monkeypatch.setattr(hmac, "compare_digest", compare)

    async def scene() -> None:
        protected = Protected()
        for key in (KEY, OTHER_KEY, "x" * 43, None):
            await protected.edge(key).request("GET", "/")
        assert compared == [True, False, False, True, False, False, False, False]

    run_scene(scene())


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "bEaReR    "])
def test_the_scheme_of_a_key_is_in_any_case_and_before_any_number_of_blanks(scheme: str) -> None:
    async def scene() -> None:
        protected = Protected()
        for key, status in [(KEY, 200), (OTHER_KEY, 200), ("x" * 43, 401), (KEY.upper(), 401), (f"{KEY} x", 401)]:
            headers = [(b"authorization", f"{scheme}{key}".encode())]
            assert (await protected.edge(None).request("GET", "/", headers=headers)).status == status
        assert len({client for client in protected.inner.clients if client}) == 2

    run_scene(scene())


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_request_with_two_keys_is_refused_and_its_connection_closed(path: str) -> None:
    async def scene() -> None:
        for key in (KEY, OTHER_KEY, "x" * 43):
            protected = Protected()
            headers = [(b"authorization", f"Bearer {key}".encode())]
            response = await protected.edge().request("GET", path, headers=headers)
            assert (response.status, response.headers["connection"]) == (400, "close")
            assert response.json["detail"] == "authorization: send this header once, not 2 times"
            assert protected.inner.clients == []

    run_scene(scene())


@pytest.mark.parametrize(("only_loopback", "status"), [(True, 421), (False, 200)])
def test_only_a_server_without_keys_on_loopback_refuses_another_host(only_loopback: bool, status: int) -> None:
    async def scene() -> None:
        protected = Protected(only_loopback=only_loopback)
        for path in ("/", "/health"):
            response = await protected.edge().request("GET", path, headers=[(b"host", b"evil.example:8700")])
            assert response.status == status
            assert ("connection" in response.headers) == only_loopback
            assert (await protected.edge().request("GET", path, headers=[(b"host", b"[::1]:8700")])).status == 200

    run_scene(scene())


def test_without_keys_each_address_is_a_client() -> None:
    async def scene() -> None:
        protected = Protected(keys=())
        assert (await protected.edge(None).request("GET", "/v1/model")).status == 200
        assert protected.inner.clients == ["127.0.0.1"]

    run_scene(scene())


@pytest.mark.parametrize(
    ("path", "content_type", "max_bytes"),
    [
        *[("/", content_type, 100) for content_type in (OCTETS, f"{OCTETS.title()} ; a=b", f"{OCTETS};+json")],
        *[("/", content_type, 10) for content_type in (JSON, "", "nonsense", f"{OCTETS}+json", f"{OCTETS}X")],
        ("/health", OCTETS, 0),
    ],
)
def test_a_body_is_read_up_to_its_limit(path: str, content_type: str, max_bytes: int) -> None:
    async def scene() -> None:
        protected = Protected()
        largest = b"x" * max_bytes
        assert (await protected.edge().request("POST", path, [largest[:3], largest[3:]], content_type)).status == 200
        assert protected.inner.bodies == [largest]
        for body in (largest + b"x", [largest, b"x", *[b"dropped"] * 3]):
            response = await protected.edge().request("POST", path, body, content_type)
            assert (response.status, response.json["detail"]) == (413, f"the body is larger than {max_bytes} bytes")
        # The length in the header has no effect.
        wrong_length = [(b"content-length", b"9" * 5000)]
        response = await protected.edge().request("POST", path, largest, content_type, headers=wrong_length)
        assert response.status == 200
        assert len(protected.inner.bodies) == 2

    run_scene(scene())


def test_a_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(admission, "LINGER_SECONDS", 0.05)

    async def scene() -> None:
        protected = Protected()

        async def receive() -> Message:
            await asyncio.sleep(0.03)  # a part arrives now and then, but the body never ends
            return {"type": "http.request", "body": b"", "more_body": True}

        sent = await post(protected, receive)
        assert sent[0]["status"] == 408
        assert (b"connection", b"close") in sent[0]["headers"]
        assert protected.inner.bodies == []
        assert not protected.app._running_requests

    run_scene(scene())


def test_the_rest_of_a_refused_body_is_dropped_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "LINGER_BYTES", 300)

    async def scene() -> None:
        received = 0

        async def receive() -> Message:
            nonlocal received
            received += 100
            return {"type": "http.request", "body": bytes(100), "more_body": True}

        sent = await post(Protected(), receive, key="another")
        assert sent[0]["status"] == 401
        assert sent[-1] == {"type": "http.response.body", "body": b""}
        assert received == 300

    run_scene(scene())


def test_a_body_may_take_as_long_as_it_comes_at_the_lowest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "BODY_SECONDS", 0.01)
    monkeypatch.setattr(admission, "BODY_BYTES_PER_SECOND", 1)

    async def scene() -> None:
        protected = Protected()
        parts = [b"x" * 60, b"y"]  # the first part gives the second one a minute

        async def receive() -> Message:
            if len(parts) == 1:
                await asyncio.sleep(0.03)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        sent = await post(protected, receive)
        assert (sent[0]["status"], protected.inner.bodies) == (200, [b"x" * 60 + b"y"])

    run_scene(scene())


def test_a_request_whose_client_goes_away_while_sending_is_dropped() -> None:
    async def scene() -> None:
        protected = Protected()
        messages: list[Message] = [
            {"type": "http.request", "body": b"x", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            raise AssertionError("the client has gone")

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        await protected.app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        assert protected.inner.bodies == []
        assert not protected.app._running_requests

    run_scene(scene())


def test_a_delete_is_carried_out_though_its_client_has_gone() -> None:
    async def scene() -> None:
        methods: list[str] = []

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(0.001)
            methods.append(scope["method"])
            await PlainTextResponse("")(scope, receive, send)

        is_gone = asyncio.Event()
        is_gone.set()
        for method in ("POST", "DELETE"):
            protected = Protected(inner)
            for has_body in (True, False):  # the client goes away after the body has arrived, or before
                parts = [b""] if has_body else []
                await Edge(protected.app, KEY, is_gone).request(method, "/", parts)
        assert methods == ["DELETE", "DELETE"]

    run_scene(scene())


def test_each_client_has_its_own_limit_of_running_requests() -> None:
    async def scene() -> None:
        may_end = asyncio.Event()
        inner = Inner()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await may_end.wait()
            await inner(scope, receive, send)

        protected = Protected(slow, max_requests=2)
        requests = [asyncio.create_task(protected.edge().request("GET", "/")) for _ in range(2)]
        await wait_until(lambda: protected.app._running_requests.total() == 2)
        refused = await protected.edge().request("GET", "/")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        requests.append(asyncio.create_task(protected.edge(OTHER_KEY).request("GET", "/")))
        await wait_until(lambda: protected.app._running_requests.total() == 3)
        may_end.set()
        assert [(await request).status for request in requests] == [200, 200, 200]
        assert (await protected.edge().request("GET", "/")).status == 200
        assert not protected.app._running_requests

    run_scene(scene())


@pytest.mark.parametrize(
    ("answers", "leaves", "undone"), [(True, False, 0), (True, True, 0), (False, True, 1), (False, False, 1)]
)
def test_an_application_is_cancelled_with_its_client_and_undoes_what_nobody_has_received(
    answers: bool, leaves: bool, undone: int
) -> None:
    async def scene() -> None:
        is_gone, undo, cancelled = asyncio.Event(), [], []

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            scope["if_unanswered"].append(lambda: undo.append(1))
            if answers:
                await PlainTextResponse("through")(scope, receive, send)
            if leaves:
                is_gone.set()
                try:
                    await asyncio.sleep(0.01 if answers else 60)
                except asyncio.CancelledError:
                    cancelled.append(1)
                    raise
            elif not answers:
                raise LookupError

        protected = Protected(inner)
        response = await Edge(protected.app, KEY, is_gone).request("GET", "/")
        assert response.status == (200 if answers else 0 if leaves else 500)
        assert (len(undo), len(cancelled)) == (undone, int(leaves and not answers))
        assert not protected.app._running_requests

    run_scene(scene())


def test_an_error_of_the_application_goes_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("/secret/path")

    async def scene() -> None:
        protected = Protected(broken)
        with caplog.at_level(logging.ERROR):
            response = await protected.edge().request("GET", "/")
        assert (response.status, response.json["detail"]) == (500, "internal error")
        assert "LookupError: /secret/path" in caplog.text
        assert protected.responses == [("other", 500)]
        assert not protected.app._running_requests

    run_scene(scene())


def test_a_response_that_has_started_is_cut_off_at_an_error() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError("in the middle")

    async def scene() -> None:
        protected = Protected(broken)
        with pytest.raises(LookupError, match="in the middle"):
            await protected.edge().request("GET", "/")
        assert protected.responses == [("other", 200)]

    run_scene(scene())


def test_a_key_file_has_one_key_per_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the phone's\n{KEY}\n\n  {OTHER_KEY}  \n")
    assert read_keys(file) == (KEY, OTHER_KEY)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "contains no key"),
        ("# only a remark\n", "contains no key"),
        ("short\n", "key 1 must be 16 to 1024"),
        (f"{KEY}\n{'ключ' * 8}\n", "key 2 must be 16 to 1024"),
        ("k" * 1025, "key 1 must be .* and this one has 1025"),
        (f"{KEY} {KEY}\n", r"key 1 must be .* contains U\+0020"),
        (f"{KEY}\x00\n", r"key 1 must be .* contains U\+0000"),
        (f"\ufeff\ufeff{KEY}\n", r"key 1 must be .* contains a byte-order mark \(U\+FEFF\): save the file"),
        (f"{KEY}\r\n\ufeff{OTHER_KEY}\r\n", r"key 2 must be .* contains a byte-order mark"),
        (f"{KEY}\n#\n{OTHER_KEY}\n{KEY}  \n", "key 3 is the same as key 1: remove one"),
        ("\ud800" * 20, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_key_file_without_a_safe_key_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=reason):
        read_keys(file)


def test_the_time_to_read_keys_grows_with_their_number_alone() -> None:
    keys = tuple(f"{number:016}" for number in range(20_000))
    start = time.process_time()
    assert parse_keys("\n".join(keys), "keys") == keys
    assert time.process_time() - start < 2  # comparing each with all takes many seconds


def test_the_key_file_of_a_client_has_one_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"\ufeff{KEY}\r\n")
    assert read_key(file) == KEY
    file.write_text(f"{KEY}\n{OTHER_KEY}\n")
    with pytest.raises(ValueError, match="contains 2 keys, and a client sends one"):
        read_key(file)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o622])
def test_a_key_file_that_others_can_read_is_named_with_the_remedy(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "a key"
    file.touch()
    file.chmod(0o600)
    warn_if_others_can_read(file)
    file.chmod(mode)
    with pytest.warns(UserWarning, match=rf"^key file {file}: .* \(mode 0{mode:o}\): chmod 600 '{file}'$"):
        warn_if_others_can_read(file)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize(("key", "status"), [(KEY, 422), ("n" * 43, 401)])
def test_each_part_of_a_body_is_read_in_a_turn(
    monkeypatch: pytest.MonkeyPatch, parts: int, key: str, status: int
) -> None:
    clients: list[str] = []

    async def record(turns: LoopTurns, client: str) -> None:
        clients.append(client)

    async def scene() -> None:
        async with running_app() as app:
            monkeypatch.setattr(LoopTurns, "wait", record)
            answer = await Edge(app, key).request("POST", "/v1/sessions/none/verify", [b"{"] * parts)
            assert answer.status == status

    run_scene(scene())
    assert len(clients) == parts
    assert len(set(clients)) == 1


def test_an_early_refusal_has_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[str] = []

    async def record(turns: LoopTurns, client: str) -> None:
        clients.append(client)

    async def scene() -> None:
        async with running_app() as app:
            monkeypatch.setattr(LoopTurns, "wait", record)
            for path in ("/health", "/none", "/v1/model"):
                await Edge(app).request("GET", path)
            twice = [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer y")]
            assert (await Edge(app).request("GET", "/v1/model", headers=twice)).status == 400

    run_scene(scene())
    assert len(clients) == 4
