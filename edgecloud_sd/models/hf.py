"""Qwen2.5-Omni thinkers through transformers: the published 3B and 7B and the pocket pair, by the same code.

A session's passes go through `text.TextModel`, on the thinker's own weights. The thinker's own forward keeps
`rope_deltas` on the model object, where two interleaved streams would corrupt each other; for audio and text the
positions are a plain range, so nothing is lost.

Audio stands before the task in the chat format, so what two clips' prompts share is what stands before the audio: with
causal attention nothing after it can be the same. Its keys and values are computed once and copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt
from edgecloud_sd.host import limits
from edgecloud_sd.models import memory, quantized
from edgecloud_sd.models.cache import GROWTH, Cache
from edgecloud_sd.models.devices import QUANTISED_DTYPES
from edgecloud_sd.models.frontend import Frontend, one_line_errors, read_frontend
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.session import check_truncation

# Prefixes that a model keeps the keys and values of, and how long they may be: a client of a server makes its own
MAX_PREFIXES, MAX_PREFIX_LENGTH = 8, 64


class HFSession:
    """One stream on a thinker. `tokens` starts with the prompt's last token once it has been fed."""

    @torch.inference_mode()
    def __init__(self, model: HFModel, prompt: Prompt) -> None:
        self._model = model
        self._device = model.text.device
        self._cache = model.prefill(prompt)
        self.tokens: list[int] = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or whoever times the opening would time its launch

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocab]; row i = logits for what follows tokens[i].

        FloatingPointError where a logit is not finite, as after an overflow in float16: no argmax of that is a token.
        """
        if torch.is_inference_mode_enabled():  # for the whole caption: to enter it takes as long as an argmax
            return self._extend(tokens)
        with torch.inference_mode():
            return self._extend(tokens)

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        if len(tokens) == 1:  # as most are: to fill in a number takes less than to copy a list to the device
            ids = torch.full((1,), tokens[0], device=self._device)
        else:
            ids = torch.tensor(tokens, device=self._device)
        logits = self._model.logits(ids, self._cache)
        self.tokens.extend(tokens)
        # a sum is the quickest look at every one of them: it keeps any nan and any infinity
        if not math.isfinite(logits.sum(dtype=torch.float32).item()):
            raise FloatingPointError(f"the model gave logits that are not finite in {logits.dtype}; use a wider dtype")
        return logits

    def truncate(self, length: int) -> None:
        """Drop what follows the first `length` tokens. ValueError if there are fewer."""
        check_truncation(length, len(self.tokens))
        self._cache.length -= len(self.tokens) - length
        del self.tokens[length:]


@dataclass(frozen=True)
class HFModel(Frontend):
    """A loaded thinker with its front end."""

    thinker: Any
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def open(self, prompt: Prompt) -> HFSession:
        """Encode the audio once and prefill all but the last prompt token."""
        return HFSession(self, prompt)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size: ids are below it."""
        size: int = self.thinker.config.text_config.vocab_size
        return size

    @cached_property
    def text(self) -> TextModel:
        """The text model, without its head. ValueError as `TextModel`."""
        return TextModel(self.thinker)

    @cached_property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """Ids [...] to embeddings [..., hidden]. transformers takes longer to find this module than it to compute."""
        found: Callable[[Tensor], Tensor] = self.thinker.get_input_embeddings()
        return found

    def logits(self, ids: Tensor, cache: Cache) -> Tensor:
        """[len(ids), vocab] of ids that follow what is cached and are cached now: the model's calls, nothing else."""
        logits: Tensor = self.thinker.lm_head(self.text(self.embed(ids), cache))
        return logits

    def prefill(self, prompt: Prompt) -> Cache:
        """The audio encoded once, and the keys and values of all but the last prompt token."""
        end = len(prompt.ids) - 1
        shared = self.prefix(prompt)
        cache = self._prefilled(shared).copy(end + GROWTH) if shared else self.text.cache(end + GROWTH)
        if cache.length < end:
            self.text.fill(self.embed_prompt(prompt)[0, cache.length : end], cache)
        return cache

    def prefix(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids that other clips' prompts share: those before the audio, where they are two or more, and not many."""
        first = prompt.ids.index(self.audio_token) if self.audio_token in prompt.ids else 0
        return prompt.ids[:first] if 1 < first <= MAX_PREFIX_LENGTH else ()

    def _prefilled(self, ids: tuple[int, ...]) -> Cache:
        """What a prefix leaves in a cache: computed once, for as long as it is among the last few."""
        with self._lock:  # sessions are opened on several threads
            return self._prefixes(ids)

    @cached_property
    def _prefixes(self) -> Callable[[tuple[int, ...]], Cache]:
        @lru_cache(maxsize=MAX_PREFIXES)
        def compute(ids: tuple[int, ...]) -> Cache:
            cache = self.text.cache(len(ids))
            self.text.fill(self.embed(torch.tensor(ids, device=self.text.device)), cache)
            return cache

        return compute

    def embed_prompt(self, prompt: Prompt) -> Tensor:
        """[1, len(prompt.ids), hidden]: text embeddings with the audio encoder's output at the placeholders."""
        thinker, device = self.thinker, self.text.device
        ids = torch.tensor([prompt.ids], device=device)
        embeddings = self.embed(ids)
        if prompt.features is None:
            return embeddings
        places = ids[0] == self.audio_token
        prompts.check_placeholders(prompt, self.audio_token)
        lengths = torch.tensor([prompt.features.shape[1]], device=device)
        audio = thinker.model.audio_tower(prompt.features.to(device, thinker.dtype), feature_lens=lengths)
        return embeddings.masked_scatter(places[None, :, None], audio.last_hidden_state.to(embeddings.dtype))


def load_checkpoint(checkpoint: str | Path, device: str, dtype: str) -> HFModel:
    """Load a Qwen2.5-Omni checkpoint, whole or thinker only, from a folder or the hub.

    Raise ValueError for a folder that does not exist or a model that does not fit in memory. Raise OSError for a
    checkpoint of another kind, or one that lacks weights or cannot be read.
    """
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    front = read_frontend(checkpoint)
    memory.check_checkpoint_fits(checkpoint, device, dtype, limits.in_force().memory_bytes)
    # weights to quantise are read as they are stored: they stay in the map of their file until their turn comes
    read = "auto" if dtype in QUANTISED_DTYPES else getattr(torch, dtype)
    with one_line_errors(front.name):
        thinker, loading = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            front.name, dtype=read, output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):
            raise OSError(f"it lacks {len(missing)} weights, {missing[0]} first")
        del loading
        thinker.model.visual = None  # a caption of speech needs no vision
        if dtype in QUANTISED_DTYPES:
            quantized.quantise(thinker, dtype)
    return HFModel(**vars(front), thinker=thinker.to(device).eval())
