"""The kinds of failures: every status and every exception, and the header Retry-After."""

from __future__ import annotations

import json
import socket
import ssl
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpcore2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.cloud.failures import LONGEST_RETRY_AFTER, classify_failure, parse_retry_after

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)
SENT = 7
PASSING = {408, 423, 425, 429}
PERMANENT_5XX = {501, 505, 506, 508, 510, 511}


def problem(**fields: object) -> bytes:
    return json.dumps({"detail": "why", **fields}).encode()


@pytest.mark.slow
@pytest.mark.parametrize("status", [*range(100, 200), *range(202, 600), 999])
def test_each_status_has_one_kind(status: int) -> None:
    is_permanent = (
        status // 100 == 3 or (status // 100 == 4 and status not in {404, 409, *PASSING}) or status in PERMANENT_5XX
    )
    expected = {404: "reopen", 409: "resend"}.get(status, "permanent" if is_permanent else "retry")
    failure = classify_failure(status, problem(), sent=SENT)
    assert failure.kind == expected
    assert str(status) in failure.reason
    assert "why" in failure.reason


@pytest.mark.parametrize("status", [400, 405, 413, 415, 422])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (problem(received=SENT), "permanent"),
        (problem(received=SENT + 1), "retry"),  # the message was damaged on its way
        (problem(received=None), "permanent"),
        (problem(received="7"), "permanent"),
        (b"<html>nginx</html>", "permanent"),
        (b"[1]", "permanent"),
        (b"", "permanent"),
        (b"[" * 9999, "permanent"),
    ],
)
def test_a_refused_message_is_sent_again_only_if_it_was_damaged(status: int, body: bytes, kind: str) -> None:
    assert classify_failure(status, body, sent=SENT).kind == kind


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_the_page_of_a_proxy_is_waited_out_as_long_as_its_header_says(status: int) -> None:
    page = b"<html>\r\n<head><title>nginx</title></head>\r\n</html>\r\n"
    failure = classify_failure(status, page, headers={"retry-after": "7", "content-type": "text/html"}, sent=SENT)
    assert (failure.kind, failure.retry_after) == ("retry", 7.0)


@pytest.mark.parametrize(
    ("status", "headers", "kind", "text"),
    [
        (404, {}, "permanent", "--cloud-url"),
        (401, {}, "permanent", "--cloud-key-file"),
        (403, {}, "permanent", "--cloud-key-file"),
        (307, {"location": "https://other.example/"}, "permanent", "https://other.example/"),
        (304, {}, "permanent", "304 why, a redirect to no URL"),
        (503, {}, "retry", "503"),
    ],
)
def test_the_first_contact_names_the_option_to_change(
    status: int, headers: dict[str, str], kind: str, text: str
) -> None:
    failure = classify_failure(status, problem(), headers=headers, is_first_contact=True)
    assert failure.kind == kind
    assert text in failure.reason


def caused_by(cause: Exception, kind: type[Exception] = httpcore2.ConnectError) -> Exception:
    """Return an error that wraps its cause as httpcore does."""
    return kind(cause)


CERTIFICATE = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
NO_TLS = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
NO_TLS.reason = "WRONG_VERSION_NUMBER"
BAD_MAC = ssl.SSLError(1, "bad record mac")
BAD_MAC.reason = "SSLV3_ALERT_BAD_RECORD_MAC"


@pytest.mark.parametrize(
    ("error", "is_first_contact", "kind", "text"),
    [
        (caused_by(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), False, "permanent", "resolve"),
        (caused_by(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")), False, "retry", "Temporary"),
        (caused_by(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")), True, "permanent", "resolve"),
        (caused_by(CERTIFICATE), False, "permanent", "certificate"),
        (caused_by(NO_TLS), False, "permanent", "http://"),
        (caused_by(NO_TLS, httpcore2.ReadError), False, "permanent", "TLS"),
        (caused_by(BAD_MAC, httpcore2.ReadError), False, "retry", "bad record mac"),
        (caused_by(ssl.SSLEOFError(8, "EOF occurred")), False, "retry", "EOF"),
        (caused_by(ConnectionRefusedError(111, "Connection refused")), True, "retry", "refused"),
        (caused_by(OSError(101, "Network is unreachable")), True, "retry", "unreachable"),
        (httpcore2.ConnectTimeout("took too long"), True, "retry", "ConnectTimeout"),
        (httpcore2.ReadTimeout("took too long"), False, "retry", "ReadTimeout"),
        (httpcore2.RemoteProtocolError("no http\x1b"), False, "retry", "no http"),
    ],
)
def test_each_exception_has_one_kind(error: Exception, is_first_contact: bool, kind: str, text: str) -> None:
    failure = classify_failure(error=error, is_first_contact=is_first_contact)
    assert failure.kind == kind
    assert text in failure.reason
    assert failure.reason.isprintable()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 5000, LONGEST_RETRY_AFTER),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30.0),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), 0.0),
        ("Sunday, 01-Mar-26 12:00:05 GMT", 5.0),
        ("Sun Mar  1 12:00:05 2026", 5.0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("²", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str, seconds: float | None) -> None:
    assert parse_retry_after(header, NOW) == seconds
    assert classify_failure(503, headers={"retry-after": header}).retry_after is not None or seconds is None


@given(st.text())
def test_no_header_breaks_the_reading_of_retry_after(header: str) -> None:
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or 0 <= seconds <= LONGEST_RETRY_AFTER
