"""The tokenizer of the pocket pair: byte-level BPE with the names of Qwen2.5-Omni's special tokens.

Chinese is split into runs of at most two characters before merging, so that a caption has about one token per word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from edgecloud_sd.data import prompts
from edgecloud_sd.pocket import voices

VOCABULARY_SIZE = 640  # 256 bytes, 6 special tokens and merges for the words of captions
FREE_VOCABULARY_SIZE = 832  # with merges for the words of free captions
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", EOS, prompts.AUDIO_TOKEN, "<|audio_bos|>", "<|audio_eos|>")
SPLIT_PATTERN = r"[\u4e00-\u9fff]{1,2}| ?[A-Za-z']+| ?[0-9]|\s+|[^\sA-Za-z0-9\u4e00-\u9fff]"


def iterate_corpus(is_free: bool = False) -> Iterator[str]:
    """Yield prompts and (free) captions with every word that they can contain, about as often as they contain it."""
    for language in prompts.LANGUAGES:
        for prompt_type in prompts.PROMPT_TYPES:
            yield prompts.format_chat(prompts.format_task(language, prompt_type, "aeiou"), 0)
    combinations = itertools.product(*(range(voices.count_classes(name)) for name in voices.ATTRIBUTE_NAMES))
    for number, combination in enumerate(combinations):
        attributes = voices.Attributes(*combination)
        for language in prompts.LANGUAGES:
            if is_free:
                yield voices.write_free_caption(attributes, language, (number,))
            elif number % 3 == 0:  # only the first voice, but the shipped vocabulary comes from these
                yield voices.write_caption(attributes, language)
    for language in prompts.LANGUAGES:  # some emotions occur in none of these combinations
        for emotion in voices.EMOTIONS:
            yield f" {emotion.english}" if language == "english" else emotion.chinese


def train_tokenizer(is_free: bool = False) -> Any:
    """Return a fast tokenizer of transformers, trained on `iterate_corpus`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FREE_VOCABULARY_SIZE if is_free else VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(iterate_corpus(is_free), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
