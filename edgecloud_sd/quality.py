"""Captions against references: corpus scores by pycocoevalcap.

Chinese is cut into characters (runs of Latin letters and digits stay whole), English into lower-cased words and
punctuation; `TOKENIZERS` names which, and the names stand in the results. An empty caption scores 0 and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TOKENIZERS = {"chinese": "characters", "english": "lowercase-words-and-punctuation"}
_CHARACTERS = re.compile(r"[A-Za-z0-9]+|\S")
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Quality:
    """Corpus scores; None where undefined, and then `reasons` says why."""

    bleu1: float | None
    bleu4: float | None
    cider: float | None
    per_clip_bleu4: tuple[float, ...]
    empty: int
    tokenizer: str
    reasons: dict[str, str]


def tokenize(text: str, language: str) -> list[str]:
    """The tokens that are compared."""
    if language == "chinese":
        return _CHARACTERS.findall(text.lower())
    return _WORDS.findall(text.lower())


def score(captions: Sequence[str], references: Sequence[Sequence[str]], language: str) -> Quality:
    """BLEU-1 and -4 (Papineni et al. 2002, corpus level) and CIDEr-D (Vedantam et al. 2015; scale 0 to 10).

    CIDEr weighs n-grams by how few clips of this corpus have them, so one clip alone has no CIDEr.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if not captions:
        nothing = "no clip was captioned"
        reasons = dict.fromkeys(("bleu1", "bleu4", "cider"), nothing)
        return Quality(None, None, None, (), 0, TOKENIZERS[language], reasons)
    got = {i: [" ".join(tokenize(text, language))] for i, text in enumerate(captions)}
    want = {i: [" ".join(tokenize(text, language)) for text in texts] for i, texts in enumerate(references)}
    bleu, per_clip = Bleu(4).compute_score(want, got, verbose=0)
    reasons = {}
    cider = None
    if len(captions) == 1:
        reasons["cider"] = "needs at least two clips"
    elif not any(text for texts in want.values() for text in texts):
        reasons["cider"] = "no reference has a word"
    else:
        cider = float(Cider().compute_score(want, got)[0])
    return Quality(
        bleu1=float(bleu[0]),
        bleu4=float(bleu[3]),
        cider=cider,
        per_clip_bleu4=tuple(float(each) for each in per_clip[3]),
        empty=sum(not text.strip() for text in captions),
        tokenizer=TOKENIZERS[language],
        reasons=reasons,
    )
