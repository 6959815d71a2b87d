"""The key file: the keys that a server accepts, or the key that a client sends."""

from __future__ import annotations

import os
import shlex
import stat
import warnings
from pathlib import Path

from edgecloud_sd.data.texts import read_utf8, split_lines

MIN_KEY_LENGTH, MAX_KEY_LENGTH = 16, 1024  # characters; a proxy refuses a request whose headers have more than 8 kB


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file with one key per line.

    Raise ValueError for no key, one that is easy to guess or too long for a header, and one that is there twice.
    """
    try:
        text = read_utf8(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"key file {path}: cannot be read ({error})") from None
    return parse_keys(text, f"key file {path}")


def read_key(path: Path) -> str:
    """Return the only key of a client's file. Raise ValueError as `read_keys` does, and for several keys."""
    keys = read_keys(path)
    if len(keys) > 1:
        raise ValueError(f"key file {path}: contains {len(keys)} keys, and a client sends one: leave one line in it")
    return keys[0]


def parse_keys(text: str, place: str) -> tuple[str, ...]:
    """Return the keys of a text. Raise ValueError, beginning with `place`, as `read_keys` does."""
    lines = [line.strip() for line in split_lines(text)]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{place}: contains no key: write one per line")
    numbers: dict[str, int] = {}
    for number, key in enumerate(keys, start=1):
        if problem := _explain_bad_key(key):
            advice = f"must be {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} ASCII characters without blanks"
            raise ValueError(f"{place}: key {number} {advice}, and this one {problem}")
        if (first := numbers.setdefault(key, number)) != number:
            raise ValueError(f"{place}: key {number} is the same as key {first}: remove one")
    return keys


def warn_if_others_can_read(path: Path) -> None:
    """Warn about a key file that other users of this machine can read or change."""
    mode = path.stat().st_mode
    if os.name != "nt" and stat.S_ISREG(mode) and mode & 0o077:  # Windows has no such mode
        permissions = f"mode {stat.S_IMODE(mode):04o}"
        advice = f"chmod 600 {shlex.quote(str(path))}"
        warnings.warn(f"key file {path}: other users can read or change it ({permissions}): {advice}", stacklevel=2)


def _explain_bad_key(key: str) -> str:
    """Return the fault of a key, or nothing for a good one. The text does not repeat the key."""
    if "\ufeff" in key:
        return "contains a byte-order mark (U+FEFF): save the file as UTF-8 without one"
    if strange := next((character for character in key if not "!" <= character <= "~"), None):
        return f"contains U+{ord(strange):04X}"
    return "" if MIN_KEY_LENGTH <= len(key) <= MAX_KEY_LENGTH else f"has {len(key)}"
