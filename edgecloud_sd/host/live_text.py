"""Text at the end of a terminal that changes while it is shown, in pieces of one colour."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from edgecloud_sd.host.terminal import CONTROLS


@dataclass(frozen=True)
class Piece:
    """A part of a text. `colour` is an ANSI code, or None for the colour of the terminal."""

    text: str
    colour: int | None = None

    def render(self, start: int = 0) -> str:
        """Return what a terminal prints from a character on."""
        text = self.text[start:]
        return text if self.colour is None or not text else f"\x1b[{self.colour}m{text}\x1b[0m"


def rewrite(old: Sequence[Piece], new: Sequence[Piece], columns: int) -> str:
    """Return what turns the `old` text at the end of a terminal into the `new` one.

    Text that only grows is printed after the old one. Else all is printed again from the start of the line on which the
    last equal character is, because the next one may fit there now. The old text begins on the left.
    """
    same = next((place for place, (a, b) in enumerate(zip_longest(old, new)) if a != b), len(old))
    if same == len(old):
        return "".join(piece.render() for piece in new[same:])
    starts = line_starts("".join(piece.text for piece in old), columns)
    line = bisect_right(starts, max(sum(len(piece.text) for piece in old[:same]) - 1, 0)) - 1
    up = len(starts) - 1 - line
    place, printed = 0, []
    for piece in new:
        printed.append(piece.render(max(starts[line] - place, 0)))
        place += len(piece.text)
    return (f"\x1b[{up}A" if up else "") + "\r\x1b[J" + "".join(printed)


def line_starts(text: str, columns: int) -> list[int]:
    """Return the place of the first character of each line, as a terminal of so many columns breaks them.

    A Chinese character is two columns wide, and does not fit into the last one.
    """
    from wcwidth import wcswidth

    starts, column = [0], 0
    for place, character in enumerate(text):
        width = max(wcswidth(character), 0)
        if column + width > columns:
            starts.append(place)
            column = 0
        column += width
        if character == "\n":
            starts.append(place + 1)
            column = 0
    return starts


def escape_controls(text: str) -> str:
    """Return a text without the control characters that a terminal would obey, line ends excepted."""
    return CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else repr(found[0])[1:-1], text)
