"""Quality metrics, compared with examples counted by hand, with sacrebleu and with bert-score."""

from __future__ import annotations

import gzip
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.measure import bertscore, meteor, normalisation, quality
from edgecloud_sd.measure.meteor import Meteor, MeteorUnavailable
from edgecloud_sd.measure.quality import (
    BERTSCORE,
    BLEU,
    QUALITY_METRICS,
    Quality,
    check_bertscore_model,
    is_in_language,
    score,
    tokenize,
)

CLOSE = 1e-6
NO_MODEL = "no BERTScore model was given (--bertscore-model)"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture(scope="module", autouse=True)
def few_paraphrases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give English METEOR two paraphrases, because reading its 16 million lines takes longer than all these tests."""
    table = tmp_path_factory.mktemp("meteor") / "paraphrases.gz"
    table.write_bytes(gzip.compress(b"0.5\njoyful\nin high spirits\n0.3\nvery sad\nin tears\n"))
    meteor.get_meteor("english").close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "PARAPHRASES", table)
        yield
    meteor.get_meteor("english").close()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a BERT with three random layers, few characters and no stated maximum length."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"他她很高兴悲伤abcdefgh"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=1.0,  # a smaller value makes all tokens alike
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script in place of Java."""

    def install(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def java_free_scores(scores: Quality) -> dict[str, float | None]:
    """Return the metrics that need neither Java nor a model."""
    return {name: value for name, value in scores.corpus.items() if name not in ("meteor", *BERTSCORE)}


# tokens and languages


def test_chinese_is_split_into_characters_and_latin_runs_stay_whole() -> None:
    assert tokenize("他很OK，说了 3.5 次", "chinese") == ["他", "很", "ok", "，", "说", "了", "3", ".", "5", "次"]


def test_english_is_split_into_lower_cased_words_and_punctuation() -> None:
    assert tokenize("She's HAPPY, très happy!", "english") == ["she", "'", "s", "happy", ",", "très", "happy", "!"]


@pytest.mark.slow
def test_the_scores_name_the_tokenizer_of_every_language() -> None:
    assert set(quality.TOKENIZERS) == set(quality.SCRIPTS) == set(meteor.METEOR_OPTIONS) == set(LANGUAGES)
    assert {language: score(["x"], [["x"]], language).tokenizer for language in LANGUAGES} == quality.TOKENIZERS


def test_case_and_spaces_do_not_change_a_score() -> None:
    assert score(["He is GLAD ."], [["he is glad."]], "english").corpus["bleu4"] == 1
    assert score(["他 很高 兴"], [["他很高兴"]], "chinese").corpus["bleu4"] == 1


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("他说话很慢。", ["chinese"]),
        ("He speaks slowly, très lentement.", ["english"]),
        ("他很OK，很高兴", ["chinese"]),
        ("他很 happy", ["english"]),
        ("他……！", ["chinese"]),
        ("他很ok", []),
        ("かなしい声", []),
        ("Он говорит", []),
        ("12, 3!", []),
        ("", []),
    ],
)
def test_a_text_is_in_the_language_of_most_of_its_letters(text: str, languages: list[str]) -> None:
    assert [language for language in LANGUAGES if is_in_language(text, language)] == languages


def test_language_match_is_the_share_of_matching_clips() -> None:
    scores = score(["他很高兴", "he is glad", "", "她很悲伤"], [["他很高兴"]] * 4, "chinese")
    assert list(scores.per_clip["language_match"]) == [1, 0, 0, 1]
    assert scores.corpus["language_match"] == 0.5


# the metrics


@pytest.mark.slow
def test_every_metric_has_a_value_or_a_reason(bert: Path) -> None:
    for model in (None, str(bert)):
        scores = score(["他很高兴", "", "a"], [["他很高兴"], ["她很悲伤"], ["a", "b"]], "chinese", model)
        assert list(scores.corpus) == list(scores.per_clip) == list(QUALITY_METRICS)
        assert scores.reasons.keys() == {name for name, value in scores.corpus.items() if value is None}
        for name, values in scores.per_clip.items():
            assert [value is None for value in values] == [scores.corpus[name] is None] * 3


@needs_java
@settings(max_examples=10)
@given(
    st.lists(
        st.text("她他很高兴悲伤，ab", min_size=4).filter(lambda text: len(tokenize(text, "chinese")) >= 4), min_size=1
    ),
    st.sampled_from(LANGUAGES),
)
def test_identical_text_scores_1(captions: list[str], language: str) -> None:
    scores = score(captions, [["高。", text] for text in captions], language)
    for name in {*QUALITY_METRICS} - {*BERTSCORE, "cider", "language_match"}:
        assert scores.per_clip[name] == pytest.approx([1] * len(captions), abs=CLOSE)
        if name not in BLEU or language == "chinese":  # in English these captions may have fewer than 4 tokens
            assert scores.corpus[name] == pytest.approx(1, abs=CLOSE)


def test_identical_text_has_bertscore_1(bert: Path) -> None:
    texts = ["他很高兴", "a b c", "很"]
    scores = score(texts, [[text] for text in texts], "chinese", str(bert))
    assert scores.bertscore_model == "tiny-bert"
    for name in BERTSCORE:
        assert scores.per_clip[name] == pytest.approx([1, 1, 1], abs=CLOSE)
        assert scores.corpus[name] == pytest.approx(1, abs=CLOSE)


def test_two_right_captions_without_shared_words_have_cider_10() -> None:
    texts = ["the man sounds very angry", "a woman speaks with joy"]
    scores = score(texts, [[text] for text in texts], "english")
    assert scores.corpus["cider"] == pytest.approx(10)
    assert scores.per_clip["cider"] == pytest.approx([10, 10])


def test_cider_alone_is_that_of_all_metrics() -> None:
    captions, references = ["a dog runs", "a cat sits down"], [["a dog walks"], ["the cat sits down"]]
    alone = quality.cider_scores(captions, references, "english", normalisation.DEFAULT_NORMALISATION)
    assert alone == pytest.approx(score(captions, references, "english").per_clip["cider"])
    with pytest.raises(quality.NotMeasured, match="at least two clips"):
        quality.cider_scores(captions[:1], references[:1], "english", normalisation.DEFAULT_NORMALISATION)


def test_swapped_captions_without_shared_words_have_cider_0() -> None:
    texts = ["the man sounds very angry", "a woman speaks with joy"]
    assert score(texts[::-1], [[text] for text in texts], "english").corpus["cider"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("caption", "reference", "language"),
    [("a b c d e", "a b c d f", "english"), ("他说话很慢", "他说话很快", "chinese")],
)
def test_bleu_and_rouge_match_a_count_by_hand(caption: str, reference: str, language: str) -> None:
    scores = score([caption], [[reference]], language)
    # n-grams matched: 4 of 5, 3 of 4, 2 of 3, 1 of 2; the lengths are equal
    precisions = [4 / 5, 3 / 4, 2 / 3, 1 / 2]
    assert [scores.corpus[name] for name in BLEU] == pytest.approx(
        [math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]
    )
    assert scores.corpus["rouge_l"] == pytest.approx(4 / 5)


@needs_java
def test_meteor_matches_a_count_by_hand() -> None:
    # 4 of 6 tokens match, in two chunks: F-mean 4/6, less a penalty of 0.7 (2/4)^1.4
    expected = 4 / 6 * (1 - 0.7 * (2 / 4) ** 1.4)
    scores = score(["高伤，乐音低", "她很悲伤"], [["悲伤，声音低"], ["男声"]], "chinese")
    assert scores.per_clip["meteor"] == pytest.approx((expected, 0))
    # summed: 4 of 10 tokens for 4 of 8, alpha 0.75
    precision, recall = 4 / 10, 4 / 8
    mean = precision * recall / (0.75 * precision + 0.25 * recall)
    assert scores.corpus["meteor"] == pytest.approx(mean * (1 - 0.7 * (2 / 4) ** 1.4))


@needs_java
def test_english_meteor_matches_stems_synonyms_and_paraphrases_and_chinese_does_not() -> None:
    references = [["he sounds"], ["a big dog"], ["she is very sad"]]
    captions = ["he sounded", "a large dog", "she is in tears"]
    for language, has_matches in {"english": True, "chinese": False}.items():
        values = score(captions, references, language).per_clip["meteor"]
        others = score(["he walked", "a cold dog", "she is in town"], references, language).per_clip["meteor"]
        assert [a > b for a, b in zip(values, others, strict=True)] == [has_matches] * 3  # type: ignore[operator]


def test_bertscore_equals_the_score_of_bert_score(bert: Path) -> None:
    from bert_score import BERTScorer

    theirs = BERTScorer(model_type=str(bert), num_layers=3, device="cpu")
    theirs._tokenizer.model_max_length = 62
    captions = ["他很高兴", "a b c d", "悲", "她很悲伤"]
    references = [["她很高兴", "悲伤"], ["a b"], ["高", "他很悲", "伤"], ["他很高兴"]]
    expected = [values.tolist() for values in theirs.score(captions, references)]
    scores = score(captions, references, "chinese", str(bert))
    for name, values in zip(BERTSCORE, expected, strict=True):
        assert scores.per_clip[name] == pytest.approx(values, abs=CLOSE)
        assert scores.corpus[name] == pytest.approx(sum(values) / 4, abs=CLOSE)
    assert max(expected[2]) < 0.99


def test_a_short_caption_pays_the_brevity_penalty() -> None:
    scores = score(["a b c d"], [["a b c d e"]], "english")
    assert [scores.corpus[name] for name in BLEU] == pytest.approx([math.exp(1 - 5 / 4)] * 4)


def test_a_repeated_word_counts_only_as_often_as_in_one_reference() -> None:
    # the example of Papineni et al. 2002, section 2.1
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert score(["the the the the the the the"], [references], "english").corpus["bleu1"] == pytest.approx(2 / 7)


def test_corpus_bleu_comes_from_summed_counts() -> None:
    scores = score(["a b c d", "e f g h i j k l"], [["a b c d"], ["m n o p q r s t"]], "english")
    assert scores.corpus["bleu1"] == pytest.approx(4 / 12)
    assert scores.corpus["bleu4"] == pytest.approx((4 / 12 * 3 / 10 * 2 / 8 * 1 / 6) ** (1 / 4))
    assert scores.per_clip["bleu4"] == pytest.approx((1, 0))


def test_a_clip_too_short_for_4_grams_has_bleu_4_from_shorter_n_grams() -> None:
    alone = score(["他很慢"], [["他很慢"]], "chinese")
    assert (alone.per_clip["bleu4"], alone.corpus["bleu4"]) == ((1,), 0)
    among = score(["他很慢", "她说话很慢"], [["他很慢"], ["她说话很慢"]], "chinese")
    assert (among.per_clip["bleu4"], among.corpus["bleu4"]) == ((1, 1), 1)


words = st.text("aab ", max_size=12).map(lambda text: " ".join(text.replace(" ", "")))
some_words = words.filter(bool)
corpora = st.lists(st.tuples(words, st.lists(some_words, min_size=1, max_size=3)), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=20)
@given(corpora)
def test_bleu_equals_the_score_of_sacrebleu(pairs: list[tuple[str, list[str]]]) -> None:
    import sacrebleu

    captions, references = [text for text, _ in pairs], [texts for _, texts in pairs]
    scores = score(captions, references, "english")
    streams: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(3)]
    for n, name in enumerate(BLEU, 1):
        of_corpus = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        of_clip = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, effective_order=True)
        theirs = [of_clip.sentence_score(text, texts).score / 100 for text, texts in pairs]
        assert scores.corpus[name] == pytest.approx(of_corpus.corpus_score(captions, streams).score / 100, abs=CLOSE)
        assert scores.per_clip[name] == pytest.approx(theirs, abs=CLOSE)


@needs_java
def test_the_best_of_several_references_counts(bert: Path) -> None:
    captions, good, bad = ["他的声音很高兴"], "他的声音很高兴", "一位女士在哭"
    alone = score(captions, [[good]], "chinese", str(bert))
    among = score(captions, [[bad, good, bad]], "chinese", str(bert))
    for name in {*QUALITY_METRICS} - {"cider"}:
        assert among.corpus[name] == pytest.approx(alone.corpus[name])
        assert among.corpus[name] == pytest.approx(1, abs=CLOSE)


def test_clips_may_have_different_numbers_of_references() -> None:
    scores = score(["a b c d", "e f g h"], [["a b c d"], ["x", "e f g h", "y z"]], "english")
    assert scores.per_clip["bleu4"] == scores.per_clip["rouge_l"] == (1, 1)


@needs_java
def test_an_empty_caption_scores_0_and_is_counted(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scores = score(["", "a b c d", " \n"], [["a b c d"]] * 3, "english", str(bert))
    assert scores.empty == 2
    for name in {*QUALITY_METRICS} - {"cider"}:
        assert scores.per_clip[name] == pytest.approx((0, 1, 0), abs=CLOSE)
    # all words are right, and the brevity penalty is that of 4 words for 12
    assert scores.corpus["bleu1"] == pytest.approx(math.exp(1 - 12 / 4))
    # METEOR has a recall of one third (alpha 0.85) and no penalty, because one clip is completely right
    assert scores.corpus["meteor"] == pytest.approx(4 / 12 / (0.85 + 0.15 * 4 / 12))
    assert capfd.readouterr().err == ""


@needs_java
def test_a_corpus_of_empty_captions_scores_0(bert: Path) -> None:
    scores = score(["", ""], [["a b c d"], ["e f g h"]], "english", str(bert))
    assert scores.corpus == dict.fromkeys(QUALITY_METRICS, 0)
    assert (scores.empty, scores.reasons) == (2, {})


def test_documented_means_are_means_over_clips(bert: Path) -> None:
    scores = score(["他很高兴", "她伤", "a"], [["她很高兴"], ["她很悲伤"], ["a b", "高"]], "chinese", str(bert))
    for name in ("rouge_l", "cider", "language_match", *BERTSCORE):
        assert scores.corpus[name] == pytest.approx(sum(scores.per_clip[name]) / 3)  # type: ignore[arg-type]


@settings(max_examples=10)
@given(corpora.filter(lambda pairs: len(pairs) > 1), st.randoms(use_true_random=False))
def test_the_order_of_clips_changes_nothing(pairs: list[tuple[str, list[str]]], random: Random) -> None:
    shuffled_like(pairs, random, None)


def test_the_order_of_clips_changes_no_bertscore(bert: Path) -> None:
    texts = ["他很高兴", "", "她很悲伤", "a b c", "悲"]
    pairs = [(text, [other, "很高"]) for text, other in zip(texts, ["她高兴", "他", "悲伤", "a c", "伤"], strict=True)]
    shuffled_like(pairs, Random(0), str(bert))


def shuffled_like(pairs: list[tuple[str, list[str]]], random: Random, model: str | None) -> None:
    order = list(range(len(pairs)))
    random.shuffle(order)
    before = score([text for text, _ in pairs], [texts for _, texts in pairs], "chinese", model)
    after = score([pairs[i][0] for i in order], [pairs[i][1] for i in order], "chinese", model)
    for name in QUALITY_METRICS:
        assert after.corpus[name] == pytest.approx(before.corpus[name], abs=CLOSE)
        assert after.per_clip[name] == pytest.approx([before.per_clip[name][i] for i in order], abs=CLOSE)
    assert (after.empty, after.reasons) == (before.empty, before.reasons)


@settings(max_examples=10)
@given(corpora)
def test_scores_stay_in_their_ranges(pairs: list[tuple[str, list[str]]]) -> None:
    scores = score([text for text, _ in pairs], [texts for _, texts in pairs], "english")
    for name in QUALITY_METRICS:
        for value in (scores.corpus[name], *scores.per_clip[name]):
            assert value is None or 0 <= value <= (10 if name == "cider" else 1) + CLOSE


# normalisation


WIDE = "Ａ，（ﾊ）！\u3000～￥"


@pytest.mark.parametrize(
    ("name", "text", "normalised"),
    [
        ("none", f"e\u0301{WIDE}", f"e\u0301{WIDE}"),
        ("nfc", f"e\u0301{WIDE}", "éＡ,(ﾊ)! ~¥"),
        ("nfkc", f"e\u0301{WIDE}", "éA,(ハ)! ~¥"),
        ("nfc", "｡､｢｣。、…“”", "。、「」。、…“”"),
    ],
)
def test_a_normalisation_changes_what_it_states(name: str, text: str, normalised: str) -> None:
    assert normalisation.NORMALISATIONS[name](text) == normalised


@given(st.text(), st.sampled_from([*normalisation.NORMALISATIONS]))
def test_a_normalised_text_stays_as_it_is(text: str, name: str) -> None:
    normalise = normalisation.NORMALISATIONS[name]
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(("name", "is_equal"), [("none", False), ("nfc", True), ("nfkc", True)])
def test_widths_and_forms_of_equal_text_change_no_score_unless_asked(name: str, is_equal: bool) -> None:
    wide, plain = "cafe\u0301，很高！", "café,很高!"
    scores = score([wide, "悲伤"], [[plain], ["悲伤"]], "chinese", normalisation=name)
    assert scores.normalisation == name
    for metric in ("bleu1", "bleu4", "rouge_l"):
        assert (scores.per_clip[metric][0] == pytest.approx(1, abs=CLOSE)) is is_equal


# reasons for missing scores


@pytest.mark.parametrize("references", [[["a b c"]] * 3, [["a b c", "a b"], ["a b c"], ["b c", "A B C"]]], ids=str)
def test_clips_with_equal_references_have_no_cider_but_a_reason(references: list[list[str]]) -> None:
    scores = score(["a b c", "a x", "d"], references, "english")
    assert (scores.corpus["cider"], scores.per_clip["cider"]) == (None, (None,) * 3)
    assert "same n-grams" in scores.reasons["cider"]
    assert score(["a b c", "a x", "d"], [*references[:2], ["a c b"]], "english").corpus["cider"] is not None


def test_a_single_clip_has_no_cider_but_a_reason() -> None:
    scores = score(["a b c d"], [["a b c d"]], "english")
    assert (scores.corpus["cider"], scores.per_clip["cider"]) == (None, (None,))
    assert scores.reasons["cider"] == "CIDEr needs at least two clips"


@needs_java
def test_two_clips_without_a_bertscore_model_lack_only_bertscore() -> None:
    assert score(["a", "b"], [["a"], ["b"]], "english").reasons == dict.fromkeys(BERTSCORE, NO_MODEL)


def test_no_clips_have_no_scores_but_a_reason() -> None:
    scores = score([], [], "english")
    assert scores.corpus == dict.fromkeys(QUALITY_METRICS)
    assert scores.per_clip == dict.fromkeys(QUALITY_METRICS, ())
    assert scores.reasons == dict.fromkeys(QUALITY_METRICS, "no clip was captioned")


@pytest.mark.parametrize(
    ("references", "problem"),
    [
        ([["a"]], "2 captions have 1 lists of references: give one list per caption"),
        ([["a"], []], "caption 2 of 2 has no reference: give it at least one text"),
        *[
            ([["a"], ["b", text]], "caption 2 of 2 has a reference without visible text: give it at least one text")
            for text in (
                " ",
                "\u200b\ufeff",
                "\x00\x1f",
                "\ufe0f",
                "\u0301",
                "\u3164\u2800",
                "\ue000",
                "\ud800",
                "\u00ad",
            )
        ],
    ],
)
def test_a_caption_without_a_usable_reference_is_refused(references: list[list[str]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        score(["a", "b"], references, "english")


def test_without_java_only_meteor_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(meteor, "get_meteor", Meteor)
    scores = score(["a b", "c"], [["a"], ["c"]], "english")
    assert (scores.corpus["meteor"], scores.per_clip["meteor"]) == (None, (None, None))
    assert scores.reasons["meteor"] == "METEOR needs Java, which is not installed"
    assert None not in java_free_scores(scores).values()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Error: no heap' >&2; printf '\\tat edu.cmu\\n' >&2; exit 1", "METEOR failed: Error: no heap"),
        ("echo 'Could not reserve memory'; exit 1", "METEOR failed: Could not reserve memory"),
        ("while read -r line; do echo; done", "METEOR failed: Java ended"),
        ("read -r line; echo 1.0; read -r line; echo 1.0", "METEOR failed: Java ended"),
    ],
)
def test_the_message_of_a_failing_java_is_the_reason(
    script: str, reason: str, fake_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(script)
    monkeypatch.setattr(meteor, "START_SECONDS", 10)
    with pytest.raises(MeteorUnavailable) as failed:
        # the text is larger than a pipe buffer, so Java ends before it has read everything
        Meteor("chinese").score(["a " * 50_000], [["a"]])
    assert str(failed.value).startswith(reason)
    assert "edu.cmu" not in str(failed.value)


def test_a_hanging_java_is_killed_in_time(fake_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java("sleep 60; echo 'too late'")  # the child of the script keeps the pipe open
    monkeypatch.setattr(meteor, "START_SECONDS", 0.1)
    monkeypatch.setattr(meteor, "CLIP_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(MeteorUnavailable, match=r"METEOR took longer than 0.2 s"):
        Meteor("chinese").score(["a"], [["a"]])
    assert time.monotonic() - start < 30


def test_a_java_with_many_warnings_does_not_block(fake_java: Callable[[str], None]) -> None:
    fake_java("head -c 300000 /dev/zero >&2; read -r line; echo 1.0; read -r line; echo 0.5; echo 0.25")
    mine = Meteor("chinese")
    assert mine.score(["a"], [["a"]]) == (0.25, [0.5])
    mine.close()


def test_a_java_that_cannot_start_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_bytes(b"\x7fELF")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeteorUnavailable, match="METEOR needs Java, which cannot be started: "):
        Meteor("chinese").score(["a"], [["a"]])


@pytest.mark.slow
@needs_java
def test_java_restarts_after_it_was_killed_and_ends_on_close() -> None:
    def children() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child.name() == "java"]

    before = children()
    mine = Meteor("chinese")
    assert mine.score(["a b"], [["a b"]]) == mine.score(["a b"], [["a b"]]) == (1, [1])
    (java,) = set(children()) - set(before)
    java.kill()
    java.wait()
    assert mine.score(["a b"], [["a b"]]) == (1, [1])
    mine.close()
    assert children() == before


@needs_java
def test_odd_characters_do_not_break_the_protocol_of_meteor() -> None:
    odd = [
        "a ||| b",
        "|||",
        "EVAL ||| a",
        "a\nb",
        "a\rb\u2028c\x85d",
        "\ud800 a",
        "a\x00b",
        "".join(map(chr, range(0x4E00, 0x5000))),
        "\ufeff你",
    ]
    scores = score([*odd, "a b c"], [[text] for text in [*odd, "a b d"]], "chinese")
    alone = score(["a b c"], [["a b d"]], "chinese")
    assert scores.per_clip["meteor"] == pytest.approx((*[1] * len(odd), alone.corpus["meteor"]))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "tiny-bert"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "a t5 is not an encoder of text"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "deserializing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "tiny-bert"),
        (lambda folder: (folder / "vocab.txt").unlink(), "its tokenizer knows no words"),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
            ),
            "its file lacks 16 weights",
        ),
    ],
)
def test_an_unusable_model_is_refused_early_and_is_the_reason_later(
    break_it: Callable[[Path], object], reason: str, bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / bert.name
    shutil.copytree(bert, folder)
    break_it(folder)
    with pytest.raises(ValueError, match=f"^BERTScore model 'tiny-bert' cannot be loaded: .*{reason}") as failed:
        check_bertscore_model(str(folder))
    assert str(tmp_path) not in str(failed.value)
    scores = score(["a"], [["a"]], "english", str(folder))
    assert scores.bertscore_model is None
    assert {scores.reasons[name] for name in BERTSCORE} == {str(failed.value)}
    assert [scores.corpus[name] for name in BERTSCORE] == [None] * 3


def test_an_unknown_model_name_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"BERTScore model 'nobody/no-such-model' cannot be loaded: .*encoder's name"):
        check_bertscore_model("nobody/no-such-model")


def test_without_bert_score_the_reason_names_the_package(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bertscore.load_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score.utils", None)
    scores = score(["a"], [["a"]], "english", str(bert))
    assert scores.reasons["bertscore_f1"].startswith("BERTScore model 'tiny-bert': bert-score is not installed")


def test_the_model_is_loaded_once_and_silently_and_logging_is_restored(
    bert: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    for bar in (True, False):
        monkeypatch.setattr(logging, "_tqdm_active", bar)
        bertscore.load_scorer.cache_clear()
        state = (logging.get_verbosity(), logging.is_progress_bar_enabled())
        check_bertscore_model(str(bert))
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == state
    assert capfd.readouterr() == ("", "")
    assert bertscore.load_scorer(str(bert)) is bertscore.load_scorer(str(bert))


def test_a_listed_model_gets_its_listed_layer_and_another_model_its_last(bert: Path, tmp_path: Path) -> None:
    from bert_score.utils import model2layers

    assert bertscore.load_scorer(str(bert)).model.config.num_hidden_layers == 3
    known, layer = next((name, layer) for name, layer in model2layers.items() if "/" not in name)
    shutil.copytree(bert, tmp_path / known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model2layers, known, 1)
        assert bertscore.load_scorer(str(tmp_path / known)).model.config.num_hidden_layers == 1
    assert layer > 3  # the copy has 3 layers
    bertscore.load_scorer.cache_clear()
    assert bertscore.load_scorer(str(tmp_path / known)).model.config.num_hidden_layers == 3


def test_a_text_longer_than_the_model_is_cut(bert: Path) -> None:
    assert bertscore.load_scorer(str(bert)).score(["他很" * 40], [["他很" * 50]])[2] == pytest.approx([1])


def test_a_text_without_visible_text_scores_0_silently(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scores = score(["\x01", "\u200b", "a"], [["a"], ["\u200b b"], ["a"]], "english", str(bert))
    for name in ("bertscore_f1", "bleu1", "rouge_l"):
        assert scores.per_clip[name] == pytest.approx((0, 0, 1), abs=CLOSE)
    assert scores.empty == 2
    assert capfd.readouterr().err == ""


def test_roberta_gets_the_space_before_its_first_word(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

    known = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", "a"])}
    RobertaTokenizer(vocab=known, merges=[]).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    RobertaModel(RobertaConfig(vocab_size=len(known), max_position_embeddings=20, **sizes)).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a") == [0, 6, 2]
    assert bertscore.load_scorer(str(tmp_path)).tokenizer.encode("a") == [0, 5, 6, 2]
    assert bertscore.load_scorer(str(tmp_path)).score(["a" * 50], [["a" * 60]])[2] == pytest.approx([1])
