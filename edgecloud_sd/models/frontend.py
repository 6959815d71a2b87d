"""The front end of a checkpoint: its tokenizer and feature extractor, without its weights."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # configurations that hold a thinker


@dataclass(frozen=True)
class Traits:
    """What both sides of a pair have to have in common, wherever they run. Row counts may differ: both published Qwens
    pad their vocabularies, each in its own way."""

    tokenizer: str  # digest of every token and its id
    eos: tuple[int, ...]  # ids that end a caption, rising
    audio_token: int  # id of the audio placeholder
    mel_bins: int
    hop_length: int  # samples
    n_fft: int  # samples


def frontend_traits(side: Frontend) -> Traits:
    """Of a loaded side, or of its front end alone."""
    vocabulary = json.dumps(side.tokenizer.get_vocab(), sort_keys=True)
    return Traits(
        tokenizer=hashlib.sha256(vocabulary.encode()).hexdigest(),
        eos=tuple(sorted(side.eos)),
        audio_token=side.audio_token,
        mel_bins=side.extractor.feature_size,
        hop_length=side.extractor.hop_length,
        n_fft=side.extractor.n_fft,
    )


def check_pair(edge_name: str, edge: Traits, cloud_name: str, cloud: Traits) -> None:
    """ValueError unless both sides mean the same by every id, end at the same ids, and hear the same features."""
    names = {
        "tokenizers": ("tokenizer",),
        "end-of-caption ids": ("eos",),
        "audio placeholders": ("audio_token",),
        "mel spectrograms": ("mel_bins", "hop_length", "n_fft"),
    }
    for what, fields in names.items():
        if any(getattr(edge, field) != getattr(cloud, field) for field in fields):
            raise ValueError(f"{edge_name} and {cloud_name} have different {what}, so they are not a pair")


@dataclass(frozen=True)
class Frontend:
    """What builds a checkpoint's prompts and reads its tokens: all of it but the weights."""

    name: str
    tokenizer: Any
    extractor: Any
    eos: frozenset[int]
    audio_token: int  # id of the placeholder


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """What cannot be loaded is an OSError that says so in one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    # RuntimeError is torch's, of memory
    except (OSError, ValueError, SafetensorError, StrictDataclassError, MemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # the first of a configuration's error names no value
        reason = " ".join(map(str.strip, lines)) if isinstance(error, StrictDataclassError) else lines[0]
        raise OSError(f"checkpoint {name!r} cannot be loaded: {reason}") from error


def load_config(name: str) -> Any:
    """The configuration of a checkpoint, or of a JSON file. OSError for one of another kind."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if config.model_type not in MODEL_TYPES:
        raise OSError(f"it is a {config.model_type}, not one of {', '.join(MODEL_TYPES)}")
    return config


def thinker_config(config: Any) -> Any:
    """The part of a configuration that is the thinker's: a whole Omni's holds one for each of its parts."""
    return getattr(config, "thinker_config", config)


def read_frontend(checkpoint: str | Path) -> Frontend:
    """Read the front end of a checkpoint, a folder or a name on the hub.

    Raise ValueError if there is no such folder, and OSError if it cannot be read or is of another kind.
    """
    from transformers import AutoTokenizer, GenerationConfig, WhisperFeatureExtractor
    from transformers.utils import logging

    name = str(checkpoint)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"no checkpoint {name!r}: give a folder that exists, or a name on the hub as owner/name")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with one_line_errors(name):
        config = load_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        extractor = WhisperFeatureExtractor.from_pretrained(name)
        try:
            configured = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # a checkpoint need not have one
            configured = getattr(config, "eos_token_id", None)
    eos = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    return Frontend(name, tokenizer, extractor, frozenset(eos), thinker_config(config).audio_token_id)
