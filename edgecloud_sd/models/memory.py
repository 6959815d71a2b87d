"""Whether a checkpoint fits in memory, told from its headers before any of it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from edgecloud_sd.host import limits
from edgecloud_sd.host.limits import gb
from edgecloud_sd.models import quantized
from edgecloud_sd.models.devices import DTYPES, QUANTISED_DTYPES

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
SAMPLE = 2**20  # bytes at each end of a file that its digest is of


@dataclass(frozen=True)
class Need:
    """What a thinker needs in one dtype, for its weights alone: decoding comes on top."""

    parameters: int
    loaded: int  # bytes, once it is there
    loading: int  # bytes while it loads, as --max-memory-gb counts them


@dataclass(frozen=True)
class Room:
    """Memory that weights can go to."""

    free: int  # bytes
    words: str  # "7.400 GB of memory are free"
    when: Literal["loaded", "loading"]  # the need that must fit in it
    remedy: str

    def holds(self, need: Need) -> bool:
        return self.needs(need) <= self.free

    def needs(self, need: Need) -> int:
        return need.loaded if self.when == "loaded" else need.loading


def check_checkpoint_fits(
    checkpoint: str | Path, device: str = "cpu", dtype: str = "float32", limit_bytes: int | None = None
) -> None:
    """ValueError, naming the need and the remedy, for a checkpoint too large for `device` or the process's limit.

    `limit_bytes` is the limit in force (`limits.InForce.memory_bytes`). What cannot be known passes: a checkpoint that
    is not on this machine yet, the memory of a device that is neither CPU nor CUDA.
    """
    check_need_fits(str(checkpoint), lambda each: checkpoint_need(checkpoint, each), device, dtype, limit_bytes)


def check_need_fits(
    name: str, needs: Callable[[str], Need | None], device: str, dtype: str, limit_bytes: int | None = None
) -> None:
    """As `check_checkpoint_fits`, for what needs so much in a dtype."""
    need = needs(dtype)
    if need is None:
        return
    for room in rooms(device, limit_bytes):
        if not room.holds(need):
            known = (*DTYPES, *QUANTISED_DTYPES) if device.startswith("cpu") else DTYPES
            others = [each for each in known if (other := needs(each)) and room.holds(other)]
            raise ValueError(too_large(name, dtype, need, room, others))


def too_large(name: str, dtype: str, need: Need, room: Room, others: list[str]) -> str:
    """The message for a need that is more than the room; `others` are the dtypes in which it would fit."""
    text = f"checkpoint {name!r} needs {gb(room.needs(need))} GB in {dtype}"
    if room.when == "loading":
        text += f" while it loads ({gb(need.loaded)} for its weights)"
    text += f", and {room.words}: {room.remedy}"
    floats, quantised = ([each for each in known if each in others] for known in (DTYPES, QUANTISED_DTYPES))
    if floats:
        text += f", or take it in {' or '.join(floats)} (--edge-dtype, --cloud-dtype)"
    if quantised:
        text += f", or as the edge in {' or '.join(quantised)} (--edge-dtype)"
    return text


def rooms(device: str, limit_bytes: int | None) -> Iterator[Room]:
    """What must hold a checkpoint on a torch device: the limit if there is one, and the device as it is now."""
    if limit_bytes is not None:
        free = max(0, limit_bytes - limits.memory_in_use())
        words = f"{gb(free)} of the {gb(limit_bytes)} GB of {limits.MEMORY} are free"
        yield Room(free, words, "loading", "raise the limit")
    if device.startswith("cpu"):
        # pages of a mapped file can be dropped while it loads: only what stays counts
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        yield Room(free, f"{gb(free)} GB of memory are free", "loaded", "take a smaller model")
    elif device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        yield Room(free, f"{gb(free)} GB of {device} are free", "loaded", "take a smaller model")


def checkpoint_need(checkpoint: str | Path, dtype: str) -> Need | None:
    """What the thinker of a checkpoint, a folder or a name on the hub, needs in `dtype`.

    None where no weights can be read: not downloaded, or no safetensors. The loader has the word on those.
    """
    try:
        files = _files(checkpoint)
        headers = [_header(file) for file in files]
        mapped = sum(file.stat().st_size for file in files)
    except (OSError, ValueError):
        return None
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    whole = any(name.startswith("thinker.") for name in tensors)  # with a talker that is not loaded
    counted = {name: tensor for name, tensor in tensors.items() if not whole or name.startswith("thinker.")}
    shapes = {name: shape for name, (_, shape) in counted.items()}
    loaded = loaded_bytes(shapes, dtype)
    if dtype in QUANTISED_DTYPES:
        return Need(sum(map(math.prod, shapes.values())), loaded, mapped + loaded)
    converted = sum(math.prod(shape) for stored, shape in counted.values() if STORED.get(stored) != dtype)
    # all files are mapped until the end, talker and all; what is stored in `dtype` stays in its map, the rest is copied
    return Need(loaded // BYTES[dtype], loaded, mapped + converted * BYTES[dtype])


def loaded_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes that a thinker's tensors, by name, take in `dtype`."""
    if dtype not in QUANTISED_DTYPES:
        return BYTES[dtype] * sum(map(math.prod, shapes.values()))
    heard = {name: shape for name, shape in shapes.items() if "visual." not in name}  # what sees is dropped first
    tables = [shape for name, shape in heard.items() if "embed_tokens." in name]
    if tables and not any("lm_head." in name for name in heard):  # tied: looked up as it is, rounded as the head
        heard["lm_head.weight"] = tables[0]
    return sum(quantized.tensor_bytes(quantized.part_of(name, shape), shape, dtype) for name, shape in heard.items())


def weights_digest(checkpoint: str | Path) -> str:
    """Tells checkpoints apart by their weights: of each file its size, its first and its last megabyte.

    Empty where no weights can be read, as `checkpoint_need` has it.
    """
    seen = hashlib.sha256()
    try:
        for path in _files(checkpoint):
            size = path.stat().st_size
            with path.open("rb") as file:
                seen.update(f"{size} ".encode() + file.read(SAMPLE))
                file.seek(max(size - SAMPLE, 0))
                seen.update(file.read(SAMPLE))
    except (OSError, ValueError):
        return ""
    return seen.hexdigest()


def _files(checkpoint: str | Path) -> list[Path]:
    """The files with a checkpoint's weights. OSError if there are none here."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(checkpoint), "config.json")
        if not isinstance(cached, str):
            raise FileNotFoundError(checkpoint)
        folder = Path(cached).parent
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's stored dtype and shape. ValueError for a file that is no safetensors.

    Read by hand: safetensors maps the whole file even for this, which a memory limit may refuse.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in header.items()}
