"""Text that changes at the end of a terminal, checked on a small terminal of any width."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wcwidth import wcswidth

from edgecloud_sd.__main__ import COLOURS, GREY, print_caption
from edgecloud_sd.events import Committed, Confirmed, Event, Finished, Retracted
from edgecloud_sd.host.live_text import Piece, escape_controls, rewrite
from edgecloud_sd.timing.harness import Harness
from tests.support.strategies import Case, cases

PARTS = (b"a", "好".encode(), "，".encode()[:2], "，".encode()[2:], b" ", b"\n", "说".encode())


def say(ids: Sequence[int]) -> str:
    """Return a text of narrow and wide characters. Tokens 2 and 3 are the two parts of one character."""
    return b"".join(PARTS[token] for token in ids).decode(errors="replace")


class Terminal:
    """The rows of a terminal that breaks lines, moves up, and clears to its end."""

    def __init__(self, columns: int, printed: str = "") -> None:
        self.columns = columns
        self.rows = [""]
        self.row = self.column = 0
        self.print(printed)

    def print(self, text: str) -> None:
        for code, kind, character in re.findall(r"\x1b\[(\d*)([AJm])|([^\x1b])", text, re.DOTALL):
            if kind == "A":
                self.row -= int(code)
            elif kind == "J":
                assert self.column == 0
                self.rows[self.row :] = [""]
            elif character == "\r":
                self.column = 0
            elif character:
                self._put(character)

    def _put(self, character: str) -> None:
        width = 0 if character == "\n" else wcswidth(character)
        if character == "\n" or self.column + width > self.columns:
            self.row, self.column = self.row + 1, 0
            self.rows += [""] * (self.row == len(self.rows))
        if width:
            self.rows[self.row] += character
            self.column += width


pieces = st.builds(Piece, st.text("ab好，\n", min_size=1, max_size=4), st.sampled_from([None, 31, 90]))


@example([[Piece("a"), Piece("好")], [Piece("a")]], 2)  # shrinks to the end of the first line
@given(st.lists(st.lists(pieces, max_size=6), max_size=6), st.integers(2, 9))
def test_a_rewritten_text_looks_like_one_that_was_printed_at_once(texts: list[list[Piece]], columns: int) -> None:
    terminal, shown = Terminal(columns), list[Piece]()
    for text in texts:
        terminal.print(rewrite(shown, text, columns))
        shown = text
        fresh = Terminal(columns, "".join(piece.text for piece in text))
        assert vars(terminal) == vars(fresh)


def test_text_that_only_grows_is_printed_without_a_move() -> None:
    shown = [Piece("a好" * 9, 32)]
    assert rewrite(shown, [*shown, Piece("b", 31)], 5) == "\x1b[31mb\x1b[0m"


def test_only_the_lines_from_the_first_change_on_are_printed_again() -> None:
    shown = [Piece("好好"), Piece("aa", 90), Piece("好好", 90)]  # lines of 5 columns: "好好a", "a好好"
    assert rewrite(shown, [*shown[:2], Piece("说", 31)], 5) == "\r\x1b[J\x1b[90ma\x1b[0m\x1b[31m说\x1b[0m"


def test_a_terminal_gets_no_control_characters_of_a_caption() -> None:
    assert escape_controls("a\x1b[2J\r好\n") == "a\\x1b[2J\\r好\n"


def printed_by(events: Iterable[Event], is_coloured: bool, columns: Callable[[], int] | None) -> tuple[str, str]:
    """Return what `print_caption` prints on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        print_caption(iter(events), say, is_coloured, columns=columns)
    return out.getvalue(), err.getvalue()


@given(cases(), st.integers(2, 9))
def test_a_terminal_ends_with_the_output_and_a_file_never_has_text_that_is_taken_back(case: Case, columns: int) -> None:
    trace = case.play(Harness())
    events = [event for _, event in trace.events]
    on_terminal, _ = printed_by(events, True, lambda: columns)
    assert Terminal(columns, on_terminal).rows == Terminal(columns, say(trace.tokens) + "\n").rows
    assert printed_by(events, False, None)[0] == say(trace.tokens) + "\n"


EVENTS: list[Event] = [
    Committed((1, 0), "local", False),
    Confirmed(1),
    Retracted(1),
    Committed((6,), "correction"),
    Finished("eos"),
]


def test_text_is_grey_until_it_is_final() -> None:
    out, legend = printed_by(EVENTS, True, lambda: 80)
    grey, accepted, correction = GREY, COLOURS["accepted"], COLOURS["correction"]
    assert out == (
        f"\x1b[{grey}m好\x1b[0m\x1b[{grey}ma\x1b[0m"
        f"\r\x1b[J\x1b[{accepted}m好\x1b[0m\x1b[{grey}ma\x1b[0m"
        f"\r\x1b[J\x1b[{accepted}m好\x1b[0m"
        f"\x1b[{correction}m说\x1b[0m\n"
    )
    assert "grey" in legend
    assert "local" not in legend


@pytest.mark.parametrize("count", range(1, 6))
def test_without_a_terminal_only_final_text_is_printed(count: int) -> None:
    texts = ["", "好", "好", "好说", "好说"]
    assert printed_by(EVENTS[:count], False, None) == (texts[count - 1] + "\n", "")
    assert "grey" not in printed_by(EVENTS[:count], True, None)[1]
