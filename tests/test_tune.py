"""The command `bench.tune`: its options, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import tune
from edgecloud_sd.config import ConfigError
from edgecloud_sd.host.files import hold_file


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "one of the arguments --pareto"),
        (["--pareto", "--clips", "1"], "--clips: '1' is not a whole number of at least 2"),
        (["--pareto", "--clips", "many"], "--clips: 'many' is not"),
        (["--pareto", "--calibrate", "9"], "not allowed with argument --pareto"),
        (["--calibrate", "0"], "--calibrate: '0' is not a whole number of at least 2"),
    ],
)
def test_a_bad_option_ends_the_command_with_its_reason(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.tune_parser().parse_args(arguments)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--link", "5g,4g"], "--link: give one link, not 2"),
        (["--profile", "measure"], "--profile: 'measure'"),
        (["--profile", "unheard"], "--profile: no profile 'unheard'"),
        (["--language", "latin"], "--language: 'latin' is not one of"),
    ],
)
def test_a_setting_that_the_picture_cannot_use_is_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tune.resolve_settings(tune.tune_parser().parse_args(["--pareto", *arguments]))


def test_options_of_decoding_add_their_grid() -> None:
    options = tune.tune_parser().parse_args(["--pareto", "--gate", "always", "--rank", "2,3"])
    added = tune.given_strategies(options, tune.resolve_settings(options))
    assert [strategy.label for strategy in added] == ["speculative-always-k3-rank2", "speculative-always-k3-rank3"]
    options = tune.tune_parser().parse_args(["--pareto"])
    assert not tune.given_strategies(options, tune.resolve_settings(options))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--pareto", "--output", "picture.svg"], "--output: 'picture.svg' does not end in .html"),
        (["--pareto", "--rule", "greedy,synthetic(0.5)"], "--rule: synthetic(0.5) writes no captions to score"),
        (["--calibrate", "9", "--output", "zh.json"], "--output: 'zh.json' does not end in .yaml"),
        (["--calibrate", "9"], "--gate: entropy has no level to calibrate: give one of risk, token"),
        (["--calibrate", "9", "--gate", "risk", "--rank", "2,3"], "--calibrate: needs one strategy"),
        (
            ["--calibrate", "9", "--gate", "token", "--max-new-tokens", "300"],
            "--max-new-tokens: a calibration verifies",
        ),
    ],
)
def test_a_task_that_cannot_be_done_is_refused_before_a_model_loads(arguments: list[str], problem: str) -> None:
    with pytest.raises(SystemExit) as error:
        tune.main(arguments)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"), [("file/picture.html", "Not a directory|File exists"), ("held.html", "is writing it")]
)
def test_an_output_that_cannot_be_written_is_refused_before_a_model_loads(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tune, "open_pair", lambda settings: pytest.fail("a model loads"))
    with hold_file(tmp_path / "held.html"), pytest.raises(SystemExit) as error:
        tune.main(["--pareto", "--output", str(tmp_path / name)])
    assert re.search(problem, str(error.value))
