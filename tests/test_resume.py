"""The file of a stopped run, from which a later run goes on."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.resume import ResumeError, SavedClips, SaveError, comparable_limits, keep_other_results
from edgecloud_sd.events import Prepared, Trace
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure import results

HEADER = {"experiment": {"k": 3}, "environment": {"python": "3.11"}, "in_force": {"cores": 2}}


@pytest.fixture(autouse=True, scope="module")
def no_disk() -> Iterator[None]:
    """Do not wait for the disk, which makes thousands of writes slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def make_record(name: str, seconds: float = 0.2) -> dict[str, Any]:
    return results.measurement_to_json(name, Trace(((0.1, Prepared(3)),)), unmeasured(seconds, "测试"), None)


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


def test_a_run_killed_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    file = save_clips(tmp_path, "one", "two").path
    whole = file.read_bytes()
    header, one, _ = whole.splitlines(keepends=True)
    ends = [len(header), len(header + one), len(whole)]
    for cut in {*range(0, len(whole), 23), *(end - before for end in ends for before in (0, 1, 2))}:
        file.write_bytes(whole[:cut])
        expected = ["one"] * (cut >= len(header + one) - 1) + ["two"] * (cut >= len(whole) - 1)
        assert list(save_clips(tmp_path, "three", resume=True).records) == [*expected, "three"]
        assert list(save_clips(tmp_path, resume=True).records) == [*expected, "three"]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "line",
    [b"", b"no json", b"[]", b"null", b'{"file_id": "one"}', b"\xff\xfe", b'{"experiment": {"k": 3}}'],
)
def test_a_bad_line_costs_that_line(tmp_path: Path, line: bytes, place: int) -> None:
    file = save_clips(tmp_path, "one", "two").path
    lines = file.read_bytes().splitlines()
    lines.insert(place, line)
    file.write_bytes(damaged := b"\n".join(lines) + b"\n")
    saved = save_clips(tmp_path, resume=True)
    assert list(saved.records) == ["one", "two"]
    assert saved.notes[0].startswith(f"{file}: ")
    assert (tmp_path / "a.json.unfinished.old").read_bytes() == damaged
    assert save_clips(tmp_path, resume=True).notes == []


@pytest.mark.parametrize("line", range(3))
def test_a_changed_byte_costs_its_line(tmp_path: Path, line: int) -> None:
    file = save_clips(tmp_path, "one", "two").path
    lines = file.read_bytes().splitlines()
    for place in range(0, len(lines[line]), 7):
        changed = bytes([lines[line][place] ^ 1])
        file.write_bytes(
            b"\n".join([*lines[:line], lines[line][:place] + changed + lines[line][place + 1 :], *lines[line + 1 :]])
        )
        kept = save_clips(tmp_path, resume=True).records
        assert kept == {name: make_record(name) for name in ("one", "two") if name != ("", "one", "two")[line]}


OTHER = {"experiment": {"k": 4}, "environment": {"python": "3.11"}}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.booleans()), max_size=12), st.integers(0, 99))
def test_writers_without_a_lock_never_take_each_others_clips(steps: list[tuple[bool, int, bool]], cut: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        writers = [SavedClips(folder / "a.json", header, False) for header in (HEADER, OTHER)]
        for writer in writers:
            writer.start()
        for is_other, clip, is_new in steps:
            if is_new:
                writers[is_other].start()
            writers[is_other].add(make_record(str(clip), 0.2 + is_other))
        file = folder / "a.json.unfinished"
        file.write_bytes(file.read_bytes()[: -cut or None])
        for number, header in enumerate((HEADER, OTHER)):
            with suppress(ResumeError):
                saved = SavedClips(folder / "a.json", header, True)
                assert saved.records == {clip: make_record(clip, 0.2 + number) for clip in saved.records}


def test_two_runs_of_one_experiment_do_not_share_clips(tmp_path: Path) -> None:
    first = save_clips(tmp_path, "one")
    second = save_clips(tmp_path)
    second.start()
    second.add(make_record("two"))
    first.add(make_record("three"))
    assert len(second.path.read_bytes().splitlines()) == 3
    assert list(save_clips(tmp_path, resume=True).records) == ["two"]


def test_a_full_disk_is_one_line_that_names_the_clips_that_are_kept(tmp_path: Path) -> None:
    saved = save_clips(tmp_path, "one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (saved.path.stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(SaveError) as error:
            saved.add(make_record("two"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{saved.path}: cannot be written (File too large); 1 finished captions are kept in {saved.path}: the same "
        "command with --resume goes on"
    )
    assert list(save_clips(tmp_path, resume=True).records) == ["one"]


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
        (HEADER | {"in_force": {"cores": 1}}, "cores was 2 and is 1"),
    ],
)
def test_the_file_of_another_experiment_is_refused_and_stays(
    tmp_path: Path, header: dict[str, Any], difference: str
) -> None:
    before = save_clips(tmp_path, "one").path.read_bytes()
    with pytest.raises(ResumeError, match=rf"a\.json\.unfinished: is of another experiment \({difference}\)"):
        save_clips(tmp_path, header=header, resume=True)
    assert (tmp_path / "a.json.unfinished").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "owner"),
    [
        ('{"experiment_config": {"case": "a", "dataset_digest": "1"}}', None),
        ('{"experiment_config": {"case": "b", "dataset_digest": "1"}}', "b"),
        ('{"experiment_config": {"case": "a", "dataset_digest": "2"}}', "a"),
        ('{"experiment_config": {"case": "a"}}', "a"),
        ("[]", "another program"),
        ("no json", "another program"),
        (None, None),
    ],
)
def test_results_of_another_case_or_data_set_are_kept(tmp_path: Path, content: str | None, owner: str | None) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    (tmp_path / "a.json.old").touch()
    notes = keep_other_results(file, {"case": "a", "dataset_digest": "1"})
    assert notes == ([f"{file}: was of {owner}, and is kept as a.json.old1"] if owner else [])
    assert (tmp_path / "a.json.old1").exists() == (owner is not None)


def test_limits_are_compared_without_measurements_and_ids_of_cores() -> None:
    limits = LimitsInForce(cores=(2, 3), torch_threads=1, memory_bytes=None, monitored_bytes=100, peak_bytes=7)
    later = replace(limits, cores=(0, 1), peak_bytes=9)
    assert comparable_limits(asdict(limits)) == comparable_limits(asdict(later) | {"excess_gb": 0.0})
    assert comparable_limits(asdict(limits)) != comparable_limits(asdict(replace(limits, monitored_bytes=101)))


def test_a_results_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(ResumeError, match=r"a\.json: is no results file of this version"):
        save_clips(tmp_path, resume=True)
