"""Quality of captions against their references: metrics of the corpus and of each clip.

All metrics except BERTScore read the same tokens. Chinese is split into characters, with runs of Latin letters and
digits kept whole. English is split into lower-cased words and punctuation. The results name the tokenizer
(`TOKENIZERS`) and the normalisation before it (`normalisation.NORMALISATIONS`). BERTScore reads the normalised text
with the tokenizer of its own model. A caption without visible text scores 0 and is counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.prompts import look_up
from edgecloud_sd.data.texts import has_visible_text
from edgecloud_sd.measure import bertscore, meteor
from edgecloud_sd.measure.normalisation import DEFAULT_NORMALISATION, NORMALISATIONS

TOKENIZERS = {"chinese": "characters", "english": "lowercase-words-and-punctuation"}
BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
BERTSCORE = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
QUALITY_METRICS = (*BLEU, "meteor", "rouge_l", "cider", *BERTSCORE, "language_match")
SCRIPTS = {"chinese": "CJK ", "english": "LATIN "}  # first word of the Unicode names of the letters
_CHARACTERS = re.compile(r"[A-Za-z0-9]+|\S")
_WORDS = re.compile(r"\w+|[^\w\s]")
_PATTERNS = {"chinese": _CHARACTERS, "english": _WORDS}

Scores = tuple[float, Sequence[float]]  # (corpus score, score of each clip)


class NotMeasured(Exception):
    """A metric has no value; the message is the reason."""


@dataclass(frozen=True)
class Quality:
    """The quality metrics of one set of captions, under the names in `QUALITY_METRICS`.

    A metric that was not measured is None, and `reasons` has its reason.
    """

    corpus: dict[str, float | None]
    per_clip: dict[str, tuple[float | None, ...]]  # language_match is 1.0 or 0.0
    empty: int  # number of captions without visible text
    tokenizer: str
    normalisation: str
    bertscore_model: str | None  # name on the hub, or last component of the folder
    reasons: dict[str, str]


def tokenize(text: str, language: str) -> list[str]:
    """Return the lower-cased tokens of `text` that the metrics compare."""
    pattern = look_up(_PATTERNS, language, "language")
    return pattern.findall(text.lower())


def is_in_language(text: str, language: str) -> bool:
    """Return True if more than half of the letters belong to the script of `language` (Han or Latin).

    Digits, punctuation and spaces are not letters, and a text without letters is in no language. The test finds a model
    that answers in another script. French passes as English, because both use the Latin script.
    """
    script = look_up(SCRIPTS, language, "language")
    letters = [unicodedata.name(character, "") for character in text if character.isalpha()]
    return 2 * sum(name.startswith(script) for name in letters) > len(letters)


def check_bertscore_model(name: str) -> None:
    """Load the BERTScore model for this process. Raise ValueError, with the model and a fix, if that fails."""
    bertscore.load_scorer(name)


def score(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    bertscore_model: str | None = None,
    meaningless: str | None = None,
    normalisation: str = DEFAULT_NORMALISATION,
) -> Quality:
    """Return the metrics of `captions` against `references`, which has one list of texts per caption.

    `bertscore_model` is a folder or a name on the hub (see `bertscore.load_scorer`). `meaningless` is a reason to
    measure nothing, such as random weights. `normalisation` is a name in `normalisation.NORMALISATIONS`. Raise
    ValueError for a caption without references or a reference without visible text.

    CIDEr lies between 0 and 10, and every other metric between 0 and 1. Corpus BLEU and METEOR come from summed counts.
    The other corpus scores are means over clips.
    """
    shown, wanted = normalised(captions, references, normalisation)
    candidates, targets = _tokenized(shown, wanted, language)
    matches = [float(is_in_language(text, language)) for text in captions]
    groups: Mapping[tuple[str, ...], Callable[[], Iterable[Scores]]] = {
        BLEU: lambda: _bleu(candidates, targets),
        ("meteor",): lambda: [_meteor(candidates, targets, language)],
        ("rouge_l",): lambda: [_rouge_l(candidates, targets)],
        ("cider",): lambda: [_cider(candidates, targets)],
        BERTSCORE: lambda: _bertscore(shown, wanted, bertscore_model),
        ("language_match",): lambda: [(_mean(matches), matches)],
    }
    corpus: dict[str, float | None] = dict.fromkeys(QUALITY_METRICS)
    per_clip: dict[str, tuple[float | None, ...]] = dict.fromkeys(QUALITY_METRICS, (None,) * len(candidates))
    label = bertscore_model and bertscore.scorer_label(bertscore_model)
    reasons = {}
    for names, measure in groups.items():
        try:
            if not candidates or meaningless:
                raise NotMeasured(meaningless or "no clip was captioned")
            for name, (corpus_score, clip_scores) in zip(names, measure(), strict=True):
                corpus[name], per_clip[name] = float(corpus_score), tuple(map(float, clip_scores))
        except NotMeasured as error:
            reasons.update(dict.fromkeys(names, str(error)))
    return Quality(
        corpus=corpus,
        per_clip=per_clip,
        empty=sum(not text for text in candidates),
        tokenizer=look_up(TOKENIZERS, language, "language"),
        normalisation=normalisation,
        bertscore_model=label if corpus["bertscore_f1"] is not None else None,
        reasons=reasons,
    )


def score_alone(caption: str, references: Sequence[str], language: str, normalisation: str) -> dict[str, float]:
    """Return the metrics of one caption that need no other caption, no Java and no model, as `score` gives them."""
    candidates, targets = _tokenized(*normalised([caption], [references], normalisation), language)
    measured = zip((*BLEU, "rouge_l"), (*_bleu(candidates, targets), _rouge_l(candidates, targets)), strict=True)
    return {name: float(clip_scores[0]) for name, (_, clip_scores) in measured}


def normalised(
    captions: Sequence[str], references: Sequence[Sequence[str]], normalisation: str
) -> tuple[list[str], list[list[str]]]:
    """Return normalised texts, a caption without visible text as an empty one. Raise ValueError as `score` does."""
    _check_references(len(captions), references)
    normalise = look_up(NORMALISATIONS, normalisation, "normalisation")
    shown = [normalise(text) if has_visible_text(text) else "" for text in captions]
    return shown, [[normalise(text) for text in texts] for texts in references]


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str
) -> tuple[list[str], list[list[str]]]:
    """Return captions and references with a space between tokens."""
    candidates = [" ".join(tokenize(text, language)) for text in captions]
    return candidates, [[" ".join(tokenize(text, language)) for text in texts] for texts in references]


def _check_references(captions: int, references: Sequence[Sequence[str]]) -> None:
    if len(references) != captions:
        raise ValueError(f"{captions} captions have {len(references)} lists of references: give one list per caption")
    for number, texts in enumerate(references, 1):
        if not texts or not all(map(has_visible_text, texts)):
            problem = "a reference without visible text" if texts else "no reference"
            raise ValueError(
                f"caption {number} of {captions} has {problem}: give it at least one text, and no empty one"
            )


def _bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Iterable[Scores]:
    """Yield BLEU-1 to BLEU-4 (Papineni et al. 2002) without smoothing.

    A clip's BLEU-n has n-grams no longer than its caption, like `effective_order` of sacrebleu. Corpus BLEU-n has all
    orders up to n, so a corpus in which every caption is shorter than n tokens has 0.
    """
    counts = _bleu_counts(candidates, references)
    orders = [max(1, min(len(BLEU), len(text.split()))) for text in candidates]
    for n in range(1, len(BLEU) + 1):
        clip_scores = [float(bleu_of_counts(clip, min(n, order))) for clip, order in zip(counts, orders, strict=True)]
        yield float(bleu_of_counts(counts.sum(0), n)), clip_scores


def bleu_counts(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str, normalisation: str
) -> NDArray[np.float64]:
    """Return the counts of each clip [clips, 10] from which `bleu_of_counts` computes BLEU."""
    return _bleu_counts(*_tokenized(*normalised(captions, references, normalisation), language))


def cider_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str, normalisation: str
) -> NDArray[np.float64]:
    """Return CIDEr of each clip [clips], as `score` gives it. Raise NotMeasured for clips that have none."""
    _, clip_scores = _cider(*_tokenized(*normalised(captions, references, normalisation), language))
    return np.asarray(clip_scores, dtype=float)


def _bleu_counts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return matches and totals of the four orders, the caption's length and the reference's length, for each clip.

    The reference's length is that of the reference closest in length, or of the shorter one of two that are equally
    close. pycocoevalcap counts the n-grams. Its scores are not used: it adds 1e-15 to the matches and 1e-9 to the
    n-grams, so that a caption of three tokens has a BLEU-4.
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    clips = [
        cook_test(text, cook_refs(texts), eff="closest") for text, texts in zip(candidates, references, strict=True)
    ]
    rows = [[*clip["correct"], *clip["guess"], clip["testlen"], clip["reflen"]] for clip in clips]
    return np.array(rows, dtype=float).reshape(-1, 2 * len(BLEU) + 2)


def bleu_of_counts(counts: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return BLEU-n of summed or mean counts [..., 10]: brevity penalty times geometric mean of the precisions."""
    matches, totals = counts[..., :n], counts[..., len(BLEU) : len(BLEU) + n]
    length, reference_length = counts[..., -2], counts[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity_penalty = np.exp(np.minimum(0.0, 1 - reference_length / length))
        score = brevity_penalty * np.prod(matches / totals, axis=-1) ** (1 / n)
    return np.where((matches > 0).all(-1), score, 0.0)


def _meteor(candidates: Sequence[str], references: Sequence[Sequence[str]], language: str) -> Scores:
    """Return METEOR 1.5 (see `meteor.Meteor.score`)."""
    try:
        return meteor.get_meteor(language).score(candidates, references)
    except meteor.MeteorUnavailable as error:
        raise NotMeasured(str(error)) from error


def _rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Return ROUGE-L (Lin 2004) with beta 1.2: F of the best precision and the best recall over the references."""
    from pycocoevalcap.rouge.rouge import Rouge

    corpus_score, clip_scores = Rouge().compute_score(*_numbered(candidates, references))
    return corpus_score, clip_scores


def _cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Return CIDEr-D (Vedantam et al. 2015), 0 to 10: the cosine of n-gram counts, with rare n-grams weighted higher.

    The weights come from all clips, so a clip's score depends on the other clips, and a single clip has no score. A
    caption of fewer than 4 tokens has no 4-grams and stays below 7.5 even if it is right. An n-gram that the references
    of every clip have weighs nothing, so clips with equal references have no score.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.cider.cider_scorer import precook

    if len(candidates) == 1:
        raise NotMeasured("CIDEr needs at least two clips")
    if len({frozenset(ngram for text in texts for ngram in precook(text)) for texts in references}) == 1:
        raise NotMeasured("the references of all clips have the same n-grams, and CIDEr gives these the weight 0")
    corpus_score, clip_scores = Cider().compute_score(*_numbered(candidates, references))
    return corpus_score, clip_scores


def _bertscore(captions: Sequence[str], references: Sequence[Sequence[str]], model: str | None) -> Iterable[Scores]:
    """Return precision, recall and F1 of the normalised texts (see `bertscore.BertScorer.score`)."""
    if not model:
        raise NotMeasured("no BERTScore model was given (--bertscore-model)")
    try:
        scorer = bertscore.load_scorer(model)
    except ValueError as error:
        raise NotMeasured(str(error)) from error
    return [(_mean(values), values) for values in scorer.score(captions, references)]


def _numbered(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and candidates by clip number, which is the input format of pycocoevalcap."""
    return {i: list(texts) for i, texts in enumerate(references)}, {i: [text] for i, text in enumerate(candidates)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
