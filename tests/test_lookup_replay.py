"""Recorded captions replayed as drafts of earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import lookup_replay
from edgecloud_sd.data.published import read_recorded_runs


def recorded_file(path: Path, captions: list[str], mode: str = "cloud") -> Path:
    lines = [
        {"mode": mode, "file_id": str(n), "reference": "一", "caption": caption} for n, caption in enumerate(captions)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("captions", "units", "calls", "accepted"),
    [
        (["悲伤。", "悲伤。"], 4, 1, (1, 1, 1, 0)),  # the end of the caption is the cloud's own
        (["悲伤。", "高兴。"], 4, 4, (0, 0, 0, 0)),
        (["高兴。", "悲伤。", "悲 伤。", "悲伤！"], 8, 3, (2, 2, 1, 0)),  # white space is no character
        (["a voice, calm", "a voice, calm"], 5, 1, (1, 1, 1, 1)),
        (["a voice, calm", "A voice, calm"], 5, 3, (1, 1, 0, 0)),
    ],
)
def test_a_replay_counts_what_each_call_would_accept(
    tmp_path: Path, captions: list[str], units: int, calls: int, accepted: tuple[int, ...]
) -> None:
    run = read_recorded_runs(recorded_file(tmp_path / "runs.jsonl", captions))[0]
    result = lookup_replay.replay(run, 4)
    assert (result.units, result.calls, result.accepted) == (units, calls, accepted)
    assert result.units == sum(result.accepted) + result.calls


def test_the_command_says_where_lookup_pays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded_file(tmp_path / "runs.jsonl", ["悲伤，声音低沉。"] * 4)
    assert lookup_replay.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "drafting by the edge never pays" in printed
    assert (
        "cloud: lookup pays against the cloud alone on round trips below 310 ms" in printed
    )  # 8 characters at 38.7 ms
    assert lookup_replay.main([str(path), "--profile", "published-as-run"]) == 0
    assert "cloud: lookup pays against the cloud alone on round trips below 6 ms" in capsys.readouterr().out
    assert lookup_replay.main([str(recorded_file(path, ["悲伤。"] * 2, "edge"))]) == 0
    assert "edge: 95 ms a unit if it checks guesses, 380 ms if it does not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("captions", "arguments", "expected"),
    [
        (["悲伤。"], [], "runs-cloud: has one caption"),
        (["悲伤。"] * 2, ["--length", "0"], "--length: 0 is not a whole number of at least 1"),
        (["悲伤。"] * 2, ["--profile", "none"], "no profile 'none'"),
        (["悲伤。"] * 2, ["--mode", "edge"], "leave out --mode edge"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: list[str], arguments: list[str], expected: str
) -> None:
    path = recorded_file(tmp_path / "runs.jsonl", captions)
    with pytest.raises(SystemExit) as failure:
        lookup_replay.main([str(path), *arguments])
    assert expected in f"{failure.value.code} {capsys.readouterr().err}"
