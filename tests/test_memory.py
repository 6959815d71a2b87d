"""The memory need of a checkpoint, from its headers, and the error for one that does not fit."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from edgecloud_sd.host import limits
from edgecloud_sd.models import memory
from edgecloud_sd.models.devices import DTYPES
from edgecloud_sd.models.memory import (
    BYTES_PER_PARAMETER,
    MemoryNeed,
    check_checkpoint_fits,
    find_memory_budgets,
    read_checkpoint_need,
)
from edgecloud_sd.models.pairs import PAIRS

MB = 1_000_000
# This runs in its own process and loads the edge first, so that imports and caches are not counted.
MAPPED = """
import json, re, sys
import torch
from edgecloud_sd.models import pairs
from edgecloud_sd.models.load import load_model
from edgecloud_sd.events import Prompt

def maps():
    entries = []
    for line in open("/proc/self/smaps"):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \\S+ \\S+ \\S+ \\d+ *(.*)", line)
        if head:
            entries.append({"start": int(head[1], 16), "end": int(head[2], 16), "file": head[3]})
        elif line.startswith("Anonymous:"):
            entries[-1]["own"] = 1024 * int(line.split()[1])
    return entries

def load_and_decode(checkpoint):
    model = load_model(checkpoint)
    with torch.inference_mode():
        model.open(Prompt((1, 2, 3, 4))).extend([5, 6])
    return model

warm = load_and_decode(pairs.PAIRS["pocket"].edge)
before = sum(entry["own"] for entry in maps())
model = load_and_decode(sys.argv[1])
now = maps()
places = [parameter.data_ptr() for parameter in model.thinker.parameters()]
files = [next(entry["file"] for entry in now if entry["start"] <= place < entry["end"]) for place in places]
print(json.dumps({"files": files, "copied": sum(entry["own"] for entry in now) - before}))
"""


def write_safetensors(file: Path, tensors: dict[str, tuple[str, int]]) -> int:
    """Write a sparse safetensors file of tensors by (stored dtype, parameters) and return its size in bytes."""
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (stored, parameters) in tensors.items():
        start, end = end, end + size[stored] * parameters
        header[name] = {"dtype": stored, "shape": [parameters // 10, 10], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file.stat().st_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a thinker of 100 M parameters in bfloat16 (a sparse file of 0.2 GB)."""
    write_safetensors(tmp_path / "model.safetensors", {"lm_head.weight": ("BF16", 100 * MB)})
    return tmp_path


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a process that uses 50 MB on a machine with 0.2 GB of free memory and as much swap."""
    monkeypatch.setattr(limits, "memory_in_use", lambda: 50 * MB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=200 * MB))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=200 * MB))


@pytest.mark.parametrize("side", [PAIRS["pocket"].edge, PAIRS["pocket"].cloud])
def test_the_need_of_the_pocket_pair_matches_its_safetensors_files(side: str) -> None:
    file = Path(side) / "model.safetensors"  # float16, with the thinker alone
    with safe_open(file, "np") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    size = file.stat().st_size
    assert read_checkpoint_need(side, "float16") == MemoryNeed(parameters, 2 * parameters, size)
    assert read_checkpoint_need(side, "float32") == MemoryNeed(parameters, 4 * parameters, size + 4 * parameters)


def test_every_dtype_has_its_bytes_per_parameter() -> None:
    assert set(BYTES_PER_PARAMETER) == set(memory.SAFETENSORS_DTYPES.values()) == set(DTYPES)


def test_only_weights_stored_in_another_dtype_are_copied(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "model.safetensors", {"a": ("BF16", 100), "b": ("F32", 10)})
    assert read_checkpoint_need(tmp_path, "bfloat16") == MemoryNeed(110, 220, file + 20)
    assert read_checkpoint_need(tmp_path, "float16") == MemoryNeed(110, 220, file + 220)
    assert read_checkpoint_need(tmp_path, "float32") == MemoryNeed(110, 440, file + 400)
    assert read_checkpoint_need(tmp_path, "float64") == MemoryNeed(110, 880, file + 880)


def test_a_whole_omni_checkpoint_is_mapped_and_only_its_thinker_is_loaded(tmp_path: Path) -> None:
    first = write_safetensors(
        tmp_path / "model-00001-of-00002.safetensors", {"thinker.a": ("BF16", 100), "talker.thinker.a": ("BF16", 500)}
    )
    second = write_safetensors(
        tmp_path / "model-00002-of-00002.safetensors", {"thinker.b": ("BF16", 10), "token2wav.a": ("F32", 50)}
    )
    shards = {"thinker.a": 1, "talker.thinker.a": 1, "thinker.b": 2, "token2wav.a": 2}
    index = {"weight_map": {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(tmp_path / "other.safetensors", {"thinker.c": ("BF16", 1000)})  # not in the index
    assert read_checkpoint_need(tmp_path, "bfloat16") == MemoryNeed(110, 220, first + second)
    assert read_checkpoint_need(tmp_path, "float32") == MemoryNeed(110, 440, first + second + 440)


def test_a_checkpoint_on_the_hub_is_read_from_the_download_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {("owner/name", "config.json"): str(folder / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: cached.get(key))
    assert read_checkpoint_need("owner/name", "bfloat16") == read_checkpoint_need(folder, "bfloat16")
    assert read_checkpoint_need(folder, "bfloat16") is not None
    assert read_checkpoint_need("owner/other", "bfloat16") is None


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\x10\0\0\0\0\0\0\0not json at all.", b"\xff" * 20, b"\x08\0\0\0\0\0\0\0\xff\xff\xff\xff{}{}"],
)
def test_an_unreadable_checkpoint_passes_the_check(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert read_checkpoint_need(tmp_path, "float32") is None
    check_checkpoint_fits(tmp_path, "cpu", "float32", limit_bytes=1)


def test_a_missing_shard_makes_the_need_unknown(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_checkpoint_need(tmp_path, "float32") is None


@pytest.mark.usefixtures("small_machine")
def test_a_checkpoint_beyond_the_limit_is_refused_with_the_numbers_and_the_alternatives(folder: Path) -> None:
    with pytest.raises(ValueError, match="--max-memory-gb") as raised:
        check_checkpoint_fits(folder, "cpu", "float32", limit_bytes=300 * MB)
    assert str(raised.value) == (
        f"checkpoint {str(folder)!r} needs 0.600 GB in float32 while it loads (0.400 for its weights), "
        "and 0.250 of the 0.300 GB of --max-memory-gb are free: "
        "raise the limit, or choose bfloat16 (--edge-dtype, --cloud-dtype)"  # int8 would need 0.31 while it loads
    )
    with pytest.raises(ValueError, match=r" 0\.000 of the 0\.040 GB of --max-memory-gb are free: raise the limit$"):
        check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=40 * MB)


@pytest.mark.usefixtures("small_machine")
def test_a_checkpoint_beyond_a_monitored_limit_loads_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"0\.250 of the 0\.300 GB of --max-memory-gb are free.*loads all the same"):
        check_checkpoint_fits(folder, "cpu", "float32", monitored_bytes=300 * MB)
    with pytest.raises(ValueError, match="GB of memory are free"):  # the machine is no monitored limit
        check_checkpoint_fits(folder, "cpu", "float64", monitored_bytes=2000 * MB)


@pytest.mark.usefixtures("small_machine")
def test_the_limit_counts_the_need_while_loading_to_the_byte(folder: Path) -> None:
    need = read_checkpoint_need(folder, "bfloat16")
    assert need is not None
    check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=50 * MB + need.loading)
    with pytest.raises(ValueError, match="--max-memory-gb"):
        check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=50 * MB + need.loading - 1)


@pytest.mark.usefixtures("small_machine")
def test_without_a_limit_the_weights_must_fit_in_free_memory_and_swap(folder: Path) -> None:
    check_checkpoint_fits(
        folder, "cpu", "float32"
    )  # 0.4 GB, and 0.6 during the load: the system can drop maps of files
    with pytest.raises(ValueError, match="GB of memory are free") as raised:
        check_checkpoint_fits(folder, "cpu", "float64", limit_bytes=2000 * MB)
    assert str(raised.value) == (
        f"checkpoint {str(folder)!r} needs 0.800 GB in float64, and 0.400 GB of memory are free: "
        "choose a smaller model, or choose float32 or float16 or bfloat16 (--edge-dtype, --cloud-dtype), "
        "or choose int8 or int4 for the edge (--edge-dtype)"
    )


@pytest.mark.usefixtures("small_machine")
def test_the_free_memory_of_a_gpu_is_read_from_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:1": (399 * MB, 800 * MB), "cuda": (400 * MB, 800 * MB)}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(mem_get_info=free.__getitem__)))
    check_checkpoint_fits(folder, "cuda", "float32")
    message = re.escape(
        "needs 0.400 GB in float32, and 0.399 GB of cuda:1 are free: choose a smaller model, or choose "
    )
    with pytest.raises(ValueError, match=message):
        check_checkpoint_fits(folder, "cuda:1", "float32")
    with pytest.raises(ValueError, match="--max-memory-gb"):  # the weights pass through this process
        check_checkpoint_fits(folder, "cuda", "float32", limit_bytes=500 * MB)


def test_a_device_with_unknown_memory_passes_the_check(folder: Path) -> None:
    assert list(find_memory_budgets("mps", None)) == []
    check_checkpoint_fits(folder, "mps", "float64")


def test_the_pocket_pair_fits_on_this_machine_and_an_absurd_size_does_not() -> None:
    (budget,) = find_memory_budgets("cpu", None)
    need = read_checkpoint_need(PAIRS["pocket"].cloud, "float32")
    assert need is not None
    assert budget.fits(need)
    assert not budget.fits(MemoryNeed(10**18, 4 * 10**18, 4 * 10**18))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_weights_stored_in_the_requested_dtype_stay_mapped_and_are_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "float32"
    shutil.copytree(PAIRS["pocket"].cloud, folder)
    file = folder / "model.safetensors"
    with safe_open(file, "np") as weights:
        stored = {name: weights.get_tensor(name).astype(np.float32) for name in weights.keys()}  # noqa: SIM118
    save_file(stored, file, {"format": "pt"})
    done = subprocess.run([sys.executable, "-c", MAPPED, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["files"]) == {str(file)}
    assert report["copied"] < file.stat().st_size / 2, "decoding took memory beside the map of the file"
