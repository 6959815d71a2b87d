"""The pocket pair's tokenizer: byte-level BPE that knows Qwen2.5-Omni's special tokens by name.

Chinese is split into runs of at most two characters before merging, so that a caption costs about one token a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from edgecloud_sd.data import prompts
from edgecloud_sd.pocket import voices

VOCABULARY = 640
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", EOS, prompts.AUDIO_TOKEN, "<|audio_bos|>", "<|audio_eos|>")
SPLIT = r"[\u4e00-\u9fff]{1,2}| ?[A-Za-z']+| ?[0-9]|\s+|[^\sA-Za-z0-9\u4e00-\u9fff]"


def corpus() -> Iterator[str]:
    """Every word that a caption or prompt can contain, about as often as it does."""
    for language in prompts.LANGUAGES:
        for prompt_type in prompts.PROMPT_TYPES:
            yield prompts.chat(prompts.task_text(language, prompt_type, "aeiou"), 0)
    for combination in itertools.islice(
        itertools.product(*(range(voices.classes(n)) for n in voices.ATTRIBUTE_NAMES)), 0, None, 3
    ):
        for language in prompts.LANGUAGES:
            yield voices.caption(voices.Attributes(*combination), language)
    for language in prompts.LANGUAGES:  # emotions that no sampled combination reaches
        for emotion in voices.EMOTIONS:
            yield f" {emotion.english}" if language == "english" else emotion.chinese


def train_tokenizer() -> Any:
    """A fast tokenizer, ready for `save_pretrained`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
