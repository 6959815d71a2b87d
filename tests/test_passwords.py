"""Passwords in URLs: no message shows one, whoever writes the message."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecloud_sd.__main__ import main
from edgecloud_sd.cloud.failures import classify_failure
from edgecloud_sd.cloud.transport import LARGEST_ANSWER
from edgecloud_sd.cloud.url import parse_url
from edgecloud_sd.config import resolve
from edgecloud_sd.host.errors import errors_to_exit, warnings_in_one_line
from edgecloud_sd.host.passwords import hide_passwords
from tests.support.suite import run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:hunter2@host:80/path", "http://***@host:80/path"),
        ("https://hunter2@host", "https://***@host"),
        ("socks5://user:hun@ter/2@host, or ftp://x:hunter2@y", "socks5://***@host, or ftp://***@y"),
        ("http:/user:hunter2@host", "http:/***@host"),
        ("http://user:hunter2%40host", "http://***@host"),
        ("http://user:hunter2\uff20host", "http://***@host"),
        ("https://host/file?x=1&X-Amz-Signature=hunter2&y=2", "https://host/file?x=1&X-Amz-Signature=***&y=2"),
        ("http://host/?password=hunter2", "http://host/?password=***"),
        ("no URL, http://host:8700/a?key=1 and a@b", "no URL, http://host:8700/a?key=1 and a@b"),
    ],
)
def test_user_password_and_secret_parameters_of_a_url_are_hidden(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


@pytest.mark.parametrize("part", ["http://a:", "a:/", "?token", "?auth.", "@", "%40", "token"])
def test_no_text_of_a_server_takes_long_to_clean(part: str) -> None:
    start = time.process_time()
    hide_passwords(f"http://?{part * (LARGEST_ANSWER // len(part))}")
    assert time.process_time() - start < 1


def fail_with(text: str) -> None:
    with errors_to_exit():
        raise OSError(f"the proxy {text} does not answer")


def warn_of(text: str) -> None:
    with warnings_in_one_line():
        warnings.simplefilter("always")
        warnings.warn(f"the proxy {text} is slow", stacklevel=1)


def redirect(text: str) -> None:
    print(classify_failure(302, headers={"location": text}).reason)


def answer_with(text: str) -> None:
    print(classify_failure(503, f'{{"detail": "{text}"}}'.encode()).reason)


def read_file(text: str) -> None:
    for line in (f"{text}: 1", f"cloud-url: {text}: 2", f"cloud-url: [{text}]", f"edge-dtype: {text}"):
        file = Path("options.yaml")
        file.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=r"options\.yaml") as error:
            resolve({}, file)
        print(error.value, repr(error.value))


PRINTERS: dict[str, Callable[[str], object]] = {
    "an error": fail_with,
    "a warning": warn_of,
    "a redirect": redirect,
    "an answer": answer_with,
    "a file of options": read_file,
    "the URL of the cloud": parse_url,
    "another option": lambda text: resolve({"on-cloud-fault": text}),
    "the command line": lambda text: main(["caption", "a.wav", "--cloud-ulr", text]),
}


@pytest.mark.parametrize("name", PRINTERS)
@pytest.mark.parametrize(
    "text",
    [
        "http://user:hunter2@host",
        "http://user:hunter2%40host",
        "http://user:hunter2\uff20host",
        "http://user%3ahunter2%40host",
        f"https://{'u' * 300}:hunter2@host",
        "https://host/?password=hunter2",
    ],
    ids=["plain", "escaped", "wide", "all escaped", "long", "parameter"],
)
def test_no_message_shows_a_password(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        PRINTERS[name](text)
    except (ValueError, SystemExit) as error:
        print(error, repr(error), file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert "hunter2" not in captured.out + captured.err


@pytest.mark.slow
def test_the_suite_refuses_an_option_without_its_password(pytester: pytest.Pytester) -> None:
    for option in ("--cloud-url", "--edge-model"):
        result = run(pytester, option, "http://user:hunter2@host/a b")
        assert "hunter2" not in "".join(result.outlines + result.errlines)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
