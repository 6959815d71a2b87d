"""The commands `python -m edgecloud_sd caption` and `python -m edgecloud_sd.pocket`: their arguments and output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from edgecloud_sd.__main__ import COLOURS, main, print_caption, summary_line
from edgecloud_sd.config import resolve
from edgecloud_sd.data.dataset import load_audio
from edgecloud_sd.events import Committed, Degraded, Event, Finished, Trace
from edgecloud_sd.forecast.calibration import save_calibration
from edgecloud_sd.gate import risk_gate
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import __main__ as pocket
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from tests.support.calibrations import CALIBRATION

# One process for all limits, because its libraries take seconds to import. Each limit has a process forked from it.
SWEEP = """
import json, os, sys
from edgecloud_sd.__main__ import main
from edgecloud_sd.host.limits import memory_in_use
from edgecloud_sd.models.load import import_libraries

import_libraries()
for extra in range(1_000_000, 90_000_000, 5_900_000):
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(write_end, "w")
        try:
            main([*sys.argv[1:], "--max-memory-gb", str((memory_in_use() + extra) / 1e9)])
        except SystemExit as error:
            print(error.code, file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        sys.stderr.flush()
        os._exit(0)
    os.close(write_end)
    with open(read_end) as lines:
        printed = lines.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed]))
"""


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    file = tmp_path / "clip.wav"
    soundfile.write(file, clips.make_clip("evaluation", 2).samples, 16_000)
    return file


def test_the_caption_is_printed_and_its_counts_follow(
    wav: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["caption", str(wav), "--gate", "always", "--rule", "greedy", "--k", "4"])
    printed = capsys.readouterr()
    trace = stamp(pipeline.events(Request(load_audio(wav)), Strategy("speculative", k=4)))
    assert printed.out == pipeline.text(trace.tokens) + "\n"
    costs = r"cloud: \d+ tokens? written, \d+ positions computed, \d+ tokens covered"
    line = rf"^\d+ tokens \(\d+ accepted, .*\), \d+ cloud calls in \d+ rounds, {costs}, [\d.]+ s$"
    assert re.search(line, printed.err, re.M)


def test_a_transcription_that_is_not_utf_8_is_refused_in_one_line(wav: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: transcription: has U\+DCFF, half of a character, at 1; "):
        main(["caption", str(wav), "--mode", "edge", "--transcription", "a\udcff"])


def test_a_doubt_about_the_audio_is_shown_once(wav: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(wav, [[0.5, -0.5], [-0.5, 0.5]] * 4000, 16_000)
    main(["caption", str(wav), "--mode", "edge", "--max-new-tokens", "1"])
    assert capsys.readouterr().err.count(f"warning: {wav}: has channels that cancel each other") == 1


@pytest.mark.slow
def test_the_example_in_the_readme_runs(
    wav: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(wav.parent)
    wav.rename("speech.wav")
    exec(example, {})
    assert capsys.readouterr().out.startswith("The speaker sounds ")


def test_each_token_has_the_colour_of_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [Committed((1, 2), "local"), Committed((3,), "correction"), Finished("eos")]
    # token 2 is the first half of a character, and token 3 the second
    text = {(1,): "a", (1, 2): "a\ufffd", (1, 2, 3): "a。"}
    print_caption(iter(events), lambda ids: text[tuple(ids)], is_coloured=True)
    printed = capsys.readouterr()
    assert printed.out == f"\x1b[{COLOURS['local']}ma\x1b[0m\x1b[{COLOURS['correction']}m。\x1b[0m\n"
    assert "local" in printed.err
    assert "bonus" not in printed.err


def test_an_incomplete_character_is_printed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_caption(iter([Committed((1,), "cloud"), Finished("length")]), lambda ids: "a\ufffd", is_coloured=False)
    assert capsys.readouterr().out == "a\ufffd\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.wav"], "absent.wav: no such audio file"),
        (["clip.wav", "--k", "none"], "--k: 'none' is not auto or a whole number of at least 1"),
        (["clip.wav", "--mode", "hybrid"], "--mode: 'hybrid' is not one of edge, cloud, speculative, lossless"),
        (["clip.wav", "--mode", "edge,cloud"], "--mode: give one value for a caption, not 2"),
        (["clip.wav", "--mode", "revise", "--cloud-calls", "1"], "--calibration: a budget for one caption needs it"),
        (["clip.wav", "--k", "2,4"], "--k: give one value for a caption, not 2"),
        (["clip.wav", "--edge-device", "abacus"], "device 'abacus' cannot be used here"),
        (["clip.wav", "--edge-model", "absent-folder"], "no checkpoint 'absent-folder': give a folder"),
        (["clip.wav", "--edge-model", "nobody/nothing"], "checkpoint 'nobody/nothing' cannot be loaded"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    wav: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(wav.parent)
    with pytest.raises(SystemExit, match=re.escape(message)) as stopped:
        main(["caption", *options])
    assert str(stopped.value).startswith("error: ")


@pytest.mark.slow
def test_a_level_by_a_calibration_for_another_prompt_is_refused(
    wav: Path, tmp_path: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zh.yaml"
    strategy = Strategy(gate=risk_gate(), revise="context")
    own = pipeline.conditions(resolve({}), strategy, "chinese")
    options = ["caption", str(wav), "--mode", "revise", "--own", "0.8", "--calibration", str(file)]
    save_calibration(replace(CALIBRATION, conditions=own), file)
    main(options)
    assert "local" in capsys.readouterr().err
    for more in (["--transcription", "你好"], ["--prompt-type", "concise"]):
        with pytest.raises(SystemExit, match=r"^error: --calibration: zh\.yaml, prompt: is"):
            main([*options, *more])


@pytest.mark.slow
def test_the_clips_command_prints_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pocket.main(["clips", "--folder", str(tmp_path / "set")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    assert (tmp_path / "set" / "manifest_english.json").is_file()


def test_evaluating_too_few_clips_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pocket.main(["evaluate", "--clips", "1"])
    assert "--clips must be at least 4, not 1" in capsys.readouterr().err


@pytest.mark.slow
def test_captioning_imports_no_library_of_the_server() -> None:
    server = ("fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic")
    code = f"import sys; sys.modules.update(dict.fromkeys({server})); import edgecloud_sd.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_summary_names_the_fault_after_which_the_edge_finished_alone() -> None:
    trace = Trace(((0.1, Degraded("the cloud failed once")), (0.2, Committed((1,), "local")), (0.2, Finished("eos"))))
    assert summary_line(trace) == "1 token (1 local), 0.200 s, degraded, the edge finished alone: the cloud failed once"


def test_the_summary_counts_corrections_in_the_plural() -> None:
    trace = Trace(((0.1, Committed((1,), "correction")), (0.2, Committed((2,), "correction")), (0.3, Finished("eos"))))
    assert summary_line(trace) == "2 tokens (2 corrections), 0.300 s"


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this limit")
def test_a_monitored_limit_is_a_line_on_stderr_without_a_place_in_the_code(
    wav: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["caption", str(wav), "--mode", "edge", "--max-memory-gb", "0.001", "--memory-limit", "monitor"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "--max-memory-gb" in line]
    assert [line.split(": ")[0] for line in lines] == ["warning", "warning"]
    assert "loads all the same" in lines[0]
    assert " more than the 0.001 that are monitored" in lines[1]


@pytest.mark.slow
def test_every_memory_limit_is_enough_or_is_named_in_one_line(wav: Path) -> None:
    samples, rate = soundfile.read(wav)
    soundfile.write(wav, list(samples[: 3 * rate]) * 20, rate)
    command = [sys.executable, "-c", SWEEP, "caption", str(wav), "--mode", "edge", "--max-new-tokens", "2"]
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}  # torch starts a second thread also on one core
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=threads)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    places = {"enough": 0, "before a caption": 0, "in a caption": 0}
    for status, printed in outcomes:
        assert printed.count("\n") == 1, printed
        assert status == 0 or (status == 1 and re.match("error: .*--max-memory-gb", printed)), (status, printed)
        is_used_up = bool(re.match(r"error: --max-memory-gb: \S+ is used up \((?!checkpoint)", printed))
        places["in a caption" if is_used_up else "before a caption" if status else "enough"] += 1
    assert all(places.values()), places
