"""The differences between two captions: by characters in Chinese, by words in English."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

_ENGLISH_UNITS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class TextPart:
    """A stretch of text that both captions have, or only the new one (inserted), or only the base (deleted)."""

    kind: Literal["same", "inserted", "deleted"]
    text: str


def mark_differences(base: str, text: str, language: str) -> list[TextPart]:
    """Return `text` in parts, with each deleted stretch of `base` before the text that replaced it."""
    old, new = _split_units(base, language), _split_units(text, language)
    parts: list[TextPart] = []
    for operation, i, j, m, n in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation == "equal":
            parts.append(TextPart("same", "".join(new[m:n])))
        else:
            parts += [TextPart("deleted", "".join(old[i:j])), TextPart("inserted", "".join(new[m:n]))]
    return [
        TextPart(kind, "".join(part.text for part in stretch))
        for kind, stretch in groupby((part for part in parts if part.text), key=lambda part: part.kind)
    ]


def caption_distance(base: str, text: str, language: str) -> float:
    """Return 0 for equal captions and 1 for nothing in common: 1 - 2 x common units / units of both captions."""
    if base == text:
        return 0.0
    return 1 - SequenceMatcher(None, _split_units(base, language), _split_units(text, language), autojunk=False).ratio()


def _split_units(text: str, language: str) -> list[str]:
    """Return the units that are compared. Their concatenation is the text."""
    return list(text) if language == "chinese" else _ENGLISH_UNITS.findall(text)
