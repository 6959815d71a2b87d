"""Output on a terminal whose encoding lacks characters."""

from __future__ import annotations

import io
import sys

import pytest

from edgecloud_sd.data import __main__
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import escape_unencodable, hyphenate, join_lines


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"\\u60c5 \\udcff"), ("gbk", "情".encode("gbk") + b" \\udcff")]
)
def test_a_character_that_the_terminal_lacks_is_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    escape_unencodable()
    print("情 \udcff", end="", flush=True)
    assert stream.buffer.getvalue() == shown


def test_a_command_names_a_file_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match="情"):
        __main__.main(["check", "情.json"])
    assert sys.stdout.errors == "backslashreplace"


def test_a_terminal_gets_no_control_character_of_a_users_text() -> None:
    assert join_lines(" 高 \n兴\x1b[31m\0\x9b\u202e👨\u200d👩 ") == "高 兴\\x1b[31m\\x00\\x9b\\u202e👨\u200d👩"
    with pytest.raises(SystemExit, match=r"^error: \\x1b\[31m"), errors_to_exit():
        raise ValueError("\x1b[31m")


def test_names_of_options_take_underscores_and_values_keep_them() -> None:
    given = ["caption", "a_b.wav", "--max_new_tokens=5", "--edge_model", "my_model", "--prompt_file=a_b", "-k_x", "--"]
    assert hyphenate(given) == [
        *("caption", "a_b.wav", "--max-new-tokens=5", "--edge-model", "my_model", "--prompt-file=a_b", "-k_x", "--"),
    ]
