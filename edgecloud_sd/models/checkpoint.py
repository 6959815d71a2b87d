"""The files of a checkpoint on this machine, and the digest that tells two checkpoints apart."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from edgecloud_sd.host.cores import usable_cores
from edgecloud_sd.host.files import cache_root, write_whole
from edgecloud_sd.models import checkpoint_settings
from edgecloud_sd.models.pairs import DUMMY, REAL

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in transformers' order; one, or an index of its parts
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # transformers adds these
CONFIG_FILES = ("config.json", checkpoint_settings.FILE)
UNUSED_CONFIG = ("transformers_version", "_name_or_path")  # say who wrote the configuration, not what it means
PIECE_BYTES, READ_BYTES = 2**26, 2**20  # pieces of a file are digested side by side, each in small reads
SETTLED_NANOSECONDS = 2 * 10**9  # a file that changed more recently may change again under the same time stamp


class DamagedFile(OSError):
    """An error for a file of a checkpoint that cannot be used; the message names the file and the reason."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}, so the checkpoint cannot be loaded: copy or download it again")


def find_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint: itself, or its snapshot of the hub. Raise OSError if there is none here."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(checkpoint), "config.json")
    if not isinstance(cached, str):
        raise FileNotFoundError(checkpoint)
    return Path(cached).parent


def find_weight_files(checkpoint: str | Path, names: tuple[str, ...] = WEIGHT_FILES[:1]) -> list[Path]:
    """Return the files with a checkpoint's weights, under the first of `names` that exists.

    Raise FileNotFoundError if this machine has none, and DamagedFile for an index that cannot be read.
    """
    folder = find_folder(checkpoint)
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            try:
                parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [folder / part for part in sorted(set(parts.values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DamagedFile(index, "has no weight_map from tensors to files") from None
            missing = [file.name for file in files if not file.is_file()]
            if missing and Path(checkpoint).is_dir():  # the hub's cache may be in the middle of a download
                raise DamagedFile(index, f"names {missing[0]}, which is missing")
            return files
    raise FileNotFoundError(folder / names[0])


def weights_digest(checkpoint: str | Path, weights: str = REAL) -> str:
    """Return a digest of all that decides a model's logits: every byte of its weights and adapter, and its configs.

    A copy of a folder has the same digest. Dummy weights depend on the configuration alone, and their digest begins
    with `DUMMY`. Return an empty text if this machine has no weights that can be read.
    """
    try:
        if weights == DUMMY:
            folder = Path(checkpoint)
            return f"{DUMMY}-{_config_digest(folder) if folder.is_dir() else checkpoint}"
        folder = find_folder(checkpoint)
        adapters = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
        files = [*find_weight_files(checkpoint, WEIGHT_FILES), *adapters]
        parts = [_config_digest(folder), *(f"{file.name} {file_digest(file)}" for file in files)]
    except (OSError, ValueError):
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _config_digest(folder: Path) -> str:
    """Return a digest of what the configurations of a folder mean, or of no configuration."""
    files = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    configs = [json.loads(file.read_text(encoding="utf-8"), object_hook=_drop_unused) for file in files]
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()


def _drop_unused(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in UNUSED_CONFIG}


def file_digest(file: Path) -> str:
    """Return a SHA-256 digest of every byte of a file: of the digests of its pieces of `PIECE_BYTES`.

    It is computed once for each state of a file (device, inode, size and both times of change). This process keeps it,
    and for a file of more than one piece the user's cache keeps it too.
    """
    status = file.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    now = time.time_ns()
    is_settled = now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NANOSECONDS
    return _digest_state(file, state, 0 if is_settled else now)


@lru_cache
def _digest_state(file: Path, state: tuple[int, ...], moment: int) -> str:
    """Return the digest of a file in this state; a `moment` marks a state that may not last, which is not saved."""
    size = state[2]
    if moment or size <= PIECE_BYTES:
        return _compute_digest(file, size)
    saved = cache_root() / "digests" / hashlib.sha256(repr(state).encode()).hexdigest()
    if known := _read_saved(saved):
        return known
    digest = _compute_digest(file, size)
    with suppress(OSError):  # a cache that cannot be written costs time alone
        write_whole(saved, digest)
    return digest


def _compute_digest(file: Path, size: int) -> str:
    starts = range(0, size, PIECE_BYTES)
    with ThreadPoolExecutor(min(len(starts), usable_cores()) or 1) as threads:
        return hashlib.sha256(b"".join(threads.map(partial(_piece_digest, file), starts))).hexdigest()


def _piece_digest(file: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(PIECE_BYTES // READ_BYTES):
            digest.update(stream.read(READ_BYTES))
    return digest.digest()


def _read_saved(file: Path) -> str:
    """Return a saved digest, or an empty text if there is none that is whole."""
    with suppress(OSError, ValueError):
        text = file.read_text(encoding="ascii")
        if len(bytes.fromhex(text)) == hashlib.sha256().digest_size:
            return text
    return ""
