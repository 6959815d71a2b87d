"""Devices, number formats and CPU threads: names, defaults and checks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache

from edgecloud_sd.host.cores import usable_cores

AUTO = "auto"
DTYPES = ("float32", "float16", "bfloat16", "float64")  # torch's names
LOSSLESS_DTYPES = ("float32", "float64")  # lossless decoding promises equal tokens in these
QUANTISED_DTYPES = ("int8", "int4")  # weights of an edge on a CPU
DTYPES_OR_AUTO = (AUTO, *DTYPES)
# A model below this many parameters runs on one thread. Its matrices are too small to share out, and on a busy
# machine each step waits for the slower thread (measured: captions up to ten times slower).
SMALL_MODEL_PARAMETERS = 50_000_000


def check_device(device: str) -> None:
    """Raise ValueError if this machine does not have the torch device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(f"device {device!r} cannot be used here: {reason}; {_advise_device()}") from error


def _advise_device() -> str:
    """Return the devices of this machine, as advice."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return "this machine has no GPU that torch can use (nvidia-smi): choose cpu, or auto for the cloud"
    gpus = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    return f"choose cpu or {gpus}"


def free_memory() -> None:
    """Return memory that nothing uses any more to the device, so that a call that ran out of it may try again."""
    import torch

    gc.collect()  # a failed call leaves cycles that contain tensors
    torch.cuda.empty_cache()  # nothing happens without a GPU


def explain_not_finite(dtype: str) -> str:
    """Return the message for logits that are not finite in a number format."""
    problem = f"the model gave logits that are not finite in {dtype}"
    if dtype in ("float16", "bfloat16"):
        return f"{problem}, which overflows: choose float32 (--edge-dtype, --cloud-dtype)"
    return f"{problem}: its weights or the audio are at fault, so download the checkpoint again, or check the clip"


def parse_cloud_dtype(text: str) -> str:
    """Return the number format of a cloud, or raise ValueError with the known ones."""
    known = ", ".join(DTYPES_OR_AUTO)
    if text in QUANTISED_DTYPES:
        raise ValueError(f"is for the edge alone (--edge-dtype): choose one of {known}")
    if text not in DTYPES_OR_AUTO:
        raise ValueError(f"is not one of {known}")
    return text


def resolve_device(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and the number format, with `AUTO` replaced by the choice for this machine."""
    if device == AUTO:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == AUTO:
        dtype = "float16" if device.startswith("cuda") else "float32"
    return device, dtype


def choose_threads(threads: int | None, parameters: Sequence[int]) -> int:
    """Return the CPU threads of torch for models of this process, given the number of parameters of each.

    None means one thread if every model is small. Otherwise it is torch's own choice, at most one per usable core.
    """
    if threads is not None:
        return threads
    small = all(count < SMALL_MODEL_PARAMETERS for count in parameters)
    return 1 if small else min(_torch_threads(), usable_cores())


def use_threads(threads: int) -> None:
    """Set the CPU threads of torch for this process, at most as many as there are usable cores."""
    import torch

    _torch_threads()  # read before the first change
    threads = min(threads, usable_cores())
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def start_threads() -> None:
    """Start the threads with which torch computes for the calling thread: by a computation that uses them all.

    If one cannot start later, under a memory limit, the library that starts it ends the process.
    """
    import torch

    torch.ones(2**20).add_(1)


@cache
def _torch_threads() -> int:
    """Return torch's own choice for this machine."""
    import torch

    return torch.get_num_threads()
