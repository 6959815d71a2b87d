"""Text that users write: files read in UTF-8, and lines, JSON and YAML read as their writer meant them."""

from __future__ import annotations

import unicodedata

BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols by category, without any ink


def has_visible_text(text: str) -> bool:
    """Return whether a letter, digit, punctuation mark or symbol is in `text`.

    Spaces, control and format characters, combining marks and variation selectors are not visible alone.
    """
    return any(unicodedata.category(character)[0] in "LNPS" and character not in BLANK_LETTERS for character in text)
