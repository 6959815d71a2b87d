"""The finished clips of a case, one line per clip, so that a stopped run keeps them and `--resume` goes on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from edgecloud_sd.host.files import write_whole
from edgecloud_sd.measure import results

Record = dict[str, Any]
HEADER_PARTS = ("experiment", "environment", "in_force")  # a resumed run must have the same


class ResumeError(ValueError):
    """A saved file of another experiment, or one that cannot be read. The message names the file and the difference."""


class SaveError(OSError):
    """A file that cannot be written, as on a full disk. The message names the file and what is kept."""


class SavedClips:
    """The file `<results file>.unfinished`: a header that describes the experiment, then one record per clip.

    Each record names its run, and is sealed with a digest of itself and the header. A record of another run, of another
    experiment or with a damaged byte is never taken. With `resume`, `records` has the clips of that file, or of a
    complete results file of the same experiment. `notes` says which lines could not be used. A part of the header is
    None until it is known, and is then compared with nothing.
    """

    def __init__(self, results_file: Path, header: Record, resume: bool) -> None:
        self.path = results_file.with_name(f"{results_file.name}.unfinished")
        self._header = json.loads(json.dumps({part: header.get(part) for part in HEADER_PARTS}))  # as it is read back
        self._run = secrets.token_hex(8)
        self.records: dict[str, Record] = {}
        self.notes: list[str] = []
        if resume and self.path.exists():
            self._read_lines()
        elif resume and results_file.exists():
            self._read_results(results_file)

    def start(self) -> None:
        """Write the header alone, so that a later resume takes nothing from an older results file.

        Clips that an earlier run left unfinished stay beside it, as `.unfinished.old`.
        """
        with self.keep_clips():
            if self.path.exists() and self.path.read_bytes().count(b"\n") > 1:
                self._set_aside()
            self._write([])

    def add(self, record: Record) -> None:
        """Write the record of one clip to the disk. Raise SaveError if that fails."""
        with self.keep_clips():
            if not self.path.exists():
                self._write(self.records.values())
            line = _encode(self._seal(record))
            with self.path.open("ab", buffering=0) as file:  # one write, so that another writer cannot split the line
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
        self.records[record["file_id"]] = record

    def finish(self) -> None:
        """Delete the file, because the results file is written."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def keep_clips(self) -> Iterator[None]:
        """Raise SaveError, which says what is kept, if a file cannot be written in the block."""
        try:
            yield
        except OSError as error:
            file = error.filename or self.path
            raise SaveError(f"{file}: cannot be written ({error.strerror}); {self.describe_kept()}") from error

    def describe_kept(self) -> str:
        """Return what a run that stops here keeps, and how to go on."""
        kept = f"{len(self.records)} finished captions are kept in {self.path}"
        return f"{kept if self.path.exists() else 'finished cells are kept'}: the same command with --resume goes on"

    def _write(self, records: Iterable[Record]) -> None:
        header = {"run": self._run} | self._header
        lines = [header | {"seal": _digest(header)}, *map(self._seal, records)]
        write_whole(self.path, b"".join(map(_encode, lines)).decode())

    def _set_aside(self) -> Path:
        """Keep the file as `.unfinished.old`, and return its new name."""
        return self.path.replace(self.path.with_name(f"{self.path.name}.old"))

    def _seal(self, record: Record) -> Record:
        """Return a record with its run, and with a digest of both and of the header."""
        tagged = record | {"run": self._run}
        return tagged | {"seal": _digest([self._header, tagged])}

    def _open(self, line: bytes) -> Record:
        """Return a record with its run, or an empty one for a line that is damaged or of another experiment."""
        tagged = _decode(line)
        seal = tagged.pop("seal", None)
        return tagged if seal == _digest([self._header, tagged]) else {}

    def _read_lines(self) -> None:
        saved = self.path.read_bytes()
        first, *lines = saved.splitlines() or [b""]
        header = _decode(first)
        is_whole = header.pop("seal", None) == _digest(header)
        if is_whole and not lines and self._differences(header):
            self._write([])  # no clip is of that experiment, as after a start at which the cloud was away
            return
        opened = [self._open(line) for line in ([] if is_whole else [first]) + lines]
        has_parts = all(isinstance(header.get(part, ""), dict | None) for part in HEADER_PARTS)
        if has_parts and (is_whole or not any(opened)):
            self._check(self.path, header)
        # without its header, the file is that of its first record
        self._run = next((entry["run"] for entry in ([header] if is_whole else []) + opened if entry), self._run)
        own = [record for record in opened if record.pop("run", None) == self._run]
        self.records = {record["file_id"]: record for record in own}
        if unusable := len(opened) - len(own):
            self.notes.append(
                f"{self.path}: lines that are damaged or of another run: {unusable}. Their clips are decoded again, "
                f"and the whole file is kept as {self._set_aside().name}"
            )
        if unusable or not saved.endswith(b"\n"):
            self._write(own)

    def _read_results(self, file: Path) -> None:
        try:
            document = results.read_results(file)
            for clip in document["detailed_results"]:
                results.measurement_from_json(clip)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ResumeError(f"{file}: is no results file of this version ({reason}); leave out --resume") from error
        parts = document | {
            "experiment": document["experiment_config"],
            "in_force": comparable_limits(document["in_force"]),
        }
        self._check(file, parts)
        self.records = {clip["file_id"]: clip for clip in document["detailed_results"]}

    def _check(self, file: Path, saved: Record) -> None:
        if differences := self._differences(saved):
            raise ResumeError(
                f"{file}: is of another experiment ({'; '.join(differences)}); leave out --resume to start over"
            )

    def _differences(self, saved: Record) -> list[str]:
        """Return what a saved header has otherwise, in words."""
        return [
            f"{key} was {saved[part].get(key)!r} and is {own.get(key)!r}"
            for part, own in self._header.items()
            if own and saved[part]
            for key in dict.fromkeys([*own, *saved[part]])
            if saved[part].get(key) != own.get(key)
        ]


def keep_other_results(file: Path, experiment: Record) -> list[str]:
    """Rename the file at `file` unless it has results of the same case and data set. Return a note if it did."""
    try:
        saved = json.loads(file.read_bytes())["experiment_config"]
        if all(saved.get(key) == experiment[key] for key in ("case", "dataset_digest")):
            return []
        owner = saved.get("case")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        owner = "another program"
    names = (file.with_name(f"{file.name}.old{number or ''}") for number in count())
    kept = file.replace(next(name for name in names if not name.exists()))
    return [f"{file}: was of {owner}, and is kept as {kept.name}"]


def comparable_limits(in_force: Record) -> Record:
    """Return the limits of `LimitsInForce` as JSON, with the number of cores for their ids, and without measurements.

    The ids of the cores may change between two runs, and the peak of the memory does.
    """
    limits = {name: value for name, value in in_force.items() if name not in ("peak_bytes", "excess_gb")}
    return limits | {"cores": in_force["cores"] and len(in_force["cores"])}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _encode(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> Record:
    """Return the object of a line, or an empty one if the line has none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
