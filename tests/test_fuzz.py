"""The cloud's service under random requests: it responds as documented and serves every other client correctly."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecloud_sd import wire
from edgecloud_sd.acceptance import parse_rule
from edgecloud_sd.cloud.server import COMMON_STATUSES, create_app
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt
from edgecloud_sd.verifier import LocalVerifier
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import AUDIO, KEY, OTHER_KEY, Edge, SpyEngine, message_fields, run_scene, running_app
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

pytest_plugins = ["schemathesis.pytest.plugin"]
pytestmark = pytest.mark.slow

LIMITS = ServiceLimits(max_sessions=4, max_audio_seconds=2)
RULE = "rank(3)"
RULES = (
    *("greedy", "rank(1)", "rank(7)", "synthetic(0.5)", "synthetic(.9/.8/0)"),
    *("rank(8)", "rank(0)", "rank(-1)", "rank(1e9)", f"rank({'9' * 240})", "synthetic()", "synthetic(1.5)", "best", ""),
    *(f"synthetic({'/'.join(['1'] * 100)})", "9" * 500),
)
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
APP = create_app(SpyEngine(), LIMITS, (KEY,))
APP.state.service.shut_down = lambda: None  # schemathesis starts and stops the application for every request
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=AUTHORIZATION)
# The service refuses a valid body with a wrong check, which schemathesis does not expect.
EXCLUDED_CHECKS = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]


ALLOWED_STATUSES = {200, 201, 204, 404, 405, 409, 415, *COMMON_STATUSES} - {500, 503}


@SCHEMA.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_response_is_as_documented(case: Any) -> None:
    """Check statuses, types and schemas, and the refusal of requests without the key or beyond the document."""
    case.call_and_validate(headers=AUTHORIZATION, excluded_checks=EXCLUDED_CHECKS)


@dataclass(frozen=True)
class WireRequest:
    """An HTTP request."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = JSON
    key: str = KEY


@dataclass
class Attacker:
    """A client that sends valid and invalid requests, with the sessions that it has opened."""

    random: Random
    sessions: list[tuple[str, int]] = field(default_factory=lambda: [("A" * 22, 0)])  # name, check of the prompt

    def next_request(self) -> WireRequest:
        kinds = (
            *(self.open_request, self.open_request, self.damaged_open_request),
            *(self.session_request, self.session_request, self.junk_request, self.other_request),
        )
        return self.random.choice(kinds)()

    def read_response(self, request: WireRequest, status: int, body: bytes) -> None:
        if status == 201:
            self.sessions = [*self.sessions[-3:], (json.loads(body)["session"], int(request.path.rpartition("=")[2]))]

    def open_request(self) -> WireRequest:
        """Return a prompt that is valid, or nearly."""
        pick, chance = self.random.choice, self.random.random
        if chance() < 0.3:
            return self._open(wire.encode_prompt(Prompt((1, 2, 3))), is_valid=True)
        frames = pick((0, 0, 1, 3, 8, 12, 200, 201))
        positions = max((((frames - 1) // 2 + 1) - 2) // 2 + 1, 0) if frames else 0
        if chance() < 0.2:
            positions = pick((0, 1, 5, 3000))
        ids = [1, *[AUDIO] * positions, pick((2, 2, 2, AUDIO, -1, VOCABULARY, 2**31 - 1))]
        bins = pick((8, 8, 8, 7, 128))
        value = pick((0, 0, 0, 0x3C00, 0x7BFF, 0x7C00, 0x7E00))  # 0, 1, the largest number, infinity, NaN
        data = struct.pack(f"<{len(ids)}i", *ids)
        dtype = pick(("I32", "I32", "I32", "I32", "I64", "F32", "BF16", "F8_E5M2", "x"))
        header: dict[str, Any] = {"ids": {"dtype": dtype, "shape": [len(ids)], "data_offsets": [0, len(data)]}}
        if frames:
            end = len(data) + 2 * bins * frames
            dtype = pick(("F16", "F16", "F16", "F16", "BF16", "I16"))
            header["features"] = {"dtype": dtype, "shape": [bins, frames], "data_offsets": [len(data), end]}
            data += struct.pack("<H", value) * (bins * frames)
        if chance() < 0.2:
            tensor = header[pick(tuple(header))]
            tensor[pick(tuple(tensor))] = pick((None, [], [0], [2**63, 2**63], [-1, 1], "F64", [8, 0], {}, 1e400))
        text = json.dumps(header).encode()
        return self._open(struct.pack("<Q", len(text)) + text + data)

    def damaged_open_request(self) -> WireRequest:
        body = bytearray(wire.encode_prompt(Prompt((1, 2, 3))))
        for _ in range(self.random.randrange(4)):
            body[self.random.randrange(len(body))] = self.random.randrange(256)
        return self._open(bytes(body[: self.random.choice((None, None, 3, 20, -1))]))

    def _open(self, body: bytes, is_valid: bool = False) -> WireRequest:
        if is_valid or self.random.random() < 0.5:
            return WireRequest(
                "POST", f"/v1/sessions?rule={RULE}&check={wire.prompt_checksum(body, RULE)}", body, OCTETS
            )
        rule = self.random.choice(RULES)
        wants_rest, query = self.random.choice(((False, ""), (True, "&rest=1"), (True, "&rest=x"), (False, "&rest=1")))
        check = wire.prompt_checksum(body, rule, wants_rest) if self.random.random() < 0.9 else 7
        return WireRequest(
            "POST", f"/v1/sessions?rule={rule}{query}&check={check}", body, self.random.choice((OCTETS, OCTETS, JSON))
        )

    def session_request(self) -> WireRequest:
        """Return a request to verify or generate, which may be invalid, on a session that may be open."""
        pick = self.random.choice
        name, check = pick(self.sessions)
        key = pick((KEY, KEY, KEY, OTHER_KEY))
        if self.random.random() < 0.1:
            return WireRequest("DELETE", f"/v1/sessions/{name}", key=key)
        odd_ids = (7, -1, 2**31 - 1) if self.random.random() < 0.3 else ()
        context = [pick((0, 1, 2, 3, *odd_ids)) for _ in range(pick((0, 1, 1, 3, 30)))]
        draft = [pick((0, 1, 2, 3)) for _ in range(pick((0, 1, 4, 33_000)))]
        call = pick(("verify", "generate"))
        message: dict[str, Any]
        if call == "verify":
            base = pick((0, 0, 0, 1, 2, 10**30))
            message = message_fields(wire.build_verify_request(check, [abs(token) for token in context], base, draft))
            message["tokens"] = context
        else:
            eos = context[:2] if -1 not in context else ()
            message = message_fields(wire.build_generate_request(check, draft[:9], eos, pick((1, 5, 9))))
        for field_name in list(message):
            if odd_ids and self.random.random() < 0.2:
                message[field_name] = pick(
                    (None, -1, 2**32, 10**400, 0.5, "1", True, [[]], [None], {}, [2**40] * 20_000)
                )
        return WireRequest("POST", f"/v1/sessions/{name}/{call}", json.dumps(message).encode(), key=key)

    def junk_request(self) -> WireRequest:
        name = self.random.choice(self.sessions)[0]
        body = self.random.choice(
            (
                b"",
                b"{",
                b"[" * 50_000,
                b"9" * 9999,
                b"NaN",
                b"\xff",
                b'"\\ud800"',
                b'{"base":1,"base":NaN}',
                b"0" * 300_000,
            )
        )
        content_type = self.random.choice((JSON, "", "application/xml", f"{OCTETS}+json", "a" * 999))
        call = self.random.choice(("verify", "generate", "x"))
        return WireRequest("POST", f"/v1/sessions/{name}/{call}", body, content_type)

    def other_request(self) -> WireRequest:
        path = self.random.choice(
            ("/", "/v1", "/v1/sessions/", "/health/ready", "/metrics", "/v1/model", "/..%2f..", "/" + "x" * 5000)
        )
        method = self.random.choice(("GET", "POST", "PUT", "HEAD", "OPTIONS", "BREW"))
        return WireRequest(method, path, key=self.random.choice((KEY, "wrong", "k" * 42)))


class HonestClient:
    """A client that sends valid requests and knows the verdicts that it must receive."""

    def __init__(self) -> None:
        self.prompt = Prompt((1, 2, 3))
        self.body = wire.encode_prompt(self.prompt)
        self.check = wire.prompt_checksum(self.body, RULE, wants_rest=True)
        model = ToyModel(random_table(VOCABULARY, 0), frozenset())
        self._local = LocalVerifier(model, parse_rule(RULE), wants_rest=True).open(self.prompt)
        self._random = Random(0)
        self._context, self._base = [self.prompt.last], 0

    def next_request(self) -> tuple[bytes, Callable[[bytes], None]]:
        """Return a message and a function that checks the response to it."""
        if len(self._context) > 60:
            self._context, self._base = [self.prompt.last], 0
        draft = [self._random.randrange(VOCABULARY) for _ in range(self._random.randrange(5))]
        message = wire.build_verify_request(self.check, self._context, self._base, draft)
        expected = self._local.verify(self._base, self._context[self._base :], draft)
        self._base = len(self._context) + expected.accepted
        self._context = [*self._context, *draft[: expected.accepted], expected.token]
        check = message_fields(message)["check"]

        def check_response(body: bytes) -> None:
            assert wire.read_verdict(body, len(draft), check, wants_rest=True) == expected

        return wire.dumps(message), check_response


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_requests_of_one_client_do_not_change_the_verdicts_of_another(seed: int) -> None:
    async def scene() -> None:
        async with running_app(SpyEngine(), LIMITS) as app:
            attacker, honest = Attacker(Random(seed)), HonestClient()
            session = await Edge(app, OTHER_KEY).open(honest.prompt, RULE, wants_rest=True)
            for _ in range(8):
                request = attacker.next_request()
                edge = Edge(app, request.key)
                response = await edge.request(request.method, request.path, request.body, request.content_type)
                assert response.status in ALLOWED_STATUSES, (request, response)
                assert response.status < 400 or len(response.body) < 500
                attacker.read_response(request, response.status, response.body)
                message, check_response = honest.next_request()
                response = await session.edge.request("POST", f"{session.path}/verify", message)
                assert response.status == 200, response
                check_response(response.body)

    run_scene(scene())


SERVER = """
import sys
from edgecloud_sd.cloud import sessions
from edgecloud_sd.cloud.sessions import ServiceLimits
from tests.support.asgi import KEY, OTHER_KEY, SpyEngine
from tests.support.serving import served

class NoList(list):  # stays empty, because the records of a spy would grow with every request
    append = lambda self, item: None

sessions.ROOM_WAIT = 0.01  # otherwise every tenth request would wait 1.5 s for room
engine = SpyEngine()
engine.model.calls = engine.model.sessions = NoList()
engine.model.open = lambda prompt: engine.model.model.open(prompt)
with served(engine, ServiceLimits(max_sessions=4, max_audio_seconds=2), (KEY, OTHER_KEY)) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def break_protocol(random: Random, port: int, sessions: list[tuple[str, int]]) -> None:
    """Send bytes that no HTTP client sends, on a new connection."""
    name, check = random.choice(sessions)
    key = f"Authorization: Bearer {KEY}\r\nHost: x\r\n".encode()
    message = wire.dumps(wire.build_generate_request(check, [], (), 3000))
    head = f"POST /v1/sessions/{name}/generate HTTP/1.1\r\nContent-Type: {JSON}\r\n".encode() + key
    data = random.choice(
        (
            b"",
            random.randbytes(300),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + key + b"\r\n",
            b"GET / HTTP/1.1\r\n" + key + b"".join(b"h%d: x\r\n" % n for n in range(500)) + b"\r\n",
            b"GET / HTTP/1.1\r\n" + key + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 9\r\nContent-Length: 7\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + key + key.partition(b"Host")[0] + b"\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: %s\r\n\r\n" % (b"9" * 5000),
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 100\r\n\r\nhalf",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
            head + b"Content-Length: %d\r\n\r\n" % len(message) + message,  # and leaves during the stream
            (head + b"Content-Length: %d\r\n\r\n" % len(message) + message) * 5,  # without waiting for a response
        )
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(0.02)
        with suppress(OSError):  # the server may cut the connection or send nothing
            connection.sendall(data)
            connection.recv(200)


def test_a_server_does_not_grow_in_five_thousand_bad_requests() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=-1, stdout=-1, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline().rpartition(":")[2])
            statuses, sizes = attack(port, psutil.Process(server.pid))
            assert server.poll() is None
        finally:
            server.stdin.close()
            server.wait(60)
    print(dict(sorted(statuses.items())), sizes)
    assert sum(statuses.values()) >= 4000
    assert max(statuses) < 500
    warm, end = sizes
    assert end["rss"] - warm["rss"] < 5e6
    assert end["threads"] <= warm["threads"]
    assert end["fds"] <= warm["fds"] + 2  # the two clients may have new connections


def attack(port: int, server: psutil.Process, requests: int = 5000, warm_up: int = 1000) -> Any:
    """Send bad requests, and return the statuses and the sizes of the process after warm-up and at the end."""
    random = Random(1)
    attacker, honest, statuses = Attacker(random), HonestClient(), Counter[int]()

    def measure() -> dict[str, float]:
        return {"rss": server.memory_info().rss, "threads": server.num_threads(), "fds": server.num_fds()}

    sizes = []
    with closing(Client(port)) as bad, closing(Client(port)) as good:
        path = f"/v1/sessions?rule={RULE}&rest=1&check={honest.check}"
        status, response = good.request(WireRequest("POST", path, honest.body, OCTETS, OTHER_KEY))
        assert status == 201
        path = f"/v1/sessions/{json.loads(response)['session']}/verify"
        for number in range(requests):
            if random.random() < 0.1:
                break_protocol(random, port, attacker.sessions)
            else:
                request = attacker.next_request()
                status, response = bad.request(request)
                statuses[status] += 1
                attacker.read_response(request, status, response)
            if number % 20 == 0:
                message, check_response = honest.next_request()
                status, response = good.request(WireRequest("POST", path, message, key=OTHER_KEY))
                assert status == 200, response
                check_response(response)
            if number == warm_up:
                sizes.append(measure())
        metrics = good.request(WireRequest("GET", "/metrics", key=OTHER_KEY))[1].decode()
        open_sessions = next(line for line in metrics.splitlines() if line.startswith("edgecloud_sessions "))
        assert float(open_sessions.split()[1]) <= LIMITS.max_sessions
        sizes.append(measure())
    return statuses, sizes


class Client:
    """An HTTP client on one connection, as long as the server keeps it open."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def request(self, request: WireRequest) -> tuple[int, bytes]:
        """Return the status and the body of the response."""
        headers = {"Authorization": f"Bearer {request.key}", "Content-Type": request.content_type}
        try:
            self._http.request(request.method, request.path, request.body, headers)
            response = self._http.getresponse()
            return response.status, response.read()
        except (ConnectionError, http.client.HTTPException):  # the server refused a body that was still being sent
            self._http.close()
            return 413, b""

    def close(self) -> None:
        self._http.close()
