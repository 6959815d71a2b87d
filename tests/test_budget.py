"""The budget, the promise and the audit of a cell, and runs of the suite that have them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import tune
from bench.budget import budget_lines, budget_parts, count_audit, shared_clip_notes
from bench.gate_calibration import calibrate_gate, find_strategy
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.config import Settings, resolve
from edgecloud_sd.events import Committed, Degraded, Finished, Prepared, Trace
from edgecloud_sd.forecast.budgets import Budget, LevelCost
from edgecloud_sd.forecast.calibration import choose_budget, load_calibration, save_calibration
from edgecloud_sd.grid import strategies
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure.audit import AuditCount
from edgecloud_sd.measure.metrics import Counts
from edgecloud_sd.measure.summary import ClipResult, clip_result
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy
from tests.support.calibrations import CALIBRATION
from tests.support.results import decode, make_clip
from tests.support.suite import run


def make_captions(answers: Sequence[bool | None], *events: Committed | Degraded) -> list[ClipResult]:
    """Return a caption with these events for each answer of an audit."""
    trace = Trace(tuple((1.0, event) for event in (Prepared(3), *events, Committed((1, 2), "local"), Finished("eos"))))
    used = unmeasured(1.0, "test")
    return [clip_result(make_clip("a", "她"), trace, used, decode, is_own=is_own) for is_own in answers]


def settings_of(tmp_path: Path, **options: str) -> Settings:
    save_calibration(CALIBRATION, tmp_path / "zh.yaml")
    given = {name.replace("_", "-"): text for name, text in options.items()}
    return resolve({"mode": "revise", "own": "0.8", "calibration": str(tmp_path / "zh.yaml")} | given)


def test_a_promise_has_its_choice_its_audit_and_a_warning(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, audit="0.5")
    (strategy,) = strategies(settings)
    parts = budget_parts(settings, strategy, make_captions([True, False, None, False, False]))
    assert parts["reasons"] == {}
    assert parts["budget"]["first_level"] == parts["budget"]["last_level"] == math.nextafter(0.25, 0)
    assert (parts["budget"]["by"], parts["budget"]["calibration_clips"]) == ("calibration", 4)
    audit = parts["audit"]
    assert [audit[name] for name in ("drawn", "verified", "wrong", "promised", "rate")] == [4, 4, 3, 0.2, 0.75]
    assert audit["is_broken"]
    assert audit["p"] == pytest.approx(4 * 0.2**3 * 0.8 + 0.2**4)
    choice, warning = budget_lines(parts, "cell")
    assert choice.startswith("- cell: --own 0.8 by calibration: send level 0.25, below score 1 of 4 in zh.yaml")
    assert warning.startswith("- cell: warning: audit: 3 of 4 drawn captions differ")


def test_an_audit_verifies_each_drawn_caption_of_a_lossy_rule(tmp_path: Path) -> None:
    captions = [replace(result, counts=Counts(tokens=2, accepted=2)) for result in make_captions([True, False, None])]
    audit = count_audit(settings_of(tmp_path, audit="1"), Strategy(rule=Rank(20)), captions)
    assert isinstance(audit, AuditCount)
    assert (audit.drawn, audit.verified, audit.wrong) == (2, 2, 1)


@pytest.mark.parametrize(
    ("options", "strategy", "answers", "reason"),
    [
        ({}, None, [True], "--audit is not set"),
        ({"audit": "1"}, Strategy("edge"), [None], "mode edge has no captions that the cloud may have left"),
        ({"audit": "1"}, Strategy(), [None], "every caption is verified, because the cell is lossless"),
        ({"audit": "0.01"}, None, [None, None], "no clip of the cell was drawn: raise --audit"),
    ],
)
def test_a_figure_without_a_value_has_a_reason(
    tmp_path: Path, options: dict[str, str], strategy: Strategy | None, answers: list[bool | None], reason: str
) -> None:
    settings = settings_of(tmp_path, **options)
    parts = budget_parts(settings, strategy or strategies(settings)[0], make_captions(answers))
    assert parts["audit"] is None
    assert parts["reasons"]["audit"].startswith(reason)
    assert ("budget" in parts["reasons"]) == (strategy is not None)


def test_captions_that_the_edge_finished_alone_are_not_audited(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, audit="1")
    parts = budget_parts(settings, strategies(settings)[0], make_captions([None], Degraded("the cloud failed")))
    reason = "no clip answered by the cloud was drawn: raise --audit or caption more clips"
    assert parts["reasons"] == {"audit": reason}
    assert [*budget_lines(parts, "cell")][1:] == [f"- cell: audit: {reason}"]


def test_a_feedback_is_replayed_for_the_results(tmp_path: Path) -> None:
    settings = resolve({"mode": "revise", "cloud-calls": "1"})
    (strategy,) = strategies(settings)
    budget = budget_parts(settings, strategy, make_captions([None] * 3))["budget"]
    assert (budget["by"], budget["first_level"], budget["calibration"]) == ("feedback", 0.5, None)
    assert budget["last_level"] == pytest.approx(0.5 - 3 * 0.05)  # three captions without a call
    assert (budget["calls"], budget["written_share"]) == (0, 0)


def test_the_levels_of_a_margin_are_those_of_its_option() -> None:
    settings = resolve({"mode": "speculative", "gate": "token(margin)", "threshold": "0.5", "cloud-calls": "1"})
    budget = budget_parts(settings, strategies(settings)[0], make_captions([None] * 2))["budget"]
    assert (budget["first_level"], budget["last_level"]) == (0.5, pytest.approx(0.6))
    assert budget["reason"] == "the level went from 0.5 to 0.6"
    margins = replace(CALIBRATION.conditions, strategy="speculative-tokenM1-k1-greedy")
    calibrated = replace(CALIBRATION, conditions=margins, costs=(LevelCost(-0.3, 1.0, 0.03),), scores=())
    assert choose_budget(calibrated, Budget("calls", 1)).reason.startswith("level 0.3 by 4 clips")


def test_clips_of_the_calibration_are_named(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    (strategy,) = strategies(settings)
    assert list(shared_clip_notes(settings, strategy, ["b"])) == []
    assert list(shared_clip_notes(settings, strategy, ["a", "b", "d"])) == [
        "warning: zh.yaml was calibrated on 2 clips of this run: use others"
    ]


@pytest.mark.slow
def test_a_run_has_its_calibrated_level_and_its_audit(
    pipeline: Pipeline, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    arguments = ["--calibrate", "4", "--language", "chinese", "--gate", "risk", "--rule", "greedy"]
    calibrated = tune.resolve_settings(tune.tune_parser().parse_args([*arguments, "--revise", "context"]))
    (file,) = calibrate_gate(pipeline, calibrated, find_strategy(calibrated), 4, tmp_path / "zh.yaml")
    options = ["--mode", "revise", "--own", "0.6", "--calibration", str(file), "--audit", "1", "--max-samples", "3"]
    result = run(pytester, *options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*--own 0.6 by calibration: send level * in zh.yaml*", "*audit: * of 3 drawn*"])
    document = read_document()
    assert document["experiment_config"]["calibration"] == "zh.yaml"
    assert document["metrics"]["budget"]["calibration_clips"] == 4
    missed = [clip["hindsight"]["missed"] for clip in document["detailed_results"]]
    assert [clip["is_own"] for clip in document["detailed_results"]] == [not missed_tokens for missed_tokens in missed]
    run(pytester, *options, "--shadow", "no", "--resume", "--output-name", "alone").assert_outcomes(passed=1)
    alone = read_document("alone")["detailed_results"]
    assert [clip["is_own"] for clip in alone] == [not missed_tokens for missed_tokens in missed]
    other = load_calibration(file)
    save_calibration(replace(other, conditions=replace(other.conditions, edge_weights="other")), file)
    result = run(pytester, *options)
    result.stdout.fnmatch_lines(["*--calibration: zh.yaml, edge_weights: is 'other', and this run*calibrate again*"])
    result.assert_outcomes(failed=1)


@pytest.mark.slow
def test_a_feedback_goes_on_where_a_stopped_run_ended(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    options = ["--mode", "revise", "--cloud-calls", "0.3", "--clock", "virtual", "--profile", "laptop-gpu"]
    run(pytester, *options, "--max-samples", "4").assert_outcomes(passed=1)
    whole = read_document()
    levels = [whole["metrics"]["budget"][name] for name in ("first_level", "last_level")]
    assert levels[0] != levels[1]
    unfinished = Path("results/captioning.json.unfinished")
    assert not unfinished.exists()
    run(pytester, *options, "--max-samples", "4", "--resume").assert_outcomes(passed=1)
    again = read_document()
    assert again["metrics"]["budget"] == whole["metrics"]["budget"]
    assert [clip["token_ids"] for clip in again["detailed_results"]] == [
        clip["token_ids"] for clip in whole["detailed_results"]
    ]


def read_document(name: str = "captioning") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(f"results/{name}.json").read_text(encoding="utf-8"))
    return document
