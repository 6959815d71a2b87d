"""Expected failures as one line on stderr and an exit status. Anything else is a bug, and keeps its traceback."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata

from edgecloud_sd.host.terminal import escape_unencodable, join_lines
from edgecloud_sd.verifier import CloudFault

EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 130, 141  # 128 + SIGINT and SIGPIPE; argparse exits with 2
OWN_MODULES = ("edgecloud_sd", "bench", "tests")
GPU_MEMORY = re.compile(r"(CUDA|HIP|XPU|MPS)\b.*out of memory", re.IGNORECASE | re.DOTALL)
CPU_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|unable to allocate|bad_alloc"
    r"|failed to map segment|can't start new thread",
    re.IGNORECASE,
)
USED_UP = "is used up"
GPU_MEMORY_ADVICE = (
    "choose a smaller number format (--edge-dtype or --cloud-dtype float16), a smaller model or another device; "
    "nvidia-smi shows the processes that use the GPU"
)
CPU_MEMORY_ADVICE = "choose a smaller model or number format, or raise --max-memory-gb if it is given"


@dataclass(frozen=True)
class ExpectedError:
    """A failure that a user can mend: one line that says how, and the exit status."""

    line: str
    status: int = EXIT_FAILURE


def explain_error(error: BaseException) -> ExpectedError | None:
    """Return the line and the exit status of an expected failure, or None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return ExpectedError("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        return ExpectedError("the reader of the output has closed it", EXIT_CLOSED_PIPE)
    if isinstance(error, ImportError) and error.__cause__:  # a library hides the reason why it cannot import a module
        return explain_error(error.__cause__)
    if is_out_of_memory(error):
        return ExpectedError(explain_out_of_memory(error))
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing_package((error.name or "").partition(".")[0])
    if isinstance(error, ValueError | OSError | FloatingPointError | CloudFault):
        return ExpectedError(to_one_line(error))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a call failed for lack of memory, of the CPU or of a GPU."""
    if isinstance(error, MemoryError) or is_gpu_out_of_memory(error):
        return True
    # torch raises a plain RuntimeError on a CPU, and an operating system OSError or ImportError
    return isinstance(error, RuntimeError | OSError | ImportError) and bool(CPU_MEMORY.search(str(error)))


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether a call failed for lack of memory of a GPU."""
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(GPU_MEMORY.search(str(error)))


def explain_out_of_memory(error: BaseException) -> str:
    """Return the line for a failure for lack of memory."""
    place, advice = ("the GPU", GPU_MEMORY_ADVICE) if is_gpu_out_of_memory(error) else ("memory", CPU_MEMORY_ADVICE)
    text = to_one_line(error).removesuffix(".")
    if USED_UP in text:  # the loader of a checkpoint has explained it, with the name of the checkpoint
        return text
    reason = "" if text == type(error).__name__ else f" ({text})"
    return f"{place} {USED_UP}{reason}: {advice}"


def to_one_line(error: BaseException) -> str:
    """Return the message of an error in one line, or the name of its type if it has none.

    An error of the operating system begins with the file, in place of its number.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return join_lines(str(error)) or type(error).__name__


@contextmanager
def errors_to_exit() -> Iterator[None]:
    """Turn an expected failure of the block into one line on stderr and an exit status, and flush stdout at its end.

    Both streams escape what they cannot encode.
    """
    escape_unencodable()
    try:
        if sys.stdout is None:  # closed before the start
            raise BrokenPipeError
        yield
        sys.stdout.flush()
    except BaseException as error:
        expected = explain_error(error)
        if expected is None:
            raise
        if expected.status == EXIT_CLOSED_PIPE:
            _drop_output()
        if expected.status == EXIT_FAILURE:
            sys.exit(f"error: {expected.line}")
        with suppress(OSError):
            print(f"error: {expected.line}", file=sys.stderr)
        sys.exit(expected.status)


def _explain_missing_package(module: str) -> ExpectedError | None:
    if not module or module in OWN_MODULES:
        return None
    extras = _extras_by_module()
    package = f"'edgecloud_sd[{extras[module]}]'" if module in extras else module
    return ExpectedError(f"the package {module} is not installed: pip install {package}")


def _extras_by_module() -> dict[str, str]:
    """Return the smallest extra of this package that installs a module, by the module's name."""
    pairs: list[tuple[str, str]] = []
    with suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("edgecloud_sd") or ():
            match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?[^;]*;.*extra == ['\"](\w+)['\"]", requirement)
            if match:
                pairs.append((match[1].lower().replace("-", "_"), match[2]))
    sizes = Counter(extra for _, extra in pairs)
    return dict(sorted(pairs, key=lambda pair: -sizes[pair[1]]))  # the last pair of a module stays


def _drop_output() -> None:
    """Send the rest of stdout nowhere, or the interpreter would fail again when it flushes it at the end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print each warning of the block as one line on stderr, without its place in the code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
