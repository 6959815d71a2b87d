"""`bench.tune --calibrate` on the pocket pair: the costs in the file are those of a run at each level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import tune
from bench.gate_calibration import CalibrationDecoder, calibrate_gate, find_strategy, preview_choices
from bench.held_out import iterate_held_out
from edgecloud_sd.forecast.budgets import gate_at
from edgecloud_sd.forecast.calibration import load_calibration
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline
from tests.support.calibrations import CALIBRATION

pytestmark = pytest.mark.slow  # decodes clips with the pocket pair


@pytest.mark.parametrize(
    "options", [["--gate", "risk", "--revise", "context"], ["--gate", "token(margin)", "--language", "english"]]
)
def test_a_run_at_a_level_costs_what_the_file_says(pipeline: Pipeline, tmp_path: Path, options: list[str]) -> None:
    arguments = ["--calibrate", "2", "--language", "chinese", "--rule", "greedy", "--k", "5", *options]
    settings = tune.resolve_settings(tune.tune_parser().parse_args(arguments))
    (file,) = calibrate_gate(pipeline, settings, find_strategy(settings), 2, tmp_path / "calibration.yaml")
    calibration = load_calibration(file)
    language = settings.language[0]
    strategy = replace(find_strategy(settings), k=5, draft_ahead=2)
    calibration.check(pipeline.conditions(settings, strategy, language))
    assert len(calibration.scores) == (2 if strategy.gate.name == "risk" else 0)
    clips = list(iterate_held_out(pipeline, settings, language, 2, "calibration"))
    assert calibration.clips == tuple(clip.file_id for clip in clips)
    for cost in calibration.costs[1::4]:
        traces = CalibrationDecoder(pipeline, settings.max_new_tokens, clips).traces(
            replace(strategy, gate=gate_at(strategy.gate, cost.level)), "again"
        )
        counts = sum(map(metrics.counts, traces), metrics.Counts())
        assert (counts.cloud_calls / 2, (counts.correction + counts.bonus) / counts.tokens) == (
            cost.calls,
            cost.written_share,
        )


def test_the_levels_of_usual_budgets_are_previewed() -> None:
    lines = list(preview_choices(CALIBRATION))
    assert [line.partition(":")[0] for line in lines] == [
        *("--own 0.95", "--own 0.9", "--own 0.8"),
        *("--cloud-calls 1", "--cloud-calls 1.5"),  # no level needs only 0.5
    ]
    assert "4 clips are too few" in lines[1]


def test_each_language_has_a_file_of_its_own(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = tune.resolve_settings(tune.tune_parser().parse_args(["--calibrate", "2", "--gate", "risk"]))
    files = calibrate_gate(pipeline, settings, find_strategy(settings), 2, tmp_path / "calibration.yaml")
    assert [file.name for file in files] == ["calibration-zh.yaml", "calibration-en.yaml"]
    assert [load_calibration(file).conditions.language for file in files] == ["chinese", "english"]
