"""Runs with a server of their own that are killed: the files and the processes that stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from bench.attacks.table import AttackTable, Cell
from bench.attacks.target import write_tone

RUN_START_SECONDS = 120.0  # for the run to start its server
STAY_SECONDS = 15.0  # for which a process may outlive the run
SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP, "sigint": signal.SIGINT}


def measure_signals(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield what each signal leaves of a run that has just got its server."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="edgecloud_sd-attacks-") as folder:
            yield end_run(SIGNALS[name], Path(folder))


def end_run(number: signal.Signals, folder: Path) -> Sequence[Cell]:
    """Start a caption with `--cloud-url auto`, send it a signal when its server listens, and return the cells."""
    clip, files = folder / "clip.wav", folder / "temporary"
    files.mkdir()
    write_tone(clip)
    command = [sys.executable, "-m", "edgecloud_sd", "caption", str(clip), "--cloud-url", "auto"]
    quiet = subprocess.DEVNULL
    run = psutil.Popen(command, env=os.environ | {"TMPDIR": str(files)}, stdout=quiet, stderr=quiet)
    processes = [run, *wait_for_server(run)]
    run.send_signal(number)
    start = time.monotonic()
    _, alive = psutil.wait_procs(processes, STAY_SECONDS)
    seconds = time.monotonic() - start
    names = sorted(file.name for file in files.rglob("*") if file.is_file())
    for process in alive:
        process.kill()
    return str(run.wait()), len(names), ", ".join(names) or "-", len(alive), seconds


def wait_for_server(run: psutil.Popen) -> list[psutil.Process]:
    """Return the processes that a run has started, when one of them listens. Raise OSError if none does."""
    end = time.monotonic() + RUN_START_SECONDS
    while time.monotonic() < end and run.is_running():
        children = run.children(recursive=True)
        with suppress(psutil.Error):
            if any(link.status == psutil.CONN_LISTEN for child in children for link in child.net_connections()):
                return list(children)
        time.sleep(0.05)
    run.kill()
    raise OSError("the run to kill did not start its server")


LEFT_BEHIND = AttackTable(
    title="Left behind",
    attacks={name: f"{number.name} of a run with --cloud-url auto" for name, number in SIGNALS.items()},
    headings=("status", "files", "their names", "processes", "all gone s"),
    measure=measure_signals,
    note=(
        "The signal comes when the server listens. Files are those below the folder of temporary files; a process is "
        f"left if it lives {STAY_SECONDS:.0f} s later."
    ),
)
