"""What crosses between edge and cloud: what it says, how large it is, and that nothing else passes for it."""

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
from edgecloud_sd.verifier import prompt_seed as seed_of
from edgecloud_sd.wire import JSON, OCTETS
from tests.support.asgi import KEY
from tests.support.serving import ToyEngine, served

ids = st.lists(st.integers(0, 2**31 - 1), max_size=8)
checks = st.integers(0, 2**32 - 1)


@given(ids.filter(bool), st.none() | st.tuples(st.integers(1, 4), st.integers(1, 5)), st.integers(0, 9))
def test_a_prompt_arrives_as_it_was_sent_in_half_precision(
    sent: list[int], shape: tuple[int, int] | None, seed: int
) -> None:
    features = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    body = wire.encode_prompt(Prompt(tuple(sent), features))
    arrived = wire.decode_prompt(body)
    assert arrived.ids == tuple(sent)
    assert len(body) <= 8 + 200 + 4 * len(sent) + (0 if features is None else 2 * features.numel())
    assert seed_of(arrived) == seed_of(Prompt(tuple(sent), features))
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
    "nothing": b"",
    "a length alone": struct.pack("<Q", 2**63),
    "a header of all memory": struct.pack("<Q", 2**64 - 1) + b"{}",
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
    "a number beyond all": packed(
        b'{"ids":{"dtype":"I32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 500), bytes(8)
    ),
    "a shape of nothing": packed({"ids": tensor("I32", [], 0, 4)}, bytes(4)),
    "many dimensions": packed({"ids": tensor("I32", [2] + [1] * 200, 0, 8)}, bytes(8)),
    "BF16": packed({"ids": IDS, "features": tensor("BF16", [2, 2], 8, 16)}, bytes(16)),
    "F8": packed({"ids": IDS, "features": tensor("F8_E4M3", [2, 2], 8, 12)}, bytes(12)),
    "F4": packed({"ids": IDS, "features": tensor("F4", [2, 2], 8, 10)}, bytes(10)),
    "complex": packed({"ids": IDS, "features": tensor("C64", [1, 1], 8, 16)}, bytes(16)),
    "no such dtype": packed({"ids": tensor("O", [2], 0, 8)}, bytes(8)),
    "a dtype of another kind": packed({"ids": tensor("I32", [2], 0, 8) | {"dtype": 7}}, bytes(8)),
    "unsigned": packed({"ids": tensor("U32", [2], 0, 8)}, bytes(8)),
    "floats": packed({"ids": tensor("F32", [2], 0, 8)}, bytes(8)),
    "no ids": packed({"features": tensor("F16", [2, 2], 0, 8)}, bytes(8)),
    "something else": packed({"ids": IDS, "logits": tensor("F16", [1], 8, 10)}, bytes(10)),
    "metadata that are none": packed({"__metadata__": {"a": 1}, "ids": IDS}, bytes(8)),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_prompt_is_refused(body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_prompt(body)


@given(st.binary(max_size=300), st.data())
def test_no_bytes_do_worse_than_that(junk: bytes, data: st.DataObject) -> None:
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
def test_an_answer_is_read_as_it_was_given_and_no_other_passes_for_it(
    context: list[int], draft: list[int], begun: int, data: st.DataObject
) -> None:
    asked = wire.to_verify(begun, context, data.draw(st.integers(0, len(context))), draft)["check"]
    given = Verdict(data.draw(st.integers(0, len(draft))), data.draw(st.integers(0, 2**31 - 1)))
    message = wire.verdict(given, asked)
    assert wire.read_verdict(wire.dumps(message), len(draft), asked) == given
    field = data.draw(st.sampled_from(sorted(message)))
    changed = data.draw(st.integers(-1, 2**32) | st.none() | st.text(max_size=3) | st.floats() | st.booleans())
    other = message | {field: changed}
    if type(changed) is int and changed == message[field]:
        return
    for wrong in (other, {name: message[name] for name in message if name != field}, message | {"more": 1}):
        with pytest.raises(wire.WireError):
            wire.read_verdict(wire.dumps(wrong), len(draft), asked)
    beyond = wire.verdict(Verdict(len(draft) + 1, given.token), asked)
    for wrong, check in ((message, asked ^ 1), (beyond, asked)):
        with pytest.raises(wire.WireError):
            wire.read_verdict(wire.dumps(wrong), len(draft), check)


@given(ids.filter(bool), checks, st.data())
def test_a_stream_is_read_to_its_end_and_no_line_is_lost_doubled_or_swapped(
    output: list[int], asked: int, data: st.DataObject
) -> None:
    lines = [wire.dumps(wire.written(output[: n + 1], asked)) for n in range(len(output))]
    for n, line in enumerate(lines):
        assert wire.read_written(line, output[:n], asked) == output[n]
    last = wire.dumps(wire.ended(output, asked))
    assert wire.read_written(last, output, asked) is None
    at = data.draw(st.integers(0, len(output) - 1))
    for line in (last, *(lines[n] for n in range(len(output)) if n != at)):
        with pytest.raises(wire.WireError):
            wire.read_written(line, output[:at], asked)
    with pytest.raises(wire.WireError):
        wire.read_written(lines[at], output[:at], asked ^ 1)


@pytest.mark.parametrize("answer", [b"", b"[]", b"\xff", b"[" * 10_000, b'{"token":1}', b"9" * 5000])
def test_an_answer_that_is_no_message_is_told(answer: bytes) -> None:
    readers: list[Callable[[], object]] = [
        lambda: wire.read_verdict(answer, 1, 1),
        lambda: wire.read_written(answer, [], 1),
        lambda: wire.read_opened(answer, 1),
    ]
    for read in readers:
        with pytest.raises(wire.WireError):
            read()


def test_an_opening_is_of_the_prompt_that_was_sent() -> None:
    message = wire.opened("name", "model", 5)
    assert wire.read_opened(wire.dumps(message), 5) == ("name", "model")
    for wrong in (message | {"session": "other"}, message | {"model": "other"}, message | {"session": 1}):
        with pytest.raises(wire.WireError):
            wire.read_opened(wire.dumps(wrong), 5)
    with pytest.raises(wire.WireError):
        wire.read_opened(wire.dumps(message), 6)


class Tap:
    """Relays one connection to a server, and keeps what went each way."""

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
            ways = {near: (far, self.up), far: (near, self.down)}
            while True:
                for ready in select.select(list(ways), [], [])[0]:
                    to, kept = ways[ready]
                    data = ready.recv(65536)
                    if not data:
                        return
                    kept += data  # before it goes on, so that whoever has the answer finds it counted
                    to.sendall(data)

    def taken(self) -> tuple[int, int]:
        """Bytes up and down since the last time."""
        sizes = len(self.up), len(self.down)
        self.up.clear()
        self.down.clear()
        return sizes

    def close(self) -> None:
        self._listening.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@contextmanager
def tapped() -> Iterator[tuple[Tap, Connection]]:
    with served(ToyEngine(), keys=(KEY,)) as url:
        tap = Tap(int(url.rpartition(":")[2]))
        connection = Connection(tap.url, KEY)
        try:
            yield tap, connection
        finally:
            connection.close()
            tap.close()


def test_a_message_is_as_large_as_is_said() -> None:
    """Head and body together, on a real connection: within 5 % of what the link is charged with."""
    prompt = Prompt((1, 2, 3))
    body = wire.encode_prompt(prompt)
    begun = wire.prompt_checksum(body, "rank(7)")
    with tapped() as (tap, connection):
        answer = connection.call("POST", f"/v1/sessions?rule=rank(7)&check={begun}", body, OCTETS)
        up, down = tap.taken()
        assert up == pytest.approx(wire.REQUEST_HEAD + len(body), rel=0.05)
        assert down == pytest.approx(wire.ANSWER_HEAD + len(answer.content), rel=0.05)
        path = f"/v1/sessions/{json.loads(answer.content)['session']}"
        for draft in ([], [1, 2, 3], [1] * 40):
            request = wire.dumps(wire.to_verify(begun, [3], 0, draft))
            answer = connection.call("POST", f"{path}/verify", request, JSON)
            up, down = tap.taken()
            assert up == pytest.approx(wire.REQUEST_HEAD + len(request), rel=0.05)
            assert down == pytest.approx(wire.ANSWER_HEAD + len(answer.content), rel=0.05)
        request = wire.dumps(wire.to_generate(begun, [], (), 20))
        with connection.stream(f"{path}/generate", request) as (_, stream):
            lines = [len(line) + 1 for line in stream]
        up, down = tap.taken()
        assert up == pytest.approx(wire.REQUEST_HEAD + len(request), rel=0.05)
        assert down == pytest.approx(wire.ANSWER_HEAD + sum(wire.CHUNK_HEAD + line for line in lines), rel=0.05)


def test_neither_sound_nor_logits_cross() -> None:
    """All that goes up for a spoken prompt is its ids, its spectrogram in two bytes a value, and a few names."""
    features = torch.randn(128, 300)
    body = wire.encode_prompt(Prompt(tuple(range(100)), features))
    assert len(body) - (4 * 100 + 2 * features.numel()) < 200
    size = struct.unpack("<Q", body[:8])[0]
    header = json.loads(body[8 : 8 + size])
    assert {name: (each["dtype"], each["shape"]) for name, each in header.items()} == {
        "ids": ("I32", [100]),
        "features": ("F16", [128, 300]),
    }
    assert body.endswith(np.arange(100, dtype="<i4").tobytes()) or features.half().numpy().tobytes() in body
