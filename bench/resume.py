"""What a run has finished, a line a clip, so that a run that is stopped keeps it and `--resume` goes on from there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from edgecloud_sd.measure import results

Record = dict[str, Any]


class CannotResume(ValueError):
    """What was saved is another experiment's, or cannot be read: the message names the file and the difference."""


class Unfinished:
    """`<results file>.unfinished`: a header that says what the experiment is, then a record a clip.

    With `resume`, `done` holds what that file, or else a complete results file of the same experiment, has by clip.
    """

    def __init__(self, results_file: Path, header: Record, resume: bool) -> None:
        self.path = results_file.with_name(f"{results_file.name}.unfinished")
        self._header = json.loads(json.dumps(header))  # as it will be read back
        self.done: dict[str, Record] = {}
        if resume and self.path.exists():
            self._read_lines()
        elif resume and results_file.exists():
            self._read_results(results_file)

    def begin(self) -> None:
        """Start the file with its header alone, so that `resume` takes nothing from an older results file.

        What an earlier run left unfinished is kept beside it as `.unfinished.old`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.read_bytes().count(b"\n") > 1:
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        self._write([self._header], "w")

    def add(self, record: Record) -> None:
        """Write one clip's record to the disk."""
        if not self.path.exists():
            self.begin()
            self._write([*self.done.values()], "a")
        self.done[record["file_id"]] = record
        self._write([record], "a")

    def finish(self) -> None:
        """The results file is written: nothing is unfinished."""
        self.path.unlink(missing_ok=True)

    def _write(self, records: list[Record], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in records)
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> None:
        saved = self.path.read_bytes()
        lines = saved[: saved.rfind(b"\n") + 1].splitlines()  # a last line without its end was cut off while written
        try:
            header, *records = [json.loads(line) for line in lines]
            self._check(self.path, header)
            self.done = {record["file_id"]: record for record in records if results.measurement_from_json(record)}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CannotResume):
                raise
            raise CannotResume(f"{self.path}: is damaged ({error}); remove it to start over") from error
        os.truncate(self.path, saved.rfind(b"\n") + 1)

    def _read_results(self, file: Path) -> None:
        try:
            found = results.read_results(file)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise CannotResume(f"{file}: is no results file of this version ({reason}); leave out --resume") from error
        self._check(file, {"experiment": found["experiment_config"], "environment": found["environment"]})
        self.done = {clip["file_id"]: clip for clip in found["detailed_results"]}

    def _check(self, file: Path, header: Record) -> None:
        differences = [
            f"{key} was {header[part].get(key)!r} and is {ours.get(key)!r}"
            for part, ours in self._header.items()
            for key in dict.fromkeys([*ours, *(header[part] if part == "experiment" else ())])
            if header[part].get(key) != ours.get(key)
        ]
        if differences:
            raise CannotResume(
                f"{file}: holds another experiment ({'; '.join(differences)}); leave out --resume to start over"
            )
