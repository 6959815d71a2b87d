"""What a block of code used: shares of its own wall time, never absolute seconds, so that a slow machine passes too."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from types import SimpleNamespace
from typing import NoReturn

import pytest

from edgecloud_sd import utilization
from edgecloud_sd.utilization import GpuSampler, Meter, Utilization


class FakeNvml:
    """A GPU that gives `readings` of (per cent, bytes), the last again and again, and fails after `until` of them."""

    class NVMLError(Exception):
        pass

    def __init__(self, *readings: tuple[int, int], until: int | None = None) -> None:
        self._readings = itertools.islice(itertools.chain(readings, itertools.repeat(readings[-1])), until)
        self.percent: list[int] = []
        self.used: list[int] = []
        self.enough = threading.Event()

    def nvmlDeviceGetUtilizationRates(self, device: object) -> SimpleNamespace:  # noqa: N802
        assert device == "gpu 0"
        try:
            percent, self._next_used = next(self._readings)
        except StopIteration:
            self.enough.set()
            raise self.NVMLError("GPU is lost") from None
        self.percent.append(percent)
        return SimpleNamespace(gpu=percent)

    def nvmlDeviceGetMemoryInfo(self, device: object) -> SimpleNamespace:  # noqa: N802
        assert device == "gpu 0"
        self.used.append(self._next_used)
        if len(self.used) == 5:
            self.enough.set()
        return SimpleNamespace(used=self._next_used)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "GPU_PERIOD", 0.001)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "first_gpu", lambda: (None, None, "no GPU here"))


def burn(seconds: float) -> None:
    """Keep one thread busy for so much CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.usefixtures("no_gpu")
def test_a_busy_thread_uses_about_one_core() -> None:
    with Meter() as meter:
        burn(0.1)
    # the lower bound allows for a machine that is busy with something else
    assert 10 <= meter.used.cpu_percent <= 130


@pytest.mark.usefixtures("no_gpu")
def test_the_cpu_time_of_every_thread_counts() -> None:
    threads = [threading.Thread(target=burn, args=(0.05,)) for _ in range(2)]
    before = time.process_time()
    with Meter() as meter:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 0.09 <= meter.used.cpu <= time.process_time() - before


@pytest.mark.usefixtures("no_gpu")
def test_a_sleeping_block_uses_next_to_no_cpu() -> None:
    with Meter() as meter:
        time.sleep(0.1)
    assert 0 <= meter.used.cpu_percent < 30


def test_cpu_percent_is_cpu_seconds_over_wall_seconds() -> None:
    assert Utilization(wall=2.0, cpu=3.0, rss_mb=1.0).cpu_percent == 150


@pytest.mark.usefixtures("no_gpu")
def test_memory_that_is_held_is_seen_in_mb() -> None:
    with Meter() as before:
        pass
    with Meter() as after:
        held = bytearray(b"x" * 50_000_000)
    assert len(held) == 50_000_000
    assert 30 < after.used.rss_mb - before.used.rss_mb < 150


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_its_figures_are_none_with_a_reason() -> None:
    with Meter() as meter:
        pass
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb) == (None, None)
    assert meter.used.reasons == {"gpu_percent": "no GPU here", "gpu_memory_mb": "no GPU here"}


@pytest.mark.usefixtures("fast")
def test_a_meter_reads_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml((50, 2_000_000))
    monkeypatch.setattr(utilization, "first_gpu", lambda: (nvml, "gpu 0", ""))
    with Meter() as meter:
        assert nvml.enough.wait(10)
    assert (meter.used.gpu_percent, meter.used.gpu_memory_mb, meter.used.reasons) == (50, 2, {})


@pytest.mark.usefixtures("fast")
def test_a_block_that_fails_is_measured_and_its_error_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "first_gpu", lambda: (FakeNvml((50, 2_000_000)), "gpu 0", ""))
    before = set(threading.enumerate())
    meter = Meter()
    with pytest.raises(KeyError), meter:
        raise KeyError("in the block")
    assert meter.used.wall > 0
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("fast")
def test_the_gpus_mean_per_cent_and_highest_memory_are_given() -> None:
    nvml = FakeNvml((10, 3_000_000), (90, 9_000_000), (20, 6_000_000))
    sampler = GpuSampler(nvml, "gpu 0")
    assert nvml.enough.wait(10)
    percent, memory = sampler.stop()
    assert percent == pytest.approx(sum(nvml.percent) / len(nvml.percent))
    assert memory == max(nvml.used) / 1e6 == 9
    assert sampler.reason == ""


def test_even_the_shortest_block_is_read_once() -> None:
    sampler = GpuSampler(FakeNvml((30, 4_000_000)), "gpu 0")
    assert sampler.stop() == (30, 4)


@pytest.mark.usefixtures("fast")
def test_a_gpu_that_stops_answering_gives_what_it_said_and_a_reason() -> None:
    nvml = FakeNvml((10, 1_000_000), (30, 2_000_000), until=2)
    sampler = GpuSampler(nvml, "gpu 0")
    assert nvml.enough.wait(10)
    assert sampler.stop() == (20, 2)
    assert sampler.reason == "the GPU stopped answering (GPU is lost)"


def test_a_gpu_that_never_answers_gives_none_and_a_reason() -> None:
    sampler = GpuSampler(FakeNvml((0, 0), until=0), "gpu 0")
    assert sampler.stop() == (None, None)
    assert "GPU is lost" in sampler.reason


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("until", [None, 2])
def test_the_thread_ends_whether_the_gpu_answers_or_not(until: int | None) -> None:
    before = set(threading.enumerate())
    nvml = FakeNvml((10, 1), until=until)
    sampler = GpuSampler(nvml, "gpu 0")
    assert nvml.enough.wait(10)
    sampler.stop()
    assert set(threading.enumerate()) <= before


def test_without_a_gpu_no_thread_is_started() -> None:
    before = set(threading.enumerate())
    sampler = GpuSampler(None, None, "no GPU here")
    assert set(threading.enumerate()) <= before
    assert sampler.stop() == (None, None)
    assert sampler.reason == "no GPU here"


def test_without_nvidia_ml_py_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert utilization.first_gpu.__wrapped__() == (None, None, "nvidia-ml-py is not installed")


def test_without_a_driver_the_reason_is_nvmls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise FakeNvml.NVMLError("NVML Shared Library Not Found")

    nvml = SimpleNamespace(NVMLError=FakeNvml.NVMLError, nvmlInit=fail)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    _, device, reason = utilization.first_gpu.__wrapped__()
    assert device is None
    assert reason == "no NVIDIA GPU can be read (NVML Shared Library Not Found)"


def test_with_a_driver_the_first_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=FakeNvml.NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}"
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert utilization.first_gpu.__wrapped__() == (nvml, "gpu 0", "")
