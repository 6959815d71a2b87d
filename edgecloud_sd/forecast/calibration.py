"""Calibrations: what a gate's level costs on clips that were set aside, as a small YAML file.

A file says under which conditions its clips were decoded: the pair with the digests of its weights, number formats,
language, prompt and strategy. It is refused under any other, because its levels would promise nothing there.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from edgecloud_sd.data.texts import BadText, parse_yaml, read_utf8
from edgecloud_sd.forecast.budgets import Budget, LevelCost, budget_level, own_level, own_place
from edgecloud_sd.host.files import write_whole

FORMAT = "edgecloud_sd calibration 1"


class CalibrationError(ValueError):
    """A calibration that cannot be used. The message names the file and the field."""


@dataclass(frozen=True)
class Conditions:
    """All that a calibration depends on. It chooses a level only for a run under the same conditions.

    `strategy` is the label of the strategy at the lowest level of its gate. `prompt` is a digest of the task's text.
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
    """The costs of a gate's levels on clips, and the score s of each clip (see `budgets`).

    `name` is that of the file. Only gate risk with a lossless rule has scores.
    """

    name: str
    conditions: Conditions
    clips: tuple[str, ...]  # their file ids
    costs: tuple[LevelCost, ...]
    scores: tuple[float, ...] = ()

    @property
    def has_margins(self) -> bool:
        """True if the levels are margins with their signs changed."""
        return "-tokenM" in self.conditions.strategy

    def check(self, conditions: Conditions) -> None:
        """Raise CalibrationError for other conditions than the file's."""
        for field in fields(Conditions):
            ours, theirs = getattr(conditions, field.name), getattr(self.conditions, field.name)
            if ours != theirs:
                raise CalibrationError(
                    f"--calibration: {self.name}, {field.name}: is {theirs!r}, and this run has {ours!r}: calibrate "
                    "again for this run (python -m bench.tune --calibrate)"
                )

    def cost_at(self, level: float) -> LevelCost:
        """Return the cost of the highest level of the file that is at most `level`, or of its lowest one."""
        return max((cost for cost in self.costs if cost.level <= level), default=self.costs[0], key=attrgetter("level"))


@dataclass(frozen=True)
class GateChoice:
    """The level of a gate that a calibration gives, and the reason in one line."""

    level: float
    reason: str


def choose_own(calibration: Calibration, own: float) -> GateChoice:
    """Return the level at which a caption is the cloud's own with chance `own`.

    Raise CalibrationError for a calibration without scores.
    """
    if not calibration.scores:
        raise CalibrationError(f"{calibration.name}: has no scores: --own needs one of gate risk and rule greedy")
    n, place = len(calibration.scores), own_place(len(calibration.scores), own)
    level = own_level(calibration.scores, own)
    if level < 0:
        why = f"{n} clips are too few" if not place else f"{place} of {n} clips differ at a risk of 0"
        return GateChoice(level, f"{calibration.name}: {why}, so every caption is sent: lossless")
    chance = f"a caption differs from the cloud's own with chance {place / (n + 1):.3f} at most"
    source = f"send level {level:.4g}, below score {place} of {n} in {calibration.name}"
    return GateChoice(level, f"{source}: {chance}{_describe_cost(calibration, level)}")


def choose_budget(calibration: Calibration, budget: Budget) -> GateChoice:
    """Return the level that keeps a budget on the calibrated clips. Raise CalibrationError if none does."""
    try:
        level = budget_level(calibration.costs, budget)
    except ValueError as error:
        raise CalibrationError(f"{calibration.name}: {error}") from None
    stated = -level if calibration.has_margins else level
    source = f"level {stated:.4g} by {len(calibration.clips)} clips in {calibration.name}"
    return GateChoice(level, source + _describe_cost(calibration, level))


def _describe_cost(calibration: Calibration, level: float) -> str:
    cost = calibration.cost_at(level)
    return f"; there {cost.calls:.2f} calls a caption, and the cloud wrote {cost.written_share:.3f} of the tokens"


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration for `load_calibration`, whole or not at all."""
    import yaml

    saved = {
        "format": FORMAT,
        **asdict(calibration.conditions),
        "clips": list(calibration.clips),
        "costs": [[cost.level, cost.calls, cost.written_share] for cost in calibration.costs],
        "scores": list(calibration.scores),
    }
    write_whole(path, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120))


def load_calibration(path: Path) -> Calibration:
    """Return the calibration in a file. Raise CalibrationError for a file that is none, or is damaged."""
    try:
        saved = parse_yaml(read_utf8(path, "YAML"), str(path))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}): python -m bench.tune --calibrate") from None
    except BadText as error:
        raise CalibrationError(str(error)) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CalibrationError(f"{path}: is no calibration; its first line would be format: {FORMAT}")
    conditions = [field.name for field in fields(Conditions)]
    types = dict.fromkeys(("format", *conditions), str) | dict.fromkeys(("clips", "costs", "scores"), list)
    if set(saved) != set(types):
        names = ", ".join(sorted(map(str, set(saved) ^ set(types))))
        raise CalibrationError(f"{path}: has missing or unknown fields ({names}): calibrate again")
    for name, kind in types.items():
        if type(saved[name]) is not kind:
            raise CalibrationError(f"{path}, {name}: must be of type {kind.__name__}, not {saved[name]!r:.80}")
    if not saved["clips"] or not all(type(clip) is str for clip in saved["clips"]):
        raise CalibrationError(f"{path}, clips: must be the file ids of the clips")
    tokens = _numbers([saved["max_new_tokens"]])
    if not tokens or not tokens[0].is_integer():
        raise CalibrationError(f"{path}, max_new_tokens: must be a whole number, not {saved['max_new_tokens']!r}")
    values = {name: saved[name] for name in conditions} | {"max_new_tokens": int(tokens[0])}
    costs, scores = _read_costs(path, saved["costs"]), _read_scores(path, saved["scores"], len(saved["clips"]))
    return Calibration(path.name, Conditions(**values), tuple(saved["clips"]), costs, scores)


def _read_costs(path: Path, saved: list[Any]) -> tuple[LevelCost, ...]:
    """Return the costs, with rising levels."""
    rows = [_numbers(row) if isinstance(row, list) else None for row in saved]
    costs = [LevelCost(*row) for row in rows if row and len(row) == 3 and min(row[1:]) >= 0]
    levels = [cost.level for cost in costs]
    if not costs or len(costs) < len(rows) or sorted(set(levels)) != levels:
        raise CalibrationError(f"{path}, costs: must be rows of level, calls and share, with rising levels")
    return tuple(costs)


def _read_scores(path: Path, saved: list[Any], clips: int) -> tuple[float, ...]:
    """Return the scores: one for each clip, or none."""
    scores = _numbers(saved, most=math.inf)
    if scores is None or min(scores, default=0) < 0 or (scores and len(scores) != clips):
        raise CalibrationError(f"{path}, scores: must be a risk, or .inf, for each of the {clips} clips")
    return tuple(scores)


def _numbers(saved: list[Any], most: float = sys.float_info.max) -> list[float] | None:
    """Return saved values as numbers, or None if one of them is no number up to `most`."""
    try:
        numbers = [float(value) for value in saved]
    except (TypeError, ValueError):
        return None
    return numbers if all(-math.inf < number <= most for number in numbers) else None
