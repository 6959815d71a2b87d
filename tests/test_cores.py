"""The cores that a process may use, by its affinity and by the quotas of its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgecloud_sd.host import cores, limits
from edgecloud_sd.host.limits import LimitError, Limits
from edgecloud_sd.measure.results import environment
from edgecloud_sd.models import devices


def fake_proc(folder: Path, groups: str, mounts: dict[str, tuple[str, str]], files: dict[str, str]) -> Path:
    """Write a /proc/self whose `mounts` map a mount point to (root, type and options), and the cgroups' files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    lines = [f"31 23 0:28 {root} {folder / point} rw - {kind}" for point, (root, kind) in mounts.items()]
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text("\n".join(["1 0 8:1 / / rw - ext4 /dev/sda rw", *lines]) + "\n")
    return folder


V1, V2 = "cgroup cgroup rw,cpu,cpuacct", "cgroup2 cgroup2 rw"
PERIOD = {"cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        ("0::/\n", {"unified": ("/", V2)}, {"unified/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"unified": ("/", V2)}, {"unified/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"u": ("/", V2)}, {"u/a/cpu.max": "200000 100000", "u/a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"u": ("/", V2)}, {"u/a/cpu.max": "400000 100000", "u/a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/../other\n", {"u": ("/", V2)}, {"u/cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/\n", {"cpu": ("/", V1)}, {"cpu/cpu.cfs_quota_us": "-1\n", **PERIOD}, None),
        ("4:cpu,cpuacct:/\n", {"cpu": ("/", V1)}, {"cpu/cpu.cfs_quota_us": "250000\n", **PERIOD}, 2.5),
        ("4:cpu:/docker/1\n", {"cpu": ("/docker/1", V1)}, {"cpu/cpu.cfs_quota_us": "100000", **PERIOD}, 1.0),
        ("4:cpu:/docker/1\n", {"cpu": ("/", V1)}, {"cpu/cpu.cfs_quota_us": "100000", **PERIOD}, 1.0),
        ("9:cpuset:/\n", {"set": ("/", "cgroup cgroup rw,cpuset")}, {"set/cpu.max": "100000 100000"}, None),
        ("0::/\n", {"u": ("/", V2)}, {"u/cpu.max": "garbage"}, None),
        ("0::/\n", {"u": ("/", V2)}, {"u/cpu.max": "100000 0"}, None),
        ("", {}, {}, None),
    ],
)
def test_the_smallest_quota_of_the_cgroups_counts(
    groups: str, mounts: dict[str, tuple[str, str]], files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cores.read_cpu_quota(fake_proc(tmp_path, groups, mounts, files)) == quota


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cores.read_cpu_quota(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (0.2, 1), (1.5, 2), (2.0, 2), (64.0, 8)])
def test_every_count_of_cores_knows_affinity_and_quota(
    quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(8)))
    for module in (cores, limits):
        monkeypatch.setattr(module, "read_cpu_quota", lambda: quota)
    monkeypatch.setattr(devices, "_torch_threads", lambda: 64)
    assert cores.usable_cores() == usable
    assert devices.choose_threads(None, [10**9]) == usable
    assert environment()["cores"] == usable
    assert limits.read_limits().cpu_quota == quota
    if quota is not None and usable < 8:
        with (
            pytest.raises(LimitError, match=f"--max-cpu-cores: 3 is more than the quota of this container, {quota:g}"),
            limits.apply_limits(Limits(cpu_cores=3)),
        ):
            pass
