"""The memory that a checkpoint needs, from its headers, and the check that it fits before it is loaded."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from edgecloud_sd.data.prompts import look_up
from edgecloud_sd.host import limits
from edgecloud_sd.host.limits import format_gb
from edgecloud_sd.models import quantized
from edgecloud_sd.models.checkpoint import DamagedFile, find_weight_files
from edgecloud_sd.models.devices import DTYPES, QUANTISED_DTYPES

EMBEDDINGS = ("model.embed_tokens.weight", "thinker.model.embed_tokens.weight")  # thinker alone, whole Omni
BYTES_PER_PARAMETER = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that the weights of a thinker need in one dtype; decoding needs more on top."""

    parameters: int
    loaded: int  # bytes, after the load
    loading: int  # bytes during the load, counted as --max-memory-gb counts them


@dataclass(frozen=True)
class MemoryBudget:
    """The free memory of one device, or under one limit, for weights."""

    free: int  # bytes
    description: str  # "7.400 GB of memory are free"
    phase: Literal["loaded", "loading"]  # the part of a need that must fit
    remedy: str
    is_enforced: bool = True  # otherwise a need that does not fit is a warning

    def required(self, need: MemoryNeed) -> int:
        """Return the bytes of `need` that count here."""
        return need.loaded if self.phase == "loaded" else need.loading

    def fits(self, need: MemoryNeed) -> bool:
        """Return whether `need` fits."""
        return self.required(need) <= self.free


def check_checkpoint_fits(
    checkpoint: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    limit_bytes: int | None = None,
    monitored_bytes: int | None = None,
) -> None:
    """Raise ValueError for a checkpoint that exceeds the memory of `device` or the limit of this process.

    `limit_bytes` is the limit in force. `monitored_bytes` is one that is only monitored, and gives a warning instead.
    The message gives the need and the remedy. The check passes if it cannot know: for a checkpoint that is not
    downloaded yet, and for the memory of a device that is neither CPU nor CUDA.
    """
    check_weights_fit(
        str(checkpoint),
        lambda dtype: read_checkpoint_need(checkpoint, dtype),
        device,
        dtype,
        limit_bytes,
        monitored_bytes,
    )


def check_weights_fit(
    name: str,
    need_in: Callable[[str], MemoryNeed | None],
    device: str,
    dtype: str,
    limit_bytes: int | None = None,
    monitored_bytes: int | None = None,
) -> None:
    """Raise the ValueError of `check_checkpoint_fits`, or warn as it does, for weights that need `need_in(dtype)`."""
    need = need_in(dtype)
    if need is None:
        return
    for budget in find_memory_budgets(device, limit_bytes, monitored_bytes):
        if not budget.fits(need):
            candidates = (*DTYPES, *QUANTISED_DTYPES) if device.startswith("cpu") else DTYPES
            others = [other for other in candidates if (smaller := need_in(other)) and budget.fits(smaller)]
            message = _too_large_message(name, dtype, need, budget, others)
            if budget.is_enforced:
                raise ValueError(message)
            warnings.warn(f"{message}; it loads all the same, because this limit is monitored", stacklevel=2)


def _too_large_message(name: str, dtype: str, need: MemoryNeed, budget: MemoryBudget, others: list[str]) -> str:
    """Return the message for a need that exceeds the budget; the weights would fit in the dtypes `others`."""
    text = f"checkpoint {name!r} needs {format_gb(budget.required(need))} GB in {dtype}"
    if budget.phase == "loading":
        text += f" while it loads ({format_gb(need.loaded)} for its weights)"
    text += f", and {budget.description}: {budget.remedy}"
    floats, quantised = ([dtype for dtype in group if dtype in others] for group in (DTYPES, QUANTISED_DTYPES))
    if floats:
        text += f", or choose {' or '.join(floats)} (--edge-dtype, --cloud-dtype)"
    if quantised:
        text += f", or choose {' or '.join(quantised)} for the edge (--edge-dtype)"
    return text


def find_memory_budgets(
    device: str, limit_bytes: int | None, monitored_bytes: int | None = None
) -> Iterator[MemoryBudget]:
    """Yield the budgets that weights on a torch device must fit in: the limits if there are any, then the device."""
    for limit, is_enforced in ((limit_bytes, True), (monitored_bytes, False)):
        if limit is not None:
            free = max(0, limit - limits.memory_in_use())
            description = f"{format_gb(free)} of the {format_gb(limit)} GB of {limits.MEMORY_OPTION} are free"
            yield MemoryBudget(free, description, "loading", "raise the limit", is_enforced)
    if device.startswith("cpu"):
        # the system can drop pages of a mapped file during the load: only the loaded weights count
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        yield MemoryBudget(free, f"{format_gb(free)} GB of memory are free", "loaded", "choose a smaller model")
    elif device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        yield MemoryBudget(free, f"{format_gb(free)} GB of {device} are free", "loaded", "choose a smaller model")


def read_checkpoint_need(checkpoint: str | Path, dtype: str) -> MemoryNeed | None:
    """Return the need of a checkpoint's thinker in `dtype`, from a folder or a name on the hub.

    Return None if no safetensors can be read, for example before the download. The loader reports the error then.
    """
    try:
        files = find_weight_files(checkpoint)
        headers = [_read_header(file) for file in files]
        mapped = sum(file.stat().st_size for file in files)
    except OSError:
        return None
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    if any(name.startswith("thinker.") for name in tensors):  # a whole Omni: its talker is not loaded
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("thinker.")}
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    loaded = count_loaded_bytes(shapes, dtype)
    if dtype in QUANTISED_DTYPES:
        return MemoryNeed(sum(map(math.prod, shapes.values())), loaded, mapped + loaded)
    converted = sum(math.prod(shape) for stored, shape in tensors.values() if SAFETENSORS_DTYPES.get(stored) != dtype)
    # every file stays mapped during the load, talker included; weights stored in `dtype` stay in their map, and the
    # others are copied
    bytes_each = look_up(BYTES_PER_PARAMETER, dtype, "dtype")
    return MemoryNeed(loaded // bytes_each, loaded, mapped + converted * bytes_each)


def count_loaded_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Return the bytes of a thinker's tensors in `dtype`, from their shapes by name."""
    if dtype not in QUANTISED_DTYPES:
        return look_up(BYTES_PER_PARAMETER, dtype, "dtype") * sum(map(math.prod, shapes.values()))
    used = {name: shape for name, shape in shapes.items() if "visual." not in name}  # the vision tower is dropped first
    embeddings = [shape for name, shape in used.items() if "embed_tokens." in name]
    if embeddings and not any(
        "lm_head." in name for name in used
    ):  # tied: quantised for the head alone, so it counts twice
        used["lm_head.weight"] = embeddings[0]
    return sum(
        quantized.count_tensor_bytes(quantized.choose_storage(name, shape), shape, dtype)
        for name, shape in used.items()
    )


def check_weight_files(checkpoint: str | Path, vocab_size: int, hidden_size: int) -> None:
    """Raise DamagedFile for a file of weights on this machine that is no whole safetensors.

    Raise OSError for embeddings of another size: transformers would first fill a model of the configured size.
    """
    with suppress(FileNotFoundError):
        for file in find_weight_files(checkpoint):
            for name, (_, shape) in _read_header(file).items():
                if name in EMBEDDINGS and shape != (vocab_size, hidden_size):
                    raise OSError(
                        f"checkpoint {str(checkpoint)!r} cannot be loaded: vocab_size {vocab_size} and hidden_size "
                        f"{hidden_size} of config.json are not the shape {list(shape)} of the embeddings in "
                        f"{file.name}: use the files of one checkpoint"
                    )


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the stored dtype and the shape of each tensor. Raise DamagedFile if the file is no whole safetensors.

    The safetensors library would map the whole file even for its header, and a memory limit may refuse that.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 8 < 8 + length <= size:
            raise DamagedFile(file, "is not a safetensors file")
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        shapes = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise DamagedFile(file, "is not a safetensors file: its header cannot be read") from None
    if end != size:
        raise DamagedFile(file, f"has {size} bytes, and its header says {end}")
    return shapes
