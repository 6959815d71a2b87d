"""Files that are written whole or not at all, and files that one process at a time may write.

A lock is the system's `flock`, so it goes with its process, however that ends. Machines that share a folder see each
other's locks only if the file system passes them on: NFS needs its lock service for that. Windows has no such lock.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


class FileHeld(OSError):
    """A file that another process holds. The message names the file and the holder."""


class NoLock(OSError):
    """A file that this system cannot lock. The message names the file and the reason."""


def cache_root() -> Path:
    """Return the folder for files that can be computed again: `EDGECLOUD_SD_CACHE`, or else the user's cache folder."""
    return Path(
        os.environ.get("EDGECLOUD_SD_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edgecloud_sd")
    )


def write_whole(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to a temporary file beside `path` and rename it to `path`, whose folder is created.

    The file and its name are on the disk at the end. Temporary files of `path` that killed processes left are removed.
    """
    temporary = _name_temporary(path)
    with ExitStack() as stack:
        try:
            with suppress(NoLock):  # a lock shows other processes that this one still needs the file
                stack.callback(os.close, _lock(temporary))
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextmanager
def build_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, whose parent is created, and rename it to `path` at the end of the block.

    An error removes it. Temporary folders of `path` that killed processes left are removed.
    """
    temporary = _name_temporary(path)
    temporary.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        with suppress(NoLock):
            stack.callback(os.close, _lock(temporary))
        yield temporary
        temporary.rename(path)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can do so."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot do it
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Hold `path` until the block or this process ends. Its folder is created, and removed again if it stays empty.

    The lock is a hidden file beside `path`, with the holder's process id and host. Raise FileHeld if another process
    holds it, and NoLock if this system cannot lock it.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = _lock(lock)
    except FileHeld:
        raise FileHeld(f"{path}: {_read_holder(lock)} is writing it") from None
    except NoLock as error:
        raise NoLock(f"{path}: cannot be locked ({error})") from None
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
        if is_new:
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()


def _lock(path: Path) -> int:
    """Return a handle that holds the lock of a folder, or of a file, which is created. Raise FileHeld or NoLock."""
    while True:
        access = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        handle = os.open(path, access | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _flock(handle)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its former holder has removed it since we opened it


def _flock(handle: int) -> None:
    if sys.platform == "win32":
        raise NoLock("Windows has no such lock")
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileHeld from None
    except OSError as error:
        raise NoLock(f"by its file system: {error.strerror}") from error


def _read_holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has just come or gone
        return "another process"


def _name_temporary(path: Path) -> Path:
    """Return a name beside `path`, whose folder is created, and remove what killed processes left under such names.

    Whatever a living process builds there is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}\.tmp")
    for old in path.parent.iterdir():
        if pattern.fullmatch(old.name):
            with suppress(OSError):  # a living process holds it, or has just renamed it
                handle = _lock(old)
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
                os.close(handle)
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
