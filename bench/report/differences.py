"""How one caption differs from another: Chinese by characters, English by words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")

Kind = Literal["same", "inserted", "deleted"]


@dataclass(frozen=True)
class TextPart:
    """A stretch of text: in both captions, in the new one only, or in the base only."""

    kind: Kind
    text: str


def units(text: str, language: str) -> list[str]:
    """What is compared; joined, they are the text."""
    return list(text) if language == "chinese" else _WORDS.findall(text)


def marked(base: str, text: str, language: str) -> list[TextPart]:
    """`text`, with what differs from `base`: what is missing of the base stands before what replaced it."""
    old, new = units(base, language), units(text, language)
    parts: list[TextPart] = []
    for operation, i, j, m, n in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation == "equal":
            parts.append(TextPart("same", "".join(new[m:n])))
        else:
            parts += [TextPart("deleted", "".join(old[i:j])), TextPart("inserted", "".join(new[m:n]))]
    return [
        TextPart(kind, "".join(each.text for each in run))
        for kind, run in groupby((part for part in parts if part.text), key=lambda part: part.kind)
    ]


def distance(base: str, text: str, language: str) -> float:
    """0 for the same caption, 1 for nothing in common: 1 - 2 x units in common / units of both."""
    if base == text:
        return 0.0
    return 1 - SequenceMatcher(None, units(base, language), units(text, language), autojunk=False).ratio()
