"""Limits are in force: on every thread and every allocation, and gone after the block."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from edgecloud_sd.host import limits
from edgecloud_sd.host.limits import InForce, LimitError, Limits, affinities, hold, in_force, memory_in_use

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
MB = 1_000_000


class FakeTorch:
    """A torch with so many intra-op threads, that notes each change."""

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
    """Threads with the cores of each, all four at first, and what happens when one is set."""

    def __init__(self, *threads: int) -> None:
        self.cores = {thread: {0, 1, 2, 3} for thread in threads}
        self.born: list[tuple[int, set[int]]] = []  # one more with each change
        self.gone: set[int] = set()
        self.deaf = False
        self.error: OSError | None = None

    def set(self, thread: int, cores: set[int]) -> None:
        if self.error:
            raise self.error
        if thread in self.gone:
            del self.cores[thread]
            raise ProcessLookupError(3, "No such process")
        if not self.deaf:
            self.cores[thread] = set(cores)
        if self.born:
            child, its_cores = self.born.pop()
            self.cores[child] = its_cores


def each(threads: tuple[int, ...], cores: set[int]) -> dict[int, set[int]]:
    return {thread: set(cores) for thread in threads}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel(10, 11)
    monkeypatch.setattr(limits, "affinities", lambda: {thread: set(cores) for thread, cores in fake.cores.items()})
    monkeypatch.setattr(os, "sched_setaffinity", fake.set)
    return fake


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The id of a thread that was there before the test."""
    with sleeping() as thread:
        yield thread


class sleeping:  # noqa: N801
    """A block with one more thread, given by its id."""

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


def more(size: int) -> Limits:
    """A limit so many bytes above what is used."""
    return Limits(memory_gb=(memory_in_use() + size) / 1e9)


@pytest.mark.usefixtures("torch")
def test_threads_that_were_there_and_threads_that_come_run_on_the_first_core_and_go_back(sleeper: int) -> None:
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(sleeper, {max(usable)})  # one that had less gets that back, and no more
    with hold(Limits(cpu_cores=1)) as held:
        first = {min(usable)}
        assert held.cores == tuple(first)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(sleeper) == first
        with sleeping() as child:
            assert os.sched_getaffinity(child) == first
            assert {frozenset(cores) for cores in affinities().values()} == {frozenset(first)}
            assert {sleeper, child, threading.get_native_id()} <= set(affinities())
    assert os.sched_getaffinity(0) == usable
    assert os.sched_getaffinity(sleeper) == {max(usable)}


@pytest.mark.usefixtures("torch")
def test_a_thread_born_in_the_block_gets_all_cores_at_its_end(kernel: FakeKernel) -> None:
    with hold(Limits(cpu_cores=2)) as held:
        assert held.cores == (0, 1)
        kernel.cores[12] = {0, 1}
    assert kernel.cores == each((10, 11, 12), {0, 1, 2, 3})


@pytest.mark.usefixtures("torch")
def test_threads_that_are_born_or_gone_while_others_are_pinned_are_no_gap(kernel: FakeKernel) -> None:
    kernel.born = [(13, {0, 1, 2, 3}), (12, {0, 1, 2, 3})]
    kernel.gone = {10}
    with hold(Limits(cpu_cores=1)):
        assert kernel.cores == each((11, 12, 13), {0})
        kernel.born = [(14, {0})]
    assert kernel.cores == each((11, 12, 13, 14), {0, 1, 2, 3})


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("before", "inside"), [(8, 2), (2, 2), (1, 1)])
def test_torch_gets_no_more_threads_than_cores_and_never_more_than_it_had(
    before: int, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTorch(before)
    monkeypatch.setitem(sys.modules, "torch", fake)
    with hold(Limits(cpu_cores=2)) as held:
        assert held.torch_threads == fake.get_num_threads() == inside
    assert fake.get_num_threads() == before


def test_all_cores_are_as_many_as_can_be_asked_for(kernel: FakeKernel, torch: FakeTorch) -> None:
    with hold(Limits(cpu_cores=4)) as held:
        assert held.cores == (0, 1, 2, 3)
    with pytest.raises(LimitError) as raised, hold(Limits(cpu_cores=5)):
        pass
    assert str(raised.value) == "--max-cpu-cores: 5 asked, and this process may use 4 (0, 1, 2, 3): ask for fewer"


def test_a_kernel_that_refuses_cores_is_an_error_and_one_that_does_nothing_is_too(
    kernel: FakeKernel, torch: FakeTorch
) -> None:
    kernel.error = PermissionError(1, "Operation not permitted")
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 asked, and the system refused .*not permitted"):
        hold(Limits(cpu_cores=1)).__enter__()
    kernel.error, kernel.deaf = None, True
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 asked, and the system reads back 4 \(0, 1, 2, 3\)"):
        hold(Limits(cpu_cores=1)).__enter__()
    assert torch.get_num_threads() == 8


def test_a_torch_that_keeps_its_threads_is_an_error(
    kernel: FakeKernel, torch: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 asked, .* 1 \(0\) with 8 threads of torch"):
        hold(Limits(cpu_cores=1)).__enter__()
    assert kernel.cores == each((10, 11), {0, 1, 2, 3})


def test_an_allocation_beyond_the_limit_fails_and_one_below_or_after_does_not() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    asked = more(200 * MB)
    with hold(asked) as held:
        assert asked.memory_gb is not None
        assert held.memory_bytes == soft_limit() == round(asked.memory_gb * 1e9)
        assert resource.getrlimit(resource.RLIMIT_DATA)[1] == before[1]  # the hard one: it could not be put back
        bytes(100 * MB)
        with pytest.raises(MemoryError):
            bytes(300 * MB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    bytes(300 * MB)


def test_a_block_that_fails_leaves_nothing_in_force(kernel: FakeKernel, torch: FakeTorch) -> None:
    before = in_force()
    asked = dataclasses.replace(more(200 * MB), cpu_cores=1)
    with pytest.raises(KeyError) as raised, hold(asked):
        raise KeyError(in_force())
    (inside,) = raised.value.args
    assert (inside.cores, inside.torch_threads, inside.memory_bytes is None) == ((0,), 1, False)
    assert in_force() == before


def test_cores_are_put_back_if_the_memory_limit_cannot_be_held(kernel: FakeKernel, torch: FakeTorch) -> None:
    with pytest.raises(LimitError, match="--max-memory-gb"):
        hold(Limits(cpu_cores=1, memory_gb=0.001)).__enter__()
    assert kernel.cores == each((10, 11), {0, 1, 2, 3})
    assert torch.get_num_threads() == 8


def test_a_process_that_uses_more_already_is_an_error_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status").write_bytes(b"VmSize:\t 9000000 kB\nVmData:\t 2000000 kB\n")
    monkeypatch.setattr(limits, "PROC_SELF", tmp_path)
    before = soft_limit()
    with pytest.raises(LimitError) as raised:
        hold(Limits(memory_gb=2)).__enter__()
    assert str(raised.value) == "--max-memory-gb: 2 asked, and this process already uses 2.048: ask for more"
    assert soft_limit() == before
    (tmp_path / "status").write_bytes(b"Name:\tpython\n")
    with pytest.raises(LimitError, match=r"^--max-memory-gb: the system does not say how much memory"):
        hold(Limits(memory_gb=2)).__enter__()


def test_memory_in_use_grows_by_what_is_allocated() -> None:
    before = memory_in_use()
    held = bytes(100 * MB)
    assert len(held) <= memory_in_use() - before < 110 * MB


def test_a_limit_is_never_a_way_out_of_a_lower_one() -> None:
    outer = more(200 * MB)
    assert outer.memory_gb is not None
    with hold(outer) as held:
        with pytest.raises(
            LimitError, match=r"^--max-memory-gb: .* asked, and this process is held to .*: ask for less"
        ):
            hold(Limits(memory_gb=2 * outer.memory_gb)).__enter__()
        with hold(more(100 * MB)):
            assert soft_limit() < outer.memory_gb * 1e9
        assert soft_limit() == held.memory_bytes


def test_a_memory_limit_that_the_system_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"^--max-memory-gb: 1e\+12 asked, and the system refused"):
        hold(Limits(memory_gb=1e12)).__enter__()  # more bytes than 64 bits count

    def refuse(*_: object) -> NoReturn:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(LimitError, match=r"^--max-memory-gb: .* refused .current limit exceeds maximum limit"):
        hold(more(200 * MB)).__enter__()


def test_a_memory_limit_that_is_not_taken_or_not_kept_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(LimitError, match=r"^--max-memory-gb: .* asked, and the system reads back"):
        hold(more(200 * MB)).__enter__()
    table = {resource.RLIMIT_DATA: resource.getrlimit(resource.RLIMIT_DATA)}
    monkeypatch.setattr(resource, "setrlimit", table.__setitem__)
    monkeypatch.setattr(resource, "getrlimit", table.__getitem__)
    with pytest.raises(LimitError, match=r"^--max-memory-gb: the system takes this limit and does not keep it"):
        hold(more(200 * MB)).__enter__()


def test_without_a_limit_nothing_changes_and_all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError("a limit was set")

    monkeypatch.setattr(os, "sched_setaffinity", never)
    monkeypatch.setattr(resource, "setrlimit", never)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 3, set_num_threads=never))
    with hold(Limits()) as held:
        usable = tuple(sorted(os.sched_getaffinity(0)))
        assert held == InForce(usable, 3, None if soft_limit() == resource.RLIM_INFINITY else soft_limit())
        assert json.loads(json.dumps(dataclasses.asdict(held)))["cores"] == list(usable)


def test_torch_is_imported_for_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with hold(more(200 * MB)) as held:
        assert "torch" not in sys.modules
        assert held.torch_threads is None


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_a_limit_is_an_error_and_none_is_fine(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    if system == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(LimitError, match=r"^--max-cpu-cores: 1 asked, and only Linux .*: leave it out here$"):
        hold(Limits(cpu_cores=1)).__enter__()
    with pytest.raises(LimitError, match=r"^--max-memory-gb: 8 asked, and only Linux .*: leave it out here$"):
        hold(Limits(memory_gb=8)).__enter__()
    with hold(Limits()) as held:
        assert held.cores is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cpu_cores": 0}, "--max-cpu-cores: 0 asked: give 1 or more"),
        ({"cpu_cores": -2}, "--max-cpu-cores: -2 asked: give 1 or more"),
        ({"memory_gb": 0}, "--max-memory-gb: 0 asked: give a number above 0"),
        ({"memory_gb": float("nan")}, "--max-memory-gb: nan asked: give a number above 0"),
        ({"memory_gb": float("inf")}, "--max-memory-gb: inf asked: give a number above 0"),
    ],
)
def test_limits_that_make_no_sense_are_errors(asked: dict[str, float], message: str) -> None:
    with pytest.raises(LimitError) as raised:
        Limits(**asked)  # type: ignore[arg-type]
    assert str(raised.value) == message


@pytest.mark.usefixtures("torch")
def test_a_process_that_starts_in_the_block_inherits_both() -> None:
    code = "import os, resource; print(os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_DATA)[0])"
    with hold(dataclasses.replace(more(400 * MB), cpu_cores=1)):
        printed = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed == f"{os.sched_getaffinity(0)} {soft_limit()}\n"


IN_TORCH = """
import json, sys, torch, numpy
from safetensors import safe_open
from edgecloud_sd.host.limits import Limits, affinities, hold, in_force, memory_in_use

def fails(allocate):
    try:
        allocate()
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__

def many(size):
    kept = []
    while True:
        kept.append(torch.empty(size, dtype=torch.uint8))

torch.set_num_threads(4)
x = torch.ones(400, 400)
x @ x  # starts torch's own threads
before = in_force()
with hold(Limits(1, memory_in_use() / 1e9 + 0.1)) as held:
    found = {
        "below": fails(lambda: torch.empty(50_000_000, dtype=torch.uint8)),
        "large": fails(lambda: torch.empty(200_000_000, dtype=torch.uint8)),
        "medium": fails(lambda: many(1_000_000)),
        "small": fails(lambda: many(50_000)),
        "numpy": fails(lambda: numpy.empty(200_000_000, dtype=numpy.uint8)),
        "mapped": fails(lambda: safe_open(sys.argv[1], "pt")),
        "cores": sorted({tuple(cores) for cores in affinities().values()}),
        "kept": in_force() == held,
        "threads": held.torch_threads,
        "native": len(affinities()) > 1,
    }
found["back"] = in_force() == before
found["after"] = fails(lambda: (torch.empty(200_000_000, dtype=torch.uint8), safe_open(sys.argv[1], "pt")))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_torch_runs_out_at_the_limit_in_tensors_of_any_size_and_in_mapped_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [200 * MB], "data_offsets": [0, 200 * MB]}}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 200 * MB)  # a hole: nothing is written
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
        "kept": True,
        "threads": 1,
        "native": True,
        "back": True,
        "after": None,
    }
