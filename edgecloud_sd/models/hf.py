"""Qwen2.5-Omni thinkers through transformers: the published 3B and 7B and the pocket pair, by the same code.

The passes of a session go through `text.TextModel`, on the weights of the thinker. The forward method of the thinker
itself keeps `rope_deltas` on the model object, where two interleaved sessions would corrupt each other. For audio and
text the positions are a plain range, so that nothing is lost.

The chat format puts the audio before the task. With causal attention, only the ids before the audio give the same keys
and values for two clips. The model computes those once and copies them into each session.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from edgecloud_sd.models.checkpoint_settings import RowProcessors
from edgecloud_sd.models.devices import QUANTISED_DTYPES, explain_not_finite
from edgecloud_sd.models.frontend import Frontend, load_config, one_line_errors, read_frontend, thinker_config
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.session import check_truncation
from edgecloud_sd.steps import RowLimit, Steps, no_limit, run_steps, split_rows

# Bounds on the memory for shared prefixes, because clients of a server choose their own. The chat format
# gives a single prefix of 16 ids with the pocket pair's tokenizer.
MAX_PREFIXES, MAX_PREFIX_LENGTH = 8, 64
SEQUENTIAL_LOADING = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers reads it from the environment at each load
FRAMES_PER_ROW = 25  # frames that the pocket pair's encoder takes in about the time of one row of its cloud


class HFSession:
    """One prompt on a thinker, with its KV cache. `tokens` starts with the last token of the prompt, once it is fed."""

    def __init__(self, model: HFModel, prompt: Prompt, cache: Cache) -> None:
        self._model = model
        self._device = model.text.device
        self._cache = cache
        self.tokens: list[int] = []
        self._process = model.row_processors(prompt)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else a clock around the prefill times its launch alone

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens` and return logits [len(tokens), vocab]; row i = logits for what follows tokens[i].

        Raise FloatingPointError for a logit that is not finite, for example after an overflow in float16.
        """
        if torch.is_inference_mode_enabled():  # entering the mode takes as long as an argmax: once a caption is enough
            return self._extend(tokens)
        with torch.inference_mode():
            return self._extend(tokens)

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        if len(tokens) == 1:  # the most frequent case: filling in a number is faster than copying a list to the device
            ids = torch.full((1,), tokens[0], device=self._device)
        else:
            ids = torch.tensor(tokens, device=self._device)
        logits = self._model.logits(ids, self._cache)
        self.tokens.extend(tokens)
        # a sum is the fastest check of all logits, because it preserves nan and infinity
        if not (self._model.replaces_invalid_logits or math.isfinite(logits.sum(dtype=torch.float32).item())):
            raise FloatingPointError(explain_not_finite(str(logits.dtype).removeprefix("torch.")))
        return self._process(self.tokens, logits) if self._process else logits

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raise ValueError if there are fewer."""
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
        return run_steps(self.open_steps(prompt))

    @torch.inference_mode()
    def open_steps(self, prompt: Prompt, limit: RowLimit = no_limit) -> Steps[HFSession]:
        """Open a prompt as `open` does, in passes within `limit`."""
        cache = yield from self._prefill_steps(prompt, limit)
        return HFSession(self, prompt, cache)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size: every id is below it."""
        size: int = self.thinker.config.text_config.vocab_size
        return size

    @property
    def max_length(self) -> int:
        """The maximum length of prompt and output together."""
        length: int = self.thinker.config.text_config.max_position_embeddings
        return length

    @cached_property
    def replaces_invalid_logits(self) -> bool:
        """True if the checkpoint's settings replace logits that are not finite."""
        return "remove_invalid_values" in self.settings.values

    def row_processors(self, prompt: Prompt) -> RowProcessors | None:
        """Return what applies the checkpoint's settings to the logits of a prompt, or None if it has none."""
        if not self.settings.values:
            return None
        return RowProcessors(self.settings, prompt.ids, self.eos, self.vocab_size, self.text.device)

    @cached_property
    def text(self) -> TextModel:
        """The text model, without its head. Raises ValueError for another architecture, as `TextModel` does."""
        return TextModel(self.thinker)

    @cached_property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """The map from ids [...] to embeddings [..., hidden], cached because transformers takes long to find it."""
        module: Callable[[Tensor], Tensor] = self.thinker.get_input_embeddings()
        return module

    def logits(self, ids: Tensor, cache: Cache) -> Tensor:
        """Return logits [len(ids), vocab] of ids that follow the cached positions, and add those ids to the cache."""
        logits: Tensor = self.thinker.lm_head(self.text(self.embed(ids), cache))
        return logits

    def prefill(self, prompt: Prompt) -> Cache:
        """Encode the audio and return a cache of all but the last prompt token."""
        return run_steps(self._prefill_steps(prompt, no_limit))

    def _prefill_steps(self, prompt: Prompt, limit: RowLimit) -> Steps[Cache]:
        end = len(prompt.ids) - 1
        shared = self.shared_prefix(prompt)
        cache = self._prefix_cache(shared).copy(end + GROWTH) if shared else self.text.new_cache(end + GROWTH)
        if cache.length < end:
            embeddings = yield from self._embed_steps(prompt, limit)
            for part in split_rows(cache.length, end, limit):
                yield part.stop - part.start
                self.text.fill_cache(embeddings[0, part], cache)
        return cache

    def shared_prefix(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the ids before the audio, which the prompts of other clips share.

        The result is empty for fewer than two ids and for more than `MAX_PREFIX_LENGTH`.
        """
        first = prompt.ids.index(self.audio_token) if self.audio_token in prompt.ids else 0
        return prompt.ids[:first] if 1 < first <= MAX_PREFIX_LENGTH else ()

    def _prefix_cache(self, ids: tuple[int, ...]) -> Cache:
        """Return the cache of a prefix, computed once while it is among the last `MAX_PREFIXES`."""
        with self._lock:  # several threads open sessions
            return self._compute_prefix(ids)

    @cached_property
    def _compute_prefix(self) -> Callable[[tuple[int, ...]], Cache]:
        @lru_cache(maxsize=MAX_PREFIXES)
        def compute(ids: tuple[int, ...]) -> Cache:
            cache = self.text.new_cache(len(ids))
            self.text.fill_cache(self.embed(torch.tensor(ids, device=self.text.device)), cache)
            return cache

        return compute

    def _embed_steps(self, prompt: Prompt, limit: RowLimit) -> Steps[Tensor]:
        """Return [1, len(prompt.ids), hidden]: text embeddings, with the audio encoder's output at the placeholders."""
        thinker, device = self.thinker, self.text.device
        ids = torch.tensor([prompt.ids], device=device)
        embeddings = self.embed(ids)
        if prompt.features is None:
            return embeddings
        is_audio = ids[0] == self.audio_token
        prompts.check_placeholders(prompt, self.audio_token)
        features = prompt.features.to(device, thinker.dtype)
        audio = []
        for part in self._split_frames(features.shape[1], limit):
            frames = part.stop - part.start
            yield math.ceil(frames / FRAMES_PER_ROW)
            lengths = torch.tensor([frames], device=device)
            audio.append(thinker.model.audio_tower(features[:, part], feature_lens=lengths).last_hidden_state)
        return embeddings.masked_scatter(is_audio[None, :, None], torch.cat(audio).to(embeddings.dtype))

    def _split_frames(self, frames: int, limit: RowLimit) -> Iterator[slice]:
        """Yield the parts of the audio, one for each pass of the encoder.

        The encoder convolves and attends within a window, and pools two positions. A part is an even number of windows.
        """
        two_windows = 4 * self.thinker.config.audio_config.n_window
        part = max(FRAMES_PER_ROW * limit(0) // two_windows, 1) * two_windows
        return split_rows(0, frames, lambda begin: part)


def load_checkpoint(checkpoint: str | Path, device: str, dtype: str, front: Frontend | None = None) -> HFModel:
    """Load a Qwen2.5-Omni checkpoint, whole or thinker only, from a folder or the hub.

    Raise ValueError for a folder that does not exist or a model that does not fit in memory. Raise OSError for a
    checkpoint of another kind, or one that lacks weights or cannot be read.
    """
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    front = front or read_frontend(checkpoint)
    text = thinker_config(load_config(front.name)).text_config
    memory.check_weight_files(checkpoint, text.vocab_size, text.hidden_size)
    in_force = limits.read_limits()
    memory.check_checkpoint_fits(checkpoint, device, dtype, in_force.memory_bytes, in_force.monitored_bytes)
    # "auto" keeps the stored dtype: weights to quantise stay in the map of their file until each is quantised
    read_dtype = "auto" if dtype in QUANTISED_DTYPES else getattr(torch, dtype)
    with one_line_errors(front.name), _sequential_loading(in_force.memory_bytes is not None):
        thinker, loading = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            front.name, dtype=read_dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        for name, stored, configured in sorted(loading["mismatched_keys"]):
            raise OSError(
                f"{name} has the shape {list(stored)}, and config.json says {list(configured)}: "
                "use the files of one checkpoint"
            )
        if missing := sorted(loading["missing_keys"]):
            raise OSError(f"it lacks {len(missing)} weights, {missing[0]} first")
        del loading
        _check_sizes(front, thinker.config)
        thinker.model.visual = None  # a caption of speech needs no vision
        if dtype in QUANTISED_DTYPES:
            quantized.quantise(thinker, dtype)
    return HFModel(**vars(front), thinker=thinker.to(device).eval())


@contextmanager
def _sequential_loading(is_needed: bool) -> Iterator[None]:
    """Let transformers load without threads. One that starts when memory ends may abort the process or hang it."""
    before = os.environ.get(SEQUENTIAL_LOADING)
    if is_needed:
        os.environ[SEQUENTIAL_LOADING] = "1"
    try:
        yield
    finally:
        os.environ.pop(SEQUENTIAL_LOADING, None)
        if before is not None:
            os.environ[SEQUENTIAL_LOADING] = before


def _check_sizes(front: Frontend, config: Any) -> None:
    """Raise ValueError unless the weights have a row for each token and read the features of the extractor."""
    tokens, rows = max(front.tokenizer.get_vocab().values()) + 1, config.text_config.vocab_size
    if tokens > rows:
        raise ValueError(
            f"vocab_size of config.json is {rows}, and tokenizer.json has {tokens} ids: use one checkpoint"
        )
    bins, read = front.extractor.feature_size, config.audio_config.num_mel_bins
    if bins != read:
        raise ValueError(
            f"feature_size of preprocessor_config.json is {bins}, and num_mel_bins of config.json is {read}: "
            "use the files of one checkpoint"
        )
