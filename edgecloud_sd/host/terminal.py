"""Text to and from a terminal: any encoding of the standard streams, and nothing that the terminal would obey."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

from edgecloud_sd.host.passwords import hide_passwords

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # and the marks that reorder a line


def escape_unencodable() -> None:
    """Print characters that stdout or stderr cannot encode as backslash escapes, in place of an error."""
    for stream in {sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__}:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def join_lines(text: str) -> str:
    """Return a text in one line, with escapes for the control characters that a terminal would obey."""
    line = " ".join(text.split())
    return CONTROLS.sub(lambda character: character[0].encode("unicode_escape").decode(), line)


def to_printable(text: str) -> str:
    """Return the first 200 characters without passwords, and with blanks for what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in hide_passwords(text)[:200])


def hyphenate(arguments: Sequence[str] | None) -> list[str]:
    """Return arguments (None: those of the process) with hyphens for underscores in the names of options."""
    given = sys.argv[1:] if arguments is None else arguments
    return [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in given]
