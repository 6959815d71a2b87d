"""Silence for libraries that write to the file descriptor of stderr past Python, such as the MP3 decoder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
_lock = threading.RLock()  # the descriptor belongs to the whole process


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Send what the process writes to the descriptor of stderr nowhere in the block. Keep blocks short."""
    with _lock:
        try:
            kept = os.dup(STDERR)
        except OSError:  # a process without stderr
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), STDERR)
            yield
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)
