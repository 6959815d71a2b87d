"""Models of a given size with random weights, which show the speed and memory of a pair without its checkpoints.

The folder `dimensions/` has the sizes that Qwen/Qwen2.5-Omni-3B and -7B publish in config.json for the audio tower and
the text model of the thinker. Vision is left out, because a caption of speech does not need it. For any other size,
pass a folder with a config.json. A folder without a tokenizer gets that of the pocket pair, whose few hundred ids are
the first of the vocabulary.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgecloud_sd.host import limits
from edgecloud_sd.models import frontend, hf, memory, quantized
from edgecloud_sd.models.devices import QUANTISED_DTYPES
from edgecloud_sd.models.memory import MemoryNeed
from edgecloud_sd.models.pairs import DUMMY, PAIRS

DIMENSIONS_FOLDER = Path(__file__).parent / "dimensions"
# One row in this many is padding, at the end of the vocabulary, as in the published models. The logits of padding are 0
# and never the largest, so that neither side emits an id that the other side lacks.
ROWS_PER_PADDING_ROW = 100
VOCABULARY_TABLES = ("embed_tokens.weight", "lm_head.weight")  # tensors with a row per id
INT8_STANDARD_DEVIATION = 73.9  # uniform whole numbers from -128 to 127: sqrt((256^2 - 1) / 12)


@dataclass(frozen=True)
class PaddedTokenizer:
    """A tokenizer for a model whose vocabulary is larger: an id beyond the last token wraps around to the first."""

    tokenizer: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Return the tokenizer's own encoding."""
        return self.tokenizer(*texts, **options)

    def decode(self, ids: list[int], **options: Any) -> str:
        """Return the text of `ids`, modulo the number of tokens."""
        text: str = self.tokenizer.decode([token % len(self.tokenizer) for token in ids], **options)
        return text


def load_dummy(
    checkpoint: str | Path, device: str = "cpu", dtype: str = "float32", front: frontend.Frontend | None = None
) -> hf.HFModel:
    """Return a thinker with the dimensions of `checkpoint` and random weights.

    The weights are the same on every machine and in every dtype. Raise ValueError for a checkpoint with unknown
    dimensions or one that does not fit in memory. Raise OSError for a configuration that cannot be used.
    """
    config = load_dummy_config(checkpoint)
    front = front or load_dummy_frontend(checkpoint)
    with frontend.one_line_errors(str(checkpoint)):
        thinker = _build_empty_thinker(config)
    in_force = limits.read_limits()
    memory.check_weights_fit(
        front.name,
        lambda dtype: estimate_memory_need(thinker, dtype),
        device,
        dtype,
        in_force.memory_bytes,
        in_force.monitored_bytes,
    )
    _fill_weights(thinker, device, dtype)
    return hf.HFModel(**vars(front), thinker=thinker.eval())


def load_dummy_frontend(checkpoint: str | Path) -> frontend.Frontend:
    """Read the front end of a folder with a tokenizer, or else that of the pocket pair. Raise as `load_dummy` does."""
    config = load_dummy_config(checkpoint)
    has_tokenizer = (Path(checkpoint) / "tokenizer_config.json").is_file()
    front = frontend.read_frontend(checkpoint if has_tokenizer else PAIRS["pocket"].edge)
    tokens, rows = len(front.tokenizer), config.text_config.vocab_size
    if rows < tokens:
        raise ValueError(f"{str(checkpoint)!r}: vocab_size {rows} is less than the {tokens} tokens: raise it")
    bins = config.audio_config.num_mel_bins
    if front.extractor.feature_size != bins:
        front = replace(front, extractor=type(front.extractor)(**front.extractor.to_dict() | {"feature_size": bins}))
    return replace(front, name=f"{checkpoint}-{DUMMY}", tokenizer=PaddedTokenizer(front.tokenizer))


def load_dummy_config(checkpoint: str | Path) -> Any:
    """Return the configuration of a thinker, from a published name or a folder. Raise as `load_dummy` does."""
    published = {f"Qwen/{file.stem}": file for file in sorted(DIMENSIONS_FOLDER.glob("*.json"))}
    if str(checkpoint) not in published and not Path(checkpoint).is_dir():
        names = ", ".join(published)
        raise ValueError(f"no dimensions of {str(checkpoint)!r}: give a folder with a config.json, or one of {names}")
    with frontend.one_line_errors(str(checkpoint)):
        config = frontend.thinker_config(frontend.load_config(str(published.get(str(checkpoint), checkpoint))))
        frontend.check_dimensions(config)
    return config


def _build_empty_thinker(config: Any) -> Any:
    """Return a thinker on torch's meta device, where its weights take no memory."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)
    thinker.model.visual = None
    return thinker


def unpadded_size(vocab_size: int) -> int:
    """Return the number of vocabulary rows that are not padding."""
    return vocab_size - max(vocab_size // ROWS_PER_PADDING_ROW, 1)


def check_vocab_sizes(edge: int, cloud: int) -> None:
    """Raise ValueError if one side of a pair could emit an id that the other side has no row for."""
    if unpadded_size(edge) > cloud or unpadded_size(cloud) > edge:
        raise ValueError(
            f"vocab_size {edge} of the edge and {cloud} of the cloud differ by more than the padding of 1 row in "
            f"{ROWS_PER_PADDING_ROW}: choose closer sizes"
        )


def estimate_memory_need(thinker: Any, dtype: str) -> MemoryNeed:
    """Return the need of a thinker in `dtype`; during the load the largest tensor exists in several forms."""
    shapes = {name: tuple(parameter.shape) for name, parameter in thinker.named_parameters()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    loaded = memory.count_loaded_bytes(shapes, dtype)
    return MemoryNeed(sum(sizes), loaded, loaded + 4 * max(sizes))


def _fill_weights(thinker: Any, device: str, dtype: str) -> None:
    """Give an empty thinker its random weights, one module at a time."""
    sources: dict[nn.Parameter, tuple[str, int]] = {}  # name and fan-in; a tied parameter has those of its first module
    for prefix, module in thinker.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fan_in = 1 if isinstance(module, nn.Embedding) else math.prod(parameter.shape[1:])
            sources.setdefault(parameter, (f"{prefix}.{name}", fan_in))
    # weights to quantise are drawn in bfloat16, which represents them exactly
    drawn_dtype = torch.bfloat16 if dtype in QUANTISED_DTYPES else getattr(torch, dtype)

    def initialise(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            full_name, fan_in = sources[parameter]
            values = draw_weights(full_name, fan_in, tuple(parameter.shape), drawn_dtype)
            if full_name.endswith(VOCABULARY_TABLES):
                values[unpadded_size(len(values)) :] = 0
            setattr(module, name, nn.Parameter(values.to(device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
            thinker._init_weights(module)  # transformers computes position tables from the configuration

    if dtype in QUANTISED_DTYPES:
        quantized.quantise(thinker, dtype, initialise)
        return
    for module in list(thinker.modules()):
        initialise(module)
    thinker.tie_weights()


def draw_weights(name: str, fan_in: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random weights of `shape` for the tensor `name`, with the same values in every dtype.

    Matrices are uniform with a variance of about 1 / fan_in, which keeps the scale of activations at any depth (LeCun
    et al. 1998, "Efficient BackProp", 4.6). Vectors are 1 for the weights of norms and 0 for biases. Every value is an
    8-bit whole number times a power of 2, which every floating-point format represents exactly.
    """
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    scale = 2.0 ** round(math.log2(1 / (INT8_STANDARD_DEVIATION * math.sqrt(fan_in))))
    return numbers.view(torch.int8)[:size].to(dtype).mul_(scale).view(shape)
