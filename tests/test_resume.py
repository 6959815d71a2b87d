"""The file of a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.resume import ResumeError, SavedClips
from edgecloud_sd.events import Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure import results

HEADER = {"experiment": {"k": 3}, "environment": {"python": "3.11"}}


def record(name: str) -> dict[str, Any]:
    return results.measurement_to_json(name, Trace(((0.1, Prepared(3)),)), unmeasured(0.2, "测试"), None)


def started(folder: Path, *names: str, header: dict[str, Any] = HEADER, resume: bool = False) -> SavedClips:
    made = SavedClips(folder / "a.json", header, resume)
    for name in names:
        made.add(record(name))
    return made


def test_added_clips_are_there_after_a_stop(tmp_path: Path) -> None:
    started(tmp_path, "one", "two")
    assert started(tmp_path, resume=True).records == {name: record(name) for name in ("one", "two")}


def test_a_resumed_run_adds_to_the_saved_clips(tmp_path: Path) -> None:
    started(tmp_path, "one")
    started(tmp_path, "two", resume=True)
    assert list(started(tmp_path, resume=True).records) == ["one", "two"]


def test_a_new_run_takes_nothing_from_an_older_one_and_keeps_its_file(tmp_path: Path) -> None:
    left = started(tmp_path, "one", "two").path.read_bytes()
    (tmp_path / "a.json").write_text("the results of an older run", encoding="utf-8")
    again = started(tmp_path)
    again.start()
    assert started(tmp_path, resume=True).records == {}
    assert (tmp_path / "a.json.unfinished.old").read_bytes() == left
    again.add(record("three"))
    assert list(started(tmp_path, resume=True).records) == ["three"]


def test_starting_twice_keeps_the_older_file(tmp_path: Path) -> None:
    left = started(tmp_path, "one").path.read_bytes()
    for _ in range(2):
        started(tmp_path).start()
    assert (tmp_path / "a.json.unfinished.old").read_bytes() == left


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    file = started(tmp_path, "one", "two").path
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(started(tmp_path, "three", resume=True).records) == ["one", "three"]
    assert list(started(tmp_path, resume=True).records) == ["one", "three"]


def test_finishing_removes_the_file(tmp_path: Path) -> None:
    started(tmp_path, "one").finish()
    assert list(tmp_path.iterdir()) == []
    started(tmp_path).finish()


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ({"experiment": {"k": 4}, "environment": {"python": "3.11"}}, "k was 3 and is 4"),
        ({"experiment": {"k": 3}, "environment": {"python": "3.12"}}, "python was '3.11' and is '3.12'"),
        ({"experiment": {"k": 3, "link": "4g"}, "environment": {"python": "3.11"}}, "link was None and is '4g'"),
    ],
)
def test_another_experiment_is_refused_and_kept(tmp_path: Path, header: dict[str, Any], difference: str) -> None:
    before = started(tmp_path, "one").path.read_bytes()
    with pytest.raises(ResumeError, match=rf"a\.json\.unfinished: is of another experiment \({difference}\)"):
        started(tmp_path, header=header, resume=True)
    assert (tmp_path / "a.json.unfinished").read_bytes() == before


HEAD = '{"experiment": {"k": 3}, "environment": {"python": "3.11"}}\n'


@pytest.mark.parametrize("text", ["", "\n", "no json\n", "[]\n", '{"experiment": {}}\n', HEAD + '{"file_id": "one"}\n'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json.unfinished").write_text(text, encoding="utf-8")
    with pytest.raises(ResumeError, match="is damaged"):
        started(tmp_path, resume=True)


def test_a_results_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(ResumeError, match=r"a\.json: is no results file of this version"):
        started(tmp_path, resume=True)
