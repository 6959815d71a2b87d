"""Calibration files: saved without loss, and refused under other conditions or if damaged."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.forecast.budgets import LevelCost
from edgecloud_sd.forecast.calibration import (
    Calibration,
    CalibrationError,
    Conditions,
    load_calibration,
    save_calibration,
)

CONDITIONS = Conditions(
    pair="pocket",
    edge_weights="1a",
    cloud_weights="2b",
    edge_dtype="float32",
    cloud_dtype="float32",
    language="chinese",
    prompt="3c",
    strategy="speculative-risk1-s0.02-k64-greedy",
    max_new_tokens=64,
)
CALIBRATION = Calibration(
    CONDITIONS, "4d", 3, (LevelCost(-1.0, 2.1, 0.07), LevelCost(0.1 + 0.2, 1.0, 0.03)), (math.inf, 1 / 3, 5e-324)
)


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    save_calibration(CALIBRATION, tmp_path / "new" / "zh.yaml")
    assert load_calibration(tmp_path / "new" / "zh.yaml") == CALIBRATION


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot represent"):
        save_calibration(replace(CALIBRATION, dataset=object()), tmp_path / "zh.yaml")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", [field.name for field in fields(Conditions)])
def test_other_conditions_are_refused_by_name(field: str) -> None:
    CALIBRATION.check(CONDITIONS, "zh.yaml")
    change: dict[str, Any] = {field: 48 if field == "max_new_tokens" else "other"}
    other = replace(CONDITIONS, **change)
    with pytest.raises(
        CalibrationError, match=rf"^zh.yaml, {field}: is .*, and this run has (48|'other'): calibrate again"
    ):
        CALIBRATION.check(other, "zh.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: edgecloud_sd calibration 1", "format: other", "is no calibration"),
        ("clips: 3", "clips: 4", "scores: must be a risk"),
        ("clips: 3", "clips: many", "clips: must be of type int"),
        ("dataset:", "data:", "missing or unknown fields"),
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
