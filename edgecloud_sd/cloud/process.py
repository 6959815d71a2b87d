"""A server on loopback for one run, in a process of its own: `--cloud-url auto`."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Server:
    """A server that runs. Its key is in no command line, where others could read it."""

    url: str
    key: str
    process: subprocess.Popen[str]


@contextmanager
def run_server(model: str, device: str = "cpu", dtype: str = "float32", more: Sequence[str] = ()) -> Iterator[Server]:
    """Start it, wait until it listens, stop it at the end. OSError, with its last words, where it does not start.

    It stops too when this process ends in any other way: it reads a pipe that closes then.
    """
    with tempfile.TemporaryDirectory(prefix="edgecloud_sd-") as folder:
        key, keys, log = secrets.token_urlsafe(32), Path(folder, "key"), Path(folder, "log")
        keys.touch(mode=0o600)
        keys.write_text(key + "\n", encoding="ascii")
        command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--until-stdin-closes", "--port", "0"]
        command += ["--model", model, "--device", device, "--dtype", dtype, "--api-key-file", str(keys), *more]
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = next((line.strip() for line in process.stdout if line.startswith("http://")), "")
            if not url:
                process.wait()
                words = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
                raise OSError(f"the cloud's server did not start: {words[-1] if words else 'it said nothing'}")
            yield Server(url, key, process)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
