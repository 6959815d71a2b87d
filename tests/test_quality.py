"""Caption scores, against examples small enough to count by hand."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd import quality
from edgecloud_sd.prompts import LANGUAGES
from edgecloud_sd.quality import score, tokenize

CLOSE = 1e-6  # pycocoevalcap adds a billionth to its denominators


def test_chinese_is_cut_into_characters_and_latin_runs_stay_whole() -> None:
    assert tokenize("他很OK，说了 3.5 次", "chinese") == ["他", "很", "ok", "，", "说", "了", "3", ".", "5", "次"]


def test_english_is_cut_into_lower_cased_words_and_punctuation() -> None:
    assert tokenize("She's HAPPY, très happy!", "english") == ["she", "'", "s", "happy", ",", "très", "happy", "!"]


def test_every_language_has_a_tokenizer_that_the_scores_name() -> None:
    assert set(quality.TOKENIZERS) == set(LANGUAGES)
    assert {language: score(["x"], [["x"]], language).tokenizer for language in LANGUAGES} == quality.TOKENIZERS


@settings(max_examples=20)
@given(
    st.lists(
        st.text("她他很高兴悲伤，ab", min_size=4).filter(lambda text: len(tokenize(text, "chinese")) >= 4), min_size=1
    )
)
def test_identical_text_scores_1(captions: list[str]) -> None:
    scores = score(captions, [[text] for text in captions], "chinese")
    assert (scores.bleu1, scores.bleu4) == pytest.approx((1, 1), abs=CLOSE)
    assert scores.per_clip_bleu4 == pytest.approx([1] * len(captions), abs=CLOSE)


def test_two_clips_that_are_right_and_share_nothing_have_the_highest_cider() -> None:
    texts = ["the man sounds very angry", "a woman speaks with joy"]
    assert score(texts, [[text] for text in texts], "english").cider == pytest.approx(10)


def test_captions_for_the_wrong_clip_have_cider_0() -> None:
    texts = ["the man sounds very angry", "a woman speaks with joy"]
    assert score(texts[::-1], [[text] for text in texts], "english").cider == pytest.approx(0)


def test_bleu_counted_by_hand() -> None:
    scores = score(["a b c d e"], [["a b c d f"]], "english")
    # n-grams found: 4 of 5, 3 of 4, 2 of 3, 1 of 2; the lengths are equal
    assert scores.bleu1 == pytest.approx(4 / 5, abs=CLOSE)
    assert scores.bleu4 == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), abs=CLOSE)


def test_bleu_counted_by_hand_in_chinese() -> None:
    scores = score(["他说话很慢"], [["他说话很快"]], "chinese")
    assert scores.bleu1 == pytest.approx(4 / 5, abs=CLOSE)
    assert scores.bleu4 == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), abs=CLOSE)


def test_a_short_caption_pays_the_brevity_penalty() -> None:
    scores = score(["a b c d"], [["a b c d e"]], "english")
    assert (scores.bleu1, scores.bleu4) == pytest.approx((math.exp(1 - 5 / 4),) * 2, abs=CLOSE)


def test_a_repeated_word_counts_as_often_as_one_reference_has_it() -> None:
    # the example of Papineni et al. 2002, section 2.1
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert score(["the the the the the the the"], [references], "english").bleu1 == pytest.approx(2 / 7, abs=CLOSE)


def test_corpus_bleu_pools_counts_and_is_no_mean_of_clips() -> None:
    scores = score(["a b c d", "e f g h i j k l"], [["a b c d"], ["m n o p q r s t"]], "english")
    assert scores.bleu1 == pytest.approx(4 / 12, abs=CLOSE)
    assert scores.bleu4 == pytest.approx((4 / 12 * 3 / 10 * 2 / 8 * 1 / 6) ** (1 / 4), abs=CLOSE)
    assert scores.per_clip_bleu4 == pytest.approx((1, 0), abs=1e-3)


def test_the_best_of_several_references_counts() -> None:
    captions, good, bad = ["他的声音很高兴"], "他的声音很高兴", "一位女士在哭"
    alone, among = score(captions, [[good]], "chinese"), score(captions, [[bad, good, bad]], "chinese")
    assert among.bleu4 == pytest.approx(alone.bleu4)
    assert among.bleu4 == pytest.approx(1, abs=CLOSE)


def test_clips_may_have_different_numbers_of_references() -> None:
    scores = score(["a b c d", "e f g h"], [["a b c d"], ["x", "e f g h", "y z"]], "english")
    assert scores.per_clip_bleu4 == pytest.approx((1, 1), abs=CLOSE)


def test_an_empty_caption_scores_0_and_is_counted() -> None:
    scores = score(["", "a b c d", " \n"], [["a b c d"]] * 3, "english")
    assert scores.empty == 2
    assert scores.per_clip_bleu4 == pytest.approx((0, 1, 0), abs=CLOSE)
    # all that was said is right, and a third of what should have been: the brevity penalty of 4 words for 12
    assert scores.bleu1 == pytest.approx(math.exp(1 - 12 / 4), abs=CLOSE)


def test_nothing_but_empty_captions_scores_0() -> None:
    scores = score(["", ""], [["a b c d"], ["e f g h"]], "english")
    assert (scores.bleu1, scores.bleu4, scores.cider) == pytest.approx((0, 0, 0), abs=CLOSE)
    assert scores.empty == 2


def test_one_clip_alone_has_no_cider_and_the_reason_says_so() -> None:
    scores = score(["a b c d"], [["a b c d"]], "english")
    assert scores.cider is None
    assert scores.reasons == {"cider": "needs at least two clips"}


def test_references_without_a_word_have_no_cider_and_the_reason_says_so() -> None:
    scores = score(["a", ""], [[" "], [" "]], "english")
    assert scores.cider is None
    assert scores.reasons == {"cider": "no reference has a word"}


def test_two_clips_need_no_reason() -> None:
    assert score(["a", "b"], [["a"], ["b"]], "english").reasons == {}


def test_no_clip_at_all_has_no_scores_and_says_why() -> None:
    scores = score([], [], "english")
    assert (scores.bleu1, scores.bleu4, scores.cider) == (None, None, None)
    assert scores.per_clip_bleu4 == ()
    assert set(scores.reasons) == {"bleu1", "bleu4", "cider"}


references = st.text("aabc ", min_size=1, max_size=12).filter(str.strip)
captions_and_references = st.lists(
    st.tuples(st.text("aab c", max_size=12), st.lists(references, min_size=1, max_size=3)), min_size=2, max_size=6
)


@settings(max_examples=20)
@given(captions_and_references, st.randoms(use_true_random=False))
def test_the_order_of_clips_changes_nothing(pairs: list[tuple[str, list[str]]], random: Random) -> None:
    order = list(range(len(pairs)))
    random.shuffle(order)
    before = score([text for text, _ in pairs], [texts for _, texts in pairs], "chinese")
    after = score([pairs[i][0] for i in order], [pairs[i][1] for i in order], "chinese")
    assert after.per_clip_bleu4 == tuple(before.per_clip_bleu4[i] for i in order)
    assert (after.bleu1, after.bleu4, after.cider) == pytest.approx((before.bleu1, before.bleu4, before.cider))
    assert (after.empty, after.reasons) == (before.empty, before.reasons)


@settings(max_examples=20)
@given(captions_and_references)
def test_scores_stay_in_their_ranges(pairs: list[tuple[str, list[str]]]) -> None:
    scores = score([text for text, _ in pairs], [texts for _, texts in pairs], "english")
    assert scores.bleu1 is not None
    assert scores.bleu4 is not None
    assert scores.cider is not None
    assert 0 <= scores.bleu1 <= 1 + CLOSE
    assert 0 <= scores.bleu4 <= 1 + CLOSE
    assert 0 <= scores.cider <= 10 + CLOSE
    assert all(0 <= each <= 1 + CLOSE for each in scores.per_clip_bleu4)
