"""CPU and memory limits of this process: applied, read back from the system, and put back. Linux only.

Memory is held by RLIMIT_DATA, which since Linux 4.7 counts private writable memory, used or not: what torch, numpy and
Python allocate, and the maps through which safetensors reads weights. RLIMIT_AS would also count address space that is
only reserved, tens of GB with CUDA, and a cgroup needs privileges. Memory of a GPU is not limited.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROC_SELF = Path("/proc/self")
CORES, MEMORY = "--max-cpu-cores", "--max-memory-gb"
NOT_HERE = "only Linux can hold a process to it: leave it out here"


class LimitError(ValueError):
    """A limit that makes no sense, or cannot be held to here. The message starts with its option."""


@dataclass(frozen=True)
class Limits:
    """What is asked for; None asks for no limit. LimitError for fewer than one core, or no memory."""

    cpu_cores: int | None = None
    memory_gb: float | None = None  # 10^9 bytes

    def __post_init__(self) -> None:
        if self.cpu_cores is not None and self.cpu_cores < 1:
            raise LimitError(f"{CORES}: {self.cpu_cores} asked: give 1 or more")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise LimitError(f"{MEMORY}: {self.memory_gb:g} asked: give a number above 0")


@dataclass(frozen=True)
class InForce:
    """What the system says that this process is held to, asked for or not."""

    cores: tuple[int, ...] | None  # ids of those that its threads may run on; None where the system does not say
    torch_threads: int | None  # intra-op, of the calling thread; None if torch is not imported
    memory_bytes: int | None  # most private writable memory; None if there is no limit


@contextmanager
def hold(limits: Limits) -> Iterator[InForce]:
    """Hold this process to `limits` in the block, and give what is in force. The end of the block puts all back.

    Every thread is pinned to the first `cpu_cores` of the cores that the process may use, and torch gets at most as
    many intra-op threads; threads and processes that start in the block inherit the cores. The memory limit is a soft
    one. Beyond it allocations fail, torch's with RuntimeError and Python's with MemoryError. Processes that start in
    the block inherit it too, each for itself: it is no limit on their sum.

    LimitError where a limit cannot be held to: more cores than there are, a process that uses more memory already, a
    system that has no such limit, refuses it, or does not keep it.
    """
    with ExitStack() as stack:
        if limits.cpu_cores is not None:
            stack.enter_context(_on_cores(limits.cpu_cores))
        if limits.memory_gb is not None:
            stack.enter_context(_in_memory(limits.memory_gb))
        yield in_force()


def in_force() -> InForce:
    """What this process is held to now. Nothing is changed or imported."""
    torch = sys.modules.get("torch")
    return InForce(
        cores=tuple(sorted(set().union(*affinities().values()))) or None,
        torch_threads=torch.get_num_threads() if torch else None,
        memory_bytes=_memory_limit(),
    )


def usable_cores() -> int:
    """How many cores the calling thread may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def affinities() -> dict[int, set[int]]:
    """Ids of the cores that each thread of this process may run on, by the thread's id. Empty where unknown."""
    found: dict[int, set[int]] = {}
    if sys.platform != "linux":
        return found
    for thread in [int(each.name) for each in (PROC_SELF / "task").iterdir()]:
        with suppress(ProcessLookupError):  # it ended meanwhile
            found[thread] = os.sched_getaffinity(thread)
    return found


def memory_in_use() -> int:
    """Bytes of private writable memory of this process, as the memory limit counts them. LimitError if unknown."""
    found = re.search(rb"^VmData:\s*(\d+) kB$", (PROC_SELF / "status").read_bytes(), re.MULTILINE)
    if not found:
        raise LimitError(f"{MEMORY}: the system does not say how much memory this process uses: leave it out here")
    return int(found[1]) * 1024


def gb(size: float) -> str:
    """Bytes in GB of 10^9, to be read."""
    return f"{size / 1e9:.1f}" if size >= 1e10 else f"{size / 1e9:.3f}"


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    if sys.platform != "linux":
        raise LimitError(f"{CORES}: {count} asked, and {NOT_HERE}")
    before = affinities()
    usable = set().union(*before.values())
    if count > len(usable):
        listed = ", ".join(map(str, sorted(usable)))
        raise LimitError(f"{CORES}: {count} asked, and this process may use {len(usable)} ({listed}): ask for fewer")
    chosen = set(sorted(usable)[:count])
    import torch

    threads = torch.get_num_threads()
    try:
        try:
            _pin({}, chosen)
        except OSError as error:
            raise LimitError(f"{CORES}: {count} asked, and the system refused ({error}): leave it out here") from error
        if threads > count:
            torch.set_num_threads(count)
        kept = affinities()
        if any(cores != chosen for cores in kept.values()) or torch.get_num_threads() > count:
            found = sorted(set().union(*kept.values()))
            raise LimitError(
                f"{CORES}: {count} asked, and the system reads back {len(found)} ({', '.join(map(str, found))}) with "
                f"{torch.get_num_threads()} threads of torch: leave it out here"
            )
        yield
    finally:
        torch.set_num_threads(threads)
        _pin(before, usable)


def _pin(wanted: Mapping[int, set[int]], default: set[int]) -> None:
    """Set the cores of every thread: its own in `wanted`, or else `default`."""
    seen: set[int] = set()
    # a thread that is born meanwhile has the cores of its parent, which may be the old ones: look again
    while left := [
        thread for thread, cores in affinities().items() if thread not in seen and cores != wanted.get(thread, default)
    ]:
        for thread in left:
            seen.add(thread)
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, wanted.get(thread, default))


@contextmanager
def _in_memory(gigabytes: float) -> Iterator[None]:
    if sys.platform != "linux":  # macOS has this limit too, and does not count maps by it
        raise LimitError(f"{MEMORY}: {gigabytes:g} asked, and {NOT_HERE}")
    import resource

    asked, used = round(gigabytes * 1e9), memory_in_use()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used > asked:
        raise LimitError(f"{MEMORY}: {gigabytes:g} asked, and this process already uses {gb(used)}: ask for more")
    if soft != resource.RLIM_INFINITY and asked > soft:
        raise LimitError(f"{MEMORY}: {gigabytes:g} asked, and this process is held to {gb(soft)}: ask for less")
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (asked, hard))
    except (OSError, ValueError, OverflowError) as error:
        raise LimitError(f"{MEMORY}: {gigabytes:g} asked, and the system refused ({error}): ask for less") from error
    try:
        if (found := _memory_limit()) != asked:
            raise LimitError(
                f"{MEMORY}: {gigabytes:g} asked, and the system reads back {found or 'none'}: leave it out"
            )
        if _gives(asked):
            raise LimitError(f"{MEMORY}: the system takes this limit and does not keep it (Linux 4.7 or later does)")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _gives(size: int) -> bool:
    """Whether the system gives so many bytes. None is touched, so nothing is used."""
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def _memory_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft
