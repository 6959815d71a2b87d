"""Simulations of the coverage of the 95 % intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import coverage

# the heaviest tails, whose sums no interval over 20 clips can know
UNREACHED = tuple(
    f"sums of times, {tail}" for tail in ("log-normal, sigma 1.5", "Pareto, alpha 2", "Pareto, alpha 1.5")
)


OTHER_JSON = Path(coverage.__file__).parents[1] / "edgecloud_sd" / "measure" / "results.schema.json"  # JSON, no results


@pytest.mark.slow
def test_at_20_clips_the_intervals_cover_what_they_promise() -> None:
    for comparison in coverage.synthetic_comparisons(size=50_000):
        if comparison.name not in UNREACHED:
            result = coverage.simulate(comparison, 20, 400)
            assert result.covered >= 0.91, comparison.name  # 0.93 less two standard errors of the simulation


def test_a_population_in_which_few_clips_differ_has_few_intervals() -> None:
    names = {comparison.name: comparison for comparison in coverage.synthetic_comparisons(size=1000)}
    result = coverage.simulate(names["scores, 10% of the clips differ"], 20, 40)
    assert result.with_interval < 0.3


def results_file(path: Path, seconds: float) -> Path:
    clips = [
        {
            "file_id": str(i),
            "total_time": seconds + i % 3,
            "generated_text": "a calm voice" + " now" * (i % int(seconds + 1)),
            "reference_captions": ["a calm voice now"],
            "scores": {"rouge_l": i / 20 / seconds, "bleu4": 0.5},
        }
        for i in range(20)
    ]
    cell = {"experiment_config": {"language": "english"}, "metrics": {"score_normalisation": "none"}}
    path.write_text(json.dumps(cell | {"detailed_results": clips}))
    return path


def test_the_command_simulates_the_clips_of_two_results_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(results_file(tmp_path / f"{seconds}.json", seconds)) for seconds in (1.0, 2.0)]
    assert coverage.main([*files, "--clips", "8", "--repeats", "5"]) == 0
    printed = capsys.readouterr().out
    assert "typical clip" in printed
    assert "BLEU-4 of the corpus" in printed
    assert "8 clips" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.json"], "takes no file or two results files, not 1"),
        (["none.json", "none.json"], "none.json"),
        ([__file__, __file__], "test_coverage.py: is not JSON"),
        ([str(OTHER_JSON), str(OTHER_JSON)], "no results files of this package ('detailed_results' is missing)"),
        (["--clips", "0"], "--clips takes whole numbers above 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        coverage.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
