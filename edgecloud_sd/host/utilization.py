"""CPU, memory and GPU use of a block of code, measured from outside: no code here runs inside the decode loop."""

from __future__ import annotations

import functools
import itertools
import re
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil

from edgecloud_sd.host.cores import PROC_SELF
from edgecloud_sd.host.limits import start_outside_limit

# Seconds between two readings. One reading costs up to 0.3 ms of CPU time with its wake-up, which is 0.6 % of a core.
SAMPLING_PERIOD = 0.05
UTILIZATION_FIELDS = ("cpu_percent", "rss_mean_mb", "rss_peak_mb", "gpu_percent", "gpu_memory_mb")


@dataclass(frozen=True)
class Utilization:
    """The resources that the process used in a block; a MB is 10^6 bytes.

    A figure that was not measured is None, and `reasons` has the reason by the figure's name. A GPU that stops
    answering keeps its figures up to then, and has a reason too.
    """

    wall: float  # s
    cpu: float | None  # s of CPU time, all threads of this process; its reason is that of "cpu_percent"
    rss_mean_mb: float | None  # resident memory, mean over time of the readings
    rss_peak_mb: float | None  # resident memory, largest, between readings too
    gpu_percent: float | None = None  # mean of the readings; each is NVML's mean over the last 1/6 to 1 s
    gpu_memory_mb: float | None = None  # largest reading, whole device
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def cpu_percent(self) -> float | None:
        """100 x CPU seconds / wall seconds, above 100 with several cores."""
        return None if self.cpu is None else 100 * self.cpu / self.wall


def unmeasured(wall: float, reason: str) -> Utilization:
    """Return the record of a block of `wall` seconds in which nothing was measured, for one reason."""
    return Utilization(wall, None, None, None, reasons=dict.fromkeys(UTILIZATION_FIELDS, reason))


class Meter:
    """A context manager that measures its block: `with Meter("cuda:1") as meter: ...`, then `meter.used`.

    `used` is set when the block ends, by an error too, or earlier by `stop()`. The GPU is that of the torch device
    `device`, or the machine's first if the device is not a GPU. If two meters overlap, only the one that started first
    measures a memory peak.
    """

    used: Utilization

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._running = False

    def __enter__(self) -> Meter:
        self._sampler = Sampler(*find_gpu(self._device))
        self._mark = HighWaterMark()
        self._cpu = time.process_time()
        self._running = True
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the measurement and set `used`; a second call does nothing."""
        if not self._running:
            return
        self._running = False
        wall = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        self._sampler.stop()
        mark = self._mark.read()
        rss, percent, memory = self._sampler.rss, self._sampler.gpu_percent, self._sampler.gpu_memory
        missing = {
            "rss_peak_mb": self._mark.reason,
            "gpu_percent": percent.reason,
            "gpu_memory_mb": memory.reason,
        }
        self.used = Utilization(
            wall=wall,
            cpu=cpu,
            rss_mean_mb=mean_over_time(rss) / 1e6,
            # the kernel updates its mark in batches, so that it can lag a reading by some pages per core
            rss_peak_mb=None if mark is None else max(mark, *(size for _, size in rss)) / 1e6,
            gpu_percent=statistics.fmean(percent.readings) if percent.readings else None,
            gpu_memory_mb=max(memory.readings) / 1e6 if memory.readings else None,
            reasons={figure: reason for figure, reason in missing.items() if reason},
        )


@functools.cache
def find_gpu(device: str) -> tuple[Any, Any, str]:
    """Return NVML, its handle for the GPU of a torch device (the first for "cpu"), and the reason if it has none."""
    try:
        import pynvml
    except ImportError:
        return None, None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        if not device.startswith("cuda"):
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0), ""
        import torch

        # NVML numbers every GPU, and CUDA those of CUDA_VISIBLE_DEVICES in its own order: only the UUID is common
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), ""
        except pynvml.NVMLError:  # a part of a GPU (multi-instance GPU) has the other prefix
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}"), ""
    except (pynvml.NVMLError, AssertionError, RuntimeError) as error:  # torch without CUDA raises the last two
        return pynvml, None, f"no NVIDIA GPU can be read ({error})"


class HighWaterMark:
    """The kernel's peak of this process's resident memory, reset by the constructor.

    `reason` is not empty if the peak cannot be measured. The largest reading does not replace it, because that is only
    a lower bound.
    """

    _taken = threading.Lock()  # a process has one mark, and a second reset would spoil the first block's peak

    def __init__(self) -> None:
        self.reason = ""
        if not self._taken.acquire(blocking=False):
            self.reason = "another block is being measured, and a process has one peak"
            return
        try:
            (PROC_SELF / "clear_refs").write_bytes(b"5")  # Linux 4.0 or later, see proc_pid_clear_refs(5)
        except OSError as error:
            self._taken.release()
            self.reason = f"the kernel's peak cannot be reset ({error})"

    def read(self) -> int | None:
        """Return the peak since the reset in bytes, or None. Call this once."""
        if self.reason:
            return None
        try:
            match = re.search(rb"^VmHWM:\s*(\d+) kB$", (PROC_SELF / "status").read_bytes(), re.MULTILINE)
        finally:
            self._taken.release()
        if not match:
            self.reason = "the kernel's peak cannot be read (no VmHWM)"
            return None
        return int(match[1]) * 1024


class GpuFigure:
    """The readings of one figure of a GPU. Some GPUs report one figure and not another.

    `reason` is not empty if the figure was not read, or not to the end.
    """

    def __init__(self, subject: str, ask: Callable[[], float], errors: Any, reason: str) -> None:
        self.readings: list[float] = []
        self.reason = reason
        self._subject = subject
        self._ask = ask
        self._errors = errors

    def read(self) -> None:
        """Add a reading, unless the GPU did not answer an earlier one."""
        if self.reason:
            return
        try:
            self.readings.append(self._ask())
        except self._errors as error:
            verb = "stopped reporting" if self.readings else "does not report"
            self.reason = f"the GPU {verb} its {self._subject} ({error})"


class Sampler:
    """A thread that reads resident memory, and a GPU if there is one, until it is stopped.

    It also reads memory at the start and at the end. It does not read the GPU at the start, because that reading is a
    mean over earlier time.
    """

    def __init__(self, nvml: Any, handle: Any, reason: str = "") -> None:
        self.rss: list[tuple[int, int]] = []  # (ns, bytes)
        errors = nvml.NVMLError if nvml else ()
        self.gpu_percent = GpuFigure(
            "utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, errors, reason
        )
        self.gpu_memory = GpuFigure("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used, errors, reason)
        self._process = psutil.Process()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._read_memory()
        start_outside_limit(self._thread.start)

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLING_PERIOD):
            self._read_memory()
            self._read_gpu()

    def _read_memory(self) -> None:
        self.rss.append((time.perf_counter_ns(), self._process.memory_info().rss))

    def _read_gpu(self) -> None:
        self.gpu_percent.read()
        self.gpu_memory.read()

    def stop(self) -> None:
        """End the thread and read once more. Call this once."""
        self._stopped.set()
        self._thread.join()
        self._read_memory()
        self._read_gpu()


def mean_over_time(readings: list[tuple[int, int]]) -> float:
    """Return the mean over time of readings (moment, amount), with linear interpolation between two readings.

    The readings must be in time order and at two or more moments.
    """
    # whole numbers up to the division, so that rounding never raises the mean above the largest reading
    doubled = sum((after - before) * (a + b) for (before, a), (after, b) in itertools.pairwise(readings))
    return doubled / (2 * (readings[-1][0] - readings[0][0]))
