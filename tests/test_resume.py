"""The file of a stopped run, from which a later run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.resume import ResumeError, SavedClips
from edgecloud_sd.events import Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure import results

HEADER = {"experiment": {"k": 3}, "environment": {"python": "3.11"}}


def make_record(name: str) -> dict[str, Any]:
    return results.measurement_to_json(name, Trace(((0.1, Prepared(3)),)), unmeasured(0.2, "测试"), None)


def save_clips(folder: Path, *names: str, header: dict[str, Any] = HEADER, resume: bool = False) -> SavedClips:
    saved = SavedClips(folder / "a.json", header, resume)
    for name in names:
        saved.add(make_record(name))
    return saved


def test_a_resumed_run_reads_the_saved_clips(tmp_path: Path) -> None:
    save_clips(tmp_path, "one", "two")
    assert save_clips(tmp_path, resume=True).records == {name: make_record(name) for name in ("one", "two")}


def test_a_resumed_run_adds_to_the_saved_clips(tmp_path: Path) -> None:
    save_clips(tmp_path, "one")
    save_clips(tmp_path, "two", resume=True)
    assert list(save_clips(tmp_path, resume=True).records) == ["one", "two"]


def test_a_new_run_ignores_the_clips_of_a_stopped_one_and_renames_its_file(tmp_path: Path) -> None:
    stopped = save_clips(tmp_path, "one", "two").path.read_bytes()
    (tmp_path / "a.json").write_text("the results of an older run", encoding="utf-8")
    new_run = save_clips(tmp_path)
    new_run.start()
    assert save_clips(tmp_path, resume=True).records == {}
    assert (tmp_path / "a.json.unfinished.old").read_bytes() == stopped
    new_run.add(make_record("three"))
    assert list(save_clips(tmp_path, resume=True).records) == ["three"]


def test_starting_twice_keeps_the_file_of_the_stopped_run(tmp_path: Path) -> None:
    stopped = save_clips(tmp_path, "one").path.read_bytes()
    for _ in range(2):
        save_clips(tmp_path).start()
    assert (tmp_path / "a.json.unfinished.old").read_bytes() == stopped


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    file = save_clips(tmp_path, "one", "two").path
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(save_clips(tmp_path, "three", resume=True).records) == ["one", "three"]
    assert list(save_clips(tmp_path, resume=True).records) == ["one", "three"]


def test_finishing_removes_the_file(tmp_path: Path) -> None:
    save_clips(tmp_path, "one").finish()
    assert list(tmp_path.iterdir()) == []
    save_clips(tmp_path).finish()


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ({"experiment": {"k": 4}, "environment": {"python": "3.11"}}, "k was 3 and is 4"),
        ({"experiment": {"k": 3}, "environment": {"python": "3.12"}}, "python was '3.11' and is '3.12'"),
        ({"experiment": {"k": 3, "link": "4g"}, "environment": {"python": "3.11"}}, "link was None and is '4g'"),
    ],
)
def test_the_file_of_another_experiment_is_refused_and_stays(
    tmp_path: Path, header: dict[str, Any], difference: str
) -> None:
    before = save_clips(tmp_path, "one").path.read_bytes()
    with pytest.raises(ResumeError, match=rf"a\.json\.unfinished: is of another experiment \({difference}\)"):
        save_clips(tmp_path, header=header, resume=True)
    assert (tmp_path / "a.json.unfinished").read_bytes() == before


HEAD = '{"experiment": {"k": 3}, "environment": {"python": "3.11"}}\n'


@pytest.mark.parametrize("text", ["", "\n", "no json\n", "[]\n", '{"experiment": {}}\n', HEAD + '{"file_id": "one"}\n'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json.unfinished").write_text(text, encoding="utf-8")
    with pytest.raises(ResumeError, match="is damaged"):
        save_clips(tmp_path, resume=True)


def test_a_results_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(ResumeError, match=r"a\.json: is no results file of this version"):
        save_clips(tmp_path, resume=True)
