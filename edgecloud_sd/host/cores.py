"""The CPU cores that this process may use: those of its affinity, as far as the quota of its cgroups lasts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

PROC_SELF = Path("/proc/self")


def usable_cores() -> int:
    """Return how many cores the calling thread may use: of its affinity, and of the quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


@cache  # every caption asks for the usable cores
def read_cpu_quota(proc: Path = PROC_SELF) -> float | None:
    """Return the smallest CPU quota of this process's cgroups (version 1 or 2) in cores, or None without one.

    A quota of 1.5 lets the process use 1.5 s of CPU time per second, on however many cores. It is read once.
    """
    quotas = [quota for folder in _cgroup_folders(proc) if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(proc: Path) -> Iterator[Path]:
    """Yield the folder of each cgroup that may have a CPU quota, and those above it up to the mount point."""
    try:
        groups = (proc / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return
    paths = dict.fromkeys(("cgroup", "cgroup2"), "")
    for group in groups:
        _, controllers, path = [*group.split(":", 2), "", ""][:3]
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, (kind, _, options) = before.split(), [*after.split(), "", "", ""][:3]
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            root, mount_point = fields[3], Path(fields[4])
            # a container sees its own cgroup at the mount point, whatever the path of the host is
            inside = os.path.relpath(paths[kind] or "/", root)
            folder = mount_point if inside.startswith("..") else mount_point / inside
            yield folder
            yield from (parent for parent in folder.parents if parent.is_relative_to(mount_point))


def _read_quota(folder: Path) -> float | None:
    """Return the quota of one cgroup in cores: `cpu.max` of version 2, or `cpu.cfs_quota_us` of version 1."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="ascii").strip() for name in names)
        cores = int(quota) / int(period)  # "max" is no number, and -1 is no quota
        return cores if cores > 0 else None
    return None
