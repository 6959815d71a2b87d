"""Normalisation of text before it is scored, so that equal text in another encoding is equal.

Each caption and each reference changes by one of these names.

- `none`: no change.
- `nfc`: Unicode NFC. Then punctuation, symbols and spaces of full or half width take their ordinary width.
- `nfkc`: Unicode NFKC. Letters and digits of full or half width, ligatures and other compatibility forms change too.

The change of width under `nfc` holds for each character that Unicode decomposes as `<wide>` or `<narrow>` and that has
a category P, S or Z. So U+FF0C becomes a comma, U+3000 a space, and U+FF61 the ideographic full stop U+3002. U+3001 and
U+3002 stay as they are, because they are no width of another character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

WIDTHS = ("<wide>", "<narrow>")


def _fold_width(character: str) -> str:
    kind, *code = unicodedata.decomposition(character).split() or [""]
    is_folded = kind in WIDTHS and unicodedata.category(character)[0] in "PSZ"
    return chr(int(code[0], 16)) if is_folded else character


def _nfc(text: str) -> str:
    return "".join(map(_fold_width, unicodedata.normalize("NFC", text)))


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "none": str,
    "nfc": _nfc,
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
}
DEFAULT_NORMALISATION = "nfc"
