"""The settings of a checkpoint that change its greedy output, applied as `generate` of transformers applies them.

A checkpoint has them in generation_config.json, or an old one in config.json. transformers has a logits processor for
most of them, which reads the ids of the prompt and of the output. The processors here see these ids anew for each row
of logits, so they have no state that would have to roll back with a cache.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FILE = "generation_config.json"

# The fields with a processor, in the order of `GenerationMixin._get_logits_processor`, and the value that changes
# nothing. A count changes nothing below 0 either.
APPLIED: dict[str, object] = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    "renormalize_logits": False,
}
# Fields that do not change the greedy output of one prompt, or that an option of this package replaces.
UNUSED = frozenset(
    {
        # sampling and beams
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "diversity_penalty"),
        # the length limit, which is --max-new-tokens, and the special ids, of which `read_eos` takes the last
        *("max_length", "max_new_tokens", "bos_token_id", "pad_token_id", "decoder_start_token_id", "eos_token_id"),
        # caches and compilation
        *("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "compile_config"),
        *("disable_compile", "continuous_batching_config"),
        # drafts of `generate`, which do not change its greedy output
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "use_mtp"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
        # the form of the answer
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        "transformers_version",
    }
)
# Every other field is refused, unless it has one of these values, None or False.
HARMLESS: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),
}


@dataclass(frozen=True)
class CheckpointSettings:
    """The fields of APPLIED that a checkpoint sets, in that order, with their values."""

    values: Mapping[str, Any] = field(default_factory=dict)


NO_SETTINGS = CheckpointSettings()


class RowProcessors:
    """The processors of one prompt. They change each row of logits by the ids that precede it, the prompt's included.

    The logits become float32, as in `generate`.
    """

    def __init__(
        self, settings: CheckpointSettings, prompt_ids: Sequence[int], eos: frozenset[int], vocab_size: int, device: Any
    ) -> None:
        import torch

        self._prompt = torch.tensor([prompt_ids], device=device)
        self._processors = [
            _build_processor(name, value, self._prompt, torch.tensor(sorted(eos), device=device), vocab_size)
            for name, value in settings.values.items()
        ]

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Return the processed logits [n, vocab_size] of the last n of `tokens`, which begin with the prompt's last."""
        import torch

        ids = torch.cat((self._prompt[:, :-1], torch.tensor([tokens], device=self._prompt.device)), dim=1)
        first = ids.shape[1] - len(logits) + 1  # ids before the token that the first row is for
        rows = [self._process(ids[:, : first + row], scores[None]) for row, scores in enumerate(logits.float())]
        return torch.cat(rows)

    def _process(self, ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self._processors:
            scores = processor(ids, scores)
        return scores


def _build_processor(name: str, value: Any, prompt: Tensor, eos: Tensor, vocab_size: int) -> Any:
    """Return the processor of one field for a prompt [1, n]."""
    from transformers.generation import logits_process as processors

    n, device = prompt.shape[1], prompt.device
    builders = {
        "sequence_bias": processors.SequenceBiasLogitsProcessor,
        "encoder_repetition_penalty": lambda value: processors.EncoderRepetitionPenaltyLogitsProcessor(value, prompt),
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": processors.NoRepeatNGramLogitsProcessor,
        "encoder_no_repeat_ngram_size": lambda value: processors.EncoderNoRepeatNGramLogitsProcessor(value, prompt),
        "bad_words_ids": lambda value: processors.NoBadWordsLogitsProcessor(value, eos),
        "min_length": lambda value: processors.MinLengthLogitsProcessor(value, eos),
        "min_new_tokens": lambda value: processors.MinNewTokensLengthLogitsProcessor(n, value, eos),
        "forced_bos_token_id": processors.ForcedBOSTokenLogitsProcessor,
        "remove_invalid_values": lambda _: processors.InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty": lambda value: processors.ExponentialDecayLengthPenalty(value, eos, n),
        "suppress_tokens": lambda value: processors.SuppressTokensLogitsProcessor(value, device),
        "begin_suppress_tokens": lambda value: processors.SuppressTokensAtBeginLogitsProcessor(value, n, device),
        "watermarking_config": lambda value: value.construct_processor(vocab_size, device),
        "renormalize_logits": lambda _: processors.LogitNormalization(),
    }
    return builders[name](value)


def read_generation_config(name: str) -> Any:
    """Return transformers' GenerationConfig of a checkpoint: that of its own file, or else of config.json.

    Raise ValueError or OSError for a file that cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # the file is optional
        if os.path.lexists(Path(name) / FILE):  # a link to a file that is missing is no choice of defaults
            raise
    except (TypeError, AttributeError, KeyError) as error:  # the JSON is of another form
        raise ValueError(f"{FILE}: {_find_bad_field(Path(name) / FILE)} cannot be used: {error}") from error
    return GenerationConfig.from_pretrained(name, config_file_name="config.json", _from_model_config=True)


def _find_bad_field(file: Path) -> str:
    """Return the field, with its value, that transformers cannot read, or the kind of the content."""
    from transformers import GenerationConfig

    content = json.loads(file.read_bytes()) if file.exists() else None
    for name, value in content.items() if isinstance(content, dict) else ():
        try:
            GenerationConfig(**{name: value})
        except (TypeError, AttributeError, KeyError):
            return f"{name} {_shorten(value)}"
    return f"a {type(content).__name__}, which is no object of settings,"


def read_settings(config: Any, eos: frozenset[int], vocab_size: int) -> CheckpointSettings:
    """Return the settings of a GenerationConfig.

    Raise ValueError for a field that changes the greedy output and cannot be applied, and for a value that its
    processor refuses.
    """
    from transformers import GenerationConfig

    for name in vars(GenerationConfig()).keys() - APPLIED.keys() - UNUSED:
        value = getattr(config, name)
        if not (name.startswith("_") or value is None or value is False or value in HARMLESS.get(name, ())):
            raise ValueError(
                f"{name} {_shorten(value)} changes the greedy output and cannot be applied here: remove it from {FILE}"
            )
    values = {name: value for name in APPLIED if _is_effective(name, value := getattr(config, name, None))}
    if config.min_new_tokens is not None:  # it takes precedence in `generate`, even if it is 0
        values.pop("min_length", None)
    settings = CheckpointSettings(values)
    for name, value in values.items():
        _check_value(name, value, eos, vocab_size)
    return settings


def _is_effective(name: str, value: Any) -> bool:
    neutral = APPLIED[name]
    if value is None or neutral is False:
        return value is True
    is_count = isinstance(neutral, int) and isinstance(value, int)
    return bool(value > 0 if is_count else value != neutral)


def _check_value(name: str, value: Any, eos: frozenset[int], vocab_size: int) -> None:
    """Raise ValueError if the processor of a field refuses its value, now and not in the first caption."""
    import torch

    try:
        process = RowProcessors(CheckpointSettings({name: value}), (0,), eos, vocab_size, "cpu")
        process([0], torch.zeros(1, vocab_size))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} {_shorten(value)} of {FILE} cannot be applied: {_shorten(error)}") from error


def read_eos(config: Any, thinker_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a caption: those of the GenerationConfig or else of the thinker, and the tokenizer's.

    The published thinkers run on after the tokenizer's id if `generate` does not get it (QwenLM/Qwen2.5-Omni#371).
    Raise ValueError for an id that is no id of the thinker's vocabulary.
    """
    from transformers import GenerationConfig

    configured = config.eos_token_id
    if configured is None:  # the configuration of a whole Omni model hides that of its thinker
        configured = GenerationConfig.from_model_config(thinker_config).eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    vocabulary = range(thinker_config.text_config.vocab_size)
    if any(token is not None and (type(token) is not int or token not in vocabulary) for token in ids):
        raise ValueError(
            f"eos_token_id {_shorten(configured)} must have ids of the vocabulary only, 0 to {len(vocabulary) - 1}"
        )
    return frozenset({*ids, tokenizer.eos_token_id}) - {None}


def _shorten(value: object) -> str:
    return textwrap.shorten(str(value), 120, placeholder=" ...")
