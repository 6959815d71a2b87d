"""The digest of a checkpoint: a change anywhere changes it, and a copy does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgecloud_sd.models import checkpoint
from edgecloud_sd.models.checkpoint import file_digest, weights_digest
from edgecloud_sd.models.checkpoint_settings import FILE
from edgecloud_sd.models.pairs import DUMMY, PAIRS, REAL

SINGLE = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a cache of the test's own, and small pieces, so that small files have many."""
    monkeypatch.setenv("EDGECLOUD_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(checkpoint, "READ_BYTES", 2**12)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PAIRS["pocket"].edge, tmp_path / "edge"))


def flip_byte(file: Path, place: float) -> None:
    """Flip one bit at a share of a file's length."""
    with file.open("r+b") as stream:
        stream.seek(int(file.stat().st_size * place))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def shard(folder: Path) -> None:
    """Split the weights into two files with an index, as transformers does."""
    weights = load_file(folder / SINGLE)
    names = sorted(weights)
    index = {name: SHARDS[place % 2] for place, name in enumerate(names)}
    for part in SHARDS:
        save_file({name: weights[name] for name in names if index[name] == part}, folder / part, {"format": "pt"})
    (folder / SINGLE).unlink()
    (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def link_to_blobs(folder: Path) -> None:
    """Replace every file by a link, as in a snapshot of the hub."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)


def rename_to_bin(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    shutil.copy(folder / SINGLE, folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changed"),
    [
        (lambda folder: None, SINGLE),
        (shard, SHARDS[0]),
        (shard, SHARDS[1]),
        (link_to_blobs, SINGLE),
        (rename_to_bin, "pytorch_model.bin"),
        (add_adapter, "adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_change_anywhere_changes_the_digest_and_a_copy_does_not(
    folder: Path, tmp_path: Path, layout: Callable[[Path], None], changed: str, place: float
) -> None:
    layout(folder)
    digest = weights_digest(folder)
    assert digest
    assert weights_digest(shutil.copytree(folder, tmp_path / "copy")) == digest
    flip_byte(folder / changed, place)
    assert weights_digest(folder) != digest


def change_tensor(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    name = sorted(weights)[len(weights) // 2]
    save_file(weights | {name: np.flip(weights[name]).copy()}, folder / SINGLE, {"format": "pt"})


def change_config(folder: Path, file_name: str = "config.json", **fields: object) -> None:
    file = folder / file_name
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields, indent=7), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "weights", "is_same"),
    [
        (change_tensor, REAL, False),
        (add_adapter, REAL, False),
        (lambda folder: change_config(folder, rms_norm_eps=1e-5), REAL, False),
        (lambda folder: change_config(folder, transformers_version="4.0.0"), REAL, True),
        (lambda folder: change_config(folder, FILE, repetition_penalty=1.5), REAL, False),
        (lambda folder: change_config(folder, FILE, transformers_version="4.0.0"), REAL, True),
        (lambda folder: (folder / "README.md").write_text("new", encoding="utf-8"), REAL, True),
        (change_tensor, DUMMY, True),
        (lambda folder: change_config(folder, rms_norm_eps=1e-5), DUMMY, False),
    ],
)
def test_the_digest_is_of_all_that_decides_the_logits(
    folder: Path, change: Callable[[Path], object], weights: str, is_same: bool
) -> None:
    digest = weights_digest(folder, weights)
    change(folder)
    assert (weights_digest(folder, weights) == digest) is is_same


def test_dummy_weights_are_named_as_such_and_a_missing_checkpoint_has_no_digest(tmp_path: Path) -> None:
    assert weights_digest("Qwen/Qwen2.5-Omni-3B", DUMMY) != weights_digest("Qwen/Qwen2.5-Omni-7B", DUMMY)
    assert weights_digest("Qwen/Qwen2.5-Omni-3B", DUMMY).startswith(DUMMY)
    assert weights_digest(tmp_path / "absent") == ""


def test_a_large_file_is_read_once_by_all_processes(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SETTLED_NANOSECONDS", -(10**9))
    file = folder / SINGLE
    digest = file_digest(file)
    (saved,) = cache.iterdir()
    checkpoint._digest_state.cache_clear()  # as in a new process
    with monkeypatch.context() as reading:
        reading.setattr(checkpoint, "_piece_digest", lambda *_: pytest.fail("read again"))
        assert file_digest(file) == digest
    checkpoint._digest_state.cache_clear()
    saved.write_text("cut off", encoding="ascii")
    assert file_digest(file) == digest


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, cache: Path) -> None:
    file = folder / SINGLE
    before = file.stat()
    digest = file_digest(file)
    flip_byte(file, 0.5)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(file) != digest
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_time_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SETTLED_NANOSECONDS", -(10**9))
    monkeypatch.setenv("EDGECLOUD_SD_CACHE", str(folder / "config.json"))
    assert file_digest(folder / SINGLE) == file_digest(folder / SINGLE)
