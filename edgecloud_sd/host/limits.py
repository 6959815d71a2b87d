"""CPU and memory limits of this process: applied, read back from the system and removed again. Linux only.

The memory limit is RLIMIT_DATA. Since Linux 4.7 it counts private writable memory, used or not: the allocations of
torch, numpy and Python, and the maps through which safetensors reads weights. RLIMIT_AS would also count reserved
address space (tens of GB with CUDA), and a cgroup needs privileges. The memory of a GPU is not limited.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from edgecloud_sd.host.cores import PROC_SELF, read_cpu_quota

_T = TypeVar("_T")
CORES_OPTION, MEMORY_OPTION = "--max-cpu-cores", "--max-memory-gb"
ENFORCE, MONITOR = MEMORY_LIMITS = ("enforce", "monitor")
MONITOR_PERIOD = 0.05  # seconds between two readings; a reading takes 0.07 ms on 2 shared cores
NEEDS_LINUX = "needs Linux: leave it out on this system"
LEAVE_OUT = "leave it out on this machine"


class LimitError(ValueError):
    """An error for a limit that is invalid or cannot be applied; the message starts with the option."""


@dataclass(frozen=True)
class Limits:
    """The requested limits; None means no limit. Raises LimitError for fewer than one core or for no memory."""

    cpu_cores: int | None = None
    memory_gb: float | None = None  # 10^9 bytes
    memory_limit: str = ENFORCE

    def __post_init__(self) -> None:
        if self.cpu_cores is not None and self.cpu_cores < 1:
            raise LimitError(f"{CORES_OPTION}: {self.cpu_cores} is too few: give 1 or more")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise LimitError(f"{MEMORY_OPTION}: {self.memory_gb:g} is not a size: give a number above 0")


@dataclass(frozen=True)
class LimitsInForce:
    """The limits that the system reports for this process, whether this package set them or not."""

    cores: tuple[int, ...] | None  # ids of the cores that its threads may use; None if the system does not report them
    torch_threads: int | None  # intra-op threads of the calling thread; None if torch is not imported
    memory_bytes: int | None  # largest private writable memory; None if there is no limit
    cpu_quota: float | None = None  # cores of CPU time that the cgroups allow; None without a quota
    monitored_bytes: int | None = None  # a limit on the same memory that is watched and not applied; None without one
    peak_bytes: int | None = None  # the most memory seen since it is watched; None if it is not

    @property
    def excess_gb(self) -> float | None:
        """The peak over the monitored limit in 10^9 bytes: 0 if it stayed below, None without such a limit."""
        if self.monitored_bytes is None or self.peak_bytes is None:
            return None
        return max(0, self.peak_bytes - self.monitored_bytes) / 1e9


@contextmanager
def apply_limits(limits: Limits) -> Iterator[LimitsInForce]:
    """Limit this process in the block and yield the limits in force. The end of the block restores the old ones.

    Every thread is pinned to the first `cpu_cores` cores that the process may use, and torch gets at most as many
    intra-op threads. Beyond the memory limit, a soft one, allocations fail; `errors.is_out_of_memory` knows their
    errors. Threads and processes that start in the block inherit both; each process has the memory limit for itself. A
    memory limit that is monitored refuses nothing. If the process exceeds it, the end of the block warns once, with the
    excess.

    Raise LimitError for too many cores and for a memory limit below the use. Raise it also if the system lacks a
    limit, refuses it or does not enforce it.
    """
    with ExitStack() as stack:
        if limits.cpu_cores is not None:
            stack.enter_context(_limited_cores(limits.cpu_cores))
        if limits.memory_gb is not None:
            hold = _limited_memory if limits.memory_limit == ENFORCE else _monitored_memory
            stack.enter_context(hold(limits.memory_gb))
        yield read_limits()


def read_limits() -> LimitsInForce:
    """Return the limits in force for this process, without changing or importing anything."""
    torch = sys.modules.get("torch")
    return LimitsInForce(
        cores=tuple(sorted(set().union(*read_thread_cores().values()))) or None,
        torch_threads=torch.get_num_threads() if torch else None,
        cpu_quota=read_cpu_quota(),
        memory_bytes=_read_memory_limit(),
        monitored_bytes=_monitors[-1].limit if _monitors else None,
        peak_bytes=_monitors[-1].read() if _monitors else None,
    )


def read_thread_cores() -> dict[int, set[int]]:
    """Return the ids of the cores that each thread of this process may use, by thread id; empty except on Linux."""
    cores: dict[int, set[int]] = {}
    if sys.platform != "linux":
        return cores
    for thread in [int(task.name) for task in (PROC_SELF / "task").iterdir()]:
        with suppress(ProcessLookupError):  # the thread has ended since the listing
            cores[thread] = os.sched_getaffinity(thread)
    return cores


def memory_in_use() -> int:
    """Return the bytes of private writable memory of this process, counted as the memory limit counts them.

    Raise LimitError if the system does not report them.
    """
    match = re.search(rb"^VmData:\s*(\d+) kB$", (PROC_SELF / "status").read_bytes(), re.MULTILINE)
    if not match:
        raise LimitError(f"{MEMORY_OPTION}: the system does not report the memory of this process: {LEAVE_OUT}")
    return int(match[1]) * 1024


def format_gb(size: float) -> str:
    """Return `size` bytes as a text in GB of 10^9 bytes."""
    return f"{size / 1e9:.1f}" if size >= 1e10 else f"{size / 1e9:.3f}"


@contextmanager
def _limited_cores(count: int) -> Iterator[None]:
    if sys.platform != "linux":
        raise LimitError(f"{CORES_OPTION}: {count} {NEEDS_LINUX}")
    before = read_thread_cores()
    usable = set().union(*before.values())
    if count > len(usable):
        cores = f"{len(usable)} cores that this process may use ({_join(usable)})"
        raise LimitError(f"{CORES_OPTION}: {count} is more than the {cores}: choose fewer")
    quota = read_cpu_quota()
    if quota is not None and count > math.ceil(quota):
        raise LimitError(f"{CORES_OPTION}: {count} is more than the quota of this container, {quota:g}: choose fewer")
    chosen = set(sorted(usable)[:count])
    import torch

    threads = torch.get_num_threads()
    try:
        try:
            _pin_threads({}, chosen)
        except OSError as error:
            raise LimitError(f"{CORES_OPTION}: the system refused {count} ({error}): {LEAVE_OUT}") from error
        if threads > count:
            torch.set_num_threads(count)
        _check_cores(chosen)
        yield
    finally:
        torch.set_num_threads(threads)
        _pin_threads(before, usable)


def _check_cores(chosen: set[int]) -> None:
    """Raise LimitError unless every thread is pinned to `chosen` and torch has no more threads than that."""
    import torch

    pinned, threads = read_thread_cores().values(), torch.get_num_threads()
    if any(cores != chosen for cores in pinned) or threads > len(chosen):
        cores = set().union(*pinned)
        raise LimitError(
            f"{CORES_OPTION}: {len(chosen)} was set, but the system reports {len(cores)} ({_join(cores)}) with "
            f"{threads} threads of torch: {LEAVE_OUT}"
        )


def _join(cores: set[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


def _pin_threads(cores_by_thread: Mapping[int, set[int]], default: set[int]) -> None:
    """Set the cores of every thread: its own in `cores_by_thread`, or else `default`."""
    done: set[int] = set()
    # a thread that starts meanwhile inherits the cores of its parent, which may be the old ones: read again
    while pending := [
        thread
        for thread, cores in read_thread_cores().items()
        if thread not in done and cores != cores_by_thread.get(thread, default)
    ]:
        for thread in pending:
            done.add(thread)
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores_by_thread.get(thread, default))


class MemoryMonitor:
    """A thread that watches the private memory of this process, counted as the memory limit counts it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self._peak = memory_in_use()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def read(self) -> int:
        """Return the most bytes seen so far, now included."""
        self._peak = max(self._peak, memory_in_use())
        return self._peak

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(MONITOR_PERIOD):
            self.read()


_monitors: list[MemoryMonitor] = []  # one for each block that this process is in; the last one counts


@contextmanager
def _monitored_memory(gigabytes: float) -> Iterator[None]:
    _check_system(gigabytes)
    monitor = MemoryMonitor(round(gigabytes * 1e9))
    _monitors.append(monitor)
    try:
        yield
    finally:
        in_force = read_limits()
        _monitors.remove(monitor)
        monitor.stop()
    if in_force.excess_gb:
        warnings.warn(
            f"{MEMORY_OPTION}: the process had {format_gb(monitor.read())} GB of private memory at its peak, "
            f"{in_force.excess_gb:.3f} more than the {gigabytes:g} that are monitored",
            stacklevel=2,
        )


def _check_system(gigabytes: float) -> None:
    if sys.platform != "linux":  # macOS has such a limit too, but does not count maps
        raise LimitError(f"{MEMORY_OPTION}: {gigabytes:g} {NEEDS_LINUX}")


# one for each block that this process is in: the limit in GB, and the soft and hard limits in bytes before it
_enforced: list[tuple[float, tuple[int, int]]] = []
_pausing = threading.RLock()
_pauses = 0  # blocks of `memory_limit_paused` that have paused a limit


def lift_memory_limit() -> float | None:
    """Lift the memory limit of `apply_limits` for the rest of its block. Return it in GB, or None without one.

    To explain a failure and to report need memory, so call this before either.
    """
    if not _enforced:
        return None
    import resource

    (_, before), (gigabytes, _) = _enforced[0], _enforced[-1]
    resource.setrlimit(resource.RLIMIT_DATA, before)
    _enforced.clear()
    return gigabytes


@contextmanager
def memory_limit_paused() -> Iterator[None]:
    """Lift the memory limit of `apply_limits` in the block, for work that is not the edge's.

    Blocks on several threads may overlap.
    """
    global _pauses
    if not _enforced:
        yield
        return
    with _pausing:
        _pauses += 1
        _set_memory_limit()
    try:
        yield
    finally:
        with _pausing:
            _pauses -= 1
            _set_memory_limit()


def start_outside_limit(start: Callable[[], _T]) -> _T:
    """Return `start()`, which starts a thread, with the memory limit of `apply_limits` paused.

    A thread that lacks memory at its very start may end without a word, and its starter would wait for it forever.
    """
    with _pausing, memory_limit_paused():
        return start()


def _set_memory_limit() -> None:
    """Apply the limit of the innermost block, or none during a pause."""
    if not _enforced:  # a failure has lifted it for good
        return
    import resource

    (_, before), (gigabytes, (_, hard)) = _enforced[0], _enforced[-1]
    resource.setrlimit(resource.RLIMIT_DATA, before if _pauses else (round(gigabytes * 1e9), hard))


@contextmanager
def _limited_memory(gigabytes: float) -> Iterator[None]:
    _check_system(gigabytes)
    import resource

    limit, used = round(gigabytes * 1e9), memory_in_use()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used > limit:
        in_use = f"{format_gb(used)} GB that this process uses already"
        raise LimitError(f"{MEMORY_OPTION}: {gigabytes:g} is less than the {in_use}: raise it")
    if soft != resource.RLIM_INFINITY and limit > soft:
        raise LimitError(
            f"{MEMORY_OPTION}: {gigabytes:g} is more than the {format_gb(soft)} GB of the limit in force: lower it"
        )
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (OSError, ValueError, OverflowError) as error:
        raise LimitError(f"{MEMORY_OPTION}: the system refused {gigabytes:g} ({error}): lower it") from error
    entry = gigabytes, (soft, hard)
    try:
        if (in_force := _read_memory_limit()) != limit:
            raise LimitError(
                f"{MEMORY_OPTION}: {gigabytes:g} was set, but the system reports {in_force or 'none'}: {LEAVE_OUT}"
            )
        if _can_allocate(limit):
            raise LimitError(
                f"{MEMORY_OPTION}: the system does not enforce this limit (Linux 4.7 or later does): {LEAVE_OUT}"
            )
        _enforced.append(entry)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        with suppress(ValueError):  # it was lifted
            _enforced.remove(entry)


def _can_allocate(size: int) -> bool:
    """Return whether the system maps `size` bytes; they are never written, so that no memory is used."""
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def _read_memory_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    with _pausing:
        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft
