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

from edgecloud_sd.host.limits import MEMORY_OPTION, lift_memory_limit
from edgecloud_sd.host.passwords import hide_passwords
from edgecloud_sd.host.terminal import escape_unencodable, join_lines
from edgecloud_sd.verifier import CloudFault

EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 130, 141  # 128 + SIGINT and SIGPIPE; argparse exits with 2
OWN_MODULES = ("edgecloud_sd", "bench", "tests")
GPU_MEMORY = re.compile(r"(CUDA|HIP|XPU|MPS)\b.*out of memory", re.IGNORECASE | re.DOTALL)
CPU_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|unable to allocate|bad_alloc"
    r"|failed to map segment|can't start new thread"
    r"|could not (create a primitive|create a memory object|execute a primitive)$"  # all that oneDNN says
    r"|error return without exception set|returned NULL without setting an exception",  # an extension did not check
    re.IGNORECASE,
)
GPU_MEMORY_ADVICE = (
    "choose a smaller number format (--edge-dtype or --cloud-dtype float16), a smaller model or another device; "
    "nvidia-smi shows the processes that use the GPU"
)
CPU_MEMORY_ADVICE = "choose a smaller model or number format"


@dataclass(frozen=True)
class ExpectedError:
    """A failure that a user can mend: one line that says how, and the exit status."""

    line: str
    status: int = EXIT_FAILURE


def explain_error(error: BaseException, limit_gb: float | None = None) -> ExpectedError | None:
    """Return the line and the exit status of an expected failure, or None for a bug.

    `limit_gb` is the memory limit under which it failed, as `limits.lift_memory_limit` returns it.
    """
    if isinstance(error, KeyboardInterrupt):
        return ExpectedError("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        return ExpectedError("the reader of the output has closed it", EXIT_CLOSED_PIPE)
    if isinstance(error, ImportError) and error.__cause__:  # a library hides the reason why it cannot import a module
        return explain_error(error.__cause__, limit_gb)
    if lack := find_out_of_memory(error):
        return ExpectedError(explain_out_of_memory(lack, limit_gb))
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing_package((error.name or "").partition(".")[0])
    if isinstance(error, ValueError | OSError | FloatingPointError | CloudFault):
        return ExpectedError(to_one_line(error))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a call failed for lack of memory, of the CPU or of a GPU."""
    return find_out_of_memory(error) is not None


def find_out_of_memory(error: BaseException) -> BaseException | None:
    """Return the lack of memory, of the CPU or of a GPU, that an error is or comes from; None without one.

    Libraries wrap it in errors of any type. torch raises a plain RuntimeError, and an operating system OSError. A
    CloudFault may repeat the words of a server about its own memory.
    """
    links: list[BaseException] = []
    link: BaseException | None = error if isinstance(error, Exception) else None
    while link is not None and not isinstance(link, CloudFault):
        if isinstance(link, MemoryError) or is_gpu_out_of_memory(link) or CPU_MEMORY.search(str(link)):
            links.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return next((link for link in links if isinstance(link, MemoryError)), links[0] if links else None)


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether a call failed for lack of memory of a GPU."""
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | MemoryError) and bool(GPU_MEMORY.search(str(error)))


def explain_out_of_memory(error: BaseException, limit_gb: float | None = None) -> str:
    """Return the line for a lack of memory, which names the memory limit that was in force, if any."""
    text = to_one_line(error).removesuffix(".")
    reason = "" if text == type(error).__name__ else f" ({text})"
    if is_gpu_out_of_memory(error):
        return f"the GPU is used up{reason}: {GPU_MEMORY_ADVICE}"
    if limit_gb is not None:
        return f"{MEMORY_OPTION}: {limit_gb:g} is used up{reason}: raise it, or {CPU_MEMORY_ADVICE}"
    return f"memory is used up{reason}: {CPU_MEMORY_ADVICE}"


def to_one_line(error: BaseException) -> str:
    """Return the message of an error in one line without passwords, or the name of its type if it has none.

    An error of the operating system begins with the file, in place of its number.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return hide_passwords(f"{error.filename}: {error.strerror}")
    return hide_passwords(join_lines(str(error))) or type(error).__name__


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
        expected = explain_error(error, lift_memory_limit())
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
        print(f"warning: {hide_passwords(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
