"""The suite as a user runs it: options, grid, tables, saved benchmarks, results files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, tables
from bench.report.__main__ import main as write_report
from bench.resume import SavedClips, comparable_limits
from bench.session import errors_in_one_line
from edgecloud_sd import config
from edgecloud_sd.cloud.retry import PATIENCE, AttemptFailed
from edgecloud_sd.cloud.transport import Answer, Transport
from edgecloud_sd.events import Trace
from edgecloud_sd.host.files import hold_file
from edgecloud_sd.host.limits import read_limits
from edgecloud_sd.measure import results
from edgecloud_sd.models import hf, load, pairs
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.pocket import clips
from edgecloud_sd.pytest_plugin import FLAGS, join
from edgecloud_sd.timing import profile
from tests.support.serving import served
from tests.support.suite import ROOT, arguments, run

LOSSLESS = "speculative-pocket-always-k4-greedy-manifest_chinese-zh"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Write a manifest of three Chinese clips, of which the second has no audio file."""
    path = clips.evaluation_set(tmp_path / "clips") / clips.manifest_name("chinese")
    entries = json.loads(path.read_text(encoding="utf-8"))[:3]
    entries[1]["audio_path"] = "wav/absent.wav"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_grid_prints_tables_writes_results_and_can_be_compared(
    pipeline: Pipeline, pytester: pytest.Pytester, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)  # pytest-benchmark calls it, and it takes seconds
    result = run(
        pytester,
        *("--dataset_path", str(manifest), "--on-bad-clip", "skip", "--max-new-tokens", "12"),
        *("--mode", "edge,cloud,speculative", "--entropy-threshold", "1.5,0,inf", "--k", "4", "--rule", "greedy"),
        *("--output_name", "grid", "--benchmark-json", "saved.json", "--benchmark-save", "one"),
    )
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(
        [
            "*benchmark 'data set manifest_chinese': 5 tests*",
            "*case*clips*" + "*".join(tables.SUMMARY_COLUMNS) + "*",
            "edge-pocket-manifest_chinese-zh*",
            "cloud-pocket-manifest_chinese-zh*",
            "speculative-pocket-H1.5-k4-greedy-manifest_chinese-zh*",
            f"{LOSSLESS}*",
            "- accepted lengths (always k4 greedy): * in *% of * verifications",
            "*where the time goes*",
            "*does it pay?*",
            "always k4 greedy *edge alone *",
            "- always k4 greedy: *against the *",
            "- forecast for always k4 greedy: * as fast as the cloud alone *",
            "wrote *grid-edge-pocket-manifest_chinese-zh.json",
        ]
    )
    saved = json.loads((pytester.path / "saved.json").read_text(encoding="utf-8"))["benchmarks"]
    check_saved_rows(saved, pytester.path / "results")
    command = str(Path(sys.executable).with_name("pytest-benchmark"))
    options = ["--storage", str(pytester.path / "saved"), "compare"]
    compared = subprocess.run([command, *options], cwd=ROOT, capture_output=True, text=True)
    assert f"test_captioning[{LOSSLESS}] " in compared.stdout, compared.stderr
    assert "]:otps" not in compared.stdout
    compared = subprocess.run([command, *options, "-k", "otps"], cwd=ROOT, capture_output=True, text=True)
    assert f"test_captioning[{LOSSLESS}]:otps" in compared.stdout, compared.stderr


def check_saved_rows(saved: list[dict[str, Any]], folder: Path) -> None:
    """Check that benchmarks, metric rows and results files of the grid agree."""
    benchmarks = [row for row in saved if "results" in row["extra_info"]]
    extra = {row["param"]: row["extra_info"]["results"] for row in benchmarks}
    documents = {case: results.read_results(folder / f"grid-{case}.json") for case in extra}
    assert [row["stats"]["rounds"] for row in benchmarks] == [2, 2, 2, 2, 2]
    assert documents[LOSSLESS]["experiment_config"]["output"] == "lossless"
    assert extra[LOSSLESS]["metrics"] == documents[LOSSLESS]["metrics"]
    assert not list(folder.glob("*.unfinished"))
    rows = {row["name"]: row for row in saved}
    bleu = rows[f"test_captioning[{LOSSLESS}]:bleu4"]
    assert bleu["group"] == "bleu4 (0 to 1, higher is better)"
    assert bleu["stats"]["mean"] == bleu["stats"]["ops"] == documents[LOSSLESS]["metrics"]["figures"]["bleu4"]
    assert rows[f"test_captioning[{LOSSLESS}]:ttft"]["stats"]["rounds"] == 2
    assert f"test_captioning[{LOSSLESS}]:gpu_percent" not in rows
    thresholds = {case: document["experiment_config"]["strategy"]["threshold"] for case, document in documents.items()}
    assert thresholds["speculative-pocket-never-k4-greedy-manifest_chinese-zh"] is None
    assert thresholds["speculative-pocket-H1.5-k4-greedy-manifest_chinese-zh"] == 1.5
    assert documents[LOSSLESS]["metrics"]["figures"]["cloud_call_rate"] == 1.0
    tokens = {
        case: [clip["token_ids"] for clip in document["detailed_results"]] for case, document in documents.items()
    }
    assert tokens[LOSSLESS] == tokens["cloud-pocket-manifest_chinese-zh"] != tokens["edge-pocket-manifest_chinese-zh"]
    assert all("absent.wav" in document["skipped_clips"][0]["reason"] for document in documents.values())


@pytest.mark.slow
def test_each_side_is_loaded_once_for_all_benchmarks(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)
    checkpoints: list[str] = []
    load_model = load.load_model

    def record_checkpoint(checkpoint: str, *options: str) -> hf.HFModel:
        checkpoints.append(checkpoint)
        return load_model(checkpoint, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "load_model", record_checkpoint)
    result = run(pytester, "--max-samples", "1", "--max-new-tokens", "4", "--k", "1,2", "--extra", "load,baselines")
    # edge, cloud, two k of two strategies, two modes that revise; one run of the baselines; three loads, whose server
    # loads its own model
    result.assert_outcomes(passed=2 + 4 + 2 + 3 + 1)
    assert sorted(checkpoints) == sorted([pipeline.pair.edge, pipeline.pair.cloud])


@pytest.mark.slow
def test_a_bad_clip_fails_the_case_and_writes_nothing(pytester: pytest.Pytester, manifest: Path) -> None:
    options = ("--mode", "edge", "--dataset-path", str(manifest))
    result = run(pytester, *options)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*absent.wav: no such audio file*", "*--on-bad-clip skip*"])
    assert not (pytester.path / "results").exists()


def test_a_checkpoint_that_cannot_be_loaded_fails_with_one_line() -> None:
    with pytest.raises(pytest.fail.Exception) as error, errors_in_one_line():
        Pipeline(pairs.find_pair("pocket", edge_model="absent")).prepare("edge")
    assert str(error.value).startswith("no checkpoint 'absent': give a folder that exists")
    assert not error.value.pytrace


def test_a_run_of_one_cell_has_the_published_file_name_and_a_grid_has_a_file_per_cell() -> None:
    for modes, names in {
        "edge": ["mine.json"],
        "edge,cloud": ["mine-edge-pocket-zh.json", "mine-cloud-pocket-zh.json"],
    }.items():
        settings = config.resolve({"mode": modes, "output-name": "mine"})
        assert [tables.results_file(settings, case).name for case in cases.cases(settings)] == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "--k: '0' is not auto or a whole number of at least 1"),
        (["--mode", "edge,hybrid"], "--mode: 'hybrid' is not one of edge, cloud, speculative"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--dataset-path", "absent"], "--dataset-path: absent: no such manifest"),
        (["--edge-model", "./absent"], "--edge-model: ./absent: no such folder"),
        (["--edge-model", "absent"], "--edge-model: absent: no such folder"),
        (["--edge-model", "a/b/c"], "--edge-model: a/b/c: no such folder"),
        (["--edge-model", "models/absent"], "--edge-model: models/absent: no such folder"),
        (["--cloud-model", "/absent"], "--cloud-model: /absent: no such folder"),
        (["--benchmark-disable"], "--benchmark-disable: a benchmark is timed and runs alone; leave it out"),
        (["--benchmark-group-by", "param:kk"], "--benchmark-group-by: no benchmark has 'kk'; they have pair, "),
        (["--extra", "lod"], "--extra: 'lod' is not one of load, baselines"),
        (["--extra", "load", "--mode", "edge"], "--extra: load is not possible here. The load needs speculative cells"),
        (
            ["--extra", "baselines", "--cloud-url", "auto"],
            "--extra: baselines is not possible here. The baselines need",
        ),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(
    pytester: pytest.Pytester, options: list[str], message: str
) -> None:
    pytester.mkdir("models")
    result = run(pytester, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message}*"])


def test_a_histogram_without_its_packages_is_refused_before_anything_runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(pytester, "--mode", "edge", "--benchmark-histogram")
    result.stderr.fnmatch_lines(["ERROR: --benchmark-histogram: needs pygal and pygaljs*pip install pygal pygaljs"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FloatingPointError("not finite in float32"), "*_0000: not finite in float32"),
        (torch.OutOfMemoryError("CUDA out of memory."), "*_0000: the GPU is used up (CUDA out of memory): *"),
        (MemoryError(), "*_0000: memory is used up: choose a smaller model*"),
    ],
)
def test_an_expected_failure_of_a_caption_is_one_line(
    error: Exception, line: str, pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "trace", fail)
    result = run(pytester, "-k", "test_captioning", "--mode", "edge", "--max-samples", "1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([line, "(*the same command with --resume goes on)"])
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.slow
def test_the_limits_of_a_benchmark_are_lifted_before_its_failure_is_reported(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_at_report: list[int | None] = []

    def fail(*arguments: object, **options: object) -> None:
        limits_at_report.append(read_limits().memory_bytes)
        raise KeyError("a bug")

    monkeypatch.setattr(Pipeline, "trace", fail)

    def note(error: Exception, limit_gb: float | None) -> None:
        limits_at_report.append(read_limits().memory_bytes)

    monkeypatch.setattr("bench.session.explain_error", note)
    result = run(pytester, "-k", "test_captioning", "--mode", "edge", "--max-samples", "1", "--max-memory-gb", "64")
    result.assert_outcomes(failed=1)
    assert limits_at_report == [64 * 10**9, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lack", [MemoryError(), RuntimeError("can't start new thread"), RuntimeError("could not create a primitive")]
)
def test_a_memory_limit_that_a_caption_reaches_is_named_and_finished_cells_and_clips_are_kept(
    lack: Exception, pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, trace = count(), Pipeline.trace

    def fail_in_the_second_cell(*arguments: Any, **options: Any) -> Trace:
        if next(calls) == 5:  # a cell is a warm-up and two clips
            raise lack
        return trace(*arguments, **options)

    monkeypatch.setattr(Pipeline, "trace", fail_in_the_second_cell)
    options = ["--mode", "edge", "--language", "english,chinese", "--max-samples", "2", "--max-memory-gb", "64"]
    result = run(pytester, "-k", "test_captioning", "-v", "--benchmark-json", "saved.json", *options)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*--max-memory-gb: 64 is used up*", "(1 finished captions are kept in *"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    rows = json.loads((pytester.path / "saved.json").read_text())["benchmarks"]
    assert len(rows[0]["extra_info"]["results"]["detailed_results"]) == 2
    assert all(row["params"]["language"] == "english" for row in rows)


@pytest.mark.slow
def test_a_memory_limit_that_is_too_low_for_the_libraries_fails_with_one_line(pytester: pytest.Pytester) -> None:
    options = ["-k", "test_captioning", "--mode", "edge", "--max-samples", "1", "--max-memory-gb", "0.3"]
    result = pytester.runpytest_subprocess(*arguments(*options))
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    result.stdout.fnmatch_lines(["*-max-memory-gb*"])


def test_the_command_line_overrides_a_file_of_options(pytester: pytest.Pytester) -> None:
    (pytester.path / "mine.yaml").write_text("mode: [speculative]\nk: [2, 3]\nrule: greedy\n", encoding="utf-8")
    result = run(pytester, "--config", "mine.yaml", "--rule", "rank(2)", "--collect-only", "-q")
    names = [line.split("[")[1].rstrip("]") for line in result.outlines if "test_captioning[" in line]
    assert names == ["speculative-pocket-H1.5-k2-rank2-zh", "speculative-pocket-H1.5-k3-rank2-zh"]


def test_the_help_lists_every_option_in_its_group(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # on narrow lines, older versions of pytest break words at hyphens
    text = " ".join(" ".join(run(pytester, "--help").outlines).split())
    group_places = [text.index(f"edgecloud_sd: {group}:") for group in config.GROUPS]
    assert group_places == sorted(group_places)
    for option in config.OPTIONS:
        place = text.index(f" {option.help_text}")
        assert text.rfind(f"--{option.name}", 0, place) > group_places[config.GROUPS.index(option.group)]


@pytest.mark.slow
def test_an_option_may_name_a_path_outside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "with spaces" / "manifest.json"
    outside.parent.mkdir()
    outside.write_text("[]", encoding="utf-8")
    storage = tmp_path / "saved"
    storage.mkdir()
    monkeypatch.chdir(ROOT)
    options = ["--dataset_path", str(outside), "--benchmark-storage", str(storage), "--mode", "cloud"]
    with pytest.raises(SystemExit) as stopped:
        pytest.main(["--benchmark-only", "--collect-only", "-q", "-s", "-p", "no:cacheprovider", *options])
    assert stopped.value.code == pytest.ExitCode.OK
    assert (
        capsys.readouterr().out.splitlines()[0]
        == "bench/test_captioning.py::test_captioning[cloud-pocket-with_spaces-zh]"
    )


@pytest.mark.slow
def test_a_mistyped_option_with_a_path_outside_is_named_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    options = ["--dataset-path", str(tmp_path), "--mode", "edge", "--resume", "--dataset-pth", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        pytest.main(["--benchmark-only", "--collect-only", "-p", "no:cacheprovider", *options])
    assert stopped.value.code == pytest.ExitCode.USAGE_ERROR
    assert f"unrecognized arguments: --dataset-pth={tmp_path}\n" in capsys.readouterr().err


def test_each_option_is_joined_with_its_value() -> None:
    args = ["--k", "3", "-v", "--config=a.yaml", "--mode", "edge", "bench", "--k", "--mode"]
    joined = ["--k=3", "-v", "--config=a.yaml", "--mode=edge", "bench", "--k", "--mode"]
    assert join(args, {"--k", "--mode", "--config"}) == joined


def test_every_option_of_the_suite_without_a_value_is_a_flag(pytestconfig: pytest.Config) -> None:
    groups = [group for group in pytestconfig._parser._groups if group.name.startswith("edgecloud_sd")]
    options = [option for group in groups for option in group.options]
    flags = [option for option in options if isinstance(pytestconfig.getoption(option.dest), bool)]
    assert {name for option in flags for name in option.names()} == FLAGS


def test_the_table_in_the_readme_has_printed_headings_in_their_order() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    header = next(line for line in readme.splitlines() if line.startswith("| case |"))
    shown = [heading.strip() for heading in header.strip("|").split("|")]
    assert len(shown) > 1
    assert shown == [heading for heading in ("case", "clips", *tables.SUMMARY_COLUMNS) if heading in shown]


@pytest.mark.slow
def test_every_command_of_the_published_guide_is_understood(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "bench" / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^\| [^|]+ \| `(pytest --benchmark-only [^`]*)` \|$", readme, re.M)
    assert len(commands) >= 16
    monkeypatch.syspath_prepend(ROOT)
    for command in commands:
        options = (
            command.replace("$DATA", "pocket").replace("bench/configs", str(ROOT / "bench" / "configs")).split()[2:]
        )
        assert run(pytester, *options, "--collect-only", "-q").ret == pytest.ExitCode.OK, command


@pytest.mark.slow
def test_no_file_of_a_run_names_a_folder_of_this_machine(
    pipeline: Pipeline, pytester: pytest.Pytester, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)
    (pytester.path / "my costs").mkdir()
    costs, weights = pytester.path / "my costs" / "own.yaml", pytester.path / "my models"
    own = replace(profile.load_profile("published"), source=f"measured in {pytester.path}/runs")
    profile.save_profile(own, costs)
    shutil.copytree(pairs.POCKET_WEIGHTS / "edge", weights / "small")
    (pytester.path / "task.txt").write_text("Describe the voice.", encoding="utf-8")
    result = run(
        pytester,
        *("--dataset_path", str(manifest), "--on-bad-clip", "skip", "--max-new-tokens", "8", "--mode", "speculative"),
        *("--clock", "virtual", "--profile", str(costs), "--edge-model", str(weights / "small")),
        *("--prompt-file", str(pytester.path / "task.txt"), "--results-dir", str(pytester.path / "out")),
        *("--benchmark-json", str(pytester.path / "saved.json")),
    )
    result.assert_outcomes(passed=1)
    write_report([str(pytester.path / "saved.json"), "--output", str(pytester.path / "report.html")])
    document = results.read_results(pytester.path / "out" / "captioning.json")
    assert document["skipped_clips"][0]["reason"].startswith("absent.wav: no such audio file there")
    assert document["experiment_config"]["edge_model"] == "small"
    assert document["experiment_config"]["profile_costs"]["source"] == "measured in runs"
    for name in ("out/captioning.json", "saved.json", "report.html", "report.md"):
        text = (pytester.path / name).read_text(encoding="utf-8")
        assert [folder for folder in (str(pytester.path), str(ROOT), str(Path.home())) if folder in text] == [], name


@pytest.mark.slow
def test_two_runs_on_the_virtual_clock_write_the_same_bytes(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    for folder in ("a", "b"):
        result = run(
            pytester,
            *("--clock", "virtual", "--profile", "published", "--mode", "speculative", "--link", "4g"),
            *("--max-samples", "2", "--max-new-tokens", "8", "--results-dir", folder, "--shadow", "no"),
        )
        result.assert_outcomes(passed=1)
    first, second = [(pytester.path / folder / "captioning.json").read_bytes() for folder in ("a", "b")]
    assert first == second
    document = json.loads(first)
    assert document["experiment_config"]["case"] == "speculative-pocket-H1.5-k3-rank20-4g-virtual-published-zh"
    assert document["metrics"]["figures"]["cpu_percent"] is None
    assert document["metrics"]["reasons"]["cpu_percent"] == "the clock was virtual"
    assert document["metrics"]["latency_breakdown"]["edge_prefill"] == 7.5
    assert document["metrics"]["figures"]["wire_up_per_token"] > 0
    assert document["metrics"]["breakdown_closure"]["median"] is None
    assert document["metrics"]["reasons"]["missed_corrections"] == (
        "shadow verification did not run: it needs mode speculative, --shadow yes, a rule other than synthetic, and a "
        "cloud that answers"
    )


@pytest.mark.slow
def test_a_run_with_a_measured_profile_can_be_resumed(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
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
def test_a_resumed_run_decodes_only_the_missing_clips(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    file = pytester.path / "results" / "captioning.json"
    options = ("--mode", "edge", "--max-samples", "2", "--max-new-tokens", "8")
    run(pytester, *options).assert_outcomes(passed=1)
    complete = results.read_results(file)
    run(pytester, *options, "--resume").assert_outcomes(passed=1)
    assert results.read_results(file) == complete  # on the real clock equal times prove that nothing was decoded again
    # a run that was stopped while it wrote its second clip leaves such a file
    header = {"experiment": complete["experiment_config"], "environment": complete["environment"]}
    stopped = SavedClips(file, header | {"in_force": comparable_limits(complete["in_force"])}, resume=False)
    for clip in complete["detailed_results"]:
        stopped.add(clip)
    stopped.path.write_bytes(stopped.path.read_bytes()[:-50])
    file.unlink()
    result = run(pytester, *options, "--resume")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*captioning.json.unfinished: lines that are damaged or of another run: 1. *"])
    first, second = results.read_results(file)["detailed_results"]
    assert first == complete["detailed_results"][0]
    assert second["trace"] != complete["detailed_results"][1]["trace"]
    assert {entry.name for entry in file.parent.iterdir()} == {file.name, "captioning.json.unfinished.old"}
    # a different experiment is refused
    before = file.read_bytes()
    result = run(pytester, *options[:-1], "3", "--resume")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*captioning.json: is of another experiment (max_new_tokens was 8 and is 3)*"])
    assert file.read_bytes() == before


@pytest.mark.slow
def test_a_saved_caption_that_is_not_the_clouds_own_fails_a_lossless_run(
    pipeline: Pipeline, pytester: pytest.Pytester
) -> None:
    file = pytester.path / "results" / "captioning.json"
    options = ("--mode", "lossless", "--max-samples", "2", "--max-new-tokens", "8")
    assert run(pytester, *options).ret == pytest.ExitCode.OK
    document = json.loads(file.read_text(encoding="utf-8"))
    event = next(event for event in document["detailed_results"][1]["trace"]["events"] if event[1] == "committed")
    assert run(pytester, *options, "--resume").ret == pytest.ExitCode.OK
    event[2][0] += 1
    file.write_text(json.dumps(document), encoding="utf-8")
    result = run(pytester, *options, "--resume")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*_0001: the saved caption is not the cloud's own, though *"])


def test_a_second_run_with_the_same_results_file_is_refused_with_the_holder(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    options = ("--mode", "edge", "--output-name", "a", "--results-dir", str(tmp_path))
    with hold_file(file):
        result = run(pytester, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: {file}: process {os.getpid()} on * is writing it: wait for it, or choose another --output-name"]
    )


@pytest.mark.slow
def test_captions_under_rule_synthetic_have_no_quality(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    options = ("--mode", "speculative", "--gate", "always", "--rule", "synthetic(0.5)", "--max-samples", "1")
    result = run(pytester, *options, "--max-new-tokens", "8", "--output-name", "a")
    result.assert_outcomes(passed=1)
    metrics = results.read_results(pytester.path / "results" / "a.json")["metrics"]
    assert metrics["figures"]["bleu4"] is None
    assert metrics["reasons"]["bleu4"] == "rule synthetic(0.5) accepts tokens by chance, so captions mean nothing"


class Deprecator:
    """A plugin that warns in each phase of a run, as a library that deprecates a name."""

    def pytest_load_initial_conftests(self) -> None:
        warnings.warn("loading is deprecated", DeprecationWarning, stacklevel=1)

    def pytest_collection(self) -> None:
        warnings.warn("collecting is deprecated", DeprecationWarning, stacklevel=1)

    def pytest_sessionfinish(self) -> None:
        warnings.warn("finishing is deprecated", FutureWarning, stacklevel=1)

    def pytest_terminal_summary(self) -> None:
        warnings.warn("summing up is deprecated", UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("folder", "options", "status"),
    [
        ("bench", ["--benchmark-only"], pytest.ExitCode.OK),
        ("tests", ["--ignore-glob=*/test_*"], pytest.ExitCode.INTERNAL_ERROR),
    ],
)
def test_a_warning_of_a_library_fails_the_tests_and_no_benchmark(
    pytester: pytest.Pytester, folder: str, options: list[str], status: pytest.ExitCode
) -> None:
    files = ["-c", str(ROOT / "pytest.ini"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", str(ROOT / folder)]
    result = pytester.runpytest_inprocess("--collect-only", "-q", *options, *files, plugins=[Deprecator()])
    assert result.ret == status


@pytest.mark.slow
def test_a_run_goes_on_from_the_same_contents_only_however_their_folders_are_spelt(
    pipeline: Pipeline, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    data, edge = tmp_path / "data", tmp_path / "edge"
    manifest = clips.evaluation_set(data) / clips.manifest_name("chinese")
    shutil.copytree(pipeline.pair.edge, edge)
    (tmp_path / "link").symlink_to(tmp_path)
    options = ("--mode", "edge", "--max-samples", "1", "--max-new-tokens", "8")

    def resume(folder: str) -> pytest.RunResult:
        paths = ("--dataset-path", f"{folder}/data/{manifest.name}", "--edge-model", f"{folder}/edge/")
        return run(pytester, *options, *paths, "--resume")

    resume(str(tmp_path)).assert_outcomes(passed=1)
    complete = (pytester.path / "results" / "captioning.json").read_bytes()
    assert str(tmp_path).encode() not in complete
    for folder in (f"{tmp_path}/link", os.path.relpath(tmp_path)):
        resume(folder).assert_outcomes(passed=1)
    for file, difference in {
        next(data.glob("wav/*_0000.wav")): "dataset_digest was",
        edge / "model.safetensors": "edge_weights was",
    }.items():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        result = resume(str(tmp_path))
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([f"*captioning.json: is of another experiment ({difference} *"])
        file.write_bytes(content)


@pytest.mark.slow
def test_a_stopped_run_saves_whole_cells_only_and_says_how_to_go_on(
    pipeline: Pipeline, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)
    trace = Pipeline.trace
    calls: list[str] = []

    def stop_in_the_second_cell(self: Pipeline, request: Any, strategy: Any, *args: Any, **options: Any) -> Any:
        calls.append(strategy.mode)
        if len(calls) == 7:  # an edge cell is done, then a warm-up, its check and one caption
            raise KeyboardInterrupt
        return trace(self, request, strategy, *args, **options)

    monkeypatch.setattr(Pipeline, "trace", stop_in_the_second_cell)
    options = ("--mode", "edge,cloud", "--max-samples", "2", "--max-new-tokens", "4", "--benchmark-json", "saved.json")
    result = pytester.runpytest_inprocess("-s", *arguments(*options), no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    file = "results/captioning-cloud-pocket-zh.json.unfinished"
    result.stdout.fnmatch_lines(
        [f"stopped: 1 finished captions are kept in {file}: the same command with --resume goes on"]
    )
    assert "test_captioning[cloud" not in result.stdout.str()
    saved = json.loads((pytester.path / "saved.json").read_text(encoding="utf-8"))["benchmarks"]
    assert {row["param"] for row in saved} == {"edge-pocket-zh"}
    run(pytester, *options, "--resume").assert_outcomes(passed=2)


@pytest.mark.slow
def test_profiles_need_one_more_call_which_is_no_caption(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    options = ("--mode", "speculative", "--max-samples", "1", "--max-new-tokens", "4", "--extra", "load,baselines")
    result = run(pytester, *options, "--benchmark-cprofile", "tottime", "--benchmark-json", "saved.json")
    result.assert_outcomes(passed=5)
    saved = json.loads((pytester.path / "saved.json").read_text(encoding="utf-8"))["benchmarks"]
    whole = [
        row for row in saved if row["extra_info"].get("results") or row["extra_info"].keys() & {"load", "baselines"}
    ]
    assert len(whole) == 5
    assert len(whole[1]["extra_info"]["results"]["detailed_results"]) == 1
    assert {type(value) for row in saved for value in row["params"].values()} <= {str, int, float, bool, type(None)}
    assert len({frozenset(row["params"]) for row in saved}) == 1
    assert [row["params"]["threshold"] for row in whole] == [None, 1.5, None, None, None]


@pytest.mark.slow
def test_a_run_that_is_worse_than_an_earlier_one_fails(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    clock = ("--clock", "virtual", "--profile", "published")
    options = ("--mode", "edge", "--max-samples", "2", "-k", "test_captioning", *clock)
    run(pytester, *options, "--benchmark-save", "good").assert_outcomes(passed=1)
    rules = ("--benchmark-compare", "0001", "--fail-if", "total:+10%", "--fail-if", "bleu1:-0.01")
    same = run(pytester, *options, *rules)
    assert same.ret == pytest.ExitCode.OK
    worse = run(pytester, *options, *rules, "--max-new-tokens", "3")
    assert worse.ret == pytest.ExitCode.TESTS_FAILED
    worse.stdout.fnmatch_lines(
        ["*--fail-if: worse than in the earlier run*", "edge-pocket-virtual-published-zh: bleu1 * breaks bleu1:-0.01*"]
    )
    alone = run(pytester, *options, "--fail-if", "total:+10%")
    alone.stderr.fnmatch_lines(["*--fail-if: needs an earlier run; name one with --benchmark-compare=NUMBER*"])


@pytest.mark.slow
def test_a_full_disk_for_the_saved_benchmark_is_one_line(pipeline: Pipeline, pytester: pytest.Pytester) -> None:
    result = run(pytester, "--mode", "edge", "--max-samples", "1", "--benchmark-json", "/dev/full")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stderr.fnmatch_lines(
        ["*the saved benchmark cannot be written (*No space left on device); the results files*"]
    )
    assert (pytester.path / "results" / "captioning.json").is_file()


@pytest.fixture
def cloud_url(pipeline: Pipeline) -> Iterator[str]:
    """Serve the pocket cloud."""
    with served(pipeline.cloud) as url:  # type: ignore[arg-type]
        yield url


def fail_after(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call of the cloud, but that for its identity, fail once so many prompts were opened."""
    call, opened = Transport.call, list[str]()

    def fail_later(self: Transport, method: str, path: str, *rest: Any, **options: Any) -> Answer:
        opened.extend([path] * path.startswith("/v1/sessions?"))
        if len(opened) > prompts and path != "/v1/model":
            raise AttemptFailed("no answer")
        return call(self, method, path, *rest, **options)

    monkeypatch.setattr(Transport, "call", fail_later)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["wait", "error"])
def test_a_cloud_that_fails_for_good_ends_the_run_which_then_goes_on(
    pytester: pytest.Pytester, cloud_url: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, policy, min(PATIENCE[policy], 1.0))
    options = (
        *("--mode", "lossless,cloud", "--max-samples", "2", "--max-new-tokens", "8"),
        *("--cloud-url", cloud_url, "--on-cloud-fault", policy),
    )
    with monkeypatch.context() as patched:
        fail_after(3, patched)  # the prompts of the warm-up, of its comparison and of the first clip
        result = run(pytester, *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)  # the second cell does not begin
    result.stdout.fnmatch_lines(["*_0001: the cloud failed*no answer*", "(1 finished captions are kept in *"])
    result.stdout.fnmatch_lines(["*the cloud failed, and no benchmark waits for it again: --resume goes on*"])
    (unfinished,) = pytester.path.glob("results/*always*.json.unfinished")
    first = json.loads(unfinished.read_text(encoding="utf-8").splitlines()[1])
    run(pytester, *options, "--resume").assert_outcomes(passed=2)
    document = results.read_results(unfinished.with_suffix(""))
    assert document["detailed_results"][0]["trace"] == first["trace"]


@pytest.mark.slow
def test_the_edge_captions_alone_if_the_cloud_is_away_and_asks_it_nothing_afterwards(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, "edge", 0.05)
    options = ("--mode", "edge,cloud,lossless,speculative", "--max-samples", "2", "--max-new-tokens", "8")
    result = run(pytester, *options, "--cloud-url", "http://127.0.0.1:1", "--on-cloud-fault", "edge")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(["test_captioning?cloud-pocket-served-zh?: did not run: mode cloud has no edge *"])
    for file in pytester.path.glob("results/*speculative*.json"):
        document = results.read_results(file)
        assert document["metrics"]["figures"]["degraded"] == 1
        assert document["metrics"]["figures"]["missed_corrections"] is None


@pytest.mark.slow
def test_a_degraded_caption_has_no_shadow_verification(
    pytester: pytest.Pytester, cloud_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("edgecloud_sd.measure.shadow.rejected_places", lambda *request: asked.append(request))
    monkeypatch.setitem(PATIENCE, "edge", 1.0)
    fail_after(2, monkeypatch)  # the prompts of the warm-up and of the first clip
    options = ("--mode", "speculative", "--gate", "always", "--max-samples", "2", "--max-new-tokens", "8")
    run(pytester, *options, "--cloud-url", cloud_url, "--on-cloud-fault", "edge").assert_outcomes(passed=1)
    document = results.read_results(pytester.path / "results" / "captioning.json")
    assert [clip["degraded"] is None for clip in document["detailed_results"]] == [True, False]
    assert not asked  # the second clip has local tokens


@pytest.mark.slow
def test_openings_of_the_breaker_by_shadow_verification_are_counted(
    pytester: pytest.Pytester, cloud_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATIENCE, "edge", 1.0)
    options = ("--mode", "speculative", "--gate", "never", "--max-samples", "3", "--max-new-tokens", "8")
    fail_after(0, monkeypatch)
    run(pytester, *options, "--cloud-url", cloud_url, "--on-cloud-fault", "edge").assert_outcomes(passed=1)
    document = results.read_results(pytester.path / "results" / "captioning.json")
    assert [clip["degraded"] for clip in document["detailed_results"]] == [None] * 3
    marks = [
        [span[0] for span in clip["trace"]["spans"] if "breaker" in span[0]] for clip in document["detailed_results"]
    ]
    assert marks == [[], ["breaker_opened"], []]
