"""The one rule for failed attempts: which of them another attempt can mend, and with what change."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Literal

from edgecloud_sd import wire
from edgecloud_sd.host.terminal import to_printable

PASSING_4XX = (408, 423, 425, 429)  # too slow, locked, too early, too many
PERMANENT_5XX = (501, 505, 506, 508, 510, 511)  # the service never answers this request otherwise
KEY_STATUSES = (401, 403)
NO_SUCH_PATH = ("", "Not Found")  # details of a 404 that no cloud gives for a session
LONGEST_RETRY_AFTER = 86_400.0  # s, so that no header can hold a client for longer
# TLS errors of a broken connection. All others are of the certificate or of the two ends' settings.
PASSING_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError, ssl.SSLWantReadError)
PASSING_TLS_REASONS = ("BAD_RECORD_MAC", "DECRYPTION_FAILED", "UNEXPECTED_EOF")


@dataclass(frozen=True)
class Failure:
    """The kind and the reason of a failed attempt.

    Another attempt may succeed unchanged (`retry`), with a new session (`reopen`) or with the whole context (`resend`).
    After a `permanent` failure none can, unless the answer was damaged on its way. `is_proven` says that it was not.
    `retry_after` is the time in s that the server asks for.
    """

    kind: Literal["retry", "reopen", "resend", "permanent"]
    reason: str
    retry_after: float | None = None
    is_proven: bool = False


def classify_failure(
    status: int | None = None,
    body: bytes = b"",
    error: BaseException | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    sent: int | None = None,
    is_first_contact: bool = False,
    names_session: bool = True,
) -> Failure:
    """Return the kind of a failure: of an answer with an error `status` and its body, or of an exception.

    `sent` is `wire.request_checksum` of the request. A refusal that names another one is of a message that was damaged
    on its way. `is_first_contact` marks the request for the server's identity, and `names_session` one whose path has a
    session, which may be lost. `headers` have lower-case names.
    """
    if status is None:
        return _classify_error(error, is_first_contact)
    headers = headers or {}
    retry_after = headers.get("retry-after", "")
    try:
        detail, received = wire.read_refusal(body, status, retry_after)
    except wire.WireError as damage:
        return Failure("retry", f"the cloud answered {status}, and the answer {damage}")
    detail = to_printable(detail)
    is_undamaged = received in (None, sent)
    reason = f"the cloud answered {status} {detail}".strip()
    if status == 404 and is_undamaged and (is_first_contact or (not names_session and detail in NO_SUCH_PATH)):
        return Failure("permanent", f"{reason}; it is not an edgecloud_sd cloud of this version: check --cloud-url")
    if status == 404:
        return Failure("reopen", reason)
    if status == 409:
        return Failure("resend", reason)
    if status in KEY_STATUSES:
        return Failure("permanent", f"the cloud refuses the key: {status} {detail}".strip() + " (see --cloud-key-file)")
    if 300 <= status < 400:
        target = to_printable(headers.get("location", "")) or "no URL"
        return Failure("permanent", f"{reason}, a redirect to {target}: give the cloud's own URL as --cloud-url")
    is_refusal = (400 <= status < 500 and status not in PASSING_4XX) or status in PERMANENT_5XX
    if is_refusal and is_undamaged:
        reason = f"the cloud refuses the request: {status} {detail}".strip()
        return Failure("permanent", reason, is_proven=received is not None)
    return Failure("retry", reason, parse_retry_after(retry_after, datetime.now(timezone.utc)))


def parse_retry_after(header: str, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date, or None if it is not readable."""
    text = header.strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), LONGEST_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return min(max((moment - now).total_seconds(), 0.0), LONGEST_RETRY_AFTER)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _classify_error(error: BaseException | None, is_first_contact: bool) -> Failure:
    reason = f"{type(error).__name__} {to_printable(str(error))}".strip()
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror) and (is_first_contact or cause.errno != socket.EAI_AGAIN):
            return Failure("permanent", f"{reason}; the host's name does not resolve: check --cloud-url")
        if isinstance(cause, ssl.SSLCertVerificationError):
            remedy = "give the name that its certificate is for, or install its authority (SSL_CERT_FILE)"
            return Failure("permanent", f"{reason}; the server's certificate is not trusted: {remedy}")
        if isinstance(cause, ssl.SSLError) and not _is_passing(cause):
            remedy = "check --cloud-url (http:// for a server without TLS)"
            return Failure("permanent", f"{reason}; the two ends agree on no TLS: {remedy}")
    return Failure("retry", reason)


def _is_passing(error: ssl.SSLError) -> bool:
    return isinstance(error, PASSING_TLS) or any(name in str(error.reason) for name in PASSING_TLS_REASONS)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it wraps. httpcore gives the wrapped one as an argument and hides it elsewhere."""
    while error is not None:
        yield error
        inner = error.args[0] if error.args else None
        error = inner if isinstance(inner, BaseException) else error.__cause__
