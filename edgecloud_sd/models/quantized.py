"""A thinker with the weights of its text model in 8 or 4 bits, for an edge on a CPU.

A step over one token reads each weight once and does little with it, so that reading memory takes most of its time. The
kernels are torch's own. Their input is in bfloat16, because the kernels for float32 and float16 have no vector code on
x86. torchao has the same formats, but uses these kernels on a CPU only in a compiled model.

Embeddings and the linear layers of the audio tower stay in half precision and are computed in float32. A kernel would
not pay: a step looks up one row of the embeddings, and the audio tower always processes many rows. A checkpoint in half
precision, as all published ones are, loses nothing there. Norms, biases, convolutions, hidden states and the KV cache
are float32.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecloud_sd.models.devices import DTYPES, QUANTISED_DTYPES

GROUP_SIZE = 32  # weights of a row that share an int4 scale: the smallest group that the kernel accepts
INT8_ROW_MULTIPLE = 16  # the int8 kernel reads past the end of rows whose length is not a multiple of this
# With this many rows or more, an int8 weight is converted to float32 block by block, because the time of the kernel
# grows with every row. Both take equally long at about 60 rows of 2048 (weight 2048 x 2048, two shared AMD EPYC cores).
# 32 is below that: drafts (k + 1 rows) use the kernel, and prefills (hundreds of rows) the blocks.
MIN_ROWS_TO_UNPACK = 32
# Elements of a weight that are processed at once. A block is small beside a large weight and stays in the processor
# cache, but each block waits for all threads.
BLOCK_ELEMENTS = 2**20

Storage = Literal["quantised", "half", "float32"]


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights q [N, K] in -127..127 and a scale per row [N], with weight[n, k] ~ scale[n] * q[n, k].

    scale[n] = max over k of |weight[n, k]| / 127, rounded to the kernel's bfloat16 before the division
    (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", 2.2 and 3.1).
    """
    weight = weight.to(torch.float32, copy=True)  # in-place from here: new memory costs more than the arithmetic
    scale = _round_divisor(torch.maximum(weight.amax(1), -weight.amin(1)) / 127)
    return weight.div_(scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed int4 weights, and scales and zeros [K / GROUP_SIZE, N, 2] in bfloat16.

    The kernel computes the affine form weight ~ scale * (q - 8) + zero, with q in 0..15. Each group of a row has
    scale = (max - min) / 15 and zero = min + 8 * scale. The packing of q is the kernel's.
    """
    groups = weight.to(torch.float32, copy=True).view(len(weight), -1, GROUP_SIZE)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # ten times as fast as torch.aminmax
    scale = _round_divisor((most - least) / 15)
    zero = (least + 8 * scale.float()).bfloat16()
    q = groups.sub_(zero).div_(scale).add_(8).round_().clamp_(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).to(torch.int32), 1)
    return packed, torch.cat((scale, zero), -1).transpose(0, 1).contiguous()


def _round_divisor(scale: Tensor) -> Tensor:
    """Return the scale in bfloat16, with 1 in place of 0: any scale suits weights that are all 0."""
    rounded = scale.bfloat16()
    return torch.where(rounded == 0, 1, rounded)


class Int8Linear(nn.Module):
    """A linear layer from float32 [..., K] to [..., N] with int8 weights.

    The kernel computes few rows, if it accepts their length; other rows go through `multiply_by_blocks`.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight = nn.Parameter(torch.empty(n, k, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(n, dtype=torch.bfloat16))
        for rows in row_blocks(n, k, 4 * BLOCK_ELEMENTS):
            self.weight[rows], self.scale[rows] = quantise_int8(linear.weight[rows])
        self.bias = _float_bias(linear)
        self._min_rows_to_unpack = MIN_ROWS_TO_UNPACK if k % INT8_ROW_MULTIPLE == 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias [..., N] for `x` [..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < self._min_rows_to_unpack:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).float()
        else:
            y = multiply_by_blocks(rows, self.weight).mul_(self.scale)
        return _add_bias(y, self.bias, x)


class Int4Linear(nn.Module):
    """A linear layer from float32 [..., K] to [..., N] with int4 weights, for shapes that pass `fits_int4_kernel`.

    The kernel computes all rows, because the packing depends on the processor and no other code can read it.
    """

    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight = nn.Parameter(torch.empty(n, k // 2, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(k // GROUP_SIZE, n, 2, dtype=torch.bfloat16))
        for rows in row_blocks(n, k, 4 * BLOCK_ELEMENTS):
            self.weight[rows], self.scales[:, rows] = quantise_int4(linear.weight[rows])
        self.bias = _float_bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias [..., N] for `x` [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP_SIZE, self.scales)
        return _add_bias(y.float(), self.bias, x)


class HalfLinear(nn.Module):
    """A linear layer from float32 [..., K] to [..., N] with half-precision weights, computed in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = _half_precision(linear.weight)
        self.bias = _float_bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias [..., N] for `x` [..., K]."""
        return _add_bias(multiply_by_blocks(x.reshape(-1, x.shape[-1]), self.weight), self.bias, x)


class HalfEmbedding(nn.Module):
    """An embedding table in half precision with float32 output."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = _half_precision(embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the float32 rows of `ids`."""
        return F.embedding(ids, self.weight).float()


def row_blocks(n: int, k: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Yield slices of the rows of a weight [n, k], each with about `elements` elements.

    All but the last have a multiple of 64 rows, because the int4 kernel packs up to 64 rows together.
    """
    step = 64 * max(1, elements // (64 * k))
    return (slice(begin, begin + step) for begin in range(0, n, step))


def multiply_by_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows [M, K] @ weight [N, K].T, converting one block of `weight` at a time to the dtype of `rows`."""
    y = rows.new_empty(len(rows), len(weight))
    for block in row_blocks(*weight.shape):
        y[:, block] = rows @ weight[block].to(rows.dtype).T
    return y


def _add_bias(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return y [M, N] plus the bias, with the leading dimensions of `x`."""
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _float_bias(linear: nn.Linear) -> nn.Parameter | None:
    return None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)


def _half_precision(weight: Tensor) -> nn.Parameter:
    """Return a weight as it is stored if that is half precision, and in bfloat16 otherwise."""
    half = weight.detach() if weight.itemsize == 2 else weight.detach().bfloat16()
    return nn.Parameter(half, requires_grad=False)


def fits_int4_kernel(n: int, k: int) -> bool:
    """Return whether the int4 kernel accepts a weight [n, k]; a weight of another shape becomes int8."""
    return n % 16 == 0 and k % GROUP_SIZE == 0


def choose_storage(name: str, shape: tuple[int, ...]) -> Storage:
    """Return how `quantise` stores the tensor `name` of a checkpoint."""
    if len(shape) != 2:
        return "float32"
    return "half" if "audio_tower." in name or "embed_tokens." in name else "quantised"


def count_tensor_bytes(storage: Storage, shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor under `quantise(dtype)`, scales included."""
    size = math.prod(shape)
    if storage == "float32":
        return 4 * size
    if storage == "half":
        return 2 * size
    n, k = shape
    if dtype == "int4" and fits_int4_kernel(n, k):
        return size // 2 + 4 * (size // GROUP_SIZE)
    return size + 2 * n


@torch.no_grad()
def quantise(thinker: Any, dtype: str, initialise: Callable[[nn.Module], None] = lambda module: None) -> None:
    """Replace the layers of a thinker by layers in the format `dtype`, in place.

    Each original layer is freed before the next one is converted, so that two copies of the model never exist. The
    function calls `initialise` with each module that has weights of its own, before it reads them.
    """
    audio_modules = set(thinker.model.audio_tower.modules())
    places = [
        (parent, name, child in audio_modules)
        for parent in thinker.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, nn.Embedding)
    ]
    del audio_modules  # it would keep every original layer alive
    replacements: set[nn.Module] = set()
    for parent, name, is_audio in places:
        child = getattr(parent, name)
        initialise(child)
        replacement = _convert(child, dtype, is_audio)
        setattr(parent, name, replacement)
        replacements.add(replacement)
        del child
        _return_freed_memory()
    for module in thinker.modules():
        if module not in replacements:
            initialise(module)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _convert(layer: nn.Module, dtype: str, is_audio: bool) -> nn.Module:
    """Return the replacement of a plain linear or embedding layer."""
    if isinstance(layer, nn.Embedding):
        return HalfEmbedding(layer)
    assert isinstance(layer, nn.Linear)
    if is_audio:
        return HalfLinear(layer)
    n, k = layer.weight.shape
    return Int4Linear(layer) if dtype == "int4" and fits_int4_kernel(n, k) else Int8Linear(layer)


def _return_freed_memory() -> None:
    """Return freed memory to the system on Linux.

    glibc keeps it for later: over the layers of a model that added up to more than the int4 model itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def check_quantised_device(dtype: str, device: str) -> None:
    """Raise ValueError with the alternatives if this machine cannot compute in the format `dtype` on `device`."""
    others = ", ".join(DTYPES)
    if dtype not in QUANTISED_DTYPES:
        raise ValueError(f"unknown quantised dtype {dtype!r}: choose one of {', '.join(QUANTISED_DTYPES)}")
    if not device.startswith("cpu"):
        raise ValueError(f"dtype {dtype!r} is for an edge on the CPU, not on {device!r}: choose one of {others}")
    try:
        module = (Int8Linear if dtype == "int8" else Int4Linear)(nn.Linear(GROUP_SIZE, 16))
        module(torch.zeros(1, GROUP_SIZE))
    except (RuntimeError, AttributeError) as error:  # a torch without the kernel raises AttributeError
        reason = str(error).splitlines()[0]
        raise ValueError(f"dtype {dtype!r} has no kernel on this machine ({reason}): choose one of {others}") from None
