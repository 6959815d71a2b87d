"""What a checkpoint needs, from headers alone, and the error for one that does not fit."""

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
from edgecloud_sd.models.memory import BYTES, Need, check_checkpoint_fits, checkpoint_need, rooms, weights_digest
from edgecloud_sd.models.pairs import PAIRS

MB = 1_000_000
# In a process of its own: what the edge's loading imports and keeps is there before anything is counted.
MAPPED = """
import json, re, sys
import torch
from edgecloud_sd.models import pairs
from edgecloud_sd.models.load import load_model
from edgecloud_sd.events import Prompt

def maps():
    found = []
    for line in open("/proc/self/smaps"):
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \\S+ \\S+ \\S+ \\d+ *(.*)", line)
        if head:
            found.append({"start": int(head[1], 16), "end": int(head[2], 16), "file": head[3]})
        elif line.startswith("Anonymous:"):
            found[-1]["own"] = 1024 * int(line.split()[1])
    return found

def decoded(checkpoint):
    model = load_model(checkpoint)
    with torch.inference_mode():
        model.open(Prompt((1, 2, 3, 4))).extend([5, 6])
    return model

warm = decoded(pairs.PAIRS["pocket"].edge)
before = sum(each["own"] for each in maps())
model = decoded(sys.argv[1])
now = maps()
places = [each.data_ptr() for each in model.thinker.parameters()]
files = [next(each["file"] for each in now if each["start"] <= place < each["end"]) for place in places]
print(json.dumps({"files": files, "copied": sum(each["own"] for each in now) - before}))
"""


def write(file: Path, tensors: dict[str, tuple[str, int]]) -> int:
    """A safetensors file of tensors by (stored dtype, parameters), its data a hole; returns its bytes."""
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
    """A thinker of 100 M parameters in bfloat16 (a hole of 0.2 GB)."""
    write(tmp_path / "model.safetensors", {"lm_head.weight": ("BF16", 100 * MB)})
    return tmp_path


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that uses 50 MB, on a machine with 0.2 GB and as much swap."""
    monkeypatch.setattr(limits, "memory_in_use", lambda: 50 * MB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=200 * MB))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=200 * MB))


@pytest.mark.parametrize("side", [PAIRS["pocket"].edge, PAIRS["pocket"].cloud])
def test_the_pocket_pair_needs_what_safetensors_finds_in_its_files(side: str) -> None:
    file = Path(side) / "model.safetensors"  # float16, all of it the thinker's
    with safe_open(file, "np") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    size = file.stat().st_size
    assert checkpoint_need(side, "float16") == Need(parameters, 2 * parameters, size)
    assert checkpoint_need(side, "float32") == Need(parameters, 4 * parameters, size + 4 * parameters)


def test_every_dtype_has_its_bytes() -> None:
    assert set(BYTES) == set(memory.STORED.values()) == set(DTYPES)


def test_only_what_is_not_stored_in_the_dtype_is_copied_beside_its_map(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"a": ("BF16", 100), "b": ("F32", 10)})
    assert checkpoint_need(tmp_path, "bfloat16") == Need(110, 220, file + 20)
    assert checkpoint_need(tmp_path, "float16") == Need(110, 220, file + 220)
    assert checkpoint_need(tmp_path, "float32") == Need(110, 440, file + 400)
    assert checkpoint_need(tmp_path, "float64") == Need(110, 880, file + 880)


def test_of_a_whole_omni_only_the_thinker_is_loaded_and_all_of_it_is_mapped(tmp_path: Path) -> None:
    first = write(
        tmp_path / "model-00001-of-00002.safetensors", {"thinker.a": ("BF16", 100), "talker.thinker.a": ("BF16", 500)}
    )
    second = write(
        tmp_path / "model-00002-of-00002.safetensors", {"thinker.b": ("BF16", 10), "token2wav.a": ("F32", 50)}
    )
    shards = {"thinker.a": 1, "talker.thinker.a": 1, "thinker.b": 2, "token2wav.a": 2}
    index = {"weight_map": {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write(tmp_path / "other.safetensors", {"thinker.c": ("BF16", 1000)})  # not in the index
    assert checkpoint_need(tmp_path, "bfloat16") == Need(110, 220, first + second)
    assert checkpoint_need(tmp_path, "float32") == Need(110, 440, first + second + 440)


def test_a_name_on_the_hub_is_known_once_it_is_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {("owner/name", "config.json"): str(folder / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: cached.get(asked))
    assert checkpoint_need("owner/name", "bfloat16") == checkpoint_need(folder, "bfloat16")
    assert checkpoint_need(folder, "bfloat16") is not None
    assert checkpoint_need("owner/other", "bfloat16") is None


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\x10\0\0\0\0\0\0\0not json at all.", b"\xff" * 20, b"\x08\0\0\0\0\0\0\0\xff\xff\xff\xff{}{}"],
)
def test_what_cannot_be_read_is_unknown_and_left_to_the_loader(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert checkpoint_need(tmp_path, "float32") is None
    check_checkpoint_fits(tmp_path, "cpu", "float32", limit_bytes=1)


def test_a_shard_that_is_missing_makes_the_need_unknown(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_need(tmp_path, "float32") is None


@pytest.mark.usefixtures("in_use")
def test_a_checkpoint_beyond_the_limit_is_an_error_with_the_numbers_and_what_would_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="--max-memory-gb") as raised:
        check_checkpoint_fits(folder, "cpu", "float32", limit_bytes=300 * MB)
    assert str(raised.value) == (
        f"checkpoint {str(folder)!r} needs 0.600 GB in float32 while it loads (0.400 for its weights), "
        "and 0.250 of the 0.300 GB of --max-memory-gb are free: "
        "raise the limit, or take it in bfloat16 (--edge-dtype, --cloud-dtype)"  # int8 would need 0.31 while it loads
    )
    with pytest.raises(ValueError, match=r" 0\.000 of the 0\.040 GB of --max-memory-gb are free: raise the limit$"):
        check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=40 * MB)


@pytest.mark.usefixtures("in_use")
def test_the_limit_must_hold_the_loading_to_the_byte(folder: Path) -> None:
    need = checkpoint_need(folder, "bfloat16")
    assert need is not None
    check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=50 * MB + need.loading)
    with pytest.raises(ValueError, match="--max-memory-gb"):
        check_checkpoint_fits(folder, "cpu", "bfloat16", limit_bytes=50 * MB + need.loading - 1)


@pytest.mark.usefixtures("in_use")
def test_without_a_limit_the_weights_must_fit_in_what_the_machine_has_free_swap_and_all(folder: Path) -> None:
    check_checkpoint_fits(folder, "cpu", "float32")  # 0.4 GB, and 0.6 while it loads: maps of files can be dropped
    with pytest.raises(ValueError, match="GB of memory are free") as raised:
        check_checkpoint_fits(folder, "cpu", "float64", limit_bytes=2000 * MB)
    assert str(raised.value) == (
        f"checkpoint {str(folder)!r} needs 0.800 GB in float64, and 0.400 GB of memory are free: "
        "take a smaller model, or take it in float32 or float16 or bfloat16 (--edge-dtype, --cloud-dtype), "
        "or as the edge in int8 or int4 (--edge-dtype)"
    )


@pytest.mark.usefixtures("in_use")
def test_a_gpu_is_asked_for_what_it_has_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:1": (399 * MB, 800 * MB), "cuda": (400 * MB, 800 * MB)}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(mem_get_info=free.__getitem__)))
    check_checkpoint_fits(folder, "cuda", "float32")
    message = re.escape(
        "needs 0.400 GB in float32, and 0.399 GB of cuda:1 are free: take a smaller model, or take it in "
    )
    with pytest.raises(ValueError, match=message):
        check_checkpoint_fits(folder, "cuda:1", "float32")
    with pytest.raises(ValueError, match="--max-memory-gb"):  # it loads through this process
        check_checkpoint_fits(folder, "cuda", "float32", limit_bytes=500 * MB)


def test_a_device_that_does_not_say_is_no_obstacle(folder: Path) -> None:
    assert list(rooms("mps", None)) == []
    check_checkpoint_fits(folder, "mps", "float64")


def test_this_machine_has_room_for_the_pocket_pair_and_not_for_anything() -> None:
    (room,) = rooms("cpu", None)
    need = checkpoint_need(PAIRS["pocket"].cloud, "float32")
    assert need is not None
    assert room.holds(need)
    assert not room.holds(Need(10**18, 4 * 10**18, 4 * 10**18))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_weights_stored_in_the_dtype_asked_for_stay_in_their_map_and_have_no_copy(tmp_path: Path) -> None:
    folder = tmp_path / "float32"
    shutil.copytree(PAIRS["pocket"].cloud, folder)
    file = folder / "model.safetensors"
    with safe_open(file, "np") as weights:
        stored = {name: weights.get_tensor(name).astype(np.float32) for name in weights.keys()}  # noqa: SIM118
    save_file(stored, file, {"format": "pt"})
    done = subprocess.run([sys.executable, "-c", MAPPED, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["files"]) == {str(file)}
    assert found["copied"] < file.stat().st_size / 2, "memory that decoding took beside the map of the file"


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": np.full(4, value, dtype=np.float32)}, tmp_path / name / "model.safetensors")
    one, same, other = (weights_digest(tmp_path / name) for name in "abc")
    assert one == same != other
    assert weights_digest(tmp_path / "absent") == ""
