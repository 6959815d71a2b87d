"""The headers of a request: refused if two readers could read them differently, or if a foreign web page sent them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from edgecloud_sd.cloud.url import is_loopback
from edgecloud_sd.host.terminal import to_printable

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case, as ASGI has them
SINGLE_HEADERS = (b"authorization", b"content-length", b"content-type", b"host", b"origin", b"transfer-encoding")
BEARER = re.compile(rb"(?i:bearer) +([^ ]+)")  # RFC 7235: a scheme in any case, then one blank or more
AUTHORITY = re.compile(r"(?:\[([^\[\]]*)\]|([^:@/\[\]]*))(?::[0-9]*)?")  # a host, and a port if one is given
LOCAL_ADVICE = "a server without keys answers only to localhost, 127.0.0.1 or [::1]: use such a URL, or --api-key-file"


class HeaderProblem(NamedTuple):
    """The status and the reason with which a request is refused."""

    status: int
    detail: str


def find_ambiguity(http_version: str, headers: Headers) -> HeaderProblem | None:
    """Return the problem of a request whose headers a proxy could read differently, or None.

    The HTTP library refuses the other kinds: two different lengths, an encoding that is not chunked, two hosts.
    """
    numbers = Counter(name for name, _ in headers)
    for name in SINGLE_HEADERS:
        if numbers[name] > 1:
            return HeaderProblem(400, f"{name.decode()}: send this header once, not {numbers[name]} times")
    if b"transfer-encoding" in numbers and (b"content-length" in numbers or http_version == "1.0"):
        return HeaderProblem(400, "transfer-encoding: send it without content-length, and not in HTTP/1.0")
    return None


def find_foreign_page(headers: Headers) -> HeaderProblem | None:
    """Return the problem of a request that a web page of another host may have sent, or None.

    A page reaches loopback through its visitor's browser: directly, or under a name of its own that resolves to
    127.0.0.1 (DNS rebinding). The browser then sends that name as Host or Origin.
    """
    values = {name: value.decode("latin-1") for name, value in headers}
    host, origin = values.get(b"host"), values.get(b"origin")
    if host is not None and not _is_local(host):
        return HeaderProblem(421, f"host {to_printable(host)!r}: {LOCAL_ADVICE}")
    if origin is not None:
        scheme, _, authority = origin.partition("://")
        if scheme not in ("http", "https") or not _is_local(authority):
            return HeaderProblem(403, f"origin {to_printable(origin)!r}: {LOCAL_ADVICE}")
    return None


def parse_media_type(content_type: str) -> str:
    """Return the media type of a Content-Type header in lower case, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def parse_bearer(authorization: bytes) -> bytes:
    """Return the key in an Authorization header, or nothing if it has another form."""
    match = BEARER.fullmatch(authorization)
    return match[1] if match else b""


def _is_local(authority: str) -> bool:
    match = AUTHORITY.fullmatch(authority)
    return match is not None and is_loopback(match[1] or match[2] or "")
