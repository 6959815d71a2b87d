"""Saved runs: the files that a report can be made of, checked against the schema of the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.comparison import Document
from bench.report.cells import forecast_results, get_case_id
from edgecloud_sd.host.paths import hide_folders
from edgecloud_sd.measure import results

USABLE_FILES = (
    "give a file that pytest-benchmark saved (.benchmarks/*/0001_name.json, or that of --benchmark-json), or the "
    "results file of one cell (results/captioning.json)"
)


class UnusableFile(ValueError):
    """An error for a file that cannot be reported. Its message is one line and names a file to give instead."""


@dataclass(frozen=True)
class Run:
    """The cells of one file by case id, and the time and commit of the run.

    The forecasts are as `forecast_to_json` writes them.
    """

    name: str
    cells: Mapping[str, Document]
    forecasts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    saved: str | None = None


def join_runs(runs: Sequence[Run]) -> Run:
    """Return the cells of several files as one run. Cells with one id get the names of their files.

    Raise UnusableFile for a file that is given twice.
    """
    if len(runs) == 1:
        return runs[0]
    names = Counter(run.name for run in runs)
    cases = Counter(case for run in runs for case in run.cells)
    cells: dict[str, Document] = {}
    known: dict[str, Mapping[str, Any]] = {}
    for number, run in enumerate(runs, 1):
        file = run.name if names[run.name] == 1 else f"{run.name}, file {number}"
        for case, document in run.cells.items():
            if any(document == other for earlier in runs[: number - 1] for other in earlier.cells.values()):
                raise UnusableFile(f"{file}: its cell {case} is given twice; name each file once")
            joined = case if cases[case] == 1 else f"{case} ({file})"
            cells[joined] = document | {"experiment_config": document["experiment_config"] | {"case": joined}}
            known |= {joined: run.forecasts[case]} if case in run.forecasts else {}
    saved = "; ".join(dict.fromkeys(run.saved for run in runs if run.saved)) or None
    return Run(", ".join(dict.fromkeys(run.name for run in runs)), cells, known, saved)


def read_run(path: Path) -> Run:
    """Return the run in a file. Raise UnusableFile for a file that is no complete run of this version."""
    try:
        content = hide_folders(json.loads(path.read_text(encoding="utf-8-sig")))
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # refuses half a surrogate pair
    except OSError as error:
        raise UnusableFile(f"{path}: {error.strerror or error}; {USABLE_FILES}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also of UTF-8
        raise UnusableFile(f"{path}: is not JSON ({error}); {USABLE_FILES}") from error
    if isinstance(_get_nested(content, "benchmarks"), list):
        return _read_benchmarks(path, content)
    if _get_nested(content, "experiment_config") is not None:
        _check_results(path, "this file", content, with_traces=True)
        return Run(path.name, {get_case_id(content): content}, forecast_results(content))
    raise UnusableFile(f"{path}: contains neither benchmarks nor results; {USABLE_FILES}")


def _read_benchmarks(path: Path, content: Document) -> Run:
    """Return the run in a file of pytest-benchmark. Rows without results are metrics, loads or other benchmarks."""
    cells: dict[str, Document] = {}
    for benchmark in content["benchmarks"]:
        document = _get_nested(benchmark, "extra_info", "results")
        if document is None:
            continue
        _check_results(path, str(_get_nested(benchmark, "name")), document, with_traces=False)
        case = get_case_id(document)
        if case in cells:
            raise UnusableFile(f"{path}: contains the cell {case} twice; {USABLE_FILES}")
        cells[case] = document
    if not cells:
        count = len(content["benchmarks"])
        raise UnusableFile(
            f"{path}: none of its {count} benchmarks has captions; run bench/test_captioning.py, and {USABLE_FILES}"
        )
    saved = {case: _get_nested(content, "forecasts", case) for case in cells}
    known = {case: answer for case, answer in saved.items() if isinstance(_get_nested(answer, "sentence"), str)}
    return Run(path.name, cells, known, _describe_saving(content))


def _check_results(path: Path, name: str, document: Any, with_traces: bool) -> None:
    """Raise UnusableFile unless the document satisfies the schema of the results."""
    version = _get_nested(document, "schema_version")
    if version != results.SCHEMA_VERSION:
        raise UnusableFile(
            f"{path}: {name} has results of version {version!r}, but this release reads version "
            f"{results.SCHEMA_VERSION}; run the benchmark again, or use the release that wrote the file"
        )
    try:
        results.validate_results(document, with_traces)
    except ValueError as error:
        raise UnusableFile(f"{path}: {name} is damaged ({error}); {USABLE_FILES}") from None
    try:
        json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise UnusableFile(f"{path}: {name} has a number that is NaN or infinite; {USABLE_FILES}") from error


def _get_nested(content: Any, *keys: str) -> Any:
    """Return the value under the keys, or None if a level is missing or is no object."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _describe_saving(content: Document) -> str | None:
    """Return when the run was saved and from which commit, or None if the file does not record the time."""
    moment, commit = _get_nested(content, "datetime"), _get_nested(content, "commit_info", "id")
    if moment is None:
        return None
    if commit is None:
        return str(moment)[:19]
    changes = " with uncommitted changes" if _get_nested(content, "commit_info", "dirty") else ""
    return f"{str(moment)[:19]}, commit {str(commit)[:8]}{changes}"
