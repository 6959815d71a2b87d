"""A server on loopback in a process of its own, for one run: `--cloud-url auto`.

Nothing of it has a name on the disk, so nothing is left, however this process ends. The key goes through a pipe, and
the log is a file that the system deletes when both processes have ended.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import IO

import psutil

from edgecloud_sd.host.errors import EXIT_INTERRUPTED
from edgecloud_sd.host.terminal import join_lines

SERVER_START_SECONDS = 1800.0  # for a whole start: the first one downloads the checkpoint, which may have 15 GB
STALLED_SECONDS = 60.0  # without work during a start; computing, reading and downloading all use the CPU
LEAST_WORK = 0.1  # CPU seconds: a process that waits for a file or a lock uses none
TOLD_TO_STOP = (  # statuses of a server that was told to stop
    None,  # killed, because it did not stop in time
    0,  # in order
    EXIT_INTERRUPTED,  # while it started
    signal.SIGTERM,  # on Windows
    128 + signal.SIGTERM,  # told twice
)
STOP_SECONDS = 10.0  # for the server to end: it takes less, even in the middle of a call


@dataclass(frozen=True)
class Server:
    """A running server. No command line contains its key, because other users can read command lines."""

    url: str
    key: str
    process: subprocess.Popen[str]


@contextmanager
def run_server(
    model: str, device: str = "cpu", dtype: str = "float32", options: Sequence[str] = ()
) -> Iterator[Server]:
    """Start a server, wait until it listens, and stop it at the end.

    Raise OSError with the last line of its log if it does not start, or hangs while it does. Warn if it ends before
    the block. The server also stops if this process dies, because it reads a pipe that closes then.
    """
    key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--until-stdin-closes", "--port", "0"]
    command += ["--model", model, "--device", device, "--dtype", dtype, "--api-key-file", "-", *options]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, encoding="utf-8", errors="replace", bufsize=1
        )
        url = ""
        try:
            url = _start(process, key, log)
            yield Server(url, key, process)
        finally:
            status = _stop(process)
            if url and status not in TOLD_TO_STOP:
                line = f"the cloud's server ended during the run (status {status}): {_last_line(log)}"
                warnings.warn(line, stacklevel=3)


def _start(process: subprocess.Popen[str], key: str, log: IO[bytes]) -> str:
    """Hand the key to a server and return the URL that it prints when it listens. Raise OSError if it does not."""
    assert process.stdin is not None
    with suppress(OSError):  # the server has ended, and its log says why
        process.stdin.write(key + "\n")
    urls: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_url, args=(process.stdout, urls), daemon=True).start()
    start = last_progress = time.monotonic()
    work = 0.0  # CPU seconds at the last progress
    while (now := time.monotonic()) < min(start + SERVER_START_SECONDS, last_progress + STALLED_SECONDS):
        with suppress(Empty):
            url = urls.get(timeout=0.2)
            if url:
                return url
            _stop(process)
            raise OSError(f"the cloud's server did not start: {_last_line(log)}")
        with suppress(psutil.Error):  # it has just ended
            times = psutil.Process(process.pid).cpu_times()
            if times.user + times.system >= work + LEAST_WORK:
                work, last_progress = times.user + times.system, now
    process.kill()
    process.wait()
    problem = f"did not start within {now - start:.0f} s, {now - last_progress:.0f} of them without any work"
    raise OSError(f"the cloud's server {problem}, and was killed: {_last_line(log)}")


def _read_url(stdout: IO[str], urls: SimpleQueue[str]) -> None:
    """Put the first URL on the queue, and "" when the server ends or closes its stdout. Read on, so that it may print.

    Only another thread can wait for a line and for a deadline at once on every system.
    """
    with stdout:
        for line in stdout:
            if line.startswith("http://"):
                urls.put(line.strip())
    urls.put("")


def _last_line(log: IO[bytes]) -> str:
    """Return the last line of the log of a server that has ended. A running one would go on at the place read last."""
    log.seek(0)
    lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return join_lines(lines[-1]) if lines else "its log is empty"


def _stop(process: subprocess.Popen[str]) -> int | None:
    """Close the server's stdin, which tells it to stop. Return its status, or None if it had to be killed."""
    assert process.stdin is not None
    with suppress(OSError):  # it ended before it had read the key
        process.stdin.close()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also after a second Ctrl-C
        process.kill()
        process.wait()
