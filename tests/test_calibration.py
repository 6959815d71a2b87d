"""Calibration files: saved without loss, and refused under other conditions or if damaged."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.forecast.budgets import Budget
from edgecloud_sd.forecast.calibration import (
    CalibrationError,
    Conditions,
    choose_budget,
    choose_own,
    load_calibration,
    save_calibration,
)
from tests.support.calibrations import CALIBRATION

CONDITIONS = CALIBRATION.conditions


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    save_calibration(CALIBRATION, tmp_path / "new" / "zh.yaml")
    assert load_calibration(tmp_path / "new" / "zh.yaml") == CALIBRATION


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot represent"):
        save_calibration(replace(CALIBRATION, scores=(object(),)), tmp_path / "zh.yaml")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", [field.name for field in fields(Conditions)])
def test_other_conditions_are_refused_by_name(field: str) -> None:
    CALIBRATION.check(CONDITIONS)
    change: dict[str, Any] = {field: 48 if field == "max_new_tokens" else "other"}
    other = replace(CONDITIONS, **change)
    with pytest.raises(
        CalibrationError,
        match=rf"^--calibration: zh.yaml, {field}: is .*, and this run has (48|'other'): calibrate again",
    ):
        CALIBRATION.check(other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: edgecloud_sd calibration 1", "format: other", "is no calibration"),
        ("clips: [a, ", "clips: [", "scores: must be a risk"),
        ("clips: [a, ", "clips: [[a], ", "clips: must be the file ids"),
        ("language: chinese", "language:", "language: must be of type str"),
        ("max_new_tokens: 64", "max_new_tokens: many", "max_new_tokens: must be a whole number"),
        ("clips:", "data:", "missing or unknown fields"),
        ("[-1.0, 2.1, 0.07]", "[1.0, 2.1, 0.07]", "rising levels"),
        ("[-1.0, 2.1, 0.07]", "[-1.0, 2.1]", "rising levels"),
        (".inf", ".nan", "scores: must be a risk"),
        ("costs:", "costs: {", "is not YAML"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "zh.yaml"
    save_calibration(CALIBRATION, file)
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CalibrationError, match=message) as caught:
        load_calibration(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.yaml: cannot be read"):
        load_calibration(tmp_path / "none.yaml")


def test_a_calibration_gives_a_level_and_its_reason() -> None:
    many = replace(CALIBRATION, clips=tuple("abcdefghi"), scores=(0.5, 0.25, *[math.inf] * 7))
    own = choose_own(many, 0.9)
    assert own.level == math.nextafter(0.25, 0)
    assert own.reason.startswith("send level 0.25, below score 1 of 9 in zh.yaml: a caption differs")
    assert "with chance 0.100 at most; there 2.10 calls a caption" in own.reason
    assert choose_own(many, 0.95).level < 0
    assert "9 clips are too few, so every caption is sent: lossless" in choose_own(many, 0.95).reason
    assert choose_budget(many, Budget("calls", 1.5)).level == 0.1 + 0.2
    with pytest.raises(CalibrationError, match=r"zh\.yaml: 0\.5 is less than any level"):
        choose_budget(many, Budget("calls", 0.5))
    with pytest.raises(CalibrationError, match=r"zh\.yaml: has no scores"):
        choose_own(replace(many, scores=()), 0.9)
