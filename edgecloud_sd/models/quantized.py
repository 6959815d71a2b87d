"""A thinker with the weights of its text model in 8 or 4 bits, for an edge on a CPU.

A step over one token reads each weight once and does little with it, so its time is that of reading memory. The kernels
are torch's own, and take what goes into a layer in bfloat16: those for float32 and float16 have no vector code on x86.
torchao, which has the same formats, leaves them unused on a CPU unless a model is compiled.

What is not worth a kernel is held in half precision and computed in float32: embeddings, of which a step looks up a
row, and the linear layers of the audio tower, which always see many rows. A checkpoint in half precision, as all
published ones are, loses nothing by that. Norms, biases and convolutions are float32, and so are hidden states and the
keys and values of a cache.
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

GROUP = 32  # weights of a row that share a scale in int4: the least that the kernel takes
INT8_ROW_MULTIPLE = 16  # multiple that the length of an int8 row must be: the kernel reads past the end of others
# Rows from which it is quicker to write an int8 weight out in float32, block by block, than to call the kernel, whose
# time grows with every row
MIN_ROWS_TO_UNPACK = 32
# Elements of a weight that are worked on at once: few beside a large one, and few enough to stay in a cache, but each
# block waits for all threads
BLOCK = 2**20


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, a scale a row: weight[n, k] = scale[n] * q[n, k] as nearly as may be, q in -127..127.

    scale[n] = max over k of |weight[n, k]| / 127, in bfloat16 as the kernel takes it, rounded before q is found
    (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", 2.2 and 3.1).
    """
    weight = weight.to(torch.float32, copy=True)  # fresh memory costs more than the arithmetic
    scale = _divisor(torch.maximum(weight.amax(1), -weight.amin(1)) / 127)
    return weight.div_(scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A scale and a zero for each `GROUP` of a row: weight = scale * (q - 8) + zero as nearly as may be, q in 0..15.

    scale = (max - min) / 15 and zero = min + 8 * scale over a group: the affine form that the kernel multiplies out.
    Returns q as the kernel packs it, and [K / GROUP, N, 2] of scales and zeros in bfloat16.
    """
    groups = weight.to(torch.float32, copy=True).view(len(weight), -1, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # ten times as quick as aminmax
    scale = _divisor((most - least) / 15)
    zero = (least + 8 * scale.float()).bfloat16()
    q = groups.sub_(zero).div_(scale).add_(8).round_().clamp_(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).to(torch.int32), 1)
    return packed, torch.cat((scale, zero), -1).transpose(0, 1).contiguous()


def _divisor(scale: Tensor) -> Tensor:
    """In bfloat16, and never 0: what is all 0 has any scale."""
    rounded = scale.bfloat16()
    return torch.where(rounded == 0, 1, rounded)


class Int8Linear(nn.Module):
    """Float32 [..., K] to [..., N], with `int8` weights. Few rows go through the kernel where it takes their length."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight = nn.Parameter(torch.empty(n, k, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(n, dtype=torch.bfloat16))
        for rows in blocks(n, k, 4 * BLOCK):
            self.weight[rows], self.scale[rows] = int8(linear.weight[rows])
        self.bias = _bias(linear)
        self._few = MIN_ROWS_TO_UNPACK if linear.in_features % INT8_ROW_MULTIPLE == 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < self._few:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).float()
        else:
            y = by_blocks(rows, self.weight).mul_(self.scale)
        return _finished(y, self.bias, x)


class Int4Linear(nn.Module):
    """Float32 [..., K] to [..., N], with `int4` weights. All rows go through the kernel, which takes only what
    `takes_int4`; its packed weights depend on the processor, so that nothing else can read them."""

    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        self.weight = nn.Parameter(torch.empty(n, k // 2, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(k // GROUP, n, 2, dtype=torch.bfloat16))
        for rows in blocks(n, k, 4 * BLOCK):
            self.weight[rows], self.scales[:, rows] = int4(linear.weight[rows])
        self.bias = _bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales)
        return _finished(y.float(), self.bias, x)


class HalfLinear(nn.Module):
    """Float32 [..., K] to [..., N], computed in float32 from weights held in half precision."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = _half(linear.weight)
        self.bias = _bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        return _finished(by_blocks(x.reshape(-1, x.shape[-1]), self.weight), self.bias, x)


class HalfEmbedding(nn.Module):
    """Float32 rows of a table held in half precision."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = _half(embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


def blocks(n: int, k: int, elements: int = BLOCK) -> Iterator[slice]:
    """Rows of a weight [n, k] to be worked on one after the other.

    A multiple of 64 rows each, but the last: so many the kernel for int4 packs together, at most.
    """
    step = 64 * max(1, elements // (64 * k))
    return (slice(begin, begin + step) for begin in range(0, n, step))


def by_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, K] times weight [N, K] transposed, of which a block at a time is written out in the dtype of `rows`."""
    y = rows.new_empty(len(rows), len(weight))
    for block in blocks(*weight.shape):
        y[:, block] = rows @ weight[block].to(rows.dtype).T
    return y


def _finished(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _bias(linear: nn.Linear) -> nn.Parameter | None:
    return None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)


def _half(weight: Tensor) -> nn.Parameter:
    """As it is stored, where that is half precision; else in bfloat16."""
    kept = weight.detach() if weight.itemsize == 2 else weight.detach().bfloat16()
    return nn.Parameter(kept, requires_grad=False)


def takes_int4(n: int, k: int) -> bool:
    """Whether the int4 kernel takes a weight [n, k]; one that it does not take is held in int8."""
    return n % 16 == 0 and k % GROUP == 0


WeightPart = Literal["text", "half", "float32"]  # how a module's weights are held


def tensor_bytes(part: WeightPart, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor of `part` in the format `dtype`, scales and all."""
    size = math.prod(shape)
    if part == "float32":
        return 4 * size
    if part == "half":
        return 2 * size
    n, k = shape
    if dtype == "int4" and takes_int4(n, k):
        return size // 2 + 4 * (size // GROUP)
    return size + 2 * n


def part_of(name: str, shape: tuple[int, ...]) -> WeightPart:
    """Of a tensor of a checkpoint, by its name."""
    if len(shape) != 2:
        return "float32"
    return "half" if "audio_tower." in name or "embed_tokens." in name else "text"


@torch.no_grad()
def quantise(thinker: Any, dtype: str, fill: Callable[[nn.Module], None] = lambda module: None) -> None:
    """Hold a thinker's weights in the format `dtype`, in place, a module at a time: each one's own weights go as soon
    as its rounded ones are there, so that a model is never there twice.

    `fill` is called with each module that has weights of its own, before these are read.
    """
    audio = set(thinker.model.audio_tower.modules())
    places = [
        (parent, name, child in audio)
        for parent in thinker.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, nn.Embedding)
    ]
    del audio  # which holds them all
    made: set[nn.Module] = set()
    for parent, name, heard in places:
        child = getattr(parent, name)
        fill(child)
        new: nn.Module
        if type(child) is nn.Embedding:
            new = HalfEmbedding(child)
        elif heard:
            new = HalfLinear(child)
        elif dtype == "int4" and takes_int4(*child.weight.shape):
            new = Int4Linear(child)
        else:
            new = Int8Linear(child)
        setattr(parent, name, new)
        made.add(new)
        del child
        _give_back()
    for module in thinker.modules():
        if module not in made:
            fill(module)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _give_back() -> None:
    """What was freed, to the system: glibc keeps it for later, and between layers that are made one after the other it
    came to more than an int4 model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def check_quantised_device(dtype: str, device: str) -> None:
    """ValueError, naming what to take instead, where this machine cannot compute in the format `dtype`."""
    others = ", ".join(DTYPES)
    if dtype not in QUANTISED_DTYPES:
        raise ValueError(f"unknown quantised dtype {dtype!r}: choose one of {', '.join(QUANTISED_DTYPES)}")
    if not device.startswith("cpu"):
        raise ValueError(f"dtype {dtype!r} is for an edge on the CPU, not on {device!r}: choose one of {others}")
    try:
        module = (Int8Linear if dtype == "int8" else Int4Linear)(nn.Linear(GROUP, 16))
        module(torch.zeros(1, GROUP))
    except (RuntimeError, AttributeError) as error:  # the latter of a torch without the kernel
        reason = str(error).splitlines()[0]
        raise ValueError(f"dtype {dtype!r} has no kernel here ({reason}): choose one of {others}") from None
