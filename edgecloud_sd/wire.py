"""The messages between edge and cloud, as bytes, and their sizes.

A prompt is sent as a safetensors body: ids in int32, the log-mel spectrogram in half precision. All other messages are
JSON: token ids and a few integers. Raw audio and logits are never sent.

Every message has a check: a CRC-32 over its kind and over all of its fields, each with its type and its length. So a
value that moves from one field to another changes the check. The check of a request continues that of its prompt, and
the check of an answer continues that of its request. A repeated, stale, misdirected or damaged message has another
check than the receiver expects. A CRC-32 exposes faults, and proxies that edit messages. It is no protection
against an attacker, who can compute it; TLS is. The identity in `/v1/model` has a longer digest, and a request that
closes a session has none, because the 128 random bits of the name are enough.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecloud_sd.events import Prompt, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

OCTETS, JSON, LINES = "application/octet-stream", "application/json", "application/x-ndjson"  # media types
VERSION = 3  # every check and the identity of a server depend on it, so that two versions never mix
MAX_IDS = 32_768  # in one list of a message: the maximum length of the published models
MAX_DRAFT = 256  # tokens of one draft: more than any k that pays, and few enough to verify between others' calls
MAX_HEADER = 1024  # bytes of the safetensors header of a prompt

# Bytes of HTTP around a message on an open connection: the request line or status, and the headers that client and
# server send. `tests/test_wire.py` counts them on a socket. They exclude the bytes of TCP, IP and TLS.
REQUEST_HEAD = 202
ANSWER_HEAD = 142
CHUNK_HEAD = 6  # around each line of a streamed answer

# Mean sizes in bytes, for a forecast, which has no message to measure.
ID_BYTES = 7  # an id and its comma in JSON: most ids of a vocabulary of 150,000 have six digits
VERDICT_BYTES = ANSWER_HEAD + 48
LINE_BYTES = CHUNK_HEAD + 36


class WireError(ValueError):
    """A malformed or unexpected message. The text is a predicate, such as "is not JSON", for the caller's sentence."""


@dataclass(frozen=True)
class OpenedMessage:
    """Answer to a prompt: the name of the new session, and the fingerprint of the model that serves it."""

    session: str
    model: str
    check: int


@dataclass(frozen=True)
class VerifyRequest:
    """Request to verify `draft` after a context.

    The cloud already has the first `base` tokens of the context; `tokens` are the rest.
    """

    base: int
    tokens: tuple[int, ...]
    draft: tuple[int, ...]
    check: int


@dataclass(frozen=True)
class VerdictMessage:
    """Answer to a verify request: the count of accepted draft tokens, and the target model's next token.

    `rest` has the opinions on the later draft tokens. It is None if there are none, or if the prompt was opened
    without asking for them.
    """

    accepted: int
    token: int
    rest: tuple[int, ...] | None
    check: int


@dataclass(frozen=True)
class GenerateRequest:
    """Request for the target model's own tokens after `output`, up to an id of `eos` or `max_new_tokens` in all."""

    output: tuple[int, ...]
    eos: tuple[int, ...]
    max_new_tokens: int
    check: int


@dataclass(frozen=True)
class TokenLine:
    """A line of the stream that answers a generate request: the next token."""

    token: int
    check: int


@dataclass(frozen=True)
class EndLine:
    """The last line of a stream: the count of tokens before it."""

    end: int
    check: int


@dataclass(frozen=True)
class RefusalMessage:
    """The answer to a refused request: the reason, and the check of the request that arrived, or None before a body."""

    detail: str
    received: int | None
    check: int


Message = OpenedMessage | VerifyRequest | VerdictMessage | GenerateRequest | TokenLine | EndLine | RefusalMessage
Field = int | str | bytes | Sequence[int]  # a value of a message


def dumps(message: Message) -> bytes:
    """Return a message as JSON without spaces, its fields in order, without those that are None."""
    fields = {name: value for name, value in vars(message).items() if value is not None}
    return json.dumps(fields, separators=(",", ":")).encode()


def verify_size(fed: float) -> float:
    """Return the approximate bytes of a verify request that sends `fed` ids, committed tokens and draft together."""
    return REQUEST_HEAD + 56 + ID_BYTES * fed


def checksum(kind: str, *values: Field, after: int = VERSION) -> int:
    """Return the check of a message of this kind with these fields, continued from the check `after`."""
    check = after
    for value in (kind, *values):
        tag, data = _encode_field(value)
        check = zlib.crc32(data, zlib.crc32(struct.pack("<cQ", tag, len(data)), check))
    return check


def _encode_field(value: Field) -> tuple[bytes, bytes]:
    if isinstance(value, str):
        return b"s", value.encode(errors="surrogatepass")
    if isinstance(value, bytes):
        return b"b", value
    if isinstance(value, int):
        return b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"l", np.fromiter(value, dtype="<i4").tobytes()


def prompt_checksum(body: bytes, rule: str, wants_rest: bool = False) -> int:
    """Return the check of a prompt: its body, the text of its acceptance rule, and if its verdicts have a rest.

    All later checks start from it.
    """
    return checksum("prompt", rule, wants_rest, body)


def request_checksum(method: str, path: str, query: bytes, media_type: bytes, body: bytes) -> int:
    """Return the check of a request. A refusal repeats it, so that the client sees what arrived."""
    return checksum("request", method, path, query, media_type, body)


def verify_checksum(prompt_check: int, context: Sequence[int], base: int, draft: Sequence[int]) -> int:
    """Return the check of the request to verify `draft` after `context`, of which the receiver has `base` tokens."""
    return checksum("verify", base, context, draft, after=prompt_check)


def generate_checksum(prompt_check: int, output: Sequence[int], eos: Sequence[int], max_new_tokens: int) -> int:
    """Return the check of the request for the target model's own tokens after `output`."""
    return checksum("generate", output, eos, max_new_tokens, after=prompt_check)


def encode_prompt(prompt: Prompt) -> bytes:
    """Return a safetensors body: `ids` int32 [n] and, if there is audio, `features` float16 [mel bins, frames]."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {"ids": np.asarray(prompt.ids, dtype=np.int32)}
    if prompt.features is not None:
        tensors["features"] = prompt.features.numpy().astype(np.float16)
    return save(tensors)


def decode_prompt(body: bytes) -> Prompt:
    """Return the prompt of an `encode_prompt` body, with its features in float32. Raise WireError for other bytes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if int.from_bytes(body[:8], "little") > MAX_HEADER:  # a longer one could list tens of thousands of tensors
        raise WireError("has a header that is longer than ids and features need")
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise WireError("is not safetensors with ids and features") from error
    ids = tensors.pop("ids", None)
    features = tensors.pop("features", None)
    if tensors or ids is None or ids.dtype != np.int32 or ids.ndim != 1 or not ids.size:
        raise WireError("must contain ids, int32 [n] with n of at least 1, and features or nothing else")
    if features is None:
        return Prompt(tuple(ids.tolist()))
    if features.dtype != np.float16 or features.ndim != 2 or not features.size:
        raise WireError("must contain features as float16 [mel bins, frames]")
    if not np.isfinite(features).all():
        raise WireError("contains features that are not finite")
    import torch

    return Prompt(tuple(ids.tolist()), torch.from_numpy(features.astype(np.float32)))


def build_opened_message(session: str, model: str, prompt_check: int) -> OpenedMessage:
    """Return the answer to the prompt with the check `prompt_check`."""
    return OpenedMessage(session, model, checksum("opened", session, model, after=prompt_check))


def build_verify_request(prompt_check: int, context: Sequence[int], base: int, draft: Sequence[int]) -> VerifyRequest:
    """Return the request to verify `draft` after `context`, of which the cloud already has the first `base` tokens."""
    check = verify_checksum(prompt_check, context, base, draft)
    return VerifyRequest(base, tuple(context[base:]), tuple(draft), check)


def build_verdict_message(verdict: Verdict, request_check: int) -> VerdictMessage:
    """Return the answer to the verify request with the check `request_check`."""
    check = checksum("verdict", verdict.accepted, verdict.token, verdict.rest, after=request_check)
    return VerdictMessage(verdict.accepted, verdict.token, verdict.rest or None, check)


def build_generate_request(
    prompt_check: int, output: Sequence[int], eos: Iterable[int], max_new_tokens: int
) -> GenerateRequest:
    """Return the request for the target model's own tokens after `output`."""
    ends = tuple(sorted(eos))
    check = generate_checksum(prompt_check, output, ends, max_new_tokens)
    return GenerateRequest(tuple(output), ends, max_new_tokens, check)


def build_token_line(generated: Sequence[int], request_check: int) -> TokenLine:
    """Return the line for the last of `generated`, which are all tokens generated for this request so far."""
    return TokenLine(generated[-1], checksum("token", generated, after=request_check))


def build_end_line(generated: Sequence[int], request_check: int) -> EndLine:
    """Return the last line of a stream in which all of `generated` was sent."""
    return EndLine(len(generated), checksum("end", generated, after=request_check))


def build_refusal(status: int, detail: str, received: int | None = None, retry_after: str = "") -> RefusalMessage:
    """Return the answer with an error `status` and the header Retry-After, if it has one."""
    after = VERSION if received is None else received
    return RefusalMessage(detail, received, checksum("refusal", status, detail, retry_after, after=after))


def build_timing(queue: float, run: float, request_check: int) -> str:
    """Return the value of the header Server-Timing: the milliseconds of a request in the queue and on the model."""
    texts = f"{1e3 * queue:.3f}", f"{1e3 * run:.3f}"
    check = checksum("timing", *texts, after=request_check)
    return f"queue;dur={texts[0]},model;dur={texts[1]},check;desc={check}"


def read_opened(answer: bytes, prompt_check: int) -> tuple[str, str]:
    """Return the session's name and the model's fingerprint. Raise WireError for an answer to another prompt."""
    message = _object(answer)
    session, model = message.get("session"), message.get("model")
    if not isinstance(session, str) or not isinstance(model, str):
        raise WireError("does not name a session and a model")
    if message != vars(build_opened_message(session, model, prompt_check)):
        raise WireError("does not belong to the prompt that was sent")
    return session, model


def read_verdict(answer: bytes, drafted: int, request_check: int, wants_rest: bool = False) -> Verdict:
    """Return the verdict on a draft of `drafted` tokens. Raise WireError for an answer to another request."""
    message = _object(answer)
    rest = message.pop("rest", [])
    if not isinstance(rest, list) or not all(map(_is_id, rest)):
        raise WireError("has a rest that is no list of token ids")
    _check_integers(message, ("accepted", "token", "check"))
    verdict = Verdict(message["accepted"], message["token"], tuple(rest))
    later = max(drafted - verdict.accepted - 1, 0) if wants_rest else 0
    if not 0 <= verdict.accepted <= drafted or not _is_id(verdict.token) or len(rest) != later:
        raise WireError("is not a possible verdict on the draft")
    if message["check"] != build_verdict_message(verdict, request_check).check:
        raise WireError("does not belong to the verify request")
    return verdict


def read_stream_line(line: bytes, generated: Sequence[int], request_check: int) -> int | None:
    """Return the token that follows `generated` in the stream, or None for the last line.

    Raise WireError for any other line.
    """
    if b'"end"' in line:
        if _integers(line, ("end", "check")) != vars(build_end_line(generated, request_check)):
            raise WireError("does not match the end of the stream")
        return None
    message = _integers(line, ("token", "check"))
    token = message["token"]
    if not _is_id(token) or message != vars(build_token_line([*generated, token], request_check)):
        raise WireError("is not the next token of the stream")
    return token


def read_refusal(answer: bytes, status: int, retry_after: str = "") -> tuple[str, int | None]:
    """Return the reason and `received` of an answer with an error status, as far as it has them.

    Raise WireError for a damaged answer. The answer of a proxy has no check, so it is read as it is.
    """
    try:
        message = _object(answer)
    except WireError:
        return "", None
    detail, received = str(message.get("detail", "")), message.get("received")
    received = received if type(received) is int and 0 <= received < 2**32 else None
    if "check" in message and message | {"received": received} != vars(
        build_refusal(status, detail, received, retry_after)
    ):
        raise WireError("does not match its check")
    return detail, received


def check_timing(header: str, request_check: int) -> None:
    """Raise WireError for a Server-Timing header of this server that was damaged. A proxy may add its own entries."""
    entries = {}
    for entry in header.split(","):
        name, _, value = entry.strip().partition(";")
        entries[name] = value.removeprefix("dur=").removeprefix("desc=")
    queue, model, check = (entries.get(name) for name in ("queue", "model", "check"))
    if (queue or model or check) and check != str(checksum("timing", queue or "", model or "", after=request_check)):
        raise WireError("has a damaged Server-Timing header")


def _object(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("is not JSON") from None
    if not isinstance(message, dict):
        raise WireError("is not a JSON object")
    return message


def _integers(body: bytes, names: Sequence[str]) -> dict[str, int]:
    message = _object(body)
    _check_integers(message, names)
    return message


def _check_integers(message: dict[str, Any], names: Sequence[str]) -> None:
    if message.keys() != set(names) or not all(type(value) is int for value in message.values()):
        raise WireError(f"must be an object of the integers {', '.join(names)}")


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 2**31
