"""The front end of a checkpoint: its tokenizer and feature extractor, without its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecloud_sd.host.errors import explain_out_of_memory, is_out_of_memory
from edgecloud_sd.models import checkpoint_settings, hub
from edgecloud_sd.models.checkpoint_settings import NO_SETTINGS, CheckpointSettings

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # configurations that contain a thinker


@dataclass(frozen=True)
class Frontend:
    """The parts of a checkpoint that build prompts and decode tokens."""

    name: str
    tokenizer: Any
    extractor: Any
    eos: frozenset[int]
    audio_token: int  # id of the audio placeholder
    settings: CheckpointSettings = field(default=NO_SETTINGS, kw_only=True)


@dataclass(frozen=True)
class Traits:
    """Properties that both sides of a pair must share, on whichever machines they run.

    The vocabulary size is not one of them: the published checkpoints pad theirs differently.
    """

    tokenizer: str  # digest of every token and its id
    eos: tuple[int, ...]  # ids that end a caption, in ascending order
    audio_token: int  # id of the audio placeholder
    mel_bins: int
    hop_length: int  # samples
    n_fft: int  # samples


def frontend_traits(side: Frontend) -> Traits:
    """Return the traits of a front end, or of a loaded model."""
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
    """Raise ValueError if the sides differ in their tokenizers, their end-of-caption ids or their audio features."""
    fields_by_name = {
        "tokenizers": ("tokenizer",),
        "end-of-caption ids": ("eos",),
        "audio placeholders": ("audio_token",),
        "mel spectrograms": ("mel_bins", "hop_length", "n_fft"),
    }
    for name, fields in fields_by_name.items():
        if any(getattr(edge, field) != getattr(cloud, field) for field in fields):
            raise ValueError(f"{edge_name} and {cloud_name} have different {name}, so they are not a pair")


def read_frontend(checkpoint: str | Path) -> Frontend:
    """Read the front end of a checkpoint, a folder or a name on the hub.

    Raise ValueError if there is no such folder, and OSError if it cannot be read or is of another kind.
    """
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    name = str(checkpoint)
    if not Path(name).is_dir() and not hub.CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(f"no checkpoint {name!r}: give a folder that exists, or a name on the hub as owner/name")
    with one_line_errors(name):
        config = load_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        extractor = WhisperFeatureExtractor.from_pretrained(name)
        thinker = thinker_config(config)
        generation = checkpoint_settings.read_generation_config(name)
        eos = checkpoint_settings.read_eos(generation, thinker, tokenizer)
        settings = checkpoint_settings.read_settings(generation, eos, thinker.text_config.vocab_size)
    return Frontend(name, tokenizer, extractor, eos, thinker.audio_token_id, settings=settings)


def load_config(name: str) -> Any:
    """Return the configuration of a checkpoint or of a JSON file. Raise OSError if it describes another model type."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if config.model_type not in MODEL_TYPES:
        raise OSError(f"model_type is {config.model_type!r}, and must be one of {', '.join(MODEL_TYPES)}")
    return config


def thinker_config(config: Any) -> Any:
    """Return the thinker's part of a configuration; a whole Omni model has one part for each of its models."""
    return getattr(config, "thinker_config", config)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn any failure to load checkpoint `name` into an OSError of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    hub.prepare_hub(name)
    try:
        yield
    # torch raises RuntimeError when memory runs out
    except (OSError, ValueError, SafetensorError, StrictDataclassError, MemoryError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if is_out_of_memory(error):
            lines = [explain_out_of_memory(error)]
        elif hub_reason := hub.explain_hub_error(error):
            lines = [hub_reason]
        # a configuration error spreads over several lines, and its first one names no value
        reason = " ".join(map(str.strip, lines)) if isinstance(error, StrictDataclassError) else lines[0]
        raise OSError(f"checkpoint {name!r} cannot be loaded: {reason}") from error
