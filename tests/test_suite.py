"""The suite as a user runs it: options, grid, table, saved benchmark, results files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, tables
from bench.session import errors_in_one_line
from edgecloud_sd import config
from edgecloud_sd.measure import results
from edgecloud_sd.models import hf, load, pairs
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.pocket import clips
from edgecloud_sd.pytest_plugin import join
from edgecloud_sd.timing import profile
from tests.support.suite import ROOT, run


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three Chinese clips, the second without its audio."""
    path = clips.evaluation_set(tmp_path / "clips") / clips.manifest_name("chinese")
    entries = json.loads(path.read_text(encoding="utf-8"))[:3]
    entries[1]["audio_path"] = "wav/absent.wav"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_grid_prints_one_table_writes_results_and_can_be_compared(
    pipeline: Pipeline, pytester: pytest.Pytester, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)  # which pytest-benchmark asks for seconds about the machine
    done = run(
        pytester,
        *("-k", "test_captioning"),  # a load takes a server
        *("--dataset_path", str(manifest), "--on-bad-clip", "skip"),
        *("--mode", "edge,cloud,speculative", "--entropy-threshold", "1.5,0,inf", "--k", "4", "--rule", "greedy"),
        *(
            "--output_name",
            "grid",
            "--benchmark-json",
            "saved.json",
            "--benchmark-save",
            "one",
            "--max-new-tokens",
            "12",
        ),
    )
    done.assert_outcomes(passed=5)
    done.stdout.fnmatch_lines(
        [
            "*benchmark: 5 tests*",
            "*case*clips*" + "*".join(tables.SUMMARY_COLUMNS) + "*",
            "edge-pocket-zh*",
            "cloud-pocket-zh*",
            "speculative-pocket-H1.5-k4-greedy-zh*",
            "speculative-pocket-always-k4-greedy-zh*",
            "*where the time goes*",
            "*does it pay?*",
            "speculative-pocket-always-k4-greedy-zh*[[]*, *[]]*",
            "speculative-pocket-always-k4-greedy-zh: * as fast as the cloud alone *",
            "wrote *grid-edge-pocket-zh.json",
        ]
    )
    saved = json.loads((pytester.path / "saved.json").read_text(encoding="utf-8"))["benchmarks"]
    own = [each for each in saved if "results" in each["extra_info"]]
    extra = {each["param"]: each["extra_info"]["results"] for each in own}
    found = {case: results.read_results(pytester.path / "results" / f"grid-{case}.json") for case in extra}
    assert [each["stats"]["rounds"] for each in own] == [2, 2, 2, 2, 2]
    strict = "speculative-pocket-always-k4-greedy-zh"
    assert found[strict]["experiment_config"]["output"] == "lossless"
    assert extra[strict]["metrics"] == found[strict]["metrics"]
    assert not list((pytester.path / "results").glob("*.unfinished"))
    rows = {each["name"]: each for each in saved}
    bleu = rows[f"test_captioning[{strict}]:bleu4"]
    assert bleu["group"] == "bleu4 (0 to 1, higher is better)"
    assert bleu["stats"]["mean"] == bleu["stats"]["ops"] == found[strict]["metrics"]["figures"]["bleu4"]
    assert rows[f"test_captioning[{strict}]:ttft"]["stats"]["rounds"] == 2
    assert f"test_captioning[{strict}]:gpu_percent" not in rows
    assert found["speculative-pocket-never-k4-greedy-zh"]["experiment_config"]["entropy_threshold"] is None
    assert found["speculative-pocket-H1.5-k4-greedy-zh"]["experiment_config"]["entropy_threshold"] == 1.5
    assert found[strict]["metrics"]["figures"]["cloud_call_rate"] == 1.0
    tokens = {case: [clip["token_ids"] for clip in each["detailed_results"]] for case, each in found.items()}
    assert tokens[strict] == tokens["cloud-pocket-zh"] != tokens["edge-pocket-zh"]
    assert all("absent.wav" in each["skipped_clips"][0]["reason"] for each in found.values())
    command = str(Path(sys.executable).with_name("pytest-benchmark"))
    options = ["--storage", str(pytester.path / "saved"), "compare"]
    compared = subprocess.run([command, *options], cwd=ROOT, capture_output=True, text=True)
    assert f"test_captioning[{strict}]:otps" in compared.stdout, compared.stderr


@pytest.mark.slow
def test_each_side_is_loaded_once_for_all_cells_and_loads(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)
    loaded: list[str] = []

    load_model = load.load_model

    def counted(checkpoint: str, *how: str) -> hf.HFModel:
        loaded.append(checkpoint)
        return load_model(checkpoint, *how)

    monkeypatch.setattr(load, "load_model", counted)
    done = run(pytester, "--max-samples", "1", "--max-new-tokens", "4", "--k", "1,2")
    # cells, edges at once on a server, which loads its own, and what transformers does with the same two
    done.assert_outcomes(passed=4 + 3 + 1)
    assert sorted(loaded) == sorted([pipeline.pair.edge, pipeline.pair.cloud])


def test_a_bad_clip_fails_the_case_and_writes_nothing(pytester: pytest.Pytester, manifest: Path) -> None:
    options = ("--mode", "edge", "--dataset-path", str(manifest))
    done = run(pytester, *options)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*absent.wav: no such audio file*", "*--on-bad-clip skip*"])
    assert not (pytester.path / "results").exists()


def test_a_checkpoint_that_cannot_be_used_is_one_line() -> None:
    with pytest.raises(pytest.fail.Exception) as failed, errors_in_one_line():
        Pipeline(pairs.find_pair("pocket", edge_model="absent")).prepare("edge")
    assert str(failed.value).startswith("no checkpoint 'absent': give a folder that exists")
    assert not failed.value.pytrace


def test_one_cell_has_the_published_file_name_and_a_grid_one_file_a_cell() -> None:
    for modes, names in {
        "edge": ["mine.json"],
        "edge,cloud": ["mine-edge-pocket-zh.json", "mine-cloud-pocket-zh.json"],
    }.items():
        settings = config.resolve({"mode": modes, "output-name": "mine"})
        assert [tables.results_file(settings, case).name for case in cases.cases(settings)] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "--k: '0' is not auto or a whole number of at least 1"),
        (["--mode", "edge,hybrid"], "--mode: 'hybrid' is not one of edge, cloud, speculative"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
    ],
)
def test_a_bad_option_stops_before_anything_runs(pytester: pytest.Pytester, options: list[str], message: str) -> None:
    done = run(pytester, *options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{message}*"])


def test_a_file_of_options_makes_the_grid_and_the_command_line_overrides_it(pytester: pytest.Pytester) -> None:
    (pytester.path / "mine.yaml").write_text("mode: [speculative]\nk: [2, 3]\nrule: greedy\n", encoding="utf-8")
    done = run(pytester, "--config", "mine.yaml", "--rule", "rank(2)", "--collect-only", "-q")
    names = [line.split("[")[1].rstrip("]") for line in done.outlines if "test_captioning[" in line]
    assert names == ["speculative-pocket-H1.5-k2-rank2-zh", "speculative-pocket-H1.5-k3-rank2-zh"]


def test_the_help_shows_every_option_in_its_group(pytester: pytest.Pytester) -> None:
    text = " ".join(" ".join(run(pytester, "--help").outlines).split())
    starts = [text.index(f"edgecloud_sd: {group}:") for group in config.GROUPS]
    assert starts == sorted(starts)
    for option in config.OPTIONS:
        place = text.index(f" {option.help_text}")
        assert text.rfind(f"--{option.name}", 0, place) > starts[config.GROUPS.index(option.group)]


def test_an_option_may_name_a_path_outside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "manifest.json"
    outside.write_text("[]", encoding="utf-8")
    storage = tmp_path / "saved"
    storage.mkdir()
    monkeypatch.chdir(ROOT)
    options = ["--dataset_path", str(outside), "--benchmark-storage", str(storage), "--mode", "cloud"]
    with pytest.raises(SystemExit) as ended:
        pytest.main(["--benchmark-only", "--collect-only", "-q", "-s", "-p", "no:cacheprovider", *options])
    assert ended.value.code == pytest.ExitCode.OK
    assert capsys.readouterr().out.splitlines()[0] == "bench/test_captioning.py::test_captioning[cloud-pocket-zh]"


def test_options_are_joined_with_their_values() -> None:
    args = ["--k", "3", "-v", "--config=a.yaml", "--mode", "edge", "bench", "--k", "--mode"]
    joined = ["--k=3", "-v", "--config=a.yaml", "--mode=edge", "bench", "--k", "--mode"]
    assert join(args, {"--k", "--mode", "--config"}) == joined


def test_the_readme_shows_the_table_that_is_printed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = [line for line in readme.splitlines() if line.startswith("case ")]
    assert [[each.strip() for each in line.split("  ") if each.strip()] for line in headings] == [
        ["case", "clips", *tables.SUMMARY_COLUMNS]
    ]


@pytest.mark.slow
def test_every_command_of_the_readme_is_understood(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^\| [^|]+ \| `(pytest --benchmark-only [^`]*)` \|$", readme, re.M)
    assert len(commands) >= 16
    monkeypatch.syspath_prepend(ROOT)
    for command in commands:
        options = (
            command.replace("$DATA", "pocket").replace("bench/configs", str(ROOT / "bench" / "configs")).split()[2:]
        )
        assert run(pytester, *options, "--collect-only", "-q").ret == pytest.ExitCode.OK, command


@pytest.mark.slow
def test_two_runs_on_the_virtual_clock_write_the_same_bytes(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    for folder in ("a", "b"):
        done = run(
            pytester,
            *("--clock", "virtual", "--profile", "published", "--mode", "speculative", "--link", "4g"),
            *("--max-samples", "2", "--max-new-tokens", "8", "--results-dir", folder, "--shadow", "no"),
        )
        done.assert_outcomes(passed=1)
    first, second = [(pytester.path / folder / "captioning.json").read_bytes() for folder in ("a", "b")]
    assert first == second
    found = json.loads(first)
    assert found["experiment_config"]["case"] == "speculative-pocket-H1.5-k3-rank20-4g-virtual-published-zh"
    assert found["metrics"]["figures"]["cpu_percent"] is None
    assert found["metrics"]["reasons"]["cpu_percent"] == "the clock was virtual"
    assert found["metrics"]["latency_breakdown"]["edge_prefill"] == 7.5
    assert found["metrics"]["figures"]["wire_up_per_token"] > 0
    assert found["metrics"]["breakdown_closure"]["median"] is None
    assert found["metrics"]["reasons"]["missed_corrections"] == (
        "shadow verification did not run: it needs mode speculative, --shadow yes, a rule other than synthetic, and a "
        "cloud that answers"
    )


@pytest.mark.slow
def test_a_run_under_this_machines_profile_can_be_resumed(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    options = ("--clock", "virtual", "--profile", "measure", "--mode", "edge", "--max-samples", "1")
    run(pytester, *options, "--max-new-tokens", "8").assert_outcomes(passed=1)
    measured = profile.load_profile(str(pytester.path / "results" / "captioning-profile.yaml"))
    assert 0 < measured.edge.step < measured.cloud.step
    assert measured.draft_at_cloud == measured.edge.step
    first = results.read_results(pytester.path / "results" / "captioning.json")
    assert first["metrics"]["latency_breakdown"]["edge_prefill"] == pytest.approx(measured.edge.prefill)
    run(pytester, *options, "--max-new-tokens", "8", "--resume").assert_outcomes(passed=1)
    assert results.read_results(pytester.path / "results" / "captioning.json") == first


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    file = pytester.path / "results" / "captioning.json"
    options = ("--mode", "edge", "--max-samples", "2", "--max-new-tokens", "8")
    run(pytester, *options).assert_outcomes(passed=1)
    complete = results.read_results(file)
    run(pytester, *options, "--resume").assert_outcomes(passed=1)
    assert results.read_results(file) == complete  # on the real clock, so nothing was decoded again
    # as it is left by a run that was stopped while it wrote its second clip
    header = {"experiment": complete["experiment_config"], "environment": complete["environment"]}
    lines = [json.dumps(each) for each in (header, *complete["detailed_results"])]
    file.with_name("captioning.json.unfinished").write_text("\n".join(lines)[:-50], encoding="utf-8")
    file.unlink()
    run(pytester, *options, "--resume").assert_outcomes(passed=1)
    first, second = results.read_results(file)["detailed_results"]
    assert first == complete["detailed_results"][0]
    assert second["trace"] != complete["detailed_results"][1]["trace"]
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    # another experiment is not mixed with it
    before = file.read_bytes()
    done = run(pytester, *options[:-1], "3", "--resume")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*captioning.json: holds another experiment (max_new_tokens was 8 and is 3)*"])
    assert file.read_bytes() == before


@pytest.mark.slow
def test_captions_kept_by_chance_have_no_quality(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    options = ("--mode", "speculative", "--gate", "always", "--rule", "synthetic(0.5)", "--max-samples", "1")
    done = run(pytester, *options, "--max-new-tokens", "8", "--output-name", "a", "-k", "captioning")
    done.assert_outcomes(passed=1, deselected=done.parseoutcomes()["deselected"])
    metrics = results.read_results(pytester.path / "results" / "a.json")["metrics"]
    assert metrics["figures"]["bleu4"] is None
    assert metrics["reasons"]["bleu4"] == "rule synthetic(0.5) accepts tokens by chance, so captions mean nothing"
