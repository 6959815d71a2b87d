"""The finished clips of a case, one line per clip, so that a stopped run keeps them and `--resume` goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from edgecloud_sd.measure import results

Record = dict[str, Any]


class ResumeError(ValueError):
    """A saved file of another experiment, or one that cannot be read. The message names the file and the difference."""


class SavedClips:
    """The file `<results file>.unfinished`: a header that describes the experiment, then one record per clip.

    With `resume`, `records` has the clips of that file, or of a complete results file of the same experiment.
    """

    def __init__(self, results_file: Path, header: Record, resume: bool) -> None:
        self.path = results_file.with_name(f"{results_file.name}.unfinished")
        self._header = json.loads(json.dumps(header))  # compared with a header that was read back
        self.records: dict[str, Record] = {}
        if resume and self.path.exists():
            self._read_lines()
        elif resume and results_file.exists():
            self._read_results(results_file)

    def start(self) -> None:
        """Write the header alone, so that a later resume takes nothing from an older results file.

        Clips that an earlier run left unfinished stay beside it, as `.unfinished.old`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.read_bytes().count(b"\n") > 1:
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        self._write([self._header], "w")

    def add(self, record: Record) -> None:
        """Write the record of one clip to the disk."""
        if not self.path.exists():
            self.start()
            self._write([*self.records.values()], "a")
        self.records[record["file_id"]] = record
        self._write([record], "a")

    def finish(self) -> None:
        """Delete the file, because the results file is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, records: list[Record], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> None:
        saved = self.path.read_bytes()
        end = saved.rfind(b"\n") + 1  # a last line without its end was cut off
        try:
            header, *records = [json.loads(line) for line in saved[:end].splitlines()]
            self._check(self.path, header)
            self.records = {record["file_id"]: record for record in records if results.measurement_from_json(record)}
        except ResumeError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self.path}: is damaged ({error}); remove it to start over") from error
        os.truncate(self.path, end)

    def _read_results(self, file: Path) -> None:
        try:
            document = results.read_results(file)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ResumeError(f"{file}: is no results file of this version ({reason}); leave out --resume") from error
        self._check(file, {"experiment": document["experiment_config"], "environment": document["environment"]})
        self.records = {clip["file_id"]: clip for clip in document["detailed_results"]}

    def _check(self, file: Path, header: Record) -> None:
        differences = [
            f"{key} was {header[part].get(key)!r} and is {own.get(key)!r}"
            for part, own in self._header.items()
            for key in dict.fromkeys([*own, *(header[part] if part == "experiment" else ())])
            if header[part].get(key) != own.get(key)
        ]
        if differences:
            raise ResumeError(
                f"{file}: is of another experiment ({'; '.join(differences)}); leave out --resume to start over"
            )
