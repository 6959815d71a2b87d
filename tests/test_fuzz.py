"""The cloud's service under whatever else may come: it answers as documented, and everybody else is served rightly."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecloud_sd import wire
from edgecloud_sd.acceptance import parse_rule
from edgecloud_sd.cloud.server import PROBLEMS, create_app
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.verifier import LocalVerifier
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import AUDIO, KEY, OTHER_KEY, Edge, SpyEngine, play, started
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
KEYED = {"Authorization": f"Bearer {KEY}"}
APP = create_app(SpyEngine(), LIMITS, (KEY,))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=KEYED)
# a body of the right form is refused all the same where its check says that it arrived damaged
EXCLUDED = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]


@SCHEMA.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented(case: Any) -> None:
    """Statuses, types and schemas; no answer without the key; no answer to data or methods that are not documented."""
    case.call_and_validate(headers=KEYED, excluded_checks=EXCLUDED)


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    body: bytes = b""
    content: str = JSON
    key: str = KEY


@dataclass
class Vandal:
    """Asks for what makes no sense, and for what does, from the sessions that it has been given."""

    chance: random.Random
    sessions: list[tuple[str, int]] = field(default_factory=lambda: [("A" * 22, 0)])  # name, check of the prompt

    def ask(self) -> Asked:
        kinds = (self.opening, self.opening, self.damaged, self.session, self.session, self.junk, self.elsewhere)
        return self.chance.choice(kinds)()

    def told(self, asked: Asked, status: int, body: bytes) -> None:
        if status == 201:
            self.sessions = [*self.sessions[-3:], (json.loads(body)["session"], int(asked.path.rpartition("=")[2]))]

    def opening(self) -> Asked:
        """Nearly a prompt: right in most things, and often in all."""
        pick, chance = self.chance.choice, self.chance.random
        if chance() < 0.3:
            return self._open(wire.encode_prompt(Prompt((1, 2, 3))), right=True)
        frames = pick((0, 0, 1, 3, 8, 12, 200, 201))
        positions = max((((frames - 1) // 2 + 1) - 2) // 2 + 1, 0) if frames else 0
        if chance() < 0.2:
            positions = pick((0, 1, 5, 3000))
        ids = [1, *[AUDIO] * positions, pick((2, 2, 2, AUDIO, -1, VOCABULARY, 2**31 - 1))]
        bins = pick((8, 8, 8, 7, 128))
        value = pick((0, 0, 0, 0x3C00, 0x7BFF, 0x7C00, 0x7E00))  # 0, 1, the largest, infinity, nan
        data = struct.pack(f"<{len(ids)}i", *ids)
        dtype = pick(("I32", "I32", "I32", "I32", "I64", "F32", "BF16", "F8_E5M2", "x"))
        header: dict[str, Any] = {"ids": {"dtype": dtype, "shape": [len(ids)], "data_offsets": [0, len(data)]}}
        if frames:
            end = len(data) + 2 * bins * frames
            dtype = pick(("F16", "F16", "F16", "F16", "BF16", "I16"))
            header["features"] = {"dtype": dtype, "shape": [bins, frames], "data_offsets": [len(data), end]}
            data += struct.pack("<H", value) * (bins * frames)
        if chance() < 0.2:
            spoilt = header[pick(tuple(header))]
            spoilt[pick(tuple(spoilt))] = pick((None, [], [0], [2**63, 2**63], [-1, 1], "F64", [8, 0], {}, 1e400))
        text = json.dumps(header).encode()
        return self._open(struct.pack("<Q", len(text)) + text + data)

    def damaged(self) -> Asked:
        body = bytearray(wire.encode_prompt(Prompt((1, 2, 3))))
        for _ in range(self.chance.randrange(4)):
            body[self.chance.randrange(len(body))] = self.chance.randrange(256)
        return self._open(bytes(body[: self.chance.choice((None, None, 3, 20, -1))]))

    def _open(self, body: bytes, right: bool = False) -> Asked:
        if right or self.chance.random() < 0.5:
            return Asked("POST", f"/v1/sessions?rule={RULE}&check={wire.prompt_checksum(body, RULE)}", body, OCTETS)
        rule = self.chance.choice(RULES)
        check = wire.prompt_checksum(body, rule) if self.chance.random() < 0.9 else 7
        return Asked(
            "POST", f"/v1/sessions?rule={rule}&check={check}", body, self.chance.choice((OCTETS, OCTETS, JSON))
        )

    def session(self) -> Asked:
        """What may be a request, on what may be a session."""
        pick = self.chance.choice
        name, begun = pick(self.sessions)
        key = pick((KEY, KEY, KEY, OTHER_KEY))
        if self.chance.random() < 0.1:
            return Asked("DELETE", f"/v1/sessions/{name}", key=key)
        odd = (7, -1, 2**31 - 1) if self.chance.random() < 0.3 else ()
        context = [pick((0, 1, 2, 3, *odd)) for _ in range(pick((0, 1, 1, 3, 30)))]
        draft = [pick((0, 1, 2, 3)) for _ in range(pick((0, 1, 4, 9000)))]
        call = pick(("verify", "generate"))
        message: dict[str, Any]
        if call == "verify":
            base = pick((0, 0, 0, 1, 2, 10**30))
            with suppress(OverflowError):
                message = asdict(wire.build_verify_request(begun, [abs(each) for each in context], base, draft))
            message["tokens"] = context
        else:
            eos = context[:2] if -1 not in context else ()
            message = asdict(wire.build_generate_request(begun, draft[:9], eos, pick((1, 5, 9))))
        for name_of in list(message):
            if odd and self.chance.random() < 0.2:
                message[name_of] = pick((None, -1, 2**32, 10**400, 0.5, "1", True, [[]], [None], {}, [2**40] * 20_000))
        return Asked("POST", f"/v1/sessions/{name}/{call}", json.dumps(message).encode(), key=key)

    def junk(self) -> Asked:
        name = self.chance.choice(self.sessions)[0]
        body = self.chance.choice(
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
        content = self.chance.choice((JSON, "", "application/xml", "multipart/form-data", "a" * 999))
        return Asked("POST", f"/v1/sessions/{name}/{self.chance.choice(('verify', 'generate', 'x'))}", body, content)

    def elsewhere(self) -> Asked:
        path = self.chance.choice(
            ("/", "/v1", "/v1/sessions/", "/docs", "/metrics", "/v1/model", "/..%2f..", "/" + "x" * 5000)
        )
        method = self.chance.choice(("GET", "POST", "PUT", "HEAD", "OPTIONS", "BREW"))
        return Asked(method, path, key=self.chance.choice((KEY, "wrong", "k" * 42)))


class Rounds:
    """What one client asks who minds its own business, and what it has to be told."""

    def __init__(self) -> None:
        self.prompt = Prompt((1, 2, 3))
        self.body = wire.encode_prompt(self.prompt)
        self.begun = wire.prompt_checksum(self.body, RULE)
        self._local = LocalVerifier(ToyModel(random_table(VOCABULARY, 0), frozenset()), parse_rule(RULE)).open(
            self.prompt
        )
        self._chance = random.Random(0)
        self._context, self._held = [self.prompt.last], 0

    def next(self) -> tuple[wire.VerifyRequest, Verdict]:
        if len(self._context) > 60:
            self._context, self._held = [self.prompt.last], 0
        draft = [self._chance.randrange(VOCABULARY) for _ in range(self._chance.randrange(5))]
        asked = wire.build_verify_request(self.begun, self._context, self._held, draft)
        expected = self._local.verify(self._held, self._context[self._held :], draft)
        self._held = len(self._context) + expected.accepted
        self._context = [*self._context, *draft[: expected.accepted], expected.token]
        return asked, expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_one_client_asks_another_is_served_as_if_it_were_alone(seed: int) -> None:
    async def scene() -> None:
        async with started(SpyEngine(), LIMITS) as app:
            vandal, rounds = Vandal(random.Random(seed)), Rounds()
            session = await Edge(app, OTHER_KEY).opened(rounds.prompt, RULE)
            for _ in range(8):
                asked = vandal.ask()
                answer = await Edge(app, asked.key).ask(asked.method, asked.path, asked.body, asked.content)
                assert answer.status in {200, 201, 204, 404, 405, 409, 415, *PROBLEMS} - {500, 503}, (asked, answer)
                assert answer.status < 400 or len(answer.body) < 500
                vandal.told(asked, answer.status, answer.body)
                message, expected = rounds.next()
                given = await session.edge.ask("POST", f"{session.path}/verify", wire.dumps(message))
                assert given.status == 200, given
                assert wire.read_verdict(given.body, len(message.draft), message.check) == expected

    play(scene())


SERVER = """
import sys
from edgecloud_sd.cloud.sessions import ServiceLimits
from tests.support.asgi import KEY, OTHER_KEY, SpyEngine
from tests.support.serving import served

class Forgetful(list):  # a spy that has to forget, or it would grow by what it is asked
    append = lambda self, each: None

engine = SpyEngine()
engine.model.calls = engine.model.sessions = Forgetful()
engine.model.open = lambda prompt: engine.model.model.open(prompt)
with served(engine, ServiceLimits(max_sessions=4, max_audio_seconds=2), (KEY, OTHER_KEY)) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def rude(chance: random.Random, port: int, sessions: list[tuple[str, int]]) -> None:
    """What no HTTP client would do, on a connection of its own."""
    name, begun = chance.choice(sessions)
    key = f"Authorization: Bearer {KEY}\r\nHost: x\r\n".encode()
    stream = wire.dumps(wire.build_generate_request(begun, [], (), 3000))
    head = f"POST /v1/sessions/{name}/generate HTTP/1.1\r\nContent-Type: {JSON}\r\n".encode() + key
    said = chance.choice(
        (
            b"",
            chance.randbytes(300),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + key + b"\r\n",
            b"GET / HTTP/1.1\r\n" + key + b"".join(b"h%d: x\r\n" % n for n in range(500)) + b"\r\n",
            b"GET / HTTP/1.1\r\n" + key + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 9\r\nContent-Length: 7\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: %s\r\n\r\n" % (b"9" * 5000),
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Content-Length: 100\r\n\r\nhalf",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
            b"POST / HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n",
            b"POST / HTTP/1.1\r\n" + key + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
            head + b"Content-Length: %d\r\n\r\n" % len(stream) + stream,  # and goes away in the middle of it
            (head + b"Content-Length: %d\r\n\r\n" % len(stream) + stream) * 5,  # without waiting for an answer
        )
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(0.02)
        with suppress(OSError):  # it may be cut off, or find nothing to read
            connection.sendall(said)
            connection.recv(200)


def test_five_thousand_bad_requests_leave_a_server_as_it_was() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=-1, stdout=-1, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline().rpartition(":")[2])
            statuses, sizes = besieged(port, psutil.Process(server.pid))
            assert server.poll() is None
        finally:
            server.stdin.close()
            server.wait(10)
    print(dict(sorted(statuses.items())), sizes)
    assert sum(statuses.values()) >= 4000
    assert max(statuses) < 500
    warm, end = sizes
    assert end["rss"] - warm["rss"] < 5e6
    assert end["threads"] <= warm["threads"]
    assert end["fds"] <= warm["fds"] + 2  # the connections of this test may have been made anew


def besieged(port: int, server: psutil.Process, requests: int = 5000, warm: int = 1000) -> Any:
    chance = random.Random(1)
    vandal, rounds, statuses = Vandal(chance), Rounds(), Counter[int]()

    def size() -> dict[str, float]:
        return {"rss": server.memory_info().rss, "threads": server.num_threads(), "fds": server.num_fds()}

    sizes = []
    with closing(Client(port)) as bad, closing(Client(port)) as good:
        path = f"/v1/sessions?rule={RULE}&check={rounds.begun}"
        status, answer = good.ask(Asked("POST", path, rounds.body, OCTETS, OTHER_KEY))
        assert status == 201
        path = f"/v1/sessions/{json.loads(answer)['session']}/verify"
        for number in range(requests):
            if chance.random() < 0.1:
                rude(chance, port, vandal.sessions)
            else:
                asked = vandal.ask()
                status, answer = bad.ask(asked)
                statuses[status] += 1
                vandal.told(asked, status, answer)
            if number % 20 == 0:
                message, expected = rounds.next()
                status, answer = good.ask(Asked("POST", path, wire.dumps(message), key=OTHER_KEY))
                assert status == 200, answer
                assert wire.read_verdict(answer, len(message.draft), message.check) == expected
            if number == warm:
                sizes.append(size())
        said = good.ask(Asked("GET", "/metrics", key=OTHER_KEY))[1].decode()
        held = next(line for line in said.splitlines() if line.startswith("edgecloud_sessions "))
        assert float(held.split()[1]) <= LIMITS.max_sessions
        sizes.append(size())
    return statuses, sizes


class Client:
    """On one connection for as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(self, asked: Asked) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {asked.key}", "Content-Type": asked.content}
        try:
            self._http.request(asked.method, asked.path, asked.body, headers)
            answer = self._http.getresponse()
            return answer.status, answer.read()
        except (ConnectionError, http.client.HTTPException):  # cut off with its body half sent
            self._http.close()
            return 413, b""

    def close(self) -> None:
        self._http.close()
