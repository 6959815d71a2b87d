"""The cloud's HTTP service: right verdicts, and no effect of wrong requests or of other clients."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.numpy import save

from edgecloud_sd import wire
from edgecloud_sd.acceptance import parse_rule
from edgecloud_sd.cloud import server, sessions
from edgecloud_sd.cloud.client import Connection, RemoteVerifier
from edgecloud_sd.cloud.fair_queue import Completed
from edgecloud_sd.cloud.server import TokenLines
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import (
    AUDIO,
    KEY,
    OTHER_KEY,
    Edge,
    EdgeSession,
    Response,
    SpyEngine,
    SpyModel,
    message_fields,
    run_scene,
    running_app,
    wait_until,
)
from tests.support.serving import ToyEngine, served
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

PROMPT = Prompt((1, 2, 3))
UNKNOWN_SESSION = "no such session: open the prompt again"


def open_path(body: bytes, rule: str = "greedy") -> str:
    """Return the path that opens a prompt."""
    return f"/v1/sessions?rule={rule}&check={wire.prompt_checksum(body, rule)}"


def open_locally(rule: str = "greedy", prompt: Prompt = PROMPT, wants_rest: bool = False) -> Any:
    """Return the verification that the service must agree with."""
    model = ToyModel(random_table(VOCABULARY, 0), frozenset())
    return LocalVerifier(model, parse_rule(rule), wants_rest=wants_rest).open(prompt)


def read_verdict(response: Response, message: Any, wants_rest: bool = False) -> Verdict:
    """Return the verdict in the response to a message."""
    assert response.status == 200, response
    fields = message_fields(message)
    return wire.read_verdict(response.body, len(fields["draft"]), fields["check"], wants_rest)


def waiting_requests(app: Any, session: EdgeSession) -> int:
    """Return how many requests wait for the lock of a session."""
    open_session = app.state.service._sessions._by_name[session.name]
    return len(open_session.lock._waiters or ())


@pytest.mark.parametrize(
    ("message", "model"),
    [
        (wire.build_opened_message("name", "model", 1), server.OpenedBody),
        (wire.build_verify_request(1, [3, 1], 1, [2]), server.VerifyBody),
        (wire.build_verdict_message(Verdict(1, 2, (3,)), 1), server.VerdictBody),
        (wire.build_generate_request(1, [1], [2], 3), server.GenerateBody),
    ],
    ids=["opened", "to_verify", "verdict", "to_generate"],
)
def test_the_documented_fields_are_those_on_the_wire(message: Any, model: type[BaseModel]) -> None:
    assert list(message_fields(message)) == list(model.model_fields)


@pytest.mark.parametrize("rule", ["greedy", "rank(3)", "synthetic(0.6)", "synthetic(1/0.5)"])
def test_verdicts_equal_the_models_own_even_if_a_request_is_repeated(rule: str) -> None:
    async def scene() -> None:
        async with running_app() as app:
            session = await Edge(app).open(rule=rule, wants_rest=True)
            local = open_locally(rule, wants_rest=True)
            context, base, counts = [PROMPT.last], 0, Counter[str]()
            for draft in ([0, 1, 2], [], [4, 4], [6], [1, 1, 1, 1], [2, 5, 0]):
                expected = local.verify(base, context[base:], draft)
                for sent_base in (base, base, base, 0):
                    message = wire.build_verify_request(session.prompt_check, context, sent_base, draft)
                    response = await session.verify(context, sent_base, draft)
                    assert read_verdict(response, message, wants_rest=True) == expected
                    counts.update(
                        draft_tokens=len(draft), accepted_tokens=expected.accepted, opinions=len(expected.rest)
                    )
                base = len(context) + expected.accepted
                context = [*context, *draft[: expected.accepted], expected.token]
            assert all(counts.values())
            assert f'edgecloud_requests_total{{call="verify",status="200"}} {6 * 4}.0' in await metrics(app)
            for name, count in counts.items():
                assert f"edgecloud_{name}_total {count}.0" in await metrics(app)

    run_scene(scene())


def test_a_stream_is_the_models_own_output_and_continues_any_part_of_it() -> None:
    async def scene() -> None:
        async with running_app() as app:
            session = await Edge(app).open()
            expected = list(open_locally().generate(Stopping(frozenset(), 9)))
            for start in (0, 4, 9):
                message = message_fields(wire.build_generate_request(session.prompt_check, expected[:start], (), 9))
                response = await session.generate(9, expected[:start])
                assert (response.status, response.headers["content-type"]) == (200, "application/x-ndjson")
                assert "model;dur=" in response.headers["server-timing"]
                written: list[int] = []
                for line in response.body.splitlines():
                    token = wire.read_stream_line(line, written, message["check"])
                    written += [] if token is None else [token]
                assert expected[:start] + written == expected
                assert response.lines[-1]["end"] == 9 - start
                # The stream ends the agreement on a context: only base 0 is valid.
                assert (await session.verify([PROMPT.last, *expected], 3, [1])).status == 409
                assert (await session.verify([PROMPT.last, *expected], 1, [1])).status == 409
                assert (await session.verify([PROMPT.last, *expected], 0, [1])).status == 200

    run_scene(scene())


def test_a_request_with_a_wrong_context_is_refused_and_changes_nothing() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session = await Edge(app).open()
            first = await session.verify([3], 0, [1, 2])
            accepted = first.json["accepted"]
            assert accepted < 2
            calls = list(engine.model.calls)
            committed = [3, *[1, 2][:accepted]]
            context, base = [*committed, 5], len(committed)
            other_prompt = EdgeSession(session.edge, session.name, PROMPT, session.prompt_check + 1)
            requests = [
                session.verify(context, base + 1, [1]),  # the check covers a token that the service does not know
                session.verify(context, base, [1], base=base + 1),  # the check covers the context
                session.verify([3, 1, 2, 5], 3, [1]),  # the context contains rejected tokens
                session.verify(context, base, [1], base=0),
                session.verify(context, base, [1], tokens=[6]),
                session.verify(context, base, [1], draft=[2]),
                session.verify(context, base, [1], draft=[]),
                session.verify(context, base, [1], check=7),
                session.verify([4, 4, 4], 1, [1]),  # another context
                other_prompt.verify([3], 0, []),
                other_prompt.generate(3),
            ]
            assert [(await request).status for request in requests] == [409] * len(requests)
            assert (await session.verify([], 0, [1])).status == 422
            assert engine.model.calls == calls
            assert (await session.verify([3], 0, [1, 2])).json == first.json

    run_scene(scene())


def encode(**tensors: Any) -> bytes:
    """Return tensors as safetensors."""
    return save({name: np.asarray(value) for name, value in tensors.items()})


IDS = np.array([1, AUDIO, AUDIO, 3], np.int32)
MEL = np.zeros((8, 8), np.float16)  # 8 frames make 2 positions of the encoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "safetensors"),
        (b"\xff" * 100, 422, "header"),
        (encode(ids=IDS, features=MEL)[:-1], 422, "safetensors"),
        (encode(features=MEL), 422, "must contain ids"),
        (encode(ids=IDS, features=MEL, more=MEL), 422, "nothing else"),
        (encode(ids=IDS.astype(np.int64), features=MEL), 422, "int32"),
        (encode(ids=IDS[None], features=MEL), 422, "int32"),
        (encode(ids=IDS[:0]), 422, "at least 1"),
        (encode(ids=IDS, features=MEL.astype(np.float32)), 422, "float16"),
        (encode(ids=IDS, features=MEL[None]), 422, "float16"),
        (encode(ids=IDS, features=MEL[:, :0]), 422, "float16"),
        (encode(ids=IDS, features=MEL + np.float16("nan")), 422, "not finite"),
        (encode(ids=IDS, features=MEL + np.float16("inf")), 422, "not finite"),
        (encode(ids=IDS, features=MEL[:7]), 422, "8 mel bins, not 7"),
        (
            encode(ids=IDS, features=np.zeros((8, 201), np.float16)),
            413,
            "2.01 s of audio exceed the limit --max-audio-seconds of the cloud's server, 2 s",
        ),
        (encode(ids=IDS, features=MEL[:, :2]), 422, "too few"),
        (encode(ids=IDS, features=np.zeros((8, 12), np.float16)), 422, "audio placeholders for 12 frames, not 3"),
        (encode(ids=IDS), 422, "audio placeholders for 0 frames, not 0"),
        (encode(ids=IDS[[0, 1, 3, 2]], features=MEL), 422, "ids: the last token must be text"),
        (encode(ids=np.array([1, -1], np.int32)), 422, "ids: -1 is not a token id of this model: use 0 to 6"),
        (encode(ids=np.array([1, 7], np.int32)), 422, "ids: 7 is not a token id of this model: use 0 to 6"),
        (
            encode(ids=np.zeros(51, np.int32)),
            413,
            "a prompt of 51 tokens and 1 new tokens exceed the maximum length of the cloud's model toy, 50",
        ),
        (b"x" * 100_000, 413, "larger than"),
    ],
)
def test_an_invalid_prompt_never_reaches_the_model(body: bytes, status: int, reason: str) -> None:
    async def scene() -> None:
        engine = SpyEngine(max_length=50)
        async with running_app(engine, ServiceLimits(max_audio_seconds=2)) as app:
            edge = Edge(app)
            response = await edge.request("POST", open_path(body), body, OCTETS)
            assert response.status == status
            assert reason in response.json["detail"]
            assert engine.model.calls == []
            assert "edgecloud_sessions 0.0" in (await edge.request("GET", "/metrics")).body.decode()

    run_scene(scene())


def test_a_rule_that_the_engine_does_not_have_is_refused_with_those_it_has() -> None:
    async def scene() -> None:
        async with running_app(SpyEngine(synthetic=False)) as app:
            body = wire.encode_prompt(PROMPT)
            for rule, reason in {
                "synthetic(0.5)": "rule synthetic(0.5): the cloud's engine has only greedy and rank(r)",
                "rank(8)": "rule rank(8): the cloud's engine has rank(r) up to r = 7",
                "best": "unknown acceptance rule 'best': choose one of greedy, rank, rank(r), synthetic(p)",
            }.items():
                response = await Edge(app).request("POST", open_path(body, rule), body, OCTETS)
                path, _, query = open_path(body, rule).partition("?")
                received = wire.request_checksum("POST", path, query.encode(), OCTETS.encode(), body)
                assert response.status == 422
                assert response.json == vars(wire.build_refusal(422, reason, received))

    run_scene(scene())


def test_a_prompt_with_audio_is_opened_only_with_the_right_query_and_media_type() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            edge = Edge(app)
            body = encode(ids=IDS, features=MEL)

            def query_of(rule: str) -> str:
                return f"rule={rule}&check={wire.prompt_checksum(body, rule)}"

            check = wire.prompt_checksum(body, "greedy")
            for query, content_type, status in [
                (query_of("greedy"), OCTETS, 201),
                (query_of("rank(1)"), "Application/Octet-Stream; charset=binary", 201),
                (query_of("greedy"), JSON, 415),
                (query_of("greedy"), "", 415),
                (f"rule=greedy&check={check ^ 1}", OCTETS, 422),
                (query_of("rank(7)"), OCTETS, 201),
                (query_of("synthetic(0.9/0.8)"), OCTETS, 201),
                (f"rule=rank(7)&check={check}", OCTETS, 422),  # the rule was damaged on its way
                (query_of("rank(8)"), OCTETS, 422),
                (query_of("rank(0)"), OCTETS, 422),
                (query_of(f"rank({'9' * 5000})"), OCTETS, 422),
                (query_of(f"rank({'9' * 200})"), OCTETS, 422),
                (query_of("synthetic(1.5)"), OCTETS, 422),
                (query_of("synthetic(nan)"), OCTETS, 422),
                (f"rule=%ff%00&check={check}", OCTETS, 422),
                (f"rule=greedy&check=-{check}", OCTETS, 422),
                ("rule=greedy", OCTETS, 422),
                ("", OCTETS, 422),
            ]:
                assert (await edge.request("POST", f"/v1/sessions?{query}", body, content_type)).status == status, query
            assert engine.model.calls == ["open"] * 4

    run_scene(scene())


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"[" * 90_000,
        b'{"a":' * 30_000,
        b"9" * 100_000,
        b"\xff\xfe",
        b'{"\\ud800": "\\ud800"}',
        b'{"base":NaN,"tokens":[Infinity],"draft":[],"check":-Infinity}',
        b'{"base":0,"tokens":[1.0],"draft":[],"check":0}',
        b'{"base":0,"tokens":["1"],"draft":[],"check":0}',
        b'{"base":true,"tokens":[],"draft":[],"check":0}',
        b'{"base":-1,"tokens":[],"draft":[],"check":0}',
        b'{"base":0,"tokens":[-1],"draft":[],"check":0}',
        b'{"base":0,"tokens":[2147483648],"draft":[],"check":0}',
        b'{"base":0,"tokens":[7],"draft":[],"check":0}',
        b'{"base":0,"tokens":[],"draft":[7],"check":0}',
        b'{"base":0,"tokens":[],"draft":[' + b"1" * 4299 + b'],"check":0}',
        b'{"base":0,"tokens":[' + b"0," * wire.MAX_IDS + b'0],"draft":[],"check":0}',
        b'{"base":0,"tokens":[' + b'"secret",' * 8000 + b'0],"draft":[],"check":0}',
        b'{"output":[],"eos":[],"max_new_tokens":0,"check":0}',
        b'{"output":[],"eos":[7],"max_new_tokens":1,"check":0}',
        b'{"output":[7],"eos":[],"max_new_tokens":1,"check":0}',
        b'{"output":[],"eos":[],"max_new_tokens":32769,"check":0}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_invalid_json_is_refused_with_a_short_reason_that_does_not_repeat_it(body: bytes) -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(max_tokens=wire.MAX_IDS)) as app:
            session = await Edge(app).open()
            for call in ("verify", "generate"):
                response = await session.edge.request("POST", f"{session.path}/{call}", body)
                assert response.status in (400, 422), response
                assert len(response.body) < 400
                assert b"secret" not in response.body
            assert engine.model.calls == ["open"]

    run_scene(scene())


@pytest.mark.parametrize(("max_length", "max_tokens"), [(10, 99), (99, 10)])
def test_more_tokens_than_the_limit_of_the_model_or_the_server_are_refused(max_length: int, max_tokens: int) -> None:
    async def scene() -> None:
        engine = SpyEngine(max_length=max_length)
        async with running_app(engine, ServiceLimits(max_tokens=max_tokens)) as app:
            session = await Edge(app).open()
            assert (await session.verify([3] * 6, 0, [1, 1])).status == 200  # the prompt has the first token too
            assert (await session.verify([3] * 6, 0, [1, 1, 1])).status == 413
            assert (await session.generate(7)).status == 200
            assert (await session.generate(8)).status == 413

    run_scene(scene())


@pytest.mark.parametrize(("length", "status"), [(6, 200), (7, 413)])
def test_a_draft_beyond_the_limit_is_refused(length: int, status: int) -> None:
    async def scene() -> None:
        async with running_app(limits=ServiceLimits(max_draft=6)) as app:
            session = await Edge(app).open()
            answer = await session.verify([3], 0, [1] * length)
            assert answer.status == status
            if status == 413:
                assert "a draft of 7 tokens exceeds the limit of the cloud's server, 6 tokens" in answer.json["detail"]
                assert (await session.verify([3], 0, [1])).status == 200

    run_scene(scene())


@pytest.mark.parametrize(("more", "status"), [(0, 422), (1, 413)])
def test_a_message_longer_than_the_limits_allow_is_not_parsed(more: int, status: int) -> None:
    async def scene() -> None:
        limits = ServiceLimits(max_tokens=100)
        async with running_app(limits=limits) as app:
            session = await Edge(app).open()
            body = b" " * (limits.max_message_bytes + more)
            assert (await Edge(app).request("POST", f"{session.path}/verify", body)).status == status

    run_scene(scene())


def test_another_client_sees_no_difference_between_a_session_and_none() -> None:
    async def scene() -> None:
        async with running_app() as app:
            session = await Edge(app).open()
            first = await session.verify([3], 0, [1])
            for name in (session.name, "A" * 22):
                other = EdgeSession(Edge(app, OTHER_KEY), name, PROMPT, session.prompt_check)
                for response in (await other.verify([3], 0, [1]), await other.generate(3), await other.close()):
                    assert (response.status, response.json["detail"]) == (404, UNKNOWN_SESSION)
            assert (await session.verify([3], 0, [1])).json == first.json

    run_scene(scene())


@pytest.mark.parametrize("name", ["%00", "%2e%2e", "%ed%a0%80", "é", "a" * 10_000, "'; drop", "-"])
def test_a_strange_session_name_is_unknown(name: str) -> None:
    async def scene() -> None:
        async with running_app() as app:
            response = await EdgeSession(Edge(app), name, PROMPT, 0).verify([3], 0, [1])
            assert (response.status, response.json["detail"]) == (404, UNKNOWN_SESSION)

    run_scene(scene())


def test_a_closed_session_is_unknown_and_its_cache_is_empty() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session = await Edge(app).open()
            response = await session.close()
            assert (response.status, response.headers, response.body) == (204, {}, b"")
            assert engine.model.sessions[0].is_closed
            for later in (await session.close(), await session.verify([3], 0, []), await session.generate(1)):
                assert (later.status, later.json["detail"]) == (404, UNKNOWN_SESSION)

    run_scene(scene())


def test_an_idle_session_is_closed() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(idle_timeout=0.2)) as app:
            session = await Edge(app).open()
            await wait_until(lambda: engine.model.sessions[0].is_closed)
            assert (await session.verify([3], 0, [])).status == 404
            assert 'edgecloud_sessions_evicted_total{why="idle"} 1.0' in await metrics(app)

    run_scene(scene())


async def metrics(app: Any) -> str:
    """Return the metrics in the format of Prometheus."""
    return (await Edge(app).request("GET", "/metrics")).body.decode()


def test_a_new_session_closes_the_least_recently_used_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RECENT_USE", 0.0)

    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(max_sessions=2)) as app:
            first, second = await Edge(app).open(), await Edge(app).open()
            await first.verify([3], 0, [])
            await Edge(app).open()
            assert [session.is_closed for session in engine.model.sessions] == [False, True, False]
            assert (await second.verify([3], 0, [])).status == 404
            assert (await first.verify([3], 0, [])).status == 200
            assert "edgecloud_sessions 2.0" in await metrics(app)

    run_scene(scene())


class BlockedModel:
    """A switch that blocks every further call of a model until `release` is set."""

    def __init__(self, spy: SpyModel) -> None:
        self.blocked_calls, self.release = 0, threading.Event()
        spy.before_call = self

    def __call__(self, call: str) -> None:
        self.blocked_calls += 1
        assert self.release.wait(60)


def test_a_client_with_many_calls_does_not_delay_another_client() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(max_sessions=4)) as app:
            sessions = [await Edge(app).open() for _ in range(4)]
            earlier_calls = len(engine.model.calls)
            blocked = BlockedModel(engine.model)
            flood = [asyncio.create_task(session.verify([3], 0, [])) for session in sessions * 4]
            await wait_until(lambda: blocked.blocked_calls == 1)
            await wait_until(lambda: all(waiting_requests(app, session) == 3 for session in sessions))
            # The other client's session takes the place of an idle one, and its calls come after the running one.
            opening = asyncio.create_task(Edge(app, OTHER_KEY).open())
            await wait_until(lambda: len(app.state.service._queue._waiting) == 2)
            blocked.release.set()
            other = await opening
            # One call of the flood runs before the closing of the idle session, and one after it.
            assert engine.model.calls[earlier_calls:].index("open") <= 2
            assert (await other.verify([3], 0, [1, 2])).status == 200
            statuses = [(await request).status for request in flood]
            assert statuses.count(404) == 3  # the waiting requests of the session that made room
            assert statuses.count(200) == 13

    run_scene(scene())


def test_the_running_requests_of_a_client_are_limited() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(max_sessions=1)) as app:
            session = await Edge(app).open()
            blocked = BlockedModel(engine.model)
            flood = [asyncio.create_task(session.verify([3], 0, [])) for _ in range(17)]
            await wait_until(lambda: waiting_requests(app, session) == 16)
            assert (await session.verify([3], 0, [])).status == 429
            blocked.release.set()
            assert {(await request).status for request in flood} == {200}

    run_scene(scene())


def test_a_client_cannot_replace_its_own_busy_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "ROOM_WAIT", 0.01)

    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine, ServiceLimits(max_sessions=1)) as app:
            session = await Edge(app).open()
            blocked = BlockedModel(engine.model)
            running = asyncio.create_task(session.verify([3], 0, []))
            await wait_until(lambda: blocked.blocked_calls == 1)
            body = wire.encode_prompt(PROMPT)
            refused = await Edge(app).request("POST", open_path(body), body, OCTETS)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert refused.json["detail"] == "all 1 sessions are in use: try again in 1 s"
            blocked.release.set()
            assert (await running).status == 200

    run_scene(scene())


def test_edges_of_one_key_beyond_the_limit_wait_and_never_lose_a_session() -> None:
    """Three edges share two sessions, so one of them always waits until a caption of the others ends."""

    async def scene() -> None:
        async with running_app(limits=ServiceLimits(max_sessions=2)) as app:
            opened = [0, 0, 0]

            async def run_edge(number: int) -> None:
                while min(opened) < 3:
                    session = await Edge(app).open()
                    for _ in range(2):
                        assert (await session.verify([3], 0, [1])).status == 200
                        await asyncio.sleep(0.001)
                    opened[number] += 1
                    assert (await session.close()).status == 204

            await asyncio.gather(*map(run_edge, range(3)))
            assert max(opened) <= 2 * min(opened)

    run_scene(scene())


def test_a_refused_edge_waits_as_told_and_is_then_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "ROOM_WAIT", 0.01)
    waits: list[float] = []
    with served(ToyEngine(), ServiceLimits(max_sessions=1)) as url:

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            first.close()
            other.close()

        other, connection = Connection(url), Connection(url, sleep=sleep)
        first, second = (RemoteVerifier(c, parse_rule("greedy"), Harness()).open(PROMPT) for c in (other, connection))
        first.wait()
        assert second.verify(0, [3], [1, 2]) == open_locally().verify(0, [3], [1, 2])
        assert waits == [1.0]
        second.close()
        connection.close()


def test_requests_that_wait_for_a_closing_session_are_refused() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session = await Edge(app).open()
            blocked = BlockedModel(engine.model)
            running = asyncio.create_task(session.verify([3], 0, []))
            await wait_until(lambda: blocked.blocked_calls == 1)
            closing = asyncio.create_task(session.close())
            await wait_until(lambda: waiting_requests(app, session) == 1)
            late = [
                asyncio.create_task(request)
                for request in (session.verify([3], 0, []), session.generate(2), session.close())
            ]
            await wait_until(lambda: waiting_requests(app, session) == 4)
            blocked.release.set()
            assert (await running).status == 200
            assert (await closing).status == 204
            assert [(await request).status for request in late] == [404, 404, 404]

    run_scene(scene())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (LookupError("/secret/path"), 500, "internal error"),
        (MemoryError("/secret/path"), 503, "the model is out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. /secret/path"), 503, "the model is out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "the model is out of memory"),
        (FloatingPointError("the model gave logits that are not finite"), 501, "logits that are not finite"),
    ],
)
@pytest.mark.parametrize("call", ["open", "verify", "generate"])
def test_a_model_error_closes_its_session_and_no_other(
    call: str, error: Exception, status: int, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(call: str) -> None:
        raise error

    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            other = await Edge(app, OTHER_KEY).open()
            expected = (await other.verify([3], 0, [1])).json
            session = await Edge(app).open()
            await session.verify([3], 0, [1])
            engine.model.before_call = fail
            body = wire.encode_prompt(Prompt(PROMPT.ids * 2))  # more tokens than those of the other client
            with caplog.at_level(logging.WARNING):
                if call == "open":
                    response = await Edge(app).request("POST", open_path(body), body, OCTETS)
                else:
                    response = await (session.verify([3], 0, [1]) if call == "verify" else session.generate(3))
            assert response.status == status
            assert detail in response.json["detail"]
            assert b"secret" not in response.body
            assert ("retry-after" in response.headers) == (status == 503)
            assert ("Traceback" in caplog.text) == (status == 500)
            engine.model.before_call = lambda call: None
            # The cache of the failed session may contain half of a forward pass. If its client has the most tokens, its
            # other sessions make room before.
            is_open = call == "open" and status != 503
            assert (await session.verify([3], 0, [1])).status == (200 if is_open else 404)
            assert (await other.verify([3], 0, [1])).json == expected
            assert f"edgecloud_sessions {2.0 if is_open else 1.0}" in await metrics(app)
            assert f'status="{status}"' in await metrics(app)

    run_scene(scene())


class CountedMemory:
    """A model's memory for a number of cached tokens. A call that finds more in the open sessions runs out of it."""

    def __init__(self, spy: SpyModel, tokens: int) -> None:
        self.spy, self.tokens, self.failures = spy, tokens, 0
        spy.before_call = self

    def __call__(self, call: str) -> None:
        if sum(1 + len(session.tokens) for session in self.spy.sessions if not session.is_closed) > self.tokens:
            self.failures += 1
            raise MemoryError


@pytest.mark.slow
@pytest.mark.parametrize("call", ["open", "verify", "generate"])
def test_out_of_memory_is_charged_to_the_client_with_the_most_tokens_and_the_asker_is_served(call: str) -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            asker = await Edge(app, OTHER_KEY).open()
            greedy = [await Edge(app).open() for _ in range(3)]
            for session, length in zip(greedy, (4, 9, 6), strict=True):
                assert (await session.verify([3] * length, 0, [])).status == 200
            expected, local = list(open_locally().generate(Stopping(frozenset(), 9))), open_locally()
            memory = CountedMemory(engine.model, 16)
            response = await send_call(call, Edge(app, OTHER_KEY), asker)
            assert response.status == (201 if call == "open" else 200)
            if call == "verify":
                message = wire.build_verify_request(asker.prompt_check, [3], 0, [1, 2])
                assert read_verdict(response, message) == local.verify(0, [3], [1, 2])
            if call == "generate":
                assert [line["token"] for line in response.lines[:-1]] == expected
            assert memory.failures == (2 if call == "generate" else 1)  # its own tokens need the memory again
            memory.tokens = 99
            lost = [session for session in greedy if (await session.verify([3], 0, [])).status == 404]
            assert lost == ([greedy[1], greedy[2]] if call == "generate" else [greedy[1]])
            assert (await asker.verify([3], 0, [])).status == 200
            assert f'edgecloud_sessions_evicted_total{{why="memory"}} {len(lost)}.0' in await metrics(app)

    run_scene(scene())


@pytest.mark.slow
def test_a_call_that_never_fits_closes_few_sessions() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            greedy = [await Edge(app).open() for _ in range(6)]
            asker = await Edge(app, OTHER_KEY).open()
            memory = CountedMemory(engine.model, -1)
            refused = await asker.verify([3], 0, [1])
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            memory.tokens = 99
            statuses = [(await session.verify([3], 0, [])).status for session in (*greedy, asker)]
            assert statuses.count(404) == 3 + 1

    run_scene(scene())


def test_a_call_that_fails_after_its_client_has_gone_leaves_no_half_pass(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session = await Edge(app).open()
            expected = (await session.verify([3], 0, [1, 2])).json
            blocked, is_gone = BlockedModel(engine.model), asyncio.Event()

            def fail(call: str) -> None:
                blocked(call)
                raise MemoryError

            engine.model.before_call = fail
            leaving = asyncio.create_task(send_call("verify", Edge(app, KEY, is_gone), session))
            await wait_until(lambda: blocked.blocked_calls == 1)
            is_gone.set()
            await leaving
            engine.model.before_call = lambda call: None
            blocked.release.set()
            assert (await session.verify([3], 0, [1, 2])).json == expected
            assert engine.model.calls.count("open") == 2  # the cache with half of a forward pass is not used again

    with caplog.at_level(logging.WARNING):
        run_scene(scene())
    assert not caplog.records


def test_a_stream_that_fails_has_no_last_line() -> None:
    async def scene() -> None:
        for error in (MemoryError(), LookupError()):
            engine = SpyEngine()

            def fail(call: str, spy: SpyModel = engine.model, error: Exception = error) -> None:
                if len(spy.calls) == 4:
                    raise error

            engine.model.before_call = fail
            async with running_app(engine) as app:
                session = await Edge(app).open()
                response = await session.generate(9)
                assert (response.status, ["token" in line for line in response.lines]) == (200, [True, True])
                assert (await session.verify([3], 0, [])).status == 404

    run_scene(scene())


def test_a_session_stays_usable_after_its_client_leaves_a_stream() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session = await Edge(app).open()
            expected = (await session.verify([3], 0, [1, 2])).json

            async def leave(part: bytes) -> bool:
                await asyncio.sleep(0)
                return b"token" not in part

            assert len((await session.generate(2000, read=leave)).lines) < 50
            calls = len(engine.model.calls)
            assert (await session.verify([3], 0, [1, 2])).json == expected
            assert len(engine.model.calls) <= calls + 2  # the generation has stopped

    run_scene(scene())


def test_a_stream_closes_its_tokens_as_soon_as_the_client_goes_away() -> None:
    async def scene() -> None:
        is_sending, is_closed = asyncio.Event(), asyncio.Event()

        async def generate() -> AsyncGenerator[Completed[int | None], None]:
            try:
                while True:
                    yield Completed(1, 0.0, 0.0)
            finally:
                is_closed.set()

        async def receive() -> Any:
            await is_sending.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            is_sending.set()
            await asyncio.Event().wait()  # the client goes away while a message is on its way

        tokens = generate()
        first = await anext(tokens)
        await TokenLines(first, tokens, 0)({"type": "http"}, receive, send)
        assert is_closed.is_set()

    run_scene(scene())


def test_the_next_call_waits_for_a_forward_pass_whose_client_has_gone() -> None:
    """With two threads, only the session keeps its next call from running beside the abandoned one."""

    async def scene() -> None:
        engine = SpyEngine(concurrency=2)
        async with running_app(engine) as app:
            session = await Edge(app).open()
            expected = (await session.verify([3], 0, [1, 2])).json
            blocked = BlockedModel(engine.model)

            async def leave(part: bytes) -> bool:
                blocked.release.clear()
                return False

            blocked.release.set()
            await session.generate(2000, read=leave)
            blocked_calls = blocked.blocked_calls
            verifying = asyncio.create_task(session.verify([3], 0, [1, 2]))
            await asyncio.sleep(0.03)  # time for a wrong call to start
            assert blocked.blocked_calls <= blocked_calls + 1
            blocked.release.set()
            assert (await verifying).json == expected

    run_scene(scene())


async def send_call(call: str, edge: Edge, session: EdgeSession) -> Response:
    """Send one call on behalf of `edge`."""
    session = replace(session, edge=edge)
    if call == "open":
        body = wire.encode_prompt(PROMPT)
        return await edge.request("POST", open_path(body), body, OCTETS)
    if call == "verify":
        return await session.verify([3], 0, [1, 2])
    return await (session.generate(9) if call == "generate" else session.close())


@pytest.mark.parametrize(
    ("call", "is_running"),
    [("open", False), ("open", True), ("verify", False), ("verify", True), ("generate", True), ("close", False)],
)
def test_the_call_of_a_client_that_has_gone_leaves_nothing_behind(
    call: str, is_running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session, other = await Edge(app).open(), await Edge(app, OTHER_KEY).open()
            expected = (await session.verify([3], 0, [1, 2])).json
            calls = list(engine.model.calls)
            blocked = BlockedModel(engine.model)
            running = [] if is_running else [asyncio.create_task(other.verify([3], 0, []))]
            await wait_until(lambda: blocked.blocked_calls == len(running))
            is_gone = asyncio.Event()
            leaving = asyncio.create_task(send_call(call, Edge(app, KEY, is_gone), session))
            queue = app.state.service._queue
            await wait_until(lambda: blocked.blocked_calls == 1 and (is_running or bool(queue._waiting)))
            is_gone.set()
            if call != "close":
                assert (await leaving).status == 0
            blocked.release.set()
            assert (await leaving).status == (204 if call == "close" else 0)
            for request in running:
                await request
            await wait_until(lambda: not app.state.service._background)
            assert len(engine.model.calls) == len(calls) + 1
            assert "edgecloud_sessions 2.0" in await metrics(app) or call == "close"
            again = await session.verify([3], 0, [1, 2])
            assert again.status == (404 if call == "close" else 200)
            assert again.json.get("detail", again.json) == (UNKNOWN_SESSION if call == "close" else expected)
            assert all(spy.is_closed for spy in engine.model.sessions[2:])

    with caplog.at_level(logging.WARNING):
        run_scene(scene())
    assert not caplog.records


def test_a_session_whose_answer_cannot_be_sent_is_closed() -> None:
    async def scene() -> None:
        async with running_app() as app:
            for is_cut in (False, True):  # the connection breaks in the response, or before it
                body = wire.encode_prompt(PROMPT)
                requests: list[Any] = [{"type": "http.request", "body": body}]

                async def receive(requests: list[Any] = requests) -> Any:
                    if requests:
                        return requests.pop()
                    return await asyncio.Event().wait()

                async def send(message: Any, is_cut: bool = is_cut) -> None:
                    if is_cut or message["type"] == "http.response.body":
                        raise OSError("the connection is broken")

                path, _, query = open_path(body).partition("?")
                headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", OCTETS.encode())]
                scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode()}
                with pytest.raises(OSError, match="broken"):
                    await app(scope | {"headers": headers}, receive, send)
                await wait_until(lambda: not app.state.service._background)
                assert "edgecloud_sessions 0.0" in await metrics(app)

    run_scene(scene())


def test_an_abandoned_verification_of_other_tokens_changes_no_later_verdict() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with running_app(engine) as app:
            session, local = await Edge(app).open(), open_locally()
            verdict = local.verify(0, [3], [])
            await session.verify([3], 0, [])
            blocked, is_gone = BlockedModel(engine.model), asyncio.Event()
            gone = replace(session, edge=Edge(app, KEY, is_gone))
            leaving = asyncio.create_task(gone.verify([4, 4, 4], 0, [1]))
            await wait_until(lambda: blocked.blocked_calls == 1)
            is_gone.set()
            await leaving
            blocked.release.set()
            context = [3, verdict.token]
            message = wire.build_verify_request(session.prompt_check, context, 1, [2, 2])
            assert read_verdict(await session.verify(context, 1, [2, 2]), message) == local.verify(
                1, context[1:], [2, 2]
            )

    run_scene(scene())


def test_opens_whose_sockets_are_closed_at_once_leave_no_session() -> None:
    engine = SpyEngine()
    blocked = BlockedModel(engine.model)
    body = wire.encode_prompt(PROMPT)
    head = f"POST {open_path(body)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {OCTETS}\r\n"
    with served(engine) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        sockets = [socket.create_connection(address) for _ in range(20)]
        for connection in sockets:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not blocked.blocked_calls:
            time.sleep(0.002)
        for number, connection in enumerate(sockets):
            connection.shutdown(socket.SHUT_WR if number % 2 else socket.SHUT_RDWR)
        connection_of_metrics = Connection(url)
        blocked.release.set()

        def count_sessions() -> float:
            text = connection_of_metrics.transport.call("GET", "/metrics").content.decode()
            return float(re.findall(r"^edgecloud_sessions (\S+)", text, re.MULTILINE)[0])

        while not all(session.is_closed for session in engine.model.sessions) or count_sessions():
            time.sleep(0.002)
        assert len(engine.model.calls) < 10
        for connection in sockets:
            connection.close()
        connection_of_metrics.close()


def test_other_paths_methods_and_protocols_are_refused() -> None:
    async def scene() -> None:
        async with running_app() as app:
            edge = Edge(app)
            for method, path, status in [
                ("GET", "/nothing", 404),
                ("GET", "/v1/sessions/", 404),  # and no redirect to the address in a Host header
                ("GET", "//evil.example/..", 404),
                ("GET", "/v1/sessions", 405),
                ("PUT", "/v1/model", 405),
                ("HEAD", "/v1/sessions", 405),
                ("OPTIONS", "/health", 405),
                ("OPTIONS", "/v1/model", 405),
                ("GET", "/docs", 404),  # a page that runs a script of another host
                ("GET", "/docs/oauth2-redirect", 404),
                ("BREW", "/v1/model", 405),
                ("GET", "/health", 200),
                *[("HEAD", path, 200) for path in ("/health", "/health/ready", "/v1/model", "/metrics")],
            ]:
                response = await edge.request(method, path)
                assert response.status == status, (method, path)
                expected = {"/v1/sessions": "POST"}.get(path, "GET, HEAD")
                assert response.headers.get("allow") == (expected if status == 405 else None)
                assert response.status == 200 or response.json["detail"] in ("Not Found", "Method Not Allowed")
            for key in ("no_key", KEY):
                messages: list[Any] = []

                async def send(message: Any, messages: list[Any] = messages) -> None:
                    messages.append(message)

                async def receive() -> Any:
                    return {"type": "websocket.connect"}

                headers = [(b"authorization", f"Bearer {key}".encode())]
                await app(
                    {"type": "websocket", "path": "/v1/model", "headers": headers, "query_string": b"", "app": app},
                    receive,
                    send,
                )
                assert [message["type"] for message in messages] == ["websocket.close"]

    run_scene(scene())


def test_a_message_is_read_only_with_the_media_type_of_json() -> None:
    right = (JSON, JSON.upper(), f"{JSON};", f"{JSON} ; charset=utf-8")
    wrong = ("", "text/plain", OCTETS, f"{JSON}x", "application/x+json")

    async def scene() -> None:
        async with running_app() as app:
            session = await Edge(app).open()
            message = wire.dumps(wire.build_verify_request(session.prompt_check, [3], 0, [1]))
            path = f"{session.path}/verify"
            for content_type in right:
                assert (await session.edge.request("POST", path, message, content_type)).status == 200
            for content_type in wrong:
                for target in (path, f"{session.path}/generate"):
                    for body in (message, b"{"):
                        response = await session.edge.request("POST", target, body, content_type)
                        assert response.status == 415
                        assert response.json["detail"] == "content-type: the body must be application/json"
                        arrived = ("POST", target, b"", content_type.encode(), body)
                        assert response.json["received"] == wire.request_checksum(*arrived)

    run_scene(scene())


def test_a_server_that_is_about_to_stop_is_live_and_not_ready() -> None:
    async def scene() -> None:
        async with running_app() as app:
            edge = Edge(app, None)
            for path in ("/health", "/health/live", "/health/ready"):
                assert (await edge.request("GET", path)).json == {"status": "ok"}
            app.state.requests.is_closing = True
            for path in ("/health", "/health/live"):
                assert (await edge.request("GET", path)).status == 200
            response = await edge.request("GET", "/health/ready")
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert response.json["detail"] == "the server is shutting down"

    run_scene(scene())


def test_strange_requests_add_no_labels_to_the_metrics() -> None:
    async def scene() -> None:
        async with running_app() as app:
            session = await Edge(app).open()
            draft = [1, 2, 4]
            accepted = (await session.verify([3], 0, draft)).json["accepted"]
            for number in range(30):
                await Edge(app).request(f"M{number}", f"/{number}")
                await Edge(app, f"wrong{number}").request("GET", f"/{number}")
                await EdgeSession(Edge(app), f"name{number}", PROMPT, 0).verify([3], 0, [])
            text = await metrics(app)
            calls = set(re.findall(r'call="(\w+)"', text))
            assert calls == {"open_prompt", "verify", "open", "other"}
            assert f"edgecloud_draft_tokens_total {len(draft)}.0" in text
            assert f"edgecloud_accepted_tokens_total {accepted}.0" in text
            assert 'edgecloud_requests_total{call="other",status="401"} 30.0' in text
            assert "process_resident_memory_bytes" in text
            assert session.name not in text

    run_scene(scene())


def test_the_description_of_the_model_is_the_identity_of_the_engine() -> None:
    async def scene() -> None:
        engine = SpyEngine(name="toy")
        async with running_app(engine, ServiceLimits(max_audio_seconds=7)) as app:
            model = (await Edge(app).request("GET", "/v1/model")).json
            assert model["fingerprint"] == engine.identity.fingerprint
            assert (model["name"], model["vocab_size"], model["max_audio_seconds"]) == ("toy", VOCABULARY, 7.0)
            assert model["traits"]["audio_token"] == AUDIO

    run_scene(scene())


def test_the_openapi_document_has_every_call_and_the_key() -> None:
    async def scene() -> None:
        async with running_app() as app:
            document = (await Edge(app).request("GET", "/openapi.json")).json
            routes = {f"{method} {path}" for path, methods in document["paths"].items() for method in methods}
            assert routes == {
                "get /health",
                "get /health/live",
                "get /health/ready",
                "get /metrics",
                "get /v1/model",
                "post /v1/sessions",
                "post /v1/sessions/{session}/verify",
                "post /v1/sessions/{session}/generate",
                "delete /v1/sessions/{session}",
            }
            assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
            assert document["security"] == [{"key": []}]
            for path in ("/health", "/health/live", "/health/ready"):
                assert document["paths"][path]["get"]["security"] == []
            session = await Edge(app).open()
            body = wire.encode_prompt(PROMPT)
            opened = await Edge(app).request("POST", open_path(body), body, OCTETS)
            for name, response in [("OpenedBody", opened), ("VerdictBody", await session.verify([3], 0, [1]))]:
                assert set(document["components"]["schemas"][name]["required"]) == set(response.json)
        async with running_app(keys=()) as app:
            assert (await Edge(app, None).request("GET", "/openapi.json")).json["security"] == []

    run_scene(scene())
