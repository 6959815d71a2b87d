"""The open files of this process, connections included, and the limit on their number."""

from __future__ import annotations

import math
import os
from contextlib import suppress


def raise_descriptor_limit() -> float:
    """Raise the limit on open files as far as this process may, and return it: infinity if there is none."""
    try:
        import resource
    except ImportError:  # not on Windows
        return math.inf
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def count_open_descriptors() -> int:
    """Return the number of open files of this process, or a usual number if the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64
