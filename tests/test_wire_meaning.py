"""One meaning under a check: a message that was changed in any way is refused, or means what its sender meant."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import wire
from edgecloud_sd.acceptance import Rule, parse_rule
from edgecloud_sd.cloud.client import _parse_identity
from edgecloud_sd.cloud.failures import classify_failure
from edgecloud_sd.cloud.server import create_app
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.steps import Steps
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import Edge, run_scene
from tests.support.serving import ToyEngine

Fields = list[tuple[str, Any]]  # a JSON object or a query, in which a name may occur twice


def pick(draw: st.DrawFn, size: int) -> int:
    return draw(st.integers(0, size - 1))


def change_value(draw: st.DrawFn, value: Any) -> Any:
    """Return another value, near `value` or of another type."""
    if isinstance(value, bool) or value is None or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, True, 0, -1, 2**31, 2**64, 0.5, "", "0", [], [0], [[1]], {}]))
    if isinstance(value, int):
        return draw(st.sampled_from([value ^ 1 << draw(st.integers(0, 32)), value + 1, value - 1, float(value)]))
    if isinstance(value, float):
        return draw(st.sampled_from([value + 1, -value, int(value)]))
    if isinstance(value, dict):
        return {**value, draw(st.sampled_from([*value, "more"])): draw(st.sampled_from([0, "", []]))}
    if isinstance(value, str):
        place = pick(draw, len(value) + 1)
        return value[:place] + draw(st.sampled_from(["", "0", "x", "%"])) + value[place + draw(st.integers(0, 1)) :]
    ids = list(value)
    place = pick(draw, len(ids) + 1)
    return [*ids[:place], *draw(st.lists(st.integers(0, 6), max_size=2)), *ids[place + draw(st.integers(0, 2)) :]]


def moves(fields: Fields) -> Iterator[Fields]:
    """Yield the fields with some ids, or characters, of one field at an end of another."""
    for source, target in itertools.permutations(range(len(fields)), 2):
        (name, value), (other, receiver) = fields[source], fields[target]
        if not type(value) is type(receiver) in (list, str):
            continue
        for start, end in itertools.combinations(range(len(value) + 1), 2):
            for moved in (value[start:end] + receiver, receiver + value[start:end]):
                result = list(fields)
                result[source], result[target] = (name, value[:start] + value[end:]), (other, moved)
                yield result


def change_fields(draw: st.DrawFn, fields: Fields, others: Fields) -> None:
    """Change, move, duplicate, drop or swap once. `others` are the fields of another message of the kind."""
    place = pick(draw, len(fields)) if fields else None
    kind = draw(st.sampled_from(["change", "move", "move", "again", "drop", "swap", "splice", "shuffle", "rename"]))
    if place is None:
        return
    name, value = fields[place]
    if kind == "change":
        fields[place] = name, change_value(draw, value)
    elif kind == "move":
        fields[:] = draw(st.sampled_from([fields, *moves(fields)]))
    elif kind == "again":
        fields.insert(pick(draw, len(fields) + 1), (name, change_value(draw, value)))
    elif kind == "drop":
        del fields[place]
    elif kind == "swap":
        other = pick(draw, len(fields))
        (fields[place], fields[other]) = (name, fields[other][1]), (fields[other][0], value)
    elif kind == "splice":
        fields[place] = draw(st.sampled_from(others))
    elif kind == "rename":
        fields[place] = draw(st.sampled_from([*fields, ("more", 0)]))[0], value
    else:
        fields[:] = draw(st.permutations(fields))


@st.composite
def changed(draw: st.DrawFn, message: Fields, others: Fields) -> Fields:
    fields = list(message)
    for _ in range(draw(st.integers(1, 3))):
        change_fields(draw, fields, others)
    return fields


def to_json(fields: Fields) -> bytes:
    space = " " if len(fields) % 2 else ""
    return ("{" + ",".join(f"{json.dumps(name)}:{space}{json.dumps(value)}" for name, value in fields) + "}").encode()


def fields_of(message: wire.Message) -> Fields:
    return list(json.loads(wire.dumps(message)).items())


# The client's side


def read_identity(answer: bytes) -> object:
    try:
        return asdict(_parse_identity(answer))
    except (ValueError, KeyError, TypeError) as error:
        raise wire.WireError(str(error)) from None


def read_failure(status: int, retry_after: str) -> Callable[[bytes], object]:
    def read(answer: bytes) -> object:
        failure = classify_failure(status, answer, sent=7, headers={"retry-after": retry_after})
        if failure.kind == "retry":
            raise wire.WireError(failure.reason)
        return failure.kind

    return read


IDENTITY = ToyEngine().identity
IDENTITY_FIELDS = [*asdict(IDENTITY).items(), ("fingerprint", IDENTITY.fingerprint), ("check", IDENTITY.check)]
ANSWERS: dict[str, tuple[Fields, Fields, Callable[[bytes], object]]] = {  # its fields, another's, its reader
    "opened": (
        fields_of(wire.build_opened_message("a b", "c", 5)),
        fields_of(wire.build_opened_message("a", "b c", 6)),
        lambda answer: wire.read_opened(answer, 5),
    ),
    "verdict": (
        fields_of(wire.build_verdict_message(Verdict(1, 2), 5)),
        fields_of(wire.build_verdict_message(Verdict(2, 1), 6)),
        lambda answer: wire.read_verdict(answer, 3, 5),
    ),
    "verdict with a rest": (
        fields_of(wire.build_verdict_message(Verdict(1, 2, (4, 6, 4)), 5)),
        fields_of(wire.build_verdict_message(Verdict(2, 1, (6, 4)), 5)),
        lambda answer: wire.read_verdict(answer, 5, 5, wants_rest=True),
    ),
    "token": (
        fields_of(wire.build_token_line([4, 6, 2], 5)),
        fields_of(wire.build_token_line([4, 6], 5)),
        lambda answer: wire.read_stream_line(answer, [4, 6], 5),
    ),
    "end": (
        fields_of(wire.build_end_line([4, 6], 5)),
        fields_of(wire.build_token_line([4, 6, 2], 6)),
        lambda answer: wire.read_stream_line(answer, [4, 6], 5),
    ),
    "identity": (IDENTITY_FIELDS, [("vocab_size", 8), ("max_tokens", 9)], read_identity),
    "refusal": (
        fields_of(wire.build_refusal(422, "why", 7)),
        fields_of(wire.build_refusal(422, "why", 8)),
        read_failure(422, ""),
    ),
    "refusal without a body": (
        fields_of(wire.build_refusal(401, "key")),
        fields_of(wire.build_refusal(503, "memory", None, "1")),
        read_failure(401, ""),
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
@given(st.data())
def test_a_changed_answer_is_refused_or_means_the_same(kind: str, data: st.DataObject) -> None:
    fields, others, read = ANSWERS[kind]
    honest = read(to_json(fields))
    try:
        meaning = read(to_json(data.draw(changed(fields, others))))
    except wire.WireError:
        return
    assert meaning == honest


def test_no_other_verdict_is_read_under_the_check_of_a_verdict_with_a_rest() -> None:
    sent = Verdict(1, 2, (4, 6, 4))
    check, ids = wire.build_verdict_message(sent, 5).check, (2, 4, 6)
    rests = [rest for length in range(5) for rest in itertools.product(ids, repeat=length)]
    read = []
    for accepted, token, rest in itertools.product(range(4), ids, rests):
        with suppress(wire.WireError):
            answer = json.dumps({"accepted": accepted, "token": token, "rest": rest, "check": check}).encode()
            read.append(wire.read_verdict(answer, 5, 5, wants_rest=True))
    assert read == [sent]


@given(st.sampled_from([400, 401, 403, 404, 409, 413, 422, 501]), st.sampled_from([*range(200, 600)]))
def test_a_refusal_under_another_status_is_not_believed(status: int, other: int) -> None:
    answer = wire.dumps(wire.build_refusal(status, "why", 7))
    if other != status:
        assert classify_failure(other, answer, sent=7).kind == "retry"
    verdict = wire.dumps(wire.build_verdict_message(Verdict(1, 2), 5))
    assert classify_failure(other, verdict, sent=7).kind == "retry"


@given(st.floats(0, 9e9), st.floats(0, 9e9), st.data())
def test_changed_times_are_refused_or_the_same(queue: float, run: float, data: st.DataObject) -> None:
    header = wire.build_timing(queue, run, 5)
    wire.check_timing(header, 5)
    wire.check_timing(f"cdn;dur=3, {header.replace(',', ' , ')},edge;desc=x", 5)
    wire.check_timing("cdn;dur=3", 5)
    entries = [tuple(entry.split(";")) for entry in header.split(",")]
    fields: Fields = [(name, value) for name, value in entries]
    other = ",".join(f"{name};{value}" for name, value in data.draw(changed(fields, [("queue", "dur=7.000")])))
    kept = {"queue", "model", "check"} & {entry.partition(";")[0] for entry in other.split(",")}
    try:
        wire.check_timing(other, 5)
    except wire.WireError:
        return
    assert not kept or dict(entry.split(";") for entry in other.split(","))["model"] == fields[1][1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_lines_in_another_order_give_no_other_token(tokens: list[int], data: st.DataObject) -> None:
    lines = [wire.dumps(wire.build_token_line(tokens[: n + 1], 5)) for n in range(len(tokens))]
    lines.append(wire.dumps(wire.build_end_line(tokens, 5)))
    places = data.draw(st.lists(st.integers(0, len(tokens)), max_size=2 * len(lines)))
    generated: list[int] = []
    for line in (lines[place] for place in places):
        try:
            token = wire.read_stream_line(line, generated, 5)
        except wire.WireError:
            break
        if token is None:
            assert generated == tokens
            break
        generated.append(token)
    assert generated == tokens[: len(generated)]


def test_two_versions_of_the_messages_refuse_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = to_json(IDENTITY_FIELDS)
    read_identity(answer)
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    with pytest.raises(wire.WireError):
        read_identity(answer)


# The server's side


@dataclass
class RecordingEngine(ToyEngine):
    """An engine that records what it is told to do."""

    calls: list[object] = field(default_factory=list)

    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> Any:
        return SimpleNamespace(open_steps=lambda prompt: self.open_steps(prompt, rule, wants_rest))

    def open_steps(self, prompt: Prompt, rule: Rule, wants_rest: bool) -> Steps[Any]:
        start = (prompt.ids, rule.text, wants_rest)
        self.calls.append(("open", *start))
        verification: Any = yield from super().verifier(rule, wants_rest=wants_rest).open_steps(prompt)
        verify_steps, generate = verification.verify_steps, verification.generate

        def record_verify(base: int, tokens: Sequence[int], draft: Sequence[int]) -> Any:
            context = (*verification._session.tokens[:base], *tokens)
            self.calls.append(("verify", *start, context, tuple(draft)))
            return verify_steps(base, tokens, draft)

        def record_generate(stopping: Stopping, output: Sequence[int]) -> Any:
            self.calls.append(("generate", *start, stopping, tuple(output)))
            return generate(stopping, output)

        verification.verify_steps, verification.generate = record_verify, record_generate
        return verification


ENGINE = RecordingEngine()
EDGE = Edge(create_app(ENGINE), None)  # without keys, one client
PROMPT = Prompt((1, 2, 3))


@dataclass(frozen=True)
class Exchange:
    """A valid request, the fields of its message, what it makes the model do, and the answer."""

    path: str
    fields: Fields
    call: object
    answer: bytes
    wants_rest: bool


async def send(path: str, body: bytes, content_type: str = JSON) -> tuple[int, bytes, list[object]]:
    """Return the status, the body and what the request made the model do."""
    ENGINE.calls.clear()
    response = await EDGE.request("POST", path, body, content_type)
    assert response.status != 500
    return response.status, response.body, list(ENGINE.calls)


async def exchange(path: str, message: wire.Message, wants_rest: bool) -> Exchange:
    status, answer, (call,) = await send(path, wire.dumps(message))
    assert status == 200
    return Exchange(path, fields_of(message), call, answer, wants_rest)


def read_answer(one: Exchange, answer: bytes) -> object:
    """Return what a client reads in an answer to a request, or None if it refuses it."""
    fields = dict(one.fields)
    tokens: list[int] = []
    try:
        if "draft" in fields:
            return wire.read_verdict(answer, len(fields["draft"]), fields["check"], one.wants_rest)
        for line in answer.splitlines():
            token = wire.read_stream_line(line, tokens, fields["check"])
            tokens += [] if token is None else [token]
    except wire.WireError:
        return None
    return tokens


async def converse(ids: Sequence[int], rule: str, wants_rest: bool = False) -> list[Exchange]:
    """Return valid exchanges of one session, each kind of request twice."""
    session = await EDGE.open(Prompt(tuple(ids)), rule, wants_rest)
    check, verify, generate = session.prompt_check, f"{session.path}/verify", f"{session.path}/generate"
    context = [ids[-1], 4, 6, 1]
    return [
        await exchange(generate, wire.build_generate_request(check, [4], [6, 1], 3), wants_rest),
        await exchange(generate, wire.build_generate_request(check, [4, 6], [1], 3), wants_rest),
        await exchange(verify, wire.build_verify_request(check, context[:2], 0, [6, 1, 5]), wants_rest),
        await exchange(verify, wire.build_verify_request(check, context, 2, [1, 5]), wants_rest),
    ]


@given(st.integers(0, 3), st.data())
def test_a_changed_request_is_refused_or_does_the_same(place: int, data: st.DataObject) -> None:
    async def scene() -> None:
        exchanges = await converse([1, 2, 3], "greedy")
        one = exchanges[place]
        fields = data.draw(changed(one.fields, exchanges[place ^ 1].fields))
        status, _, calls = await send(one.path, to_json(fields))
        assert calls == ([one.call] if status == 200 else [])

    run_scene(scene())


def test_a_request_is_refused_if_ids_move_from_one_field_to_another() -> None:
    async def scene() -> None:
        for one in await converse([1, 2, 3], "greedy"):
            for moved in moves(one.fields):
                status, _, calls = await send(one.path, to_json(moved))
                assert (status, calls) == (409, [])

    run_scene(scene())


def test_whole_messages_of_other_requests_and_sessions_are_refused_or_mean_the_same() -> None:
    async def scene() -> None:
        prompts = [((1, 2, 3), "greedy", False), ((1, 2, 3), "greedy", False), ((2, 1, 3), "rank(2)", False)]
        prompts += [((1, 2, 3), "greedy", True)]
        exchanges = [one for ids, rule, wants_rest in prompts for one in await converse(ids, rule, wants_rest)]
        for one in exchanges:
            for other in exchanges:
                status, _, calls = await send(other.path, to_json(one.fields))
                assert calls == ([one.call] if status == 200 else [])
                assert read_answer(one, other.answer) in (None, read_answer(one, one.answer))

    run_scene(scene())


@given(st.data())
def test_a_changed_prompt_or_rule_is_refused_or_opens_the_same(data: st.DataObject) -> None:
    body, rule = wire.encode_prompt(PROMPT), data.draw(st.sampled_from(["greedy", "rank(1)", "rank(2)"]))
    wants_rest = data.draw(st.booleans())
    query = [("rule", rule), ("check", str(wire.prompt_checksum(body, rule, wants_rest)))]
    query = [*query, ("rest", "1")] if wants_rest else query
    others = [("rule", "rank(3)"), ("rule", "rank(1)"), ("check", "7"), ("rest", "1"), ("rest", "0")]
    fields = data.draw(changed(query, others))
    moved = data.draw(st.integers(0, 3))
    kind = data.draw(st.sampled_from(["none", "to the body", "from the body", "flip", "drop", "again"]))
    place = data.draw(st.integers(0, len(body) - 1))
    if kind == "to the body":
        fields, body = (
            [("rule", rule[:-moved] if moved else rule), *query[1:]],
            rule[len(rule) - moved :].encode() + body,
        )
    elif kind == "from the body":
        fields, body = [("rule", rule + body[:moved].decode("latin-1")), *query[1:]], body[moved:]
    elif kind != "none":
        flipped = {"flip": bytes([body[place] ^ 1]), "drop": b"", "again": body[place : place + 1] * 2}[kind]
        body = body[:place] + flipped + body[place + 1 :]

    async def scene() -> None:
        status, _, calls = await send(f"/v1/sessions?{urlencode(fields)}", body, OCTETS)
        assert calls == ([("open", PROMPT.ids, parse_rule(rule).text, wants_rest)] if status == 201 else [])
        assert status == 422 or body == wire.encode_prompt(PROMPT)

    run_scene(scene())


def test_a_prompt_opens_only_if_its_check_is_for_the_rest_that_its_query_asks_for() -> None:
    async def scene() -> None:
        body, queries = wire.encode_prompt(PROMPT), {"": False, "&rest=0": False, "&rest=1": True, "&rest=2": None}
        for (query, asked), wants_rest in itertools.product(queries.items(), (False, True)):
            check = wire.prompt_checksum(body, "greedy", wants_rest)
            status, _, calls = await send(f"/v1/sessions?rule=greedy{query}&check={check}", body, OCTETS)
            is_opened = asked is wants_rest
            assert (status, calls) == ((201, [("open", PROMPT.ids, "greedy", asked)]) if is_opened else (422, []))

    run_scene(scene())


# The check itself


@given(
    st.lists(st.integers(0, 3) | st.text(max_size=3) | st.binary(max_size=3) | st.lists(st.integers(0, 2), max_size=3))
)
def test_no_two_lists_of_fields_have_the_same_check(values: list[Any]) -> None:
    check = wire.checksum("kind", *values)
    assert check != wire.checksum("kin", "d", *values)
    assert check != wire.checksum("kind", *values, [])
    for place, value in enumerate(values):
        assert check != wire.checksum("kind", *values[:place], *values[place + 1 :])
        if isinstance(value, list):
            assert check != wire.checksum("kind", *values[:place], *value, *values[place + 1 :])
        if isinstance(value, str):
            assert check != wire.checksum("kind", *values[:place], value.encode(), *values[place + 1 :])


def test_the_examples_of_the_guide_have_the_checks_of_their_messages() -> None:
    guide = (Path(wire.__file__).parent / "cloud" / "README.md").read_text("utf-8")
    check = int(re.findall(r"/v1/sessions\?rule=greedy&check=(\d+)", guide)[0])
    assert check == wire.prompt_checksum(wire.encode_prompt(Prompt((1, 2, 3))), "greedy")
    opened, verify, verdict, generate = re.findall(r"`(\{.*?\"check\":\d+\})`", guide)[:4]
    lines = re.findall(r"^\{.*\}$", guide, re.MULTILINE)
    wire.read_opened(opened.encode(), check)
    request = json.loads(verify)
    assert verify == wire.dumps(wire.build_verify_request(check, request["tokens"], 0, request["draft"])).decode()
    wire.read_verdict(verdict.encode(), len(request["draft"]), request["check"])
    asking = wire.prompt_checksum(wire.encode_prompt(Prompt((1, 2, 3))), "greedy", wants_rest=True)
    asked = wire.build_verify_request(asking, request["tokens"], 0, request["draft"])
    with_rest = re.findall(r"`(\{[^`]*\"rest\"[^`]*\})`", guide)[0]
    assert wire.read_verdict(with_rest.encode(), len(asked.draft), asked.check, wants_rest=True).rest
    request = json.loads(generate)
    assert generate == wire.dumps(wire.build_generate_request(check, [], request["eos"], 3)).decode()
    tokens: list[int] = []
    for line in lines:
        token = wire.read_stream_line(line.encode(), tokens, request["check"])
        tokens += [] if token is None else [token]
    assert len(tokens) == len(lines) - 1 == 3
