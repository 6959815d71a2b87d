"""What crosses between edge and cloud, as bytes: HTTP requests and answers, and how large each is.

A prompt crosses as a safetensors body (ids in int32, the log-mel spectrogram in half precision), everything else as
JSON: token ids and a few integers. Raw audio and logits never cross. Every message carries a check, the CRC-32 of the
ids that it is about, begun with that of the prompt: a repeated, stale, misdirected or damaged one is told from the one
that was meant.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecloud_sd.events import Prompt, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

OCTETS, JSON, LINES = "application/octet-stream", "application/json", "application/x-ndjson"  # media types
MAX_IDS = 8192  # in one list of a message
MAX_MESSAGE = 2 * 12 * MAX_IDS + 1024  # bytes of JSON: two such lists, with spaces
MAX_HEADER = 1024  # bytes of what a prompt says of its tensors
# Of a message on a connection that stands: request line or status, and headers, as client and server of `cloud` write
# them (`tests/test_wire.py` counts them on a socket). TCP's, IP's and TLS's own bytes are not counted.
REQUEST_HEAD = 202
ANSWER_HEAD = 120
CHUNK_HEAD = 6  # around each line of a streamed answer


# For forecasts, before there is a message to measure: bytes of an id and its comma in JSON, as most of a vocabulary of
# 150,000 have; of a verdict with its head; of a streamed line with its own.
ID = 7
VERDICT = ANSWER_HEAD + 48
LINE = CHUNK_HEAD + 36


def verify_size(fed: float) -> float:
    """Bytes, about, of a request that feeds the cloud `fed` ids (committed tokens not yet sent, then the draft)."""
    return REQUEST_HEAD + 56 + ID * fed


class WireError(ValueError):
    """A message that is not what it should be: the message names what is wrong with it."""


def checksum(ids: Iterable[int], begun: int = 0) -> int:
    """CRC-32 over `ids` as little-endian int32, going on from `begun`."""
    return zlib.crc32(np.fromiter(ids, dtype="<i4").tobytes(), begun)


def prompt_checksum(body: bytes, rule: str) -> int:
    """The check of a prompt and of the rule, as text, that it is opened with: what every later check goes on from."""
    return zlib.crc32(body, zlib.crc32(rule.encode()))


def encode_prompt(prompt: Prompt) -> bytes:
    """safetensors: `ids` int32 [n] and, where there is audio, `features` float16 [mel bins, frames]."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {"ids": np.asarray(prompt.ids, dtype=np.int32)}
    if prompt.features is not None:
        tensors["features"] = prompt.features.numpy().astype(np.float16)
    return save(tensors)


def decode_prompt(body: bytes) -> Prompt:
    """The prompt that `encode_prompt` made this of, its features in float32 again. WireError for anything else."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if int.from_bytes(body[:8], "little") > MAX_HEADER:  # room for tens of thousands of tensors
        raise WireError("has a header that is longer than ids and features need")
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise WireError("is not safetensors with ids and features") from error
    ids = tensors.pop("ids", None)
    features = tensors.pop("features", None)
    if tensors or ids is None or ids.dtype != np.int32 or ids.ndim != 1 or not ids.size:
        raise WireError("must hold ids, int32 [n] with n of at least 1, and features or nothing else")
    if features is None:
        return Prompt(tuple(ids.tolist()))
    if features.dtype != np.float16 or features.ndim != 2 or not features.size:
        raise WireError("must hold features as float16 [mel bins, frames]")
    if not np.isfinite(features).all():
        raise WireError("holds features that are not finite")
    import torch

    return Prompt(tuple(ids.tolist()), torch.from_numpy(features.astype(np.float32)))


def opened(session: str, model: str, sent: int) -> dict[str, Any]:
    """Answer to a prompt whose body had the check `sent`."""
    return {
        "session": session,
        "model": model,
        "check": zlib.crc32(f"{session} {model}".encode(errors="replace"), sent),
    }


def to_verify(begun: int, context: Sequence[int], base: int, draft: Sequence[int]) -> dict[str, Any]:
    """Request to judge `draft` after `context`, of which the cloud holds the first `base` tokens."""
    fed = [*context, *draft]
    return {"base": base, "tokens": list(context[base:]), "draft": list(draft), "check": checksum(fed, begun)}


def verdict(given: Verdict, asked: int) -> dict[str, Any]:
    """Answer to a request whose check was `asked`."""
    return {
        "accepted": given.accepted,
        "token": given.token,
        "check": checksum((given.accepted, given.token), asked),
    }


def to_generate(begun: int, output: Sequence[int], eos: Iterable[int], max_new_tokens: int) -> dict[str, Any]:
    """Request for the cloud's own tokens after `output`."""
    ends = sorted(eos)
    what = checksum((*output, *ends, max_new_tokens), begun)
    return {"output": list(output), "eos": ends, "max_new_tokens": max_new_tokens, "check": what}


def written(output: Sequence[int], asked: int) -> dict[str, Any]:
    """One line of the stream: the last of `output`, all that was written in answer to the request."""
    return {"token": output[-1], "check": checksum(output, asked)}


def ended(output: Sequence[int], asked: int) -> dict[str, Any]:
    """The last line of the stream."""
    return {"end": len(output), "check": checksum((*output, len(output)), asked)}


def read_verdict(answer: bytes, drafted: int, asked: int) -> Verdict:
    """The verdict on a draft of `drafted` tokens. WireError for an answer to anything but the request `asked`."""
    message = _integers(answer, ("accepted", "token", "check"))
    found = Verdict(message["accepted"], message["token"])
    if not 0 <= found.accepted <= drafted or not _id(found.token) or message != verdict(found, asked):
        raise WireError("is no verdict on what was asked")
    return found


def read_written(line: bytes, output: Sequence[int], asked: int) -> int | None:
    """The token that follows `output` in the stream, or None for its last line. WireError for any other line."""
    if b'"end"' in line:
        if _integers(line, ("end", "check")) != ended(output, asked):
            raise WireError("ends where the stream does not")
        return None
    message = _integers(line, ("token", "check"))
    token = message["token"]
    if not _id(token) or message != written([*output, token], asked):
        raise WireError("is no token of what was asked")
    return token


def read_opened(answer: bytes, sent: int) -> tuple[str, str]:
    """The session's id, and which model it is on."""
    message = _object(answer)
    session, model = message.get("session"), message.get("model")
    if not isinstance(session, str) or not isinstance(model, str) or message != opened(session, model, sent):
        raise WireError("is no answer to the prompt that was sent")
    return session, model


def _object(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("is not JSON") from None
    if not isinstance(message, dict):
        raise WireError("is no JSON object")
    return message


def _integers(body: bytes, names: Sequence[str]) -> dict[str, int]:
    message = _object(body)
    if message.keys() != set(names) or not all(type(value) is int for value in message.values()):
        raise WireError(f"must hold the integers {', '.join(names)}")
    return message


def _id(token: int) -> bool:
    return 0 <= token < 2**31


def dumps(message: Mapping[str, Any]) -> bytes:
    """JSON without spaces."""
    return json.dumps(message, separators=(",", ":")).encode()
