"""The front end of a checkpoint: its tokenizer and feature extractor, without its weights."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecloud_sd.data.dataset import SAMPLE_RATE
from edgecloud_sd.data.prompts import AUDIO_TOKEN, CONTROL_TOKENS
from edgecloud_sd.host.errors import find_out_of_memory, to_one_line
from edgecloud_sd.models import checkpoint_settings, hub
from edgecloud_sd.models.checkpoint import find_folder
from edgecloud_sd.models.checkpoint_settings import NO_SETTINGS, CheckpointSettings

DEFAULT_SECTIONS = [16, 24, 24]  # those of transformers, if a configuration has no mrope_section
MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # configurations that contain a thinker


@dataclass(frozen=True)
class Frontend:
    """The parts of a checkpoint that build prompts and decode tokens."""

    name: str
    tokenizer: Any
    extractor: Any
    eos: frozenset[int]
    audio_token: int  # id of the audio placeholder
    audio_bos: int
    audio_eos: int
    settings: CheckpointSettings = field(default=NO_SETTINGS, kw_only=True)


def read_frontend(checkpoint: str | Path) -> Frontend:
    """Read the front end of a checkpoint, a folder or a name on the hub.

    Raise ValueError if there is no such folder, and OSError if it cannot be read or is of another kind.
    """
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    name = str(checkpoint)
    if not Path(name).is_dir() and not hub.CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(f"no checkpoint {name!r}: give a folder that exists, or a name on the hub as owner/name")
    _check_json_files(name)
    with one_line_errors(name, "config.json"):
        config = load_config(name)
        thinker = thinker_config(config)
        check_dimensions(thinker)
    with one_line_errors(name, "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        _check_tokenizer(tokenizer, thinker)
    with one_line_errors(name, "preprocessor_config.json"):
        _check_features(WhisperFeatureExtractor.get_feature_extractor_dict(name)[0])
        extractor = WhisperFeatureExtractor.from_pretrained(name)
    with one_line_errors(name, "generation_config.json"):
        generation = checkpoint_settings.read_generation_config(name)
        eos = checkpoint_settings.read_eos(generation, thinker, tokenizer)
        settings = checkpoint_settings.read_settings(generation, eos, thinker.text_config.vocab_size)
    return Frontend(
        name,
        tokenizer,
        extractor,
        eos,
        thinker.audio_token_id,
        thinker.audio_start_token_id,
        thinker.audio_end_token_id,
        settings=settings,
    )


def _check_json_files(name: str) -> None:
    """Raise OSError, with its name, for a JSON file of a checkpoint that is no object in UTF-8.

    `checkpoint_settings` checks its own file.
    """
    try:
        folder = find_folder(name)
    except OSError:  # the hub's checks guard a download
        return
    for file in sorted(set(folder.glob("*.json")) - {folder / checkpoint_settings.FILE}):
        with one_line_errors(name, file.name):
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                raise ValueError("it must be a JSON object")


def _check_tokenizer(tokenizer: Any, thinker: Any) -> None:
    """Raise ValueError for a tokenizer that cannot write the chat format."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("it is missing: use a checkpoint with a tokenizer of the tokenizers library")
    vocabulary = tokenizer.get_vocab()
    for token in CONTROL_TOKENS:
        if token not in vocabulary:
            raise ValueError(f"it has no token {token}, which the chat format needs: use the tokenizer of Qwen2.5-Omni")
    if vocabulary[AUDIO_TOKEN] != thinker.audio_token_id:
        raise ValueError(
            f"its {AUDIO_TOKEN} is {vocabulary[AUDIO_TOKEN]}, and audio_token_id of config.json is "
            f"{thinker.audio_token_id}: use the files of one checkpoint"
        )


def _check_features(settings: dict[str, Any]) -> None:
    """Raise ValueError for settings of a feature extractor that have the wrong type or rate."""
    for name in ("feature_size", "hop_length", "n_fft", "chunk_length", "sampling_rate"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    for name in ("padding_value", "dither"):
        value = settings.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, not {value!r}")
    rate = settings.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise ValueError(f"sampling_rate must be {SAMPLE_RATE}, as of every clip, not {rate}")


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


def check_dimensions(thinker: Any) -> None:
    """Raise ValueError for inconsistent sizes that transformers reports late or without their names."""
    text, audio = thinker.text_config, thinker.audio_config
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "d_model": audio.d_model,
        "encoder_attention_heads": audio.encoder_attention_heads,
        "encoder_ffn_dim": audio.encoder_ffn_dim,
        "n_window": audio.n_window,
        "max_source_positions": audio.max_source_positions,
        "max_position_embeddings": text.max_position_embeddings,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
        ("d_model", "encoder_attention_heads"),
    ):
        if sizes[whole] % sizes[part]:
            raise ValueError(f"{whole} {sizes[whole]} must be a multiple of {part} {sizes[part]}")
    if audio.output_dim != text.hidden_size:
        raise ValueError(f"output_dim {audio.output_dim} of the audio tower must equal hidden_size {text.hidden_size}")
    if audio.max_source_positions < audio.n_window:
        raise ValueError(
            f"max_source_positions {audio.max_source_positions} must be at least n_window {audio.n_window}, which is "
            "the number of positions in a window of the audio tower"
        )
    sections = (text.rope_parameters or {}).get("mrope_section", DEFAULT_SECTIONS)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if 2 * sum(sections) != head_size:
        raise ValueError(f"mrope_section {sections} of rope_parameters must sum to half of the head size {head_size}")


@contextmanager
def one_line_errors(name: str, file: str = "") -> Iterator[None]:
    """Turn any failure to load checkpoint `name` into an OSError of one line, which names `file` if it is given.

    Lack of memory becomes a MemoryError.
    """
    from huggingface_hub.errors import StrictDataclassError

    hub.prepare_hub(name)
    try:
        yield
    except Exception as error:  # the libraries raise errors of any type for a damaged file
        if lack := find_out_of_memory(error):
            raise MemoryError(f"checkpoint {name!r} cannot be loaded: {to_one_line(lack)}") from error
        lines = str(error).splitlines() or [""]
        if isinstance(error, KeyError | TypeError | AttributeError):
            lines = [f"it has not the expected fields ({type(error).__name__}: {lines[0]})"]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to load it without its checks
            lines = ["its weights are no file of torch: copy or download it again, as safetensors if there are any"]
        if hub_reason := hub.explain_hub_error(error):
            file, lines = "", [hub_reason]
        # a configuration error spreads over several lines, and its first one names no value
        reason = " ".join(map(str.strip, lines)) if isinstance(error, StrictDataclassError) else lines[0]
        place = f"{file}: " if file and file not in reason else ""
        raise OSError(f"checkpoint {name!r} cannot be loaded: {place}{reason or type(error).__name__}") from error
