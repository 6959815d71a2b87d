"""The resources that a block of code used. No test bounds wall time, so that a slow machine passes."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from edgecloud_sd.host import utilization
from edgecloud_sd.host.utilization import HighWaterMark, Meter, Sampler, Utilization, mean_over_time, unmeasured

needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's peak cannot be reset here"
)
MB = 1_000_000


class FakeNvml:
    """A GPU that returns `readings` of (per cent, bytes), repeats the last one, and fails after `until` of them.

    It does not support the figures in `without`.
    """

    class NVMLError(Exception):
        pass

    def __init__(self, *readings: tuple[int, int], until: int | None = None, without: Sequence[str] = ()) -> None:
        self._left = {"gpu": until, "used": until} | dict.fromkeys(without, 0)
        self._error = "Not Supported" if without else "GPU is lost"
        self._readings = readings
        self.percent: list[int] = []
        self.used: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.enough = threading.Event()

    def nvmlDeviceGetUtilizationRates(self, device: object) -> SimpleNamespace:  # noqa: N802
        return self._answer(device, "gpu", 0, self.percent)

    def nvmlDeviceGetMemoryInfo(self, device: object) -> SimpleNamespace:  # noqa: N802
        return self._answer(device, "used", 1, self.used)

    def _answer(self, device: object, name: str, column: int, given: list[int]) -> SimpleNamespace:
        assert device == "gpu 0"
        self.threads.add(threading.current_thread())
        if len(given) == self._left[name]:
            self.enough.set()
            raise self.NVMLError(self._error)
        given.append(self._readings[min(len(given), len(self._readings) - 1)][column])
        if len(self.used) == 5:
            self.enough.set()
        return SimpleNamespace(**{name: given[-1]})


class FakeProcess:
    """A process with `first` bytes of resident memory in its first reading and `rest` in all others.

    A reading outside the main thread is slow, so that a block usually ends during one.
    """

    def __init__(self, first: int, rest: int) -> None:
        self._readings = itertools.chain([first], itertools.repeat(rest))
        self.threads: list[threading.Thread] = []
        self.enough = threading.Event()

    def memory_info(self) -> SimpleNamespace:
        self.threads.append(threading.current_thread())
        if len(self.threads) == 5:
            self.enough.set()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
        return SimpleNamespace(rss=next(self._readings))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "SAMPLING_PERIOD", 0.001)


@pytest.fixture
def ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read only at the start and at the end."""
    monkeypatch.setattr(utilization, "SAMPLING_PERIOD", 3600)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "find_gpu", lambda device: (None, None, "no GPU here"))


def with_gpu(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    monkeypatch.setattr(utilization, "find_gpu", lambda device: (nvml, "gpu 0", ""))


class Burner(threading.Thread):
    """A known load: a thread that uses `seconds` of CPU time and records the exact time in `burnt`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def run(self) -> None:
        while time.thread_time() < self._seconds:
            pass
        self.burnt = time.thread_time()


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu", "ends_only")
@pytest.mark.parametrize("burners", [0, 1, 2])
def test_the_cpu_seconds_of_every_thread_are_counted(burners: int) -> None:
    threads = [Burner(0.05) for _ in range(burners)]
    before, own = time.process_time(), time.thread_time()
    with Meter() as meter:
        for thread in threads:
            thread.start()
        time.sleep(0.2)  # longer than the load, so that wall time would be wrong
        for thread in threads:
            thread.join()
    own = time.thread_time() - own  # almost 0, except for a garbage collection or a stall
    burnt = sum(thread.burnt for thread in threads)
    assert meter.used.cpu is not None
    assert burnt <= meter.used.cpu <= burnt + own + 0.05
    assert meter.used.cpu <= time.process_time() - before
    assert meter.used.wall >= 0.2
    assert meter.used.cpu_percent == 100 * meter.used.cpu / meter.used.wall


def test_cpu_percent_is_cpu_seconds_over_wall_seconds() -> None:
    assert Utilization(wall=2.0, cpu=3.0, rss_mean_mb=1.0, rss_peak_mb=1.0).cpu_percent == 150


def test_figures_that_were_not_measured_are_none_with_the_reason() -> None:
    used = unmeasured(3.0, "a simulated clock")
    figures = ["cpu_percent", "rss_mean_mb", "rss_peak_mb", "gpu_percent", "gpu_memory_mb"]
    assert used.wall == 3
    assert used.cpu is None
    assert [getattr(used, figure) for figure in figures] == [None] * 5
    assert used.reasons == dict.fromkeys(figures, "a simulated clock")


@needs_peak
@pytest.mark.usefixtures("no_gpu", "ends_only")
def test_the_peak_counts_memory_freed_in_the_block_and_not_before_it() -> None:
    def measure(size: int) -> tuple[float, float]:
        with Meter() as meter:
            block = b"x" * size
            del block
        assert meter.used.rss_mean_mb is not None
        assert meter.used.rss_peak_mb is not None
        return meter.used.rss_mean_mb, meter.used.rss_peak_mb

    mean, peak = measure(80 * MB)
    later_mean, later_peak = measure(0)
    assert 70 < peak - mean < 120
    assert later_mean <= later_peak < peak - 50


@pytest.mark.usefixtures("no_gpu", "ends_only")
def test_memory_in_use_is_reported_in_mb() -> None:
    with Meter() as meter:
        block = b"x" * (80 * MB)
    with Meter() as later:
        pass
    assert len(block) == 80 * MB
    assert meter.used.rss_mean_mb is not None
    assert later.used.rss_mean_mb is not None
    assert 20 < later.used.rss_mean_mb - meter.used.rss_mean_mb < 60  # in use at one of two readings: half


def test_the_mean_weights_each_reading_by_its_time() -> None:
    assert mean_over_time([(0, 10), (10, 10), (20, 30), (40, 30)]) == 22.5


def test_the_mean_of_a_constant_is_that_constant_to_the_last_bit() -> None:
    assert mean_over_time([(0, 123_456_789), (3, 123_456_789), (10, 123_456_789)]) == 123_456_789


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_one_thread_reads_memory_and_gpu_and_stops_with_the_block(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, nvml = FakeProcess(first=10 * MB, rest=30 * MB), FakeNvml((50, 2 * MB))
    monkeypatch.setattr("edgecloud_sd.host.utilization.psutil.Process", lambda: process)
    monkeypatch.setattr(utilization, "find_gpu", lambda device: (nvml, "gpu 0", "" if has_gpu else "no GPU here"))
    before = set(threading.enumerate())
    with Meter() as meter:
        (thread,) = set(threading.enumerate()) - before
        assert process.enough.wait(10)
        assert not has_gpu or nvml.enough.wait(10)
    assert not thread.is_alive()
    assert set(process.threads) == {thread, threading.current_thread()}
    assert process.threads[0] == process.threads[-1] == threading.current_thread()  # the start and the end
    assert nvml.threads == ({thread, threading.current_thread()} if has_gpu else set())
    assert meter.used.rss_mean_mb is not None
    assert 20 < meter.used.rss_mean_mb < 30  # the two ends alone would give 20


@pytest.mark.usefixtures("fast")
def test_a_block_that_fails_is_measured_and_its_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, FakeNvml((50, 2 * MB)))
    before = set(threading.enumerate())
    meter = Meter()
    with pytest.raises(KeyError), meter:
        raise KeyError("in the block")
    assert meter.used.wall > 0
    assert set(threading.enumerate()) <= before


@needs_peak
@pytest.mark.usefixtures("no_gpu")
def test_only_the_first_of_two_overlapping_blocks_has_a_peak() -> None:
    with Meter() as outer:
        block = b"x" * (80 * MB)
        del block
        with Meter() as inner:
            pass
    assert outer.used.rss_peak_mb is not None
    assert inner.used.rss_mean_mb is not None
    assert outer.used.rss_peak_mb > inner.used.rss_mean_mb + 50
    assert inner.used.rss_peak_mb is None
    assert inner.used.reasons["rss_peak_mb"] == "another block is being measured, and a process has one peak"


@needs_peak
def test_a_block_that_fails_releases_the_peak_for_the_next() -> None:
    with pytest.raises(KeyError), Meter():
        raise KeyError("in the block")
    with Meter() as meter:
        pass
    assert meter.used.rss_peak_mb is not None


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (None, "the kernel's peak cannot be reset ([Errno 2] No such file or directory"),
        (b"VmRSS:\t  2232 kB\n", "the kernel's peak cannot be read (no VmHWM)"),
    ],
)
def test_a_missing_kernel_peak_is_none_and_not_the_largest_reading(
    status: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path / "proc"
    monkeypatch.setattr(utilization, "PROC_SELF", proc)
    if status:
        proc.mkdir()
        (proc / "status").write_bytes(status)
    for _ in range(2):  # the second shows that the first released the mark
        with Meter() as meter:
            pass
        assert meter.used.rss_mean_mb is not None
        assert meter.used.rss_peak_mb is None
        assert meter.used.reasons["rss_peak_mb"].startswith(reason)


@pytest.mark.usefixtures("no_gpu")
def test_the_peak_is_never_below_the_mean_when_the_kernel_mark_lags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgecloud_sd.host.utilization.psutil.Process", lambda: FakeProcess(first=30 * MB, rest=30 * MB)
    )
    (tmp_path / "status").write_bytes(b"VmHWM:\t       3 kB\n")
    monkeypatch.setattr(utilization, "PROC_SELF", tmp_path)
    assert HighWaterMark().read() == 3072
    assert (tmp_path / "clear_refs").read_bytes() == b"5"
    with Meter() as meter:
        pass
    assert (meter.used.rss_mean_mb, meter.used.rss_peak_mb) == (30, 30)


@pytest.mark.usefixtures("no_gpu")
def test_gpu_figures_are_none_with_a_reason_without_a_gpu() -> None:
    with Meter() as meter:
        pass
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb) == (None, None)
    assert meter.used.reasons["gpu_percent"] == meter.used.reasons["gpu_memory_mb"] == "no GPU here"


@pytest.mark.usefixtures("ends_only")
def test_the_shortest_block_is_read_and_a_gpu_only_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml((30, 4 * MB))
    with_gpu(monkeypatch, nvml)
    with Meter() as meter:
        assert nvml.used == []
    assert meter.used.rss_mean_mb is not None
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb) == (30, 4)
    assert not {"gpu_percent", "gpu_memory_mb"} & set(meter.used.reasons)


@pytest.mark.usefixtures("fast")
def test_the_mean_utilisation_and_the_largest_memory_of_a_gpu_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml((10, 3 * MB), (90, 9 * MB), (20, 6 * MB))
    with_gpu(monkeypatch, nvml)
    with Meter() as meter:
        assert nvml.enough.wait(10)
    assert meter.used.gpu_percent == pytest.approx(sum(nvml.percent) / len(nvml.percent))
    assert meter.used.gpu_memory_mb == max(nvml.used) / MB == 9


@pytest.mark.usefixtures("fast")
def test_a_gpu_that_stops_answering_keeps_its_readings_and_memory_is_read_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml((10, 1 * MB), (30, 2 * MB), until=2)
    sampler = Sampler(nvml, "gpu 0")
    assert nvml.enough.wait(10)
    process = FakeProcess(first=1, rest=1)
    monkeypatch.setattr(sampler, "_process", process)
    assert process.enough.wait(10)
    sampler.stop()
    assert (sampler.gpu_percent.readings, sampler.gpu_memory.readings) == ([10, 30], [1 * MB, 2 * MB])
    assert sampler.gpu_percent.reason == "the GPU stopped reporting its utilisation (GPU is lost)"


def test_a_gpu_that_never_answers_has_no_figures_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, FakeNvml((0, 0), until=0))
    with Meter() as meter:
        pass
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb) == (None, None)
    assert meter.used.reasons["gpu_percent"] == "the GPU does not report its utilisation (GPU is lost)"
    assert meter.used.reasons["gpu_memory_mb"] == "the GPU does not report its memory (GPU is lost)"


@pytest.mark.usefixtures("ends_only")
@pytest.mark.parametrize(
    ("missing", "subject", "figures"),
    [
        ("used", {"gpu_memory_mb": "memory"}, (30, None)),  # a GPU that shares the memory of its CPU, such as a GB10
        ("gpu", {"gpu_percent": "utilisation"}, (None, 4)),  # a GPU that is divided into instances
    ],
)
def test_a_figure_that_a_gpu_does_not_report_leaves_the_other(
    missing: str, subject: dict[str, str], figures: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, FakeNvml((30, 4 * MB), without=[missing]))
    with Meter() as meter:
        pass
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb) == figures
    reasons = {name: reason for name, reason in meter.used.reasons.items() if name.startswith("gpu")}
    assert reasons == {name: f"the GPU does not report its {text} (Not Supported)" for name, text in subject.items()}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Install an NVML with a handle for any index or UUID."""
    nvml = SimpleNamespace(
        NVMLError=FakeNvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"index {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: f"UUID {uuid}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def install_torch(monkeypatch: pytest.MonkeyPatch, uuids: dict[str, str]) -> None:
    """Install a torch with these GPUs: UUIDs by device name."""

    def properties(device: str) -> SimpleNamespace:
        if device not in uuids:
            raise AssertionError("Invalid device id")
        return SimpleNamespace(uuid=uuids[device])

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(get_device_properties=properties)))


def test_a_missing_nvidia_ml_py_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert utilization.find_gpu.__wrapped__("cuda") == (None, None, "nvidia-ml-py is not installed")


def test_a_missing_driver_gives_the_reason_of_nvml(monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace) -> None:
    def fail() -> NoReturn:
        raise FakeNvml.NVMLError("NVML Shared Library Not Found")

    monkeypatch.setattr(driver, "nvmlInit", fail)
    reason = "no NVIDIA GPU can be read (NVML Shared Library Not Found)"
    assert utilization.find_gpu.__wrapped__("cpu") == (driver, None, reason)


def test_a_device_that_is_not_a_gpu_uses_the_first_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace
) -> None:
    install_torch(monkeypatch, {})
    assert utilization.find_gpu.__wrapped__("cpu") == (driver, "index 0", "")


def test_a_gpu_is_identified_by_the_uuid_of_torch_and_not_by_its_index(
    monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace
) -> None:
    install_torch(monkeypatch, {"cuda": "8932f937", "cuda:0": "8932f937", "cuda:1": "04a7c0de"})
    assert utilization.find_gpu.__wrapped__("cuda") == (driver, "UUID GPU-8932f937", "")
    assert utilization.find_gpu.__wrapped__("cuda:1") == (driver, "UUID GPU-04a7c0de", "")


def test_a_part_of_a_gpu_is_identified_by_its_own_uuid(
    monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace
) -> None:
    def find(uuid: str) -> str:
        if uuid.startswith("GPU-"):
            raise FakeNvml.NVMLError("Not Found")
        return uuid

    monkeypatch.setattr(driver, "nvmlDeviceGetHandleByUUID", find)
    install_torch(monkeypatch, {"cuda": "8932f937"})
    assert utilization.find_gpu.__wrapped__("cuda") == (driver, "MIG-8932f937", "")


def test_a_gpu_that_torch_cannot_see_is_not_read(monkeypatch: pytest.MonkeyPatch, driver: SimpleNamespace) -> None:
    install_torch(monkeypatch, {"cuda:0": "8932f937"})
    assert utilization.find_gpu.__wrapped__("cuda:7") == (driver, None, "no NVIDIA GPU can be read (Invalid device id)")


def test_a_meter_reads_the_gpu_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    def find_gpu(device: str) -> tuple[None, None, str]:
        devices.append(device)
        return None, None, "no GPU here"

    monkeypatch.setattr(utilization, "find_gpu", find_gpu)
    for meter in (Meter("cuda:1"), Meter()):
        with meter:
            pass
    assert devices == ["cuda:1", "cpu"]
