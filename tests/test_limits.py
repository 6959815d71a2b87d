"""Limits are in force on every thread and every allocation, and removed after the block."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from bench.session import Progress
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import AttemptFailed
from edgecloud_sd.host import limits
from edgecloud_sd.host.limits import (
    MONITOR,
    MONITOR_PERIOD,
    LimitError,
    Limits,
    LimitsInForce,
    apply_limits,
    lift_memory_limit,
    memory_in_use,
    memory_limit_paused,
    read_limits,
    read_thread_cores,
)
from edgecloud_sd.host.utilization import Meter
from edgecloud_sd.timing.harness import Harness

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
MB = 1_000_000


class FakeTorch:
    """A torch with `threads` intra-op threads that records each change."""

    def __init__(self, threads: int) -> None:
        self.threads = [threads]

    def get_num_threads(self) -> int:
        return self.threads[-1]

    def set_num_threads(self, threads: int) -> None:
        self.threads.append(threads)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch(8)
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


class FakeKernel:
    """Threads with their cores, four each at first, and the faults when a thread is pinned."""

    def __init__(self, *threads: int) -> None:
        self.cores = {thread: {0, 1, 2, 3} for thread in threads}
        self.born: list[tuple[int, set[int]]] = []  # one of these starts at each change
        self.gone: set[int] = set()
        self.is_ignoring = False
        self.error: OSError | None = None

    def set(self, thread: int, cores: set[int]) -> None:
        if self.error:
            raise self.error
        if thread in self.gone:
            del self.cores[thread]
            raise ProcessLookupError(3, "No such process")
        if not self.is_ignoring:
            self.cores[thread] = set(cores)
        if self.born:
            child, inherited = self.born.pop()
            self.cores[child] = inherited


def same_cores(threads: tuple[int, ...], cores: set[int]) -> dict[int, set[int]]:
    return {thread: set(cores) for thread in threads}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel(10, 11)
    monkeypatch.setattr(
        limits, "read_thread_cores", lambda: {thread: set(cores) for thread, cores in fake.cores.items()}
    )
    monkeypatch.setattr(os, "sched_setaffinity", fake.set)
    return fake


@pytest.fixture
def sleeper() -> Iterator[int]:
    """Yield the id of a thread that runs before the limits apply."""
    with sleeping() as thread:
        yield thread


class sleeping:  # noqa: N801
    """A context manager that runs one more thread and returns its id."""

    def __enter__(self) -> int:
        self._end, started = threading.Event(), threading.Event()

        def sleep() -> None:
            started.set()
            self._end.wait()

        self._thread = threading.Thread(target=sleep)
        self._thread.start()
        assert started.wait(10)
        assert self._thread.native_id is not None
        return self._thread.native_id

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def soft_limit() -> int:
    return int(resource.getrlimit(resource.RLIMIT_DATA)[0])


def limit_above_use(size: int) -> Limits:
    """Return a memory limit `size` bytes above the memory in use."""
    return Limits(memory_gb=(memory_in_use() + size) / 1e9)


@pytest.mark.usefixtures("torch")
def test_old_and_new_threads_run_on_the_first_core_and_get_their_cores_back(sleeper: int) -> None:
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(sleeper, {max(usable)})  # a thread with fewer cores gets no more back
    with apply_limits(Limits(cpu_cores=1)) as in_force:
        first = {min(usable)}
        assert in_force.cores == tuple(first)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(sleeper) == first
        with sleeping() as child:
            assert os.sched_getaffinity(child) == first
            assert {frozenset(cores) for cores in read_thread_cores().values()} == {frozenset(first)}
            assert {sleeper, child, threading.get_native_id()} <= set(read_thread_cores())
    assert os.sched_getaffinity(0) == usable
    assert os.sched_getaffinity(sleeper) == {max(usable)}


@pytest.mark.usefixtures("torch")
def test_a_thread_that_starts_in_the_block_gets_all_cores_at_its_end(kernel: FakeKernel) -> None:
    with apply_limits(Limits(cpu_cores=2)) as in_force:
        assert in_force.cores == (0, 1)
        kernel.cores[12] = {0, 1}
    assert kernel.cores == same_cores((10, 11, 12), {0, 1, 2, 3})


@pytest.mark.usefixtures("torch")
def test_threads_that_start_or_end_during_the_pinning_are_handled(kernel: FakeKernel) -> None:
    kernel.born = [(13, {0, 1, 2, 3}), (12, {0, 1, 2, 3})]
    kernel.gone = {10}
    with apply_limits(Limits(cpu_cores=1)):
        assert kernel.cores == same_cores((11, 12, 13), {0})
        kernel.born = [(14, {0})]
    assert kernel.cores == same_cores((11, 12, 13, 14), {0, 1, 2, 3})


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("before", "inside"), [(8, 2), (2, 2), (1, 1)])
def test_torch_gets_at_most_as_many_threads_as_cores_and_as_before(
    before: int, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTorch(before)
    monkeypatch.setitem(sys.modules, "torch", fake)
    with apply_limits(Limits(cpu_cores=2)) as in_force:
        assert in_force.torch_threads == fake.get_num_threads() == inside
    assert fake.get_num_threads() == before


def test_more_cores_than_the_process_may_use_are_refused(kernel: FakeKernel, torch: FakeTorch) -> None:
    with apply_limits(Limits(cpu_cores=4)) as in_force:
        assert in_force.cores == (0, 1, 2, 3)
    with pytest.raises(LimitError) as raised, apply_limits(Limits(cpu_cores=5)):
        pass
    assert (
        str(raised.value)
        == "--max-cpu-cores: 5 is more than the 4 cores that this process may use (0, 1, 2, 3): choose fewer"
    )


def test_a_kernel_that_refuses_or_ignores_the_cores_is_an_error(kernel: FakeKernel, torch: FakeTorch) -> None:
    kernel.error = PermissionError(1, "Operation not permitted")
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: the system refused 1 .*not permitted"):
        apply_limits(Limits(cpu_cores=1)).__enter__()
    kernel.error, kernel.is_ignoring = None, True
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 was set, but the system reports 4 \(0, 1, 2, 3\)"):
        apply_limits(Limits(cpu_cores=1)).__enter__()
    assert torch.get_num_threads() == 8


def test_a_torch_that_ignores_its_thread_limit_is_an_error(
    kernel: FakeKernel, torch: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 was set, .* 1 \(0\) with 8 threads of torch"):
        apply_limits(Limits(cpu_cores=1)).__enter__()
    assert kernel.cores == same_cores((10, 11), {0, 1, 2, 3})


def test_an_allocation_fails_only_beyond_the_limit_and_inside_the_block() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits_to_apply = limit_above_use(200 * MB)
    with apply_limits(limits_to_apply) as in_force:
        assert limits_to_apply.memory_gb is not None
        assert in_force.memory_bytes == soft_limit() == round(limits_to_apply.memory_gb * 1e9)
        assert (
            resource.getrlimit(resource.RLIMIT_DATA)[1] == before[1]
        )  # the hard limit, which could not be raised again
        bytes(100 * MB)
        with pytest.raises(MemoryError):
            bytes(300 * MB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    bytes(300 * MB)


def test_a_memory_limit_is_paused_and_lifted_inside_its_block() -> None:
    before = soft_limit()
    assert lift_memory_limit() is None
    with memory_limit_paused(), apply_limits(Limits(memory_gb=64)):
        with memory_limit_paused():
            assert soft_limit() == before
        assert soft_limit() == 64 * 10**9
        with memory_limit_paused():
            assert lift_memory_limit() == 64
        assert soft_limit() == before
        assert lift_memory_limit() is None
    assert soft_limit() == before


def test_overlapping_pauses_of_threads_restore_a_memory_limit_at_the_last_end() -> None:
    before = soft_limit()
    with apply_limits(Limits(memory_gb=64)):
        first, second = memory_limit_paused(), memory_limit_paused()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert soft_limit() == before
        second.__exit__(None, None, None)
        assert soft_limit() == 64 * 10**9


def test_no_thread_of_a_run_starts_under_a_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    before, limits_at_start, start = soft_limit(), [], threading.Thread.start

    def record(thread: threading.Thread) -> None:
        limits_at_start.append(soft_limit())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", record)
    with closing(Connection("http://127.0.0.1:1", timeout=1)) as connection, apply_limits(Limits(memory_gb=64)):
        Progress(1, "clips", None).close()
        with Meter():
            Harness().background(int).result()
        connection.close_session("session")
        with pytest.raises(AttemptFailed):
            connection.transport.call("GET", "/")
        assert soft_limit() == 64 * 10**9
    assert set(limits_at_start) == {before}
    assert len(limits_at_start) >= 3  # the meter, the closer of the session and the look-ups


def test_a_block_that_fails_restores_the_old_limits(kernel: FakeKernel, torch: FakeTorch) -> None:
    before = read_limits()
    limits_to_apply = dataclasses.replace(limit_above_use(200 * MB), cpu_cores=1)
    with pytest.raises(KeyError) as raised, apply_limits(limits_to_apply):
        raise KeyError(read_limits())
    (inside,) = raised.value.args
    assert (inside.cores, inside.torch_threads, inside.memory_bytes is None) == ((0,), 1, False)
    assert read_limits() == before


def test_cores_are_restored_if_the_memory_limit_cannot_be_applied(kernel: FakeKernel, torch: FakeTorch) -> None:
    with pytest.raises(LimitError, match="--max-memory-gb"):
        apply_limits(Limits(cpu_cores=1, memory_gb=0.001)).__enter__()
    assert kernel.cores == same_cores((10, 11), {0, 1, 2, 3})
    assert torch.get_num_threads() == 8


def test_a_limit_below_the_memory_in_use_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_bytes(b"VmSize:\t 9000000 kB\nVmData:\t 2000000 kB\n")
    monkeypatch.setattr(limits, "PROC_SELF", tmp_path)
    before = soft_limit()
    with pytest.raises(LimitError) as raised:
        apply_limits(Limits(memory_gb=2)).__enter__()
    assert str(raised.value) == "--max-memory-gb: 2 is less than the 2.048 GB that this process uses already: raise it"
    assert soft_limit() == before
    (tmp_path / "status").write_bytes(b"Name:\tpython\n")
    with pytest.raises(LimitError, match=r"^--max-memory-gb: the system does not report the memory of this process"):
        apply_limits(Limits(memory_gb=2)).__enter__()


def test_memory_in_use_grows_by_each_allocation() -> None:
    before = memory_in_use()
    block = bytes(100 * MB)
    assert len(block) <= memory_in_use() - before < 110 * MB


def test_an_inner_limit_cannot_exceed_the_outer_one() -> None:
    outer = limit_above_use(200 * MB)
    assert outer.memory_gb is not None
    with apply_limits(outer) as in_force:
        with pytest.raises(
            LimitError, match=r"^--max-memory-gb: .* is more than the .* GB of the limit in force: lower it"
        ):
            apply_limits(Limits(memory_gb=2 * outer.memory_gb)).__enter__()
        with apply_limits(limit_above_use(100 * MB)):
            assert soft_limit() < outer.memory_gb * 1e9
        assert soft_limit() == in_force.memory_bytes


def test_a_memory_limit_that_the_system_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"^--max-memory-gb: the system refused 1e\+12"):
        apply_limits(Limits(memory_gb=1e12)).__enter__()  # more bytes than 64 bits can count

    def refuse(*_: object) -> NoReturn:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(
        LimitError, match=r"^--max-memory-gb: the system refused .* .current limit exceeds maximum limit"
    ):
        apply_limits(limit_above_use(200 * MB)).__enter__()


def test_a_memory_limit_that_is_not_set_or_not_enforced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(LimitError, match=r"^--max-memory-gb: .* was set, but the system reports"):
        apply_limits(limit_above_use(200 * MB)).__enter__()
    table = {resource.RLIMIT_DATA: resource.getrlimit(resource.RLIMIT_DATA)}
    monkeypatch.setattr(resource, "setrlimit", table.__setitem__)
    monkeypatch.setattr(resource, "getrlimit", table.__getitem__)
    with pytest.raises(LimitError, match=r"^--max-memory-gb: the system does not enforce this limit"):
        apply_limits(limit_above_use(200 * MB)).__enter__()


def test_without_a_limit_nothing_changes_and_everything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError("a limit was set")

    monkeypatch.setattr(os, "sched_setaffinity", never)
    monkeypatch.setattr(resource, "setrlimit", never)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 3, set_num_threads=never))
    with apply_limits(Limits()) as in_force:
        usable = tuple(sorted(os.sched_getaffinity(0)))
        assert in_force == LimitsInForce(usable, 3, None if soft_limit() == resource.RLIM_INFINITY else soft_limit())
        assert json.loads(json.dumps(dataclasses.asdict(in_force)))["cores"] == list(usable)


def test_only_a_limit_on_cores_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with apply_limits(limit_above_use(200 * MB)) as in_force:
        assert "torch" not in sys.modules
        assert in_force.torch_threads is None


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_on_other_systems_a_limit_is_refused_and_no_limit_is_fine(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    if system == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 needs Linux: leave it out on this system$"):
        apply_limits(Limits(cpu_cores=1)).__enter__()
    with pytest.raises(LimitError, match=r"^--max-memory-gb: 8 needs Linux: leave it out on this system$"):
        apply_limits(Limits(memory_gb=8)).__enter__()
    with apply_limits(Limits()) as in_force:
        assert in_force.cores is None


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"cpu_cores": 0}, "--max-cpu-cores: 0 is too few: give 1 or more"),
        ({"cpu_cores": -2}, "--max-cpu-cores: -2 is too few: give 1 or more"),
        ({"memory_gb": 0}, "--max-memory-gb: 0 is not a size: give a number above 0"),
        ({"memory_gb": float("nan")}, "--max-memory-gb: nan is not a size: give a number above 0"),
        ({"memory_gb": float("inf")}, "--max-memory-gb: inf is not a size: give a number above 0"),
    ],
)
def test_invalid_limits_are_refused(limit: dict[str, float], message: str) -> None:
    with pytest.raises(LimitError) as raised:
        Limits(**limit)  # type: ignore[arg-type]
    assert str(raised.value) == message


@pytest.mark.usefixtures("torch")
def test_a_process_that_starts_in_the_block_inherits_both_limits() -> None:
    code = "import os, resource; print(os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_DATA)[0])"
    with apply_limits(dataclasses.replace(limit_above_use(400 * MB), cpu_cores=1)):
        printed = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed == f"{os.sched_getaffinity(0)} {soft_limit()}\n"


IN_TORCH = """
import json, sys, torch, numpy
from safetensors import safe_open
from edgecloud_sd.host.limits import Limits, apply_limits, memory_in_use, read_limits, read_thread_cores

def fails(allocate):
    try:
        allocate()
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__

def allocate_many(size):
    tensors = []
    while True:
        tensors.append(torch.empty(size, dtype=torch.uint8))

torch.set_num_threads(4)
x = torch.ones(400, 400)
x @ x  # starts the threads of torch
before = read_limits()
with apply_limits(Limits(1, memory_in_use() / 1e9 + 0.1)) as in_force:
    report = {
        "below": fails(lambda: torch.empty(50_000_000, dtype=torch.uint8)),
        "large": fails(lambda: torch.empty(200_000_000, dtype=torch.uint8)),
        "medium": fails(lambda: allocate_many(1_000_000)),
        "small": fails(lambda: allocate_many(50_000)),
        "numpy": fails(lambda: numpy.empty(200_000_000, dtype=numpy.uint8)),
        "mapped": fails(lambda: safe_open(sys.argv[1], "pt")),
        "cores": sorted({tuple(cores) for cores in read_thread_cores().values()}),
        "unchanged": read_limits() == in_force,
        "threads": in_force.torch_threads,
        "native": len(read_thread_cores()) > 1,
    }
report["restored"] = read_limits() == before
report["after"] = fails(lambda: (torch.empty(200_000_000, dtype=torch.uint8), safe_open(sys.argv[1], "pt")))
print(json.dumps(report))
"""


@pytest.mark.slow
def test_torch_fails_at_the_limit_for_tensors_of_any_size_and_for_mapped_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [200 * MB], "data_offsets": [0, 200 * MB]}}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 200 * MB)  # a sparse file: no block is written
    run = subprocess.run([sys.executable, "-c", IN_TORCH, str(weights)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "below": None,
        "large": "RuntimeError",
        "medium": "RuntimeError",
        "small": "RuntimeError",
        "numpy": "MemoryError",
        "mapped": "RuntimeError",
        "cores": [[min(os.sched_getaffinity(0))]],
        "unchanged": True,
        "threads": 1,
        "native": True,
        "restored": True,
        "after": None,
    }


def exceed_monitored_limit(limit: int) -> None:
    """Map 100 MB more than a monitored limit, and give them back before the block ends."""
    with apply_limits(Limits(memory_gb=limit / 1e9, memory_limit=MONITOR)) as in_force:
        assert (in_force.memory_bytes, in_force.monitored_bytes, in_force.excess_gb) == (None, limit, 0)
        block = mmap.mmap(-1, limit + 100 * MB - memory_in_use(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        time.sleep(5 * MONITOR_PERIOD)
        block.close()
        assert read_limits().excess_gb == pytest.approx(0.1, abs=0.02)


def test_a_monitored_limit_refuses_nothing_and_warns_once_with_the_excess() -> None:
    with pytest.warns(UserWarning, match=r"^--max-memory-gb: the process had .* more than the ") as warned:
        exceed_monitored_limit(memory_in_use() + 20 * MB)
    assert len(warned) == 1
    assert read_limits().monitored_bytes is None


def test_a_monitored_limit_that_is_not_reached_warns_of_nothing_and_records_no_excess() -> None:
    with apply_limits(Limits(memory_gb=memory_in_use() / 1e9 + 10, memory_limit=MONITOR)):
        assert read_limits().excess_gb == 0
