"""The cloud's service: right verdicts, whatever else is asked of it and by whom."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from edgecloud_sd import wire
from edgecloud_sd.acceptance import parse_rule
from edgecloud_sd.cloud.fair_queue import Completed
from edgecloud_sd.cloud.server import Lines
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerifier
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import AUDIO, KEY, OTHER_KEY, Edge, Opened, Spy, SpyEngine, play, started, until
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

PROMPT = Prompt((1, 2, 3))
NOT_THERE = {"detail": "no such session: open the prompt anew"}


def opening(sent: bytes) -> str:
    """The path that opens a prompt, strictly judged."""
    return f"/v1/sessions?rule=greedy&check={wire.prompt_checksum(sent, 'greedy')}"


def local(rule: str = "greedy", prompt: Prompt = PROMPT) -> Any:
    return LocalVerifier(ToyModel(random_table(VOCABULARY, 0), frozenset()), parse_rule(rule)).open(prompt)


def verdict(answer: Any, asked: wire.VerifyRequest) -> Verdict:
    assert answer.status == 200, answer
    return wire.read_verdict(answer.body, len(asked.draft), asked.check)


@pytest.mark.parametrize("rule", ["greedy", "rank(3)", "synthetic(0.6)", "synthetic(1/0.5)"])
def test_verdicts_are_the_models_own_however_often_one_asks(rule: str) -> None:
    async def scene() -> None:
        async with started() as app:
            session = await Edge(app).opened(rule=rule)
            model = local(rule)
            context, held, kept = [PROMPT.last], 0, 0
            for draft in ([0, 1, 2], [], [4, 4], [6], [1, 1, 1, 1], [2, 5]):
                expected = model.verify(held, context[held:], draft)
                asked = wire.build_verify_request(session.begun, context, held, draft)
                for _ in range(3):
                    assert verdict(await session.verify(context, held, draft), asked) == expected
                assert (
                    verdict(
                        await session.verify(context, 0, draft),
                        wire.build_verify_request(session.begun, context, 0, draft),
                    )
                    == expected
                )
                kept += expected.accepted
                held = len(context) + expected.accepted
                context = [*context, *draft[: expected.accepted], expected.token]
            assert kept

    play(scene())


def test_a_stream_is_the_models_own_caption_and_goes_on_from_anywhere() -> None:
    async def scene() -> None:
        async with started() as app:
            session = await Edge(app).opened()
            expected = list(local().generate(Stopping(frozenset(), 9)))
            for start in (0, 4, 9):
                asked = wire.build_generate_request(session.begun, expected[:start], (), 9)
                answer = await session.generate(9, expected[:start])
                assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
                assert "model;dur=" in answer.headers["server-timing"]
                written: list[int] = []
                for line in answer.body.splitlines():
                    token = wire.read_stream_line(line, written, asked.check)
                    written += [] if token is None else [token]
                assert expected[:start] + written == expected
                assert answer.lines[-1]["end"] == 9 - start
                # nothing of it is agreed upon, nor what was before
                assert (await session.verify([PROMPT.last, *expected], 3, [1])).status == 409
                assert (await session.verify([PROMPT.last, *expected], 1, [1])).status == 409
                assert (await session.verify([PROMPT.last, *expected], 0, [1])).status == 200

    play(scene())


def test_a_request_that_counts_on_something_else_is_refused_and_changes_nothing() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            session = await Edge(app).opened()
            first = await session.verify([3], 0, [1, 2])
            accepted = first.json["accepted"]
            assert accepted < 2
            calls = list(engine.model.calls)
            held = [3, *[1, 2][:accepted]]
            wrong = [
                session.verify([*held, 5], len(held) + 1, [1]),  # a base beyond what is held
                # the same, with the right check for what is there then
                session.verify([*held, 5], len(held), [1], base=len(held) + 1),
                session.verify([3, 1, 2, 5], 3, [1]),  # on a draft that was rejected
                session.verify([*held, 5], len(held), [1], base=0),
                session.verify([*held, 5], len(held), [1], tokens=[6]),
                session.verify([*held, 5], len(held), [1], draft=[2]),
                session.verify([*held, 5], len(held), [1], draft=[]),
                session.verify([*held, 5], len(held), [1], check=7),
                session.verify([4, 4, 4], 1, [1]),  # another past
                Opened(session.edge, session.name, PROMPT, session.begun + 1).verify([3], 0, []),  # another prompt
                Opened(session.edge, session.name, PROMPT, session.begun + 1).generate(3),
            ]
            assert [(await each).status for each in wrong] == [409] * len(wrong)
            assert (await session.verify([], 0, [1])).status == 422
            assert engine.model.calls == calls
            assert (await session.verify([3], 0, [1, 2])).json == first.json

    play(scene())


def body(**tensors: Any) -> bytes:
    return save({name: np.asarray(value) for name, value in tensors.items()})


IDS = np.array([1, AUDIO, AUDIO, 3], np.int32)
MEL = np.zeros((8, 8), np.float16)  # 8 frames are 2 positions


@pytest.mark.parametrize(
    ("sent", "status", "why"),
    [
        (b"", 422, "safetensors"),
        (b"\xff" * 100, 422, "header"),
        (body(ids=IDS, features=MEL)[:-1], 422, "safetensors"),
        (body(features=MEL), 422, "must contain ids"),
        (body(ids=IDS, features=MEL, more=MEL), 422, "nothing else"),
        (body(ids=IDS.astype(np.int64), features=MEL), 422, "int32"),
        (body(ids=IDS[None], features=MEL), 422, "int32"),
        (body(ids=IDS[:0]), 422, "at least 1"),
        (body(ids=IDS, features=MEL.astype(np.float32)), 422, "float16"),
        (body(ids=IDS, features=MEL[None]), 422, "float16"),
        (body(ids=IDS, features=MEL[:, :0]), 422, "float16"),
        (body(ids=IDS, features=MEL + np.float16("nan")), 422, "not finite"),
        (body(ids=IDS, features=MEL + np.float16("inf")), 422, "not finite"),
        (body(ids=IDS, features=MEL[:7]), 422, "8 mel bins, not 7"),
        (body(ids=IDS, features=np.zeros((8, 201), np.float16)), 413, "2.01 s of audio, at most 2 s"),
        (body(ids=IDS, features=MEL[:, :2]), 422, "too few"),
        (body(ids=IDS, features=np.zeros((8, 12), np.float16)), 422, "audio placeholders for 12 frames, not 3"),
        (body(ids=IDS), 422, "audio placeholders for 0 frames, not 0"),
        (body(ids=IDS[[0, 1, 3, 2]], features=MEL), 422, "last of the ids must be text"),
        (body(ids=np.array([1, -1], np.int32)), 422, "below 7"),
        (body(ids=np.array([1, 7], np.int32)), 422, "below 7"),
        (body(ids=np.zeros(51, np.int32)), 413, "51 tokens are more than the 50 of a prompt"),
        (b"x" * 100_000, 413, "larger than"),
    ],
)
def test_a_prompt_that_is_none_never_reaches_the_model(sent: bytes, status: int, why: str) -> None:
    async def scene() -> None:
        engine = SpyEngine(max_length=50)
        async with started(engine, ServiceLimits(max_audio_seconds=2)) as app:
            edge = Edge(app)
            answer = await edge.ask("POST", opening(sent), sent, OCTETS)
            assert answer.status == status
            assert why in answer.json["detail"]
            assert engine.model.calls == []
            assert "edgecloud_sessions 0.0" in (await edge.ask("GET", "/metrics")).body.decode()

    play(scene())


def test_a_rule_that_the_engine_cannot_judge_by_is_named() -> None:
    async def scene() -> None:
        async with started(SpyEngine(synthetic=False)) as app:
            for rule, why in {
                "synthetic(0.5)": "the cloud's engine judges by greedy and rank(r) alone, not by synthetic(0.5)",
                "rank(8)": "the cloud's engine judges by rank 7 at most, not 8",
                "best": "unknown acceptance rule 'best': choose one of greedy, rank, rank(r), synthetic(p)",
            }.items():
                path = f"/v1/sessions?rule={rule}&check={wire.prompt_checksum(wire.encode_prompt(PROMPT), rule)}"
                answer = await Edge(app).ask("POST", path, wire.encode_prompt(PROMPT), OCTETS)
                assert (answer.status, answer.json) == (422, {"detail": why})

    play(scene())


def test_a_prompt_with_audio_is_opened_and_its_envelope_checked() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            edge = Edge(app)
            sent = body(ids=IDS, features=MEL)

            def asked(rule: str) -> str:
                return f"rule={rule}&check={wire.prompt_checksum(sent, rule)}"

            check = wire.prompt_checksum(sent, "greedy")
            for query, content, status in [
                (asked("greedy"), OCTETS, 201),
                (asked("rank(1)"), "Application/Octet-Stream; charset=binary", 201),
                (asked("greedy"), JSON, 415),
                (asked("greedy"), "", 415),
                (f"rule=greedy&check={check ^ 1}", OCTETS, 422),
                (asked("rank(7)"), OCTETS, 201),
                (asked("synthetic(0.9/0.8)"), OCTETS, 201),
                (f"rule=rank(7)&check={check}", OCTETS, 422),  # damaged on its way: another rule than was asked for
                (asked("rank(8)"), OCTETS, 422),
                (asked("rank(0)"), OCTETS, 422),
                (asked(f"rank({'9' * 5000})"), OCTETS, 422),
                (asked(f"rank({'9' * 200})"), OCTETS, 422),
                (asked("synthetic(1.5)"), OCTETS, 422),
                (asked("synthetic(nan)"), OCTETS, 422),
                (f"rule=%ff%00&check={check}", OCTETS, 422),
                (f"rule=greedy&check=-{check}", OCTETS, 422),
                ("rule=greedy", OCTETS, 422),
                ("", OCTETS, 422),
            ]:
                assert (await edge.ask("POST", f"/v1/sessions?{query}", sent, content)).status == status, query
            assert engine.model.calls == ["open"] * 4

    play(scene())


@pytest.mark.parametrize(
    "sent",
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
        b'{"base":0,"tokens":[' + b"0," * 8192 + b'0],"draft":[],"check":0}',
        b'{"base":0,"tokens":[' + b'"secret",' * 8000 + b'0],"draft":[],"check":0}',
        b'{"output":[],"eos":[],"max_new_tokens":0,"check":0}',
        b'{"output":[],"eos":[7],"max_new_tokens":1,"check":0}',
        b'{"output":[7],"eos":[],"max_new_tokens":1,"check":0}',
        b'{"output":[],"eos":[],"max_new_tokens":8193,"check":0}',
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_json_that_is_no_request_is_told_so_in_few_words(sent: bytes) -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            session = await Edge(app).opened()
            for call in ("verify", "generate"):
                answer = await session.edge.ask("POST", f"{session.path}/{call}", sent)
                assert answer.status in (400, 422), answer
                assert len(answer.body) < 400
                assert b"secret" not in answer.body
            assert engine.model.calls == ["open"]

    play(scene())


@pytest.mark.parametrize(("max_length", "most"), [(10, 99), (99, 10)])
def test_more_tokens_than_the_model_or_the_server_takes_are_refused(max_length: int, most: int) -> None:
    async def scene() -> None:
        engine = SpyEngine(max_length=max_length)
        async with started(engine, ServiceLimits(max_tokens=most)) as app:
            session = await Edge(app).opened()
            assert (await session.verify([3] * 6, 0, [1])).status == 200
            assert (await session.verify([3] * 6, 0, [1, 1])).status == 413
            assert (await session.generate(7)).status == 200
            assert (await session.generate(8)).status == 413

    play(scene())


def test_another_client_cannot_tell_a_session_from_none() -> None:
    async def scene() -> None:
        async with started() as app:
            session = await Edge(app).opened()
            first = await session.verify([3], 0, [1])
            thief = Opened(Edge(app, OTHER_KEY), session.name, PROMPT, session.begun)
            nowhere = Opened(Edge(app, OTHER_KEY), "A" * 22, PROMPT, session.begun)
            for tried in (thief, nowhere):
                for answer in (await tried.verify([3], 0, [1]), await tried.generate(3), await tried.close()):
                    assert (answer.status, answer.json) == (404, NOT_THERE)
            assert (await session.verify([3], 0, [1])).json == first.json

    play(scene())


@pytest.mark.parametrize("name", ["%00", "%2e%2e", "%ed%a0%80", "é", "a" * 10_000, "'; drop", "-"])
def test_no_name_but_a_sessions_own_finds_it(name: str) -> None:
    async def scene() -> None:
        async with started() as app:
            answer = await Opened(Edge(app), name, PROMPT, 0).verify([3], 0, [1])
            assert (answer.status, answer.json) == (404, NOT_THERE)

    play(scene())


def test_a_closed_session_is_gone_and_its_memory_too() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            session = await Edge(app).opened()
            answer = await session.close()
            assert (answer.status, answer.headers, answer.body) == (204, {}, b"")
            assert engine.model.sessions[0].closed
            for again in (await session.close(), await session.verify([3], 0, []), await session.generate(1)):
                assert (again.status, again.json) == (404, NOT_THERE)

    play(scene())


def test_a_session_that_nobody_uses_is_closed() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine, ServiceLimits(idle_timeout=0.2)) as app:
            session = await Edge(app).opened()
            await until(lambda: engine.model.sessions[0].closed)
            assert (await session.verify([3], 0, [])).status == 404
            assert 'edgecloud_sessions_evicted_total{why="idle"} 1.0' in await metrics(app)

    play(scene())


async def metrics(app: Any) -> str:
    return (await Edge(app).ask("GET", "/metrics")).body.decode()


def test_room_is_made_by_closing_what_was_not_used_for_longest() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine, ServiceLimits(max_sessions=2)) as app:
            first, second = await Edge(app).opened(), await Edge(app).opened()
            await first.verify([3], 0, [])
            await Edge(app).opened()
            assert [session.closed for session in engine.model.sessions] == [False, True, False]
            assert (await second.verify([3], 0, [])).status == 404
            assert (await first.verify([3], 0, [])).status == 200
            assert "edgecloud_sessions 2.0" in await metrics(app)

    play(scene())


class Held:
    """Holds the engine's threads from the next call on, until let go."""

    def __init__(self, spy: Spy) -> None:
        self.at_work, self.go = 0, threading.Event()
        spy.before = self

    def __call__(self, call: str) -> None:
        self.at_work += 1
        assert self.go.wait(5)


def test_who_floods_keeps_nobody_else_waiting() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine, ServiceLimits(max_sessions=4)) as app:
            mine = [await Edge(app).opened() for _ in range(4)]
            before = len(engine.model.calls)
            held = Held(engine.model)
            flood = [asyncio.create_task(each.verify([3], 0, [])) for each in mine]
            flood += [asyncio.create_task(each.verify([3], 0, [])) for each in mine * 3]
            await until(lambda: held.at_work == 1)
            # a place is made for another, whose calls come next after the one that runs
            opening = asyncio.create_task(Edge(app, OTHER_KEY).opened())
            await asyncio.sleep(0.02)
            held.go.set()
            other = await opening
            # one call of the flood runs, and another after what is closed to make room
            assert engine.model.calls[before:].index("open") <= 2
            assert (await other.verify([3], 0, [1, 2])).status == 200
            statuses = [(await each).status for each in flood]
            assert statuses.count(404) == 3  # of the session that made room, and not the one that ran
            assert statuses.count(200) == 13

    play(scene())


def test_one_client_has_so_many_requests_at_once() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine, ServiceLimits(max_sessions=1)) as app:
            session = await Edge(app).opened()
            held = Held(engine.model)
            flood = [asyncio.create_task(session.verify([3], 0, [])) for _ in range(17)]
            await until(lambda: held.at_work == 1)
            assert (await session.verify([3], 0, [])).status == 429
            held.go.set()
            assert {(await each).status for each in flood} == {200}

    play(scene())


def test_a_session_at_work_on_all_its_own_is_not_thrown_out_by_its_owner() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine, ServiceLimits(max_sessions=1)) as app:
            session = await Edge(app).opened()
            held = Held(engine.model)
            working = asyncio.create_task(session.verify([3], 0, []))
            await until(lambda: held.at_work == 1)
            sent = wire.encode_prompt(PROMPT)
            refused = await Edge(app).ask("POST", opening(sent), sent, OCTETS)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            held.go.set()
            assert (await working).status == 200

    play(scene())


def test_a_call_that_waits_for_a_session_that_is_closed_is_told() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            session = await Edge(app).opened()
            held = Held(engine.model)
            running = asyncio.create_task(session.verify([3], 0, []))
            await until(lambda: held.at_work == 1)
            closing = asyncio.create_task(session.close())
            await asyncio.sleep(0)
            late = [
                asyncio.create_task(each) for each in (session.verify([3], 0, []), session.generate(2), session.close())
            ]
            await asyncio.sleep(0.01)
            held.go.set()
            assert (await running).status == 200
            assert (await closing).status == 204
            assert [(await each).status for each in late] == [404, 404, 404]

    play(scene())


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (LookupError("/secret/path"), 500, "internal error"),
        (MemoryError("/secret/path"), 503, "the model is out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. /secret/path"), 503, "the model is out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "the model is out of memory"),
        (FloatingPointError("the model gave logits that are not finite"), 422, "logits that are not finite"),
    ],
)
@pytest.mark.parametrize("call", ["open", "verify", "generate"])
def test_a_model_that_fails_takes_its_session_along_and_nothing_else(
    call: str, error: Exception, status: int, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(what: str) -> None:
        raise error

    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            other = await Edge(app, OTHER_KEY).opened()
            expected = (await other.verify([3], 0, [1])).json
            session = await Edge(app).opened()
            engine.model.before = fail
            sent = wire.encode_prompt(PROMPT)
            with caplog.at_level(logging.WARNING):
                if call == "open":
                    answer = await Edge(app).ask("POST", opening(sent), sent, OCTETS)
                else:
                    answer = await (session.verify([3], 0, [1]) if call == "verify" else session.generate(3))
            assert answer.status == status
            assert detail in answer.json["detail"]
            assert b"secret" not in answer.body
            assert ("retry-after" in answer.headers) == (status == 503)
            assert ("Traceback" in caplog.text) == (status == 500)
            engine.model.before = lambda call: None
            # half of a pass may be in its cache
            assert (await session.verify([3], 0, [1])).status == (200 if call == "open" else 404)
            assert (await other.verify([3], 0, [1])).json == expected
            assert f"edgecloud_sessions {2.0 if call == 'open' else 1.0}" in await metrics(app)
            assert f'status="{status}"' in await metrics(app)

    play(scene())


def test_a_stream_that_fails_in_the_middle_has_no_last_line() -> None:
    async def scene() -> None:
        for error in (MemoryError(), LookupError()):
            engine = SpyEngine()

            def fail(call: str, spy: Spy = engine.model, error: Exception = error) -> None:
                if len(spy.calls) == 4:
                    raise error

            engine.model.before = fail
            async with started(engine) as app:
                session = await Edge(app).opened()
                answer = await session.generate(9)
                assert (answer.status, ["token" in line for line in answer.lines]) == (200, [True, True])
                assert (await session.verify([3], 0, [])).status == 404

    play(scene())


def test_whoever_leaves_a_stream_leaves_its_session_as_it_should_be() -> None:
    async def scene() -> None:
        engine = SpyEngine()
        async with started(engine) as app:
            session = await Edge(app).opened()
            expected = (await session.verify([3], 0, [1, 2])).json

            async def leave(part: bytes) -> bool:
                await asyncio.sleep(0)
                return b"token" not in part

            assert len((await session.generate(2000, read=leave)).lines) < 50
            calls = len(engine.model.calls)
            assert (await session.verify([3], 0, [1, 2])).json == expected
            assert len(engine.model.calls) <= calls + 2  # nothing is written for nobody

    play(scene())


def test_a_stream_is_closed_when_it_is_left_and_not_when_nobody_remembers_it() -> None:
    async def scene() -> None:
        closed = []

        async def rest() -> AsyncGenerator[tuple[bytes, Completed[Any]], None]:
            try:
                while True:
                    yield b"line", Completed(1, 0.0, 0.0)
            finally:
                closed.append(True)

        async def receive() -> Any:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0.1)  # it is left while a line is on its way

        begun = rest()
        first, ran = await anext(begun)
        await Lines(first, ran, begun)({"type": "http"}, receive, send)
        assert closed

    play(scene())


def test_whoever_leaves_in_the_middle_of_a_pass_leaves_the_session_to_that_pass() -> None:
    """With room for two calls at once, the next call on a session must wait for the one nobody waits for any more."""

    async def scene() -> None:
        engine = SpyEngine(concurrency=2)
        async with started(engine) as app:
            session = await Edge(app).opened()
            expected = (await session.verify([3], 0, [1, 2])).json
            stay = [True]
            held = Held(engine.model)

            async def leave(part: bytes) -> bool:
                held.go.clear()
                stay.clear()
                return False

            held.go.set()
            left = asyncio.create_task(session.generate(2000, read=leave))
            await until(lambda: not stay)
            await left
            at_work = held.at_work
            verifying = asyncio.create_task(session.verify([3], 0, [1, 2]))
            await asyncio.sleep(0.03)
            assert held.at_work <= at_work + 1
            held.go.set()
            assert (await verifying).json == expected

    play(scene())


def test_nothing_else_is_there_and_nothing_upgrades() -> None:
    async def scene() -> None:
        async with started() as app:
            edge = Edge(app)
            for method, path, status in [
                ("GET", "/nothing", 404),
                ("GET", "/v1/sessions/", 404),  # no redirect to where a Host header says
                ("GET", "//evil.example/..", 404),
                ("GET", "/v1/sessions", 405),
                ("PUT", "/v1/model", 405),
                ("HEAD", "/health", 405),
                ("OPTIONS", "/v1/model", 405),
                ("BREW", "/v1/model", 405),
                ("GET", "/health", 200),
            ]:
                answer = await edge.ask(method, path)
                assert answer.status == status, (method, path)
                assert answer.status == 200 or answer.json in (
                    {"detail": "Not Found"},
                    {"detail": "Method Not Allowed"},
                )
            for name in ("no_key", KEY):
                sent: list[Any] = []

                async def send(message: Any, sent: list[Any] = sent) -> None:
                    sent.append(message)

                async def receive() -> Any:
                    return {"type": "websocket.connect"}

                headers = [(b"authorization", f"Bearer {name}".encode())]
                await app(
                    {"type": "websocket", "path": "/v1/model", "headers": headers, "query_string": b"", "app": app},
                    receive,
                    send,
                )
                assert [each["type"] for each in sent] == ["websocket.close"]

    play(scene())


def test_labels_are_few_whatever_is_asked() -> None:
    async def scene() -> None:
        async with started() as app:
            session = await Edge(app).opened()
            draft = [1, 2, 4]
            accepted = (await session.verify([3], 0, draft)).json["accepted"]
            for number in range(30):
                await Edge(app).ask(f"M{number}", f"/{number}")
                await Edge(app, f"wrong{number}").ask("GET", f"/{number}")
                await Opened(Edge(app), f"name{number}", PROMPT, 0).verify([3], 0, [])
            said = await metrics(app)
            calls = set(re.findall(r'call="(\w+)"', said))
            assert calls == {"open_prompt", "verify", "open", "other"}
            assert f"edgecloud_draft_tokens_total {len(draft)}.0" in said
            assert f"edgecloud_accepted_tokens_total {accepted}.0" in said
            assert 'edgecloud_requests_total{call="other",status="401"} 30.0' in said
            assert "process_resident_memory_bytes" in said
            assert session.name not in said

    play(scene())


def test_what_the_server_says_of_itself_is_its_identity() -> None:
    async def scene() -> None:
        engine = SpyEngine(name="toy")
        async with started(engine, ServiceLimits(max_audio_seconds=7)) as app:
            said = (await Edge(app).ask("GET", "/v1/model")).json
            assert said["fingerprint"] == engine.identity.fingerprint
            assert (said["name"], said["vocab_size"], said["max_audio_seconds"]) == ("toy", VOCABULARY, 7.0)
            assert said["traits"]["audio_token"] == AUDIO

    play(scene())


def test_the_document_tells_of_every_call_and_of_the_key() -> None:
    async def scene() -> None:
        async with started() as app:
            document = (await Edge(app).ask("GET", "/openapi.json")).json
            said = {f"{method} {path}" for path, calls in document["paths"].items() for method in calls}
            assert said == {
                "get /health",
                "get /metrics",
                "get /v1/model",
                "post /v1/sessions",
                "post /v1/sessions/{session}/verify",
                "post /v1/sessions/{session}/generate",
                "delete /v1/sessions/{session}",
            }
            assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
            assert document["security"] == [{"key": []}]
            assert document["paths"]["/health"]["get"]["security"] == []
            assert (await Edge(app).ask("GET", "/docs")).status == 200
            session = await Edge(app).opened()
            sent = wire.encode_prompt(PROMPT)
            opened = await Edge(app).ask("POST", opening(sent), sent, OCTETS)
            for name, answer in [("OpenedMessage", opened), ("VerdictMessage", await session.verify([3], 0, [1]))]:
                assert set(document["components"]["schemas"][name]["required"]) == set(answer.json)
        async with started(keys=()) as app:
            assert (await Edge(app, None).ask("GET", "/openapi.json")).json["security"] == []

    play(scene())
