"""The key file: the keys that a server accepts, or the key that a client sends."""

from __future__ import annotations

from pathlib import Path

from edgecloud_sd.data.texts import read_utf8, split_lines

MIN_KEY_LENGTH = 16  # characters


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file with one key per line. Raise ValueError for no key or one that is easy to guess."""
    try:
        lines = [line.strip() for line in split_lines(read_utf8(path))]
    except (OSError, ValueError) as error:
        raise ValueError(f"key file {path}: cannot be read ({error})") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"key file {path}: contains no key: write one per line")
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_LENGTH or not all("!" <= character <= "~" for character in key):
            raise ValueError(
                f"key file {path}: key {number} must be {MIN_KEY_LENGTH} or more ASCII characters without blanks"
            )
    return keys
