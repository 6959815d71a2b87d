"""CPU, memory and GPU of a block of code, measured around it: nothing of this runs inside the decode loop."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil

GPU_PERIOD = 0.05  # s between two readings; NVML itself averages over 1/6 to 1 s


@dataclass(frozen=True)
class Utilization:
    """What the process used in the block. What could not be measured is None, and `reasons` says why.

    A GPU that stops answering keeps the figures read until then, with a reason too.
    """

    wall: float  # s
    cpu: float  # s of CPU time, all threads of this process
    rss_mb: float  # resident memory at the end, MB (10^6 bytes)
    gpu_percent: float | None = None  # mean over the block
    gpu_memory_mb: float | None = None  # highest in the block, whole device
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def cpu_percent(self) -> float:
        """100 x CPU seconds / wall seconds: exact, and above 100 with several cores."""
        return 100 * self.cpu / self.wall


class Meter:
    """`with Meter() as meter: ...`, then `meter.used`."""

    used: Utilization

    def __init__(self) -> None:
        self._process = psutil.Process()

    def __enter__(self) -> Meter:
        self._gpu = GpuSampler(*first_gpu())
        self._cpu = time.process_time()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wall = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        gpu_percent, gpu_memory = self._gpu.stop()
        self.used = Utilization(
            wall=wall,
            cpu=cpu,
            rss_mb=self._process.memory_info().rss / 1e6,
            gpu_percent=gpu_percent,
            gpu_memory_mb=gpu_memory,
            reasons={"gpu_percent": self._gpu.reason, "gpu_memory_mb": self._gpu.reason} if self._gpu.reason else {},
        )


@functools.cache
def first_gpu() -> tuple[Any, Any, str]:
    """NVML, its handle for the first NVIDIA GPU, and, where there is none, the reason."""
    try:
        import pynvml
    except ImportError:
        return None, None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0), ""
    except pynvml.NVMLError as error:
        return pynvml, None, f"no NVIDIA GPU can be read ({error})"


class GpuSampler:
    """Reads a GPU on a thread of its own until stopped. `reason` says why there is nothing to read."""

    def __init__(self, nvml: Any, device: Any, reason: str = "") -> None:
        self.reason = reason
        self._percent: list[float] = []
        self._memory: list[float] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if not reason:
            self._thread = threading.Thread(target=self._sample, args=(nvml, device), daemon=True)
            self._thread.start()

    def _sample(self, nvml: Any, device: Any) -> None:
        while True:
            try:
                self._percent.append(nvml.nvmlDeviceGetUtilizationRates(device).gpu)
                self._memory.append(nvml.nvmlDeviceGetMemoryInfo(device).used / 1e6)
            except nvml.NVMLError as error:
                self.reason = f"the GPU stopped answering ({error})"
                return
            if self._stopped.wait(GPU_PERIOD):
                return

    def stop(self) -> tuple[float | None, float | None]:
        """Mean utilisation in per cent and highest memory in MB, or (None, None)."""
        self._stopped.set()
        if self._thread:
            self._thread.join()
        if not self._percent or not self._memory:
            return None, None
        return sum(self._percent) / len(self._percent), max(self._memory)
