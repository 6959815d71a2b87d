"""Calibrations: what a gate's level costs on clips that were set aside, as a small YAML file.

A file says under which conditions its clips were decoded: the pair with the digests of its weights, number formats,
language, prompt and strategy. It is refused under any other, because its levels would promise nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgecloud_sd.data.texts import BadText, parse_yaml, read_utf8
from edgecloud_sd.forecast.budgets import LevelCost
from edgecloud_sd.host.files import write_whole

FORMAT = "edgecloud_sd calibration 1"


class CalibrationError(ValueError):
    """A calibration that cannot be used. The message names the file and the field."""


@dataclass(frozen=True)
class Conditions:
    """All that a calibration depends on. A level is chosen under the same conditions only.

    `strategy` is the strategy's label without the level of its gate. `prompt` is a digest of the text of the task.
    """

    pair: str
    edge_weights: str
    cloud_weights: str
    edge_dtype: str
    cloud_dtype: str
    language: str
    prompt: str
    strategy: str
    max_new_tokens: int


@dataclass(frozen=True)
class Calibration:
    """The costs of levels on `clips` clips, and the score s of each clip (gate risk alone; see `budgets`).

    `dataset` is the digest of the clips.
    """

    conditions: Conditions
    dataset: str
    clips: int
    costs: tuple[LevelCost, ...]
    scores: tuple[float, ...] = ()

    def check(self, conditions: Conditions, name: str) -> None:
        """Raise CalibrationError, beginning with the name of the file, for other conditions than the file's."""
        for field in fields(Conditions):
            ours, theirs = getattr(conditions, field.name), getattr(self.conditions, field.name)
            if ours != theirs:
                raise CalibrationError(
                    f"{name}, {field.name}: is {theirs!r}, and this run has {ours!r}: calibrate again for this run "
                    "(python -m bench.tune --calibrate)"
                )


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration for `load_calibration`, whole or not at all."""
    import yaml

    saved = {
        "format": FORMAT,
        **asdict(calibration.conditions),
        "dataset": calibration.dataset,
        "clips": calibration.clips,
        "costs": [[cost.level, cost.calls, cost.written_share] for cost in calibration.costs],
        "scores": list(calibration.scores),
    }
    write_whole(path, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120))


def load_calibration(path: Path) -> Calibration:
    """Return the calibration in a file. Raise CalibrationError for a file that is none, or is damaged."""
    try:
        saved = parse_yaml(read_utf8(path, "YAML"), str(path), is_typed=True)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}): python -m bench.tune --calibrate") from None
    except BadText as error:
        raise CalibrationError(str(error)) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CalibrationError(f"{path}: is no calibration; its first line would be format: {FORMAT}")
    condition_types = {field.name: int if field.name == "max_new_tokens" else str for field in fields(Conditions)}
    types = {"format": str, **condition_types, "dataset": str, "clips": int, "costs": list, "scores": list}
    if set(saved) != set(types):
        names = ", ".join(sorted(map(str, set(saved) ^ set(types))))
        raise CalibrationError(f"{path}: has missing or unknown fields ({names}): calibrate again")
    for name, kind in types.items():
        if type(saved[name]) is not kind:
            raise CalibrationError(f"{path}, {name}: must be of type {kind.__name__}, not {saved[name]!r:.80}")
    return Calibration(
        Conditions(**{name: saved[name] for name in condition_types}),
        saved["dataset"],
        saved["clips"],
        _read_costs(path, saved["costs"]),
        _read_scores(path, saved),
    )


def _read_costs(path: Path, rows: list[Any]) -> tuple[LevelCost, ...]:
    """Return the costs, with rising levels."""
    is_valid = all(isinstance(row, list) and len(row) == 3 and all(_is_number(value) for value in row) for row in rows)
    levels = [row[0] for row in rows] if is_valid else []
    if not levels or sorted(set(levels)) != levels or any(min(row[1:]) < 0 for row in rows):
        raise CalibrationError(f"{path}, costs: must be rows of level, calls and share, with rising levels")
    return tuple(LevelCost(*map(float, row)) for row in rows)


def _read_scores(path: Path, saved: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the scores: one for each clip, or none."""
    scores = saved["scores"]
    is_valid = all(_is_number(score) or score == math.inf for score in scores)
    if not is_valid or any(score < 0 for score in scores) or (scores and len(scores) != saved["clips"]):
        raise CalibrationError(f"{path}, scores: must be a risk, or .inf, for each of the {saved['clips']} clips")
    return tuple(map(float, scores))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
