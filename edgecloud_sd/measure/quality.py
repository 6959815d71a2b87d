"""Captions against references: scores of a corpus and of each clip, from one tokenization.

Chinese is cut into characters (runs of Latin letters and digits stay whole), English into lower-cased words and
punctuation; `TOKENIZERS` names which, and the names stand in the results. BERTScore cuts text by its own model's
tokenizer. An empty caption scores 0 and is counted.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecloud_sd.measure import bertscore, meteor

TOKENIZERS = {"chinese": "characters", "english": "lowercase-words-and-punctuation"}
BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
BERTSCORE = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
QUALITY_METRICS = (*BLEU, "meteor", "rouge_l", "cider", *BERTSCORE, "language_match")
SCRIPTS = {"chinese": "CJK ", "english": "LATIN "}  # how Unicode's names of the letters begin
_CHARACTERS = re.compile(r"[A-Za-z0-9]+|\S")
_WORDS = re.compile(r"\w+|[^\w\s]")

Scores = tuple[float, Sequence[float]]  # of the corpus, of each clip


class NotMeasured(Exception):
    """The message says why a metric has no value."""


@dataclass(frozen=True)
class Quality:
    """A value for every name of METRICS; None where there is none, and then `reasons` says why."""

    corpus: dict[str, float | None]
    per_clip: dict[str, tuple[float | None, ...]]  # one value a clip; language_match: 1.0 or 0.0
    empty: int  # captions without text
    tokenizer: str
    bertscore_model: str | None  # a folder's last component or the name on the hub
    reasons: dict[str, str]


def tokenize(text: str, language: str) -> list[str]:
    """The tokens that are compared."""
    if language == "chinese":
        return _CHARACTERS.findall(text.lower())
    return _WORDS.findall(text.lower())


def in_language(text: str, language: str) -> bool:
    """Whether more than half of the letters are of the language's script: Han for chinese, Latin for english.

    Digits, punctuation and spaces are not letters. A text without letters is in no language. French in Latin script
    passes for english: this finds a model that answers in another script, not in another language of the same one.
    """
    letters = [unicodedata.name(each, "") for each in text if each.isalpha()]
    return 2 * sum(name.startswith(SCRIPTS[language]) for name in letters) > len(letters)


def check_bertscore_model(name: str) -> None:
    """Load the model for the session. ValueError, with the model and a fix, where that cannot be done."""
    bertscore.load_scorer(name)


def score(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    bertscore_model: str | None = None,
    meaningless: str | None = None,
) -> Quality:
    """Every metric of METRICS. `bertscore_model` is a folder or a name on the hub; see `bertscore.load_scorer`. Of
    captions that are `meaningless`, for a reason that it gives, nothing is measured.

    All but CIDEr (0 to 10) lie between 0 and 1. ROUGE-L, CIDEr, BERTScore and language_match of a corpus are means over
    its clips; BLEU and METEOR are made of summed counts. Raises ValueError unless every clip has references and every
    reference has text.
    """
    got = [" ".join(tokenize(text, language)) for text in captions]
    want = [[" ".join(tokenize(text, language)) for text in texts] for texts in references]
    if len(got) != len(want) or not all(texts and all(texts) for texts in want):
        raise ValueError("every caption needs references, and every reference text")
    matches = [float(in_language(text, language)) for text in captions]
    parts: Mapping[tuple[str, ...], Callable[[], Iterable[Scores]]] = {
        BLEU: lambda: _bleu(got, want),
        ("meteor",): lambda: [_meteor(got, want, language)],
        ("rouge_l",): lambda: [_rouge_l(got, want)],
        ("cider",): lambda: [_cider(got, want)],
        BERTSCORE: lambda: _bertscore(captions, references, bertscore_model),
        ("language_match",): lambda: [(_mean(matches), matches)],
    }
    corpus: dict[str, float | None] = dict.fromkeys(QUALITY_METRICS)
    per_clip: dict[str, tuple[float | None, ...]] = dict.fromkeys(QUALITY_METRICS, (None,) * len(got))
    reasons = {}
    for names, measure in parts.items():
        try:
            if not got or meaningless:
                raise NotMeasured(meaningless or "no clip was captioned")
            for name, (whole, each) in zip(names, measure(), strict=True):
                corpus[name], per_clip[name] = float(whole), tuple(float(value) for value in each)
        except NotMeasured as error:
            reasons.update(dict.fromkeys(names, str(error)))
    return Quality(
        corpus=corpus,
        per_clip=per_clip,
        empty=sum(not text for text in got),
        tokenizer=TOKENIZERS[language],
        bertscore_model=bertscore.scorer_label(bertscore_model)
        if bertscore_model and corpus["bertscore_f1"] is not None
        else None,
        reasons=reasons,
    )


def _bleu(got: Sequence[str], want: Sequence[Sequence[str]]) -> Iterable[Scores]:
    """BLEU-1 to -4 (Papineni et al. 2002): no smoothing, the reference closest in length, the shorter of two.

    pycocoevalcap counts; its own scores are not used, as they make of 0 matches 1e-15 and of 0 n-grams 1e-9, so that
    captions of three tokens would have a BLEU-4. A clip's BLEU-n goes up to n-grams as long as its caption, sacrebleu's
    effective_order: of a whole corpus of captions shorter than n it is 0, but a single right one of them has 1.
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    clips = [cook_test(text, cook_refs(texts), eff="closest") for text, texts in zip(got, want, strict=True)]
    for n in range(1, len(BLEU) + 1):
        yield _bleu_of(clips, n), [_bleu_of([clip], max(1, min(n, clip["testlen"]))) for clip in clips]


def _bleu_of(clips: Sequence[Mapping[str, Any]], n: int) -> float:
    found = [sum(clip["correct"][i] for clip in clips) for i in range(n)]
    made = [sum(clip["guess"][i] for clip in clips) for i in range(n)]
    if not all(found):
        return 0.0
    length, wanted = (sum(clip[key] for clip in clips) for key in ("testlen", "reflen"))
    brevity = min(1.0, math.exp(1 - wanted / length))
    precision: float = math.prod(a / b for a, b in zip(found, made, strict=True)) ** (1 / n)
    return brevity * precision


def _meteor(got: Sequence[str], want: Sequence[Sequence[str]], language: str) -> Scores:
    """METEOR 1.5, of the same tokens as the others; see `meteor.Meteor.score`."""
    try:
        return meteor.scorer(language).score(got, want)
    except meteor.MeteorUnavailable as error:
        raise NotMeasured(str(error)) from error


def _rouge_l(got: Sequence[str], want: Sequence[Sequence[str]]) -> Scores:
    """ROUGE-L (Lin 2004), beta 1.2: F of the longest common subsequence's best precision and best recall."""
    from pycocoevalcap.rouge.rouge import Rouge

    whole, each = Rouge().compute_score(*_numbered(got, want))
    return whole, each


def _cider(got: Sequence[str], want: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D (Vedantam et al. 2015), 0 to 10: cosine of n-gram counts, weighed by how few clips have the n-gram.

    It is a property of the whole set: one clip alone has none, and a clip's own value depends on the others'. A caption
    of fewer than 4 tokens has no 4-grams and stays under 7.5 even if it is right.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(got) == 1:
        raise NotMeasured("needs at least two clips")
    whole, each = Cider().compute_score(*_numbered(got, want))
    return whole, each


def _bertscore(captions: Sequence[str], references: Sequence[Sequence[str]], model: str | None) -> Iterable[Scores]:
    """Precision, recall and F1 of the texts as they are; see `bertscore.BertScorer.score`."""
    if not model:
        raise NotMeasured("no BERTScore model was given (--bertscore-model)")
    try:
        scorer = bertscore.load_scorer(model)
    except ValueError as error:
        raise NotMeasured(str(error)) from error
    return [(_mean(values), values) for values in scorer.score(captions, references)]


def _numbered(got: Sequence[str], want: Sequence[Sequence[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions as pycocoevalcap wants them."""
    return {i: list(texts) for i, texts in enumerate(want)}, {i: [text] for i, text in enumerate(got)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
