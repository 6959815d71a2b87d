"""What a report is of: the cells of one file, checked, by case id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import forecasts
from bench.comparison import Document
from edgecloud_sd.measure import results, traces
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.timing import link
from edgecloud_sd.timing import profile as profiles

GIVE = (
    "give a file that pytest-benchmark saved (.benchmarks/*/0001_name.json, or that of --benchmark-json), or the "
    "results file of one cell (results/captioning.json)"
)


class Unusable(ValueError):
    """A file that no report can be made of. The message is one line, and says what to give instead."""


@dataclass(frozen=True)
class Run:
    """One file. `answers`: the oracle's sentence by case id; `saved`: when and of which commit, where it is known."""

    name: str
    cells: Mapping[str, Document]
    answers: Mapping[str, str] = field(default_factory=dict)
    saved: str | None = None


def read_run(path: Path) -> Run:
    """The cells of a file. Raises Unusable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}; {GIVE}") from error
    except (ValueError, KeyError, TypeError) as error:  # of JSON and of UTF-8
        raise Unusable(f"{path}: is no JSON ({error}); {GIVE}") from error
    if isinstance(found, dict) and isinstance(found.get("benchmarks"), list):
        return _saved_run(path, found)
    if isinstance(found, dict) and "experiment_config" in found:
        check_results(path, "this file", found, with_traces=True)
        case = found["experiment_config"]["case"]
        return Run(path.name, {case: found}, _answer(case, found))
    raise Unusable(f"{path}: holds neither benchmarks nor results; {GIVE}")


def check_results(path: Path, what: str, document: Any, with_traces: bool) -> None:
    """Unusable unless `document` satisfies the schema of the results. `with_traces`: whether it must hold them too."""
    version = _at(document, "schema_version")
    if version != results.SCHEMA_VERSION:
        wanted = f"version {results.SCHEMA_VERSION}; run the benchmark again, or read it with the release that wrote it"
        raise Unusable(f"{path}: {what} holds results of version {version!r} and not of {wanted}")
    try:
        results.validate_results(document, with_traces)
    except ValueError as error:
        raise Unusable(f"{path}: {what} is damaged ({error}); {GIVE}") from None
    try:
        json.dumps(document, allow_nan=False)
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path}: {what} holds a number that is none (NaN or Infinity); {GIVE}") from error


def _saved_run(path: Path, found: Document) -> Run:
    cells: dict[str, Document] = {}
    for each in found["benchmarks"]:
        document = _at(each, "extra_info", "results")
        if document is None:
            continue  # the row of one metric, or a benchmark that captions nothing
        check_results(path, str(_at(each, "name")), document, with_traces=False)
        case = document["experiment_config"]["case"]
        if case in cells:
            raise Unusable(f"{path}: holds the cell {case} twice; {GIVE}")
        cells[case] = document
    if not cells:
        names = len(found["benchmarks"])
        raise Unusable(
            f"{path}: none of its {names} benchmarks holds captions; run bench/test_captioning.py, and {GIVE}"
        )
    answers = {
        case: str(sentence) for case in cells if (sentence := _at(found, "verdicts", case, "sentence")) is not None
    }
    return Run(path.name, cells, answers, _saved(found))


def _at(found: Any, *keys: str) -> Any:
    """What lies that deep in a document of which nothing is known; None where nothing does."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _saved(found: Document) -> str | None:
    moment, commit = _at(found, "datetime"), _at(found, "commit_info", "id")
    if moment is None:
        return None
    changed = " with uncommitted changes" if _at(found, "commit_info", "dirty") else ""
    return str(moment)[:19] + (f", commit {str(commit)[:8]}{changed}" if commit else "")


def _answer(case: str, document: Document) -> dict[str, str]:
    """The oracle's, from the traces that the results file of one cell holds."""
    said = document["experiment_config"]
    stop = said["draft_stop"] or ""
    gated = int(said.get("entropy_threshold") is not None)
    gated += int(stop.startswith("stopM") or (stop != "" and not gated))  # a gate's own entropy serves both
    one_process = said["clock"] == "real" and not said["cloud_url"]
    together = one_process and said.get("edge_device") == said.get("cloud_device")
    try:
        decoded = [traces.trace_from_json(clip["trace"]) for clip in document["detailed_results"]]
        crossed, eager = link.find_link(said["link"] or "none"), said["open"] == "eager"
        k = None if said["k"] == AUTO or said["draft_stop"] else said["k"]
        ahead, is_lossless = said["draft_ahead"] or 0, said["output"] != "lossy"
        cell = forecasts.Decoded(said["mode"], k, gated, crossed, eager, ahead, is_lossless, decoded)
        costs = said["profile_costs"]
        found = forecasts.forecast_cells({case: cell}, profiles.profile_from_json(costs) if costs else None, together)
    except (ValueError, KeyError, TypeError) as error:  # a trace or a link that this version does not know
        return {case: f"no answer: {error}"}
    return {name: forecasts.forecast_sentence(each) for name, each in found.items()}
