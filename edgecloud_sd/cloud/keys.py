"""The file with the keys that a server asks for, or that a client shows."""

from __future__ import annotations

from pathlib import Path

SHORTEST_KEY = 16  # characters


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line, each a client of its own. ValueError for none, or for one that can be guessed."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"key file {path}: cannot be read ({error})") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"key file {path}: holds no key")
    for number, key in enumerate(keys, start=1):
        if len(key) < SHORTEST_KEY or not all("!" <= each <= "~" for each in key):
            raise ValueError(
                f"key file {path}: key {number} must be {SHORTEST_KEY} or more ASCII characters, no blanks"
            )
    return keys
