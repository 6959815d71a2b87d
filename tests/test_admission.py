"""What a request has to pass before the application sees it."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from edgecloud_sd.cloud import admission as guard
from edgecloud_sd.cloud.admission import Admission
from edgecloud_sd.cloud.keys import read_keys
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import KEY, OTHER_KEY, Edge, play

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Inner:
    """The application: notes what comes through."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.clients: list[str | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.append(scope.get("client_name"))
        self.bodies.append((await receive())["body"])
        await PlainTextResponse("through")(scope, receive, send)


class Guarded:
    def __init__(self, inner: App | None = None, keys: tuple[str, ...] = (KEY, OTHER_KEY), at_once: int = 9) -> None:
        self.inner = Inner()
        self.told: list[tuple[str, int]] = []
        self.app = Admission(
            inner or self.inner, keys, 100, 10, at_once, lambda call, status: self.told.append((call, status))
        )

    def edge(self, key: str | None = KEY) -> Edge:
        return Edge(self.app, key)


def test_without_the_key_there_is_nothing_but_health() -> None:
    async def scene() -> None:
        guarded = Guarded()
        for key in (None, "", "k" * 42, "k" * 44, KEY.upper(), f"{KEY} "):
            for path in ("/v1/model", "/metrics", "/docs", "/openapi.json", "/nothing", "/", "/health/", "/Health"):
                answer = await guarded.edge(key).ask("GET", path)
                assert (answer.status, answer.json) == (401, {"detail": "needs a key"})
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await guarded.edge(key).ask("GET", "/health")).status == 200
        assert set(guarded.inner.clients) == {None}
        for key in (KEY, OTHER_KEY):
            assert (await guarded.edge(key).ask("GET", "/nothing")).body == b"through"
        one, other = guarded.inner.clients[-2:]
        assert one
        assert other
        assert one != other
        assert KEY not in f"{one}{other}"

    play(scene())


def test_nothing_of_a_body_is_read_without_the_key() -> None:
    async def scene() -> None:
        async def receive() -> Message:
            raise AssertionError("it was read")

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/sessions", "headers": [(b"content-length", b"9")]}
        await Guarded().app(scope, receive, send)
        assert sent[0]["status"] == 401

    play(scene())


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    real = hmac.compare_digest

    def compare(given: bytes, wanted: bytes) -> bool:
        assert len(given) == len(wanted)
        compared.append(real(given, wanted))
        return compared[-1]

    monkeypatch.setattr(hmac, "compare_digest", compare)

    async def scene() -> None:
        guarded = Guarded()
        for key in (KEY, OTHER_KEY, "x" * 43, None):
            await guarded.edge(key).ask("GET", "/")
        assert compared == [True, False, False, True, False, False, False, False]

    play(scene())


def test_without_keys_an_address_is_a_client() -> None:
    async def scene() -> None:
        guarded = Guarded(keys=())
        assert (await guarded.edge(None).ask("GET", "/v1/model")).status == 200
        assert guarded.inner.clients == ["127.0.0.1"]

    play(scene())


@pytest.mark.parametrize(
    ("path", "content", "largest"),
    [("/", OCTETS, 100), ("/", JSON, 10), ("/", "", 10), ("/", "nonsense", 10), ("/health", OCTETS, 0)],
)
def test_a_body_may_be_so_large_and_is_read_no_further(path: str, content: str, largest: int) -> None:
    async def scene() -> None:
        guarded = Guarded()
        most = b"x" * largest
        assert (await guarded.edge().ask("POST", path, [most[:3], most[3:]], content)).status == 200
        assert guarded.inner.bodies == [most]
        for body in (most + b"x", [most, b"x", *[b"never read"] * 3]):
            answer = await guarded.edge().ask("POST", path, body, content)
            assert (answer.status, answer.json) == (413, {"detail": f"the body is larger than {largest} bytes"})
        # a length that is announced is believed no more than any other word
        lie = [(b"content-length", b"9" * 5000)]
        assert (await guarded.edge().ask("POST", path, most, content, headers=lie)).status == 200
        assert len(guarded.inner.bodies) == 2

    play(scene())


def test_a_body_that_trickles_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)

    async def scene() -> None:
        guarded = Guarded()
        sent: list[Message] = []

        async def receive() -> Message:
            await asyncio.sleep(0.03)  # each part in time, and the whole never
            return {"type": "http.request", "body": b"", "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        await guarded.app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        assert sent[0]["status"] == 408
        assert guarded.inner.bodies == []
        assert not guarded.app._working

    play(scene(), 3.0)


def test_whoever_goes_away_while_sending_is_forgotten() -> None:
    async def scene() -> None:
        guarded = Guarded()
        messages: list[Message] = [
            {"type": "http.request", "body": b"x", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            raise AssertionError("nobody is there")

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        await guarded.app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
        assert guarded.inner.bodies == []
        assert not guarded.app._working

    play(scene())


def test_one_client_has_so_many_requests_at_once_and_another_as_many() -> None:
    async def scene() -> None:
        go = asyncio.Event()
        inner = Inner()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await go.wait()
            await inner(scope, receive, send)

        guarded = Guarded(slow, at_once=2)
        asked = [asyncio.create_task(guarded.edge().ask("GET", "/")) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await guarded.edge().ask("GET", "/")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        asked.append(asyncio.create_task(guarded.edge(OTHER_KEY).ask("GET", "/")))
        await asyncio.sleep(0)
        go.set()
        assert [(await each).status for each in asked] == [200, 200, 200]
        assert (await guarded.edge().ask("GET", "/")).status == 200
        assert not guarded.app._working

    play(scene())


def test_what_goes_wrong_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("/secret/path")

    async def scene() -> None:
        guarded = Guarded(broken)
        with caplog.at_level(logging.ERROR):
            answer = await guarded.edge().ask("GET", "/")
        assert (answer.status, answer.json) == (500, {"detail": "internal error"})
        assert "LookupError: /secret/path" in caplog.text
        assert guarded.told == [("other", 500)]
        assert not guarded.app._working

    play(scene())


def test_an_answer_that_has_begun_is_cut_off_when_it_goes_wrong() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError("in the middle")

    async def scene() -> None:
        guarded = Guarded(broken)
        with pytest.raises(LookupError, match="in the middle"):
            await guarded.edge().ask("GET", "/")
        assert guarded.told == [("other", 200)]

    play(scene())


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the phone's\n{KEY}\n\n  {OTHER_KEY}  \n")
    assert read_keys(file) == (KEY, OTHER_KEY)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "holds no key"),
        ("# only a remark\n", "holds no key"),
        ("short\n", "key 1 must be 16 or more"),
        (f"{KEY}\n{'ключ' * 8}\n", "key 2 must be 16 or more"),
        (f"{KEY} {KEY}\n", "key 1 must be"),
        (f"{KEY}\x00\n", "key 1 must be"),
        ("\ud800" * 20, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=why):
        read_keys(file)
