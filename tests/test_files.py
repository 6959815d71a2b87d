"""Files that are written whole, and the locks of files."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.host.files import FileHeld, NoLock, build_folder, hold_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_written_with_the_usual_permissions_and_nothing_beside_it(tmp_path: Path) -> None:
    file, plain = tmp_path / "new" / "a.json", tmp_path / "plain"
    write_whole(file, "悲伤")
    plain.touch()
    assert file.read_text(encoding="utf-8") == "悲伤"
    assert file.stat().st_mode == plain.stat().st_mode
    assert names(file.parent) == ["a.json"]


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.json"]


def test_the_file_is_on_the_disk_before_the_rename_and_its_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any) -> None:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            calls.append(f"{name} folder" if is_folder else name)
            real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, record(name))
    write_whole(tmp_path / "a.json", "text")
    assert calls == ["fsync", "replace", "fsync folder"]


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    for name in (".a.json-00000000.tmp", ".a.json-11111111.tmp", ".a.json-mine", ".b.json-22222222.tmp"):
        (tmp_path / name).touch()
    with (tmp_path / ".a.json-11111111.tmp").open() as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_whole(tmp_path / "a.json", "text")
    assert names(tmp_path) == [".a.json-11111111.tmp", ".a.json-mine", ".b.json-22222222.tmp", "a.json"]


def test_a_folder_is_there_whole_and_that_of_an_ended_process_is_removed(tmp_path: Path) -> None:
    for name in (".a-00000000.tmp", ".a-11111111.tmp", ".a-mine"):
        (tmp_path / name / "part").mkdir(parents=True)
    living = os.open(tmp_path / ".a-11111111.tmp", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    others = [".a-11111111.tmp", ".a-mine"]
    with suppress(KeyboardInterrupt), build_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == others
    with build_folder(tmp_path / "a") as first, build_folder(tmp_path / "a") as second:
        (first / "wav").mkdir()
        assert names(tmp_path) == sorted([*others, first.name, second.name])
    os.close(living)
    assert names(tmp_path / "a") == ["wav"]
    assert names(tmp_path) == [*others, "a"]


def test_a_held_file_is_refused_with_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for _ in range(2):
        with hold_file(file), pytest.raises(FileHeld) as error, hold_file(file):
            pass
        assert str(error.value) == f"{file}: process {os.getpid()} on {socket.gethostname()} is writing it"
        assert names(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from edgecloud_sd.host.files import hold_file\n"
        "with hold_file(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(FileHeld, match=f"process {process.pid} on "), hold_file(tmp_path / "a.json"):
            pass
        process.kill()
    with hold_file(tmp_path / "a.json"):
        assert names(tmp_path) == [".a.json.lock"]
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_named_and_still_takes_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = tmp_path / "a.json"
    with pytest.raises(NoLock, match=r"a\.json: cannot be locked .*No locks available"), hold_file(file):
        pass
    write_whole(file, "text")
    assert file.read_text(encoding="utf-8") == "text"
