"""Qwen2.5-Omni thinkers through transformers: the published 3B and 7B and the pocket pair, by the same code.

The session calls the thinker's text model and head directly, with explicit positions and masks. The thinker's own
forward keeps `rope_deltas` on the model object, where two interleaved streams would corrupt each other; for audio and
text the positions are a plain range, so nothing is lost.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgecloud_sd import limits, prompts
from edgecloud_sd.models import memory
from edgecloud_sd.pairs import DTYPES
from edgecloud_sd.records import Prompt
from edgecloud_sd.session import check_truncation

KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # model types that hold a thinker


class HFSession:
    """One stream on a thinker. `tokens` starts with the prompt's last token once it has been fed."""

    @torch.inference_mode()
    def __init__(self, model: HFModel, prompt: Prompt) -> None:
        from transformers import DynamicCache

        self._thinker = model.thinker
        self._device = model.thinker.device
        self._cache = DynamicCache(config=model.thinker.config.text_config)
        self.tokens: list[int] = []
        if len(prompt.ids) > 1:
            self._forward(model.embed_prompt(prompt)[:, :-1])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or whoever times the opening would time its launch

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocab]; row i = logits for what follows tokens[i].

        FloatingPointError where a logit is not finite, as after an overflow in float16: no argmax of that is a token.
        """
        ids = torch.tensor([tokens], device=self._device)
        hidden = self._forward(self._thinker.get_input_embeddings()(ids))
        self.tokens.extend(tokens)
        logits: Tensor = self._thinker.lm_head(hidden[0])
        # a sum is the quickest look at every one of them: it keeps any nan and any infinity
        if not math.isfinite(logits.sum(dtype=torch.float32).item()):
            raise FloatingPointError(f"the model gave logits that are not finite in {logits.dtype}; use a wider dtype")
        return logits

    def truncate(self, length: int) -> None:
        """Drop what follows the first `length` tokens. ValueError if there are fewer."""
        check_truncation(length, len(self.tokens))
        self._cache.crop(length - len(self.tokens))  # takes the negative count of tokens to drop
        del self.tokens[length:]

    def _forward(self, embeddings: Tensor) -> Tensor:
        """Text model on [1, n, hidden] after what is cached; returns the hidden states, same shape."""
        n = embeddings.shape[1]
        past = self._cache.get_seq_length()
        positions = torch.arange(past, past + n, device=self._device)
        mask = None  # a single row sees everything
        if n > 1:
            mask = (torch.arange(past + n, device=self._device) <= positions[:, None])[None, None]
        hidden: Tensor = self._thinker.model.language_model(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": mask},
            position_ids=positions.expand(3, 1, n),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


@dataclass(frozen=True)
class Frontend:
    """What builds a checkpoint's prompts and reads its tokens: all of it but the weights."""

    name: str
    tokenizer: Any
    extractor: Any
    eos: frozenset[int]
    audio_token: int  # id of the placeholder


@dataclass(frozen=True)
class HFModel(Frontend):
    """A loaded thinker with its front end."""

    thinker: Any

    def open(self, prompt: Prompt) -> HFSession:
        """Encode the audio once and prefill all but the last prompt token."""
        return HFSession(self, prompt)

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """[1, len(prompt.ids), hidden]: text embeddings with the audio encoder's output at the placeholders."""
        thinker = self.thinker
        ids = torch.tensor([prompt.ids], device=thinker.device)
        embeddings: Tensor = thinker.get_input_embeddings()(ids)
        if prompt.features is None:
            return embeddings
        places = ids[0] == self.audio_token
        frames = prompt.features.shape[1]
        expected = prompts.audio_positions(frames)
        if int(places.sum()) != expected:
            raise ValueError(
                f"the prompt has {int(places.sum())} audio placeholders for {frames} frames, not {expected}"
            )
        lengths = torch.tensor([frames], device=thinker.device)
        audio = thinker.model.audio_tower(prompt.features.to(thinker.device, thinker.dtype), feature_lens=lengths)
        return embeddings.masked_scatter(places[None, :, None], audio.last_hidden_state.to(embeddings.dtype))


def load(checkpoint: str | Path, device: str = "cpu", dtype: str = "float32") -> HFModel:
    """Load a Qwen2.5-Omni checkpoint (whole or thinker only) from a folder or the hub.

    Raises ValueError for an unknown dtype or device or a folder that is not there, OSError for a checkpoint of another
    kind, or one that lacks weights or cannot be read.
    """
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    check_device(device)
    front = load_frontend(checkpoint)
    memory.fits(checkpoint, device, dtype, limits.in_force().memory_bytes)
    with _one_line(front.name):
        thinker, loading = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            front.name, dtype=getattr(torch, dtype), output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):
            raise OSError(f"it lacks {len(missing)} weights, {missing[0]} first")
    return HFModel(**vars(front), thinker=thinker.to(device).eval())


def load_frontend(checkpoint: str | Path) -> Frontend:
    """A checkpoint without its weights. Raises as `load`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, WhisperFeatureExtractor
    from transformers.utils import logging

    name = str(checkpoint)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"no checkpoint {name!r}: give a folder that exists, or a name on the hub as owner/name")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with _one_line(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in KINDS:
            raise OSError(f"it is a {config.model_type}, not one of {', '.join(KINDS)}")
        tokenizer = AutoTokenizer.from_pretrained(name)
        extractor = WhisperFeatureExtractor.from_pretrained(name)
        try:
            configured = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # a checkpoint need not have one
            configured = getattr(config, "eos_token_id", None)
    eos = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    thinker = getattr(config, "thinker_config", config)  # a whole Omni's holds one for each part
    return Frontend(name, tokenizer, extractor, frozenset(eos), thinker.audio_token_id)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """What cannot be loaded is an OSError that says so in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError, MemoryError, RuntimeError) as error:  # the last is torch's, of memory
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"checkpoint {name!r} cannot be loaded: {reason}") from error


def check_device(device: str) -> None:
    """ValueError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error
