"""The standard streams, whatever encoding the terminal has."""

from __future__ import annotations

import io
import sys


def escape_unencodable() -> None:
    """Print characters that stdout or stderr cannot encode as backslash escapes, in place of an error."""
    for stream in {sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__}:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
