"""CPU, memory and GPU of a block of code, measured around it: nothing of this runs inside the decode loop."""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil

from edgecloud_sd.host.limits import PROC_SELF

PERIOD = 0.05  # s between two readings; one costs up to 0.3 ms of CPU with its wake-up, so 0.6 % of a core
UTILIZATION_FIELDS = ("cpu_percent", "rss_mean_mb", "rss_peak_mb", "gpu_percent", "gpu_memory_mb")


@dataclass(frozen=True)
class Utilization:
    """What the process used in a block. A figure that is not measured is None, and `reasons` says why, by its name.

    A GPU that stops answering keeps the figures read until then, with a reason too. MB are 10^6 bytes.
    """

    wall: float  # s
    cpu: float | None  # s of CPU time, all threads of this process; the reason goes by "cpu_percent"
    rss_mean_mb: float | None  # resident memory: mean of the readings, each weighted by its time
    rss_peak_mb: float | None  # resident memory: highest moment, between readings too
    gpu_percent: float | None = None  # plain mean of the readings, each NVML's own mean over the last 1/6 to 1 s
    gpu_memory_mb: float | None = None  # highest reading, whole device
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def cpu_percent(self) -> float | None:
        """100 x CPU seconds / wall seconds: exact, and above 100 with several cores."""
        return None if self.cpu is None else 100 * self.cpu / self.wall


def unmeasured(wall: float, reason: str) -> Utilization:
    """A block of `wall` seconds in which nothing was measured, for one reason."""
    return Utilization(wall, None, None, None, reasons=dict.fromkeys(UTILIZATION_FIELDS, reason))


class Meter:
    """`with Meter("cuda:1") as meter: ...`, then `meter.used`, whether the block ends or raises.

    `meter.stop()` ends it before the block does.

    The GPU is that of the torch device `device`, or the machine's first if that is no GPU. Of meters that overlap only
    the one that began first gives a peak of memory.
    """

    used: Utilization

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._running = False

    def __enter__(self) -> Meter:
        self._sampler = Sampler(*gpu(self._device))
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
        """What was used until here; nothing more the second time."""
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
            "gpu_percent": self._sampler.reason,
            "gpu_memory_mb": self._sampler.reason,
        }
        self.used = Utilization(
            wall=wall,
            cpu=cpu,
            rss_mean_mb=mean_over_time(rss) / 1e6,
            # the kernel counts in batches, so that its mark can lag a reading by some pages a core
            rss_peak_mb=None if mark is None else max(mark, *(each for _, each in rss)) / 1e6,
            gpu_percent=sum(percent) / len(percent) if percent else None,
            gpu_memory_mb=max(memory) / 1e6 if memory else None,
            reasons={figure: reason for figure, reason in missing.items() if reason},
        )


@functools.cache
def gpu(device: str) -> tuple[Any, Any, str]:
    """NVML, its handle for the GPU of a torch device (the first for "cpu"), and, where there is none, the reason."""
    try:
        import pynvml
    except ImportError:
        return None, None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        if not device.startswith("cuda"):
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0), ""
        import torch

        # NVML counts every GPU; CUDA those of CUDA_VISIBLE_DEVICES, in an order of its own: both know the UUID
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), ""
    except (pynvml.NVMLError, AssertionError, RuntimeError) as error:  # the last two are torch's, without CUDA
        return pynvml, None, f"no NVIDIA GPU can be read ({error})"


class HighWaterMark:
    """The kernel's peak of this process's resident memory, reset here. `reason` says why there is none.

    There is no second best: the largest of some readings would be a floor.
    """

    _taken = threading.Lock()  # a process has one mark: a second reset would spoil the first block's peak

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
        """The peak since the reset in bytes, or None. To be called once."""
        if self.reason:
            return None
        try:
            found = re.search(rb"^VmHWM:\s*(\d+) kB$", (PROC_SELF / "status").read_bytes(), re.MULTILINE)
        finally:
            self._taken.release()
        if not found:
            self.reason = "the kernel's peak cannot be read (no VmHWM)"
            return None
        return int(found[1]) * 1024


class Sampler:
    """Reads resident memory and, if there is one, a GPU, on one thread until stopped.

    Memory is read at the start and at the end as well. A GPU is read at the end but not at the start: what it says
    there is about what came before. `reason` says why nothing (more) was read of it.
    """

    def __init__(self, nvml: Any, handle: Any, reason: str = "") -> None:
        self.reason = reason
        self.rss: list[tuple[int, int]] = []  # (ns, bytes)
        self.gpu_percent: list[float] = []
        self.gpu_memory: list[int] = []  # bytes
        self._nvml = nvml
        self._handle = handle
        self._process = psutil.Process()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._read_memory()
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(PERIOD):
            self._read_memory()
            self._read_gpu()

    def _read_memory(self) -> None:
        self.rss.append((time.perf_counter_ns(), self._process.memory_info().rss))

    def _read_gpu(self) -> None:
        if self.reason:
            return
        try:
            percent = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        except self._nvml.NVMLError as error:
            self.reason = f"the GPU stopped answering ({error})"
            return
        self.gpu_percent.append(percent)
        self.gpu_memory.append(memory)

    def stop(self) -> None:
        """End the thread and read once more. To be called once."""
        self._stopped.set()
        self._thread.join()
        self._read_memory()
        self._read_gpu()


def mean_over_time(readings: list[tuple[int, int]]) -> float:
    """Mean of (moment, amount), in time order and not all at one moment, a straight line drawn between two readings."""
    # whole numbers up to the division: rounding never lifts the mean above the largest reading
    doubled = sum((after - before) * (a + b) for (before, a), (after, b) in itertools.pairwise(readings))
    return doubled / (2 * (readings[-1][0] - readings[0][0]))
