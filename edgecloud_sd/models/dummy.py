"""Models of a given size with random weights: how fast and how large a pair is on a machine, without its checkpoints.

`dimensions/` has what Qwen/Qwen2.5-Omni-3B and -7B publish in their config.json of the thinker's audio tower and text
model (vision is left out: no caption of speech needs it); any other size is a folder with a config.json. A model that
has no tokenizer takes that of the pocket pair, whose few hundred ids are the first of its rows.
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
from edgecloud_sd.models.memory import Need
from edgecloud_sd.models.pairs import DUMMY, PAIRS

DIMENSIONS = Path(__file__).parent / "dimensions"
# One row in so many is padding, the last ones: their logits are 0, which is never the largest. So a side of a pair says
# no id that is beyond the other's rows, as both published models pad their vocabularies, each in its own way.
PADDING = 100
TABLES = ("embed_tokens.weight", "lm_head.weight")  # with a row an id
SPREAD = 73.9  # standard deviation of whole numbers -128 to 127, all as likely


@dataclass(frozen=True)
class Padded:
    """A tokenizer for a model with more rows than tokens: an id beyond the last is read as if they began anew."""

    tokenizer: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self.tokenizer(*given, **options)

    def decode(self, ids: list[int], **options: Any) -> str:
        text: str = self.tokenizer.decode([each % len(self.tokenizer) for each in ids], **options)
        return text


def load_dummy(checkpoint: str | Path, device: str = "cpu", dtype: str = "float32") -> hf.HFModel:
    """A thinker like that of `checkpoint`, with weights that are the same on every machine and in every dtype.

    Raises ValueError for a checkpoint of which no dimensions are known, or that does not fit; OSError as
    `hf.load_checkpoint`.
    """
    config = configuration(checkpoint)
    front = load_dummy_frontend(checkpoint)
    with frontend.one_line_errors(str(checkpoint)):
        thinker = _empty(config)
    memory.check_need_fits(
        front.name, lambda each: memory_need(thinker, each), device, dtype, limits.in_force().memory_bytes
    )
    _materialise(thinker, device, dtype)
    return hf.HFModel(**vars(front), thinker=thinker.eval())


def load_dummy_frontend(checkpoint: str | Path) -> frontend.Frontend:
    """Its own front end, where it is a folder with a tokenizer, or the pocket pair's. Raises as `load_dummy`."""
    config = configuration(checkpoint)
    own = (Path(checkpoint) / "tokenizer_config.json").is_file()
    front = frontend.read_frontend(checkpoint if own else PAIRS["pocket"].edge)
    tokens, rows = len(front.tokenizer), config.text_config.vocab_size
    if rows < tokens:
        raise ValueError(f"{str(checkpoint)!r} has {rows} rows for the {tokens} tokens of its tokenizer: give it more")
    bins = config.audio_config.num_mel_bins
    if front.extractor.feature_size != bins:
        front = replace(front, extractor=type(front.extractor)(**front.extractor.to_dict() | {"feature_size": bins}))
    return replace(front, name=f"{checkpoint}-{DUMMY}", tokenizer=Padded(front.tokenizer))


def configuration(checkpoint: str | Path) -> Any:
    """The configuration of a thinker: of a published one by its name, or of a folder. Raises as `load_dummy`."""
    known = {f"Qwen/{file.stem}": file for file in sorted(DIMENSIONS.glob("*.json"))}
    if str(checkpoint) not in known and not Path(checkpoint).is_dir():
        raise ValueError(
            f"no dimensions of {str(checkpoint)!r}: give a folder with a config.json, or one of {', '.join(known)}"
        )
    with frontend.one_line_errors(str(checkpoint)):
        config = frontend.thinker_config(frontend.load_config(str(known.get(str(checkpoint), checkpoint))))
        _check(config)
    return config


def _check(config: Any) -> None:
    """ValueError for sizes that do not go together and that transformers notices late, if it says which they are."""
    text, audio = config.text_config, config.audio_config
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "d_model": audio.d_model,
        "encoder_attention_heads": audio.encoder_attention_heads,
        "encoder_ffn_dim": audio.encoder_ffn_dim,
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
        raise ValueError(f"output_dim {audio.output_dim} of the audio tower must be hidden_size {text.hidden_size}")


def _empty(config: Any) -> Any:
    """A thinker that takes no memory."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)
    thinker.model.visual = None
    return thinker


def unpadded_size(rows: int) -> int:
    """Rows that are no padding."""
    return rows - max(rows // PADDING, 1)


def check_vocab_sizes(edge: int, cloud: int) -> None:
    """ValueError where a side of a pair may say an id that the other has no row for."""
    if unpadded_size(edge) > cloud or unpadded_size(cloud) > edge:
        raise ValueError(
            f"vocab_size {edge} of the edge and {cloud} of the cloud differ by more than a padding of 1 in {PADDING}: "
            "each would say ids that the other does not know"
        )


def memory_need(thinker: Any, dtype: str) -> Need:
    """What it needs in `dtype`: the largest tensor is there in several forms while it is made."""
    shapes = {name: tuple(each.shape) for name, each in thinker.named_parameters()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    loaded = memory.loaded_bytes(shapes, dtype)
    return Need(sum(sizes), loaded, loaded + 4 * max(sizes))


def _materialise(thinker: Any, device: str, dtype: str) -> None:
    """Give an empty thinker its weights, a module at a time."""
    made_of: dict[nn.Parameter, tuple[str, int]] = {}  # name and fan-in; of tied ones the first module's
    for prefix, module in thinker.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fan_in = 1 if isinstance(module, nn.Embedding) else math.prod(parameter.shape[1:])
            made_of.setdefault(parameter, (f"{prefix}.{name}", fan_in))
    # what is to be rounded is made in bfloat16, which holds these weights as they are
    made = torch.bfloat16 if dtype in QUANTISED_DTYPES else getattr(torch, dtype)

    def fill(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            full, fan_in = made_of[parameter]
            values = random_weights(full, fan_in, tuple(parameter.shape), made)
            if full.endswith(TABLES):
                values[unpadded_size(len(values)) :] = 0
            setattr(module, name, nn.Parameter(values.to(device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
            thinker._init_weights(module)  # tables of positions: what transformers computes of the configuration

    if dtype in QUANTISED_DTYPES:
        quantized.quantise(thinker, dtype, fill)
        return
    for module in list(thinker.modules()):
        fill(module)
    thinker.tie_weights()


def random_weights(name: str, fan_in: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random weights of the tensor `name`, the same in every dtype.

    Matrices are uniform with a variance of about 1 / fan_in, so that what goes through keeps its scale at any depth
    (LeCun et al. 1998, "Efficient BackProp", 4.6); of vectors, weights of norms are 1 and biases 0. All values are
    whole numbers of 8 bits times a power of 2, which every floating format holds exactly.
    """
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    scale = 2.0 ** round(math.log2(1 / (SPREAD * math.sqrt(fan_in))))
    return numbers.view(torch.int8)[:size].to(dtype).mul_(scale).view(shape)
