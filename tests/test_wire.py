"""The messages between edge and cloud: contents, sizes, and the refusal of all other bytes."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import wire
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.verifier import prompt_seed
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import KEY
from tests.support.serving import ToyEngine, served

token_ids = st.integers(0, 2**31 - 1)
ids = st.lists(token_ids, max_size=8)
checks = st.integers(0, 2**32 - 1)


@given(ids.filter(bool), st.none() | st.tuples(st.integers(1, 4), st.integers(1, 5)), st.integers(0, 9))
def test_a_prompt_survives_encoding_with_its_features_in_half_precision(
    prompt_ids: list[int], shape: tuple[int, int] | None, seed: int
) -> None:
    features = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    body = wire.encode_prompt(Prompt(tuple(prompt_ids), features))
    arrived = wire.decode_prompt(body)
    assert arrived.ids == tuple(prompt_ids)
    assert len(body) <= 8 + 200 + 4 * len(prompt_ids) + (0 if features is None else 2 * features.numel())
    assert prompt_seed(arrived) == prompt_seed(Prompt(tuple(prompt_ids), features))
    if features is None:
        assert arrived.features is None
    else:
        assert arrived.features is not None
        assert arrived.features.dtype == torch.float32
        assert torch.equal(arrived.features, features.half().float())


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


IDS = tensor("I32", [2], 0, 8)
HOSTILE = {
    "empty": b"",
    "a length alone": struct.pack("<Q", 2**63),
    "a header of 16 EiB": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header longer than the body": struct.pack("<Q", 1000) + b"{}",
    "a long header": packed(b"{" + b" " * 2000 + b"}"),
    "very many tensors": packed({f"t{n}": tensor("U8", [0], 0, 0) for n in range(50_000)}),
    "no JSON": packed(b"\xff\xfe"),
    "no object": packed([]),
    "deep": packed(b"[" * 1000),
    "no tensor": packed({"ids": 1}),
    "no offsets": packed({"ids": {"dtype": "I32", "shape": [2]}}, bytes(8)),
    "no data": packed({"ids": IDS}),
    "more data": packed({"ids": IDS}, bytes(9)),
    "a hole": packed({"ids": tensor("I32", [2], 4, 12)}, bytes(12)),
    "overlap": packed({"ids": IDS, "features": tensor("F16", [2, 2], 4, 12)}, bytes(12)),
    "backwards": packed({"ids": tensor("I32", [2], 8, 0)}, bytes(8)),
    "negative": packed({"ids": tensor("I32", [-2], 0, 8)}, bytes(8)),
    "a shape that overflows": packed({"ids": tensor("I32", [2**62, 8], 0, 8)}, bytes(8)),
    "a number of 500 digits": packed(
        b'{"ids":{"dtype":"I32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 500), bytes(8)
    ),
    "no dimension": packed({"ids": tensor("I32", [], 0, 4)}, bytes(4)),
    "many dimensions": packed({"ids": tensor("I32", [2] + [1] * 200, 0, 8)}, bytes(8)),
    "BF16": packed({"ids": IDS, "features": tensor("BF16", [2, 2], 8, 16)}, bytes(16)),
    "F8": packed({"ids": IDS, "features": tensor("F8_E4M3", [2, 2], 8, 12)}, bytes(12)),
    "F4": packed({"ids": IDS, "features": tensor("F4", [2, 2], 8, 10)}, bytes(10)),
    "complex": packed({"ids": IDS, "features": tensor("C64", [1, 1], 8, 16)}, bytes(16)),
    "unknown dtype": packed({"ids": tensor("O", [2], 0, 8)}, bytes(8)),
    "a dtype of another kind": packed({"ids": tensor("I32", [2], 0, 8) | {"dtype": 7}}, bytes(8)),
    "unsigned": packed({"ids": tensor("U32", [2], 0, 8)}, bytes(8)),
    "floats": packed({"ids": tensor("F32", [2], 0, 8)}, bytes(8)),
    "no ids": packed({"features": tensor("F16", [2, 2], 0, 8)}, bytes(8)),
    "another tensor": packed({"ids": IDS, "logits": tensor("F16", [1], 8, 10)}, bytes(10)),
    "metadata of another type": packed({"__metadata__": {"a": 1}, "ids": IDS}, bytes(8)),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_prompt_is_refused(body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_prompt(body)


@given(st.binary(max_size=300), st.data())
def test_random_bytes_are_refused_or_decode_to_a_valid_prompt(junk: bytes, data: st.DataObject) -> None:
    whole = wire.encode_prompt(Prompt((1, 2, 3), torch.zeros(2, 3)))
    start = data.draw(st.integers(0, len(whole)))
    for body in (junk, packed(junk), whole[:start] + junk + whole[start + len(junk) :]):
        try:
            prompt = wire.decode_prompt(body)
        except wire.WireError:
            continue
        assert prompt.ids
        assert prompt.features is None or bool(prompt.features.isfinite().all())


@given(ids, ids, checks, st.data())
def test_a_verdict_is_read_back_and_any_altered_answer_is_refused(
    context: list[int], draft: list[int], prompt_check: int, data: st.DataObject
) -> None:
    base, wants_rest = data.draw(st.integers(0, len(context))), data.draw(st.booleans())
    check = wire.build_verify_request(prompt_check, context, base, draft).check
    accepted, token = data.draw(st.integers(0, len(draft))), data.draw(st.integers(0, 2**31 - 1))
    verdict = Verdict(accepted, token, tuple(draft[accepted + 1 :]) if wants_rest else ())
    answer = wire.dumps(wire.build_verdict_message(verdict, check))
    assert wire.read_verdict(answer, len(draft), check, wants_rest) == verdict
    assert (b'"rest"' in answer) == bool(verdict.rest)
    message = json.loads(answer)
    field = data.draw(st.sampled_from([*sorted(message), "rest"]))
    number = st.integers(-1, 2**32) | st.floats()
    changed = data.draw(number | st.none() | st.text(max_size=3) | st.booleans() | st.lists(token_ids, max_size=4))
    if type(changed) is type(message.get(field, [])) and changed == message.get(field, []):
        return
    without = {name: message[name] for name in message if name != field}
    for altered in (message | {field: changed}, message | {"more": 1}, *[without] * (field in message)):
        with pytest.raises(wire.WireError):
            wire.read_verdict(json.dumps(altered).encode(), len(draft), check, wants_rest)
    with pytest.raises(wire.WireError):
        wire.read_verdict(answer, len(draft), check ^ 1, wants_rest)
    longer, shorter = Verdict(accepted, token, (*verdict.rest, 1)), Verdict(accepted, token, verdict.rest[1:])
    for impossible in (longer, *[shorter] * bool(verdict.rest), Verdict(len(draft) + 1, token)):
        answer = wire.dumps(wire.build_verdict_message(impossible, check))
        with pytest.raises(wire.WireError):
            wire.read_verdict(answer, len(draft), check, wants_rest)


@given(ids.filter(bool), checks, st.data())
def test_a_stream_is_read_to_its_end_and_a_line_out_of_order_is_refused(
    output: list[int], check: int, data: st.DataObject
) -> None:
    lines = [wire.dumps(wire.build_token_line(output[: n + 1], check)) for n in range(len(output))]
    for n, line in enumerate(lines):
        assert wire.read_stream_line(line, output[:n], check) == output[n]
    last = wire.dumps(wire.build_end_line(output, check))
    assert wire.read_stream_line(last, output, check) is None
    at = data.draw(st.integers(0, len(output) - 1))
    for line in (last, *(lines[n] for n in range(len(output)) if n != at)):
        with pytest.raises(wire.WireError):
            wire.read_stream_line(line, output[:at], check)
    with pytest.raises(wire.WireError):
        wire.read_stream_line(lines[at], output[:at], check ^ 1)


@pytest.mark.parametrize("answer", [b"", b"[]", b"\xff", b"[" * 10_000, b'{"token":1}', b"9" * 5000])
def test_an_answer_of_another_shape_is_refused(answer: bytes) -> None:
    readers: list[Callable[[], object]] = [
        lambda: wire.read_verdict(answer, 1, 1),
        lambda: wire.read_stream_line(answer, [], 1),
        lambda: wire.read_opened(answer, 1),
    ]
    for read in readers:
        with pytest.raises(wire.WireError):
            read()


def test_the_answer_to_another_prompt_is_refused() -> None:
    answer = wire.dumps(wire.build_opened_message("name", "model", 5))
    assert wire.read_opened(answer, 5) == ("name", "model")
    for change in ({"session": "other"}, {"model": "other"}, {"session": 1}):
        with pytest.raises(wire.WireError):
            wire.read_opened(json.dumps(json.loads(answer) | change).encode(), 5)
    with pytest.raises(wire.WireError):
        wire.read_opened(answer, 6)


def test_messages_are_json_without_spaces_and_their_fields_in_order() -> None:
    messages: list[wire.Message] = [
        wire.build_opened_message("name", "model", 5),
        wire.build_verify_request(1, [3, 4, 5], 1, [6]),
        wire.build_verdict_message(Verdict(1, 2), 3),
        wire.build_verdict_message(Verdict(1, 2, (4, 5)), 3),
        wire.build_generate_request(1, [7], {9, 8}, 4),
        wire.build_token_line([5, 6], 1),
        wire.build_end_line([5, 6], 1),
        wire.build_refusal(422, "why"),
        wire.build_refusal(422, "why", 0),
    ]
    checks = [message.check for message in messages]
    assert [wire.dumps(message).decode() for message in messages] == [
        f'{{"session":"name","model":"model","check":{checks[0]}}}',
        f'{{"base":1,"tokens":[4,5],"draft":[6],"check":{checks[1]}}}',
        f'{{"accepted":1,"token":2,"check":{checks[2]}}}',
        f'{{"accepted":1,"token":2,"rest":[4,5],"check":{checks[3]}}}',
        f'{{"output":[7],"eos":[8,9],"max_new_tokens":4,"check":{checks[4]}}}',
        f'{{"token":6,"check":{checks[5]}}}',
        f'{{"end":2,"check":{checks[6]}}}',
        f'{{"detail":"why","check":{checks[7]}}}',
        f'{{"detail":"why","received":0,"check":{checks[8]}}}',
    ]
    assert len(set(checks)) == len(checks)


class Tap:
    """A relay of one connection to a server that records the bytes of both directions."""

    def __init__(self, port: int) -> None:
        self.up, self.down = bytearray(), bytearray()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._port = port
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        near, _ = self._listening.accept()
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            directions = {near: (far, self.up), far: (near, self.down)}
            while True:
                for ready in select.select(list(directions), [], [])[0]:
                    receiver, record = directions[ready]
                    data = ready.recv(65536)
                    if not data:
                        return
                    record += data  # before the bytes are sent on, so that a client that has its answer finds them here
                    receiver.sendall(data)

    def take_sizes(self) -> tuple[int, int]:
        """Return the bytes up and down since the last call."""
        sizes = len(self.up), len(self.down)
        self.up.clear()
        self.down.clear()
        return sizes

    def close(self) -> None:
        self._listening.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@contextmanager
def tapped_connection() -> Iterator[tuple[Tap, Connection]]:
    with served(ToyEngine(), keys=(KEY,)) as url:
        tap = Tap(int(url.rpartition(":")[2]))
        connection = Connection(tap.url, KEY)
        try:
            yield tap, connection
        finally:
            connection.close()
            tap.close()


def test_the_sizes_charged_to_a_link_are_within_5_percent_of_the_bytes_on_a_socket() -> None:
    prompt = Prompt((1, 2, 3) * 9)
    body = wire.encode_prompt(prompt)
    prompt_check = wire.prompt_checksum(body, "rank(7)", wants_rest=True)
    with tapped_connection() as (tap, connection):
        answer = connection.transport.call(
            "POST", f"/v1/sessions?rule=rank(7)&rest=1&check={prompt_check}", body, OCTETS
        )
        up, down = tap.take_sizes()
        assert up == pytest.approx(wire.REQUEST_HEAD + len(body), rel=0.05)
        assert down == pytest.approx(wire.ANSWER_HEAD + len(answer.content), rel=0.05)
        path = f"/v1/sessions/{json.loads(answer.content)['session']}"
        for draft in ([], [1, 2, 3], [1] * 40):
            request = wire.dumps(wire.build_verify_request(prompt_check, [3], 0, draft))
            answer = connection.transport.call("POST", f"{path}/verify", request, JSON)
            up, down = tap.take_sizes()
            assert up == pytest.approx(wire.REQUEST_HEAD + len(request), rel=0.05)
            assert down == pytest.approx(wire.ANSWER_HEAD + len(answer.content), rel=0.05)
        request = wire.dumps(wire.build_generate_request(prompt_check, [], (), 20))
        with connection.transport.stream(f"{path}/generate", request, lambda: 10.0) as (_, stream):
            lines = [len(line) + 1 for line in stream]
        up, down = tap.take_sizes()
        assert up == pytest.approx(wire.REQUEST_HEAD + len(request), rel=0.05)
        assert down == pytest.approx(wire.ANSWER_HEAD + sum(wire.CHUNK_HEAD + line for line in lines), rel=0.05)


def test_a_prompt_body_is_its_ids_its_spectrogram_and_a_short_header() -> None:
    features = torch.randn(128, 300)
    body = wire.encode_prompt(Prompt(tuple(range(100)), features))
    assert len(body) - (4 * 100 + 2 * features.numel()) < 200
    size = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + size])
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "ids": ("I32", [100]),
        "features": ("F16", [128, 300]),
    }
    assert body.endswith(np.arange(100, dtype="<i4").tobytes()) or features.half().numpy().tobytes() in body
