"""A server on loopback in a process of its own, for one run: `--cloud-url auto`."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


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

    Raise OSError with the last line of its log if it does not start. The server also stops if this process dies,
    because it reads a pipe that closes then.
    """
    with tempfile.TemporaryDirectory(prefix="edgecloud_sd-") as folder:
        key, key_file, log_file = secrets.token_urlsafe(32), Path(folder, "key"), Path(folder, "log")
        key_file.touch(mode=0o600)
        key_file.write_text(key + "\n", encoding="ascii")
        command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--until-stdin-closes", "--port", "0"]
        command += ["--model", model, "--device", device, "--dtype", dtype, "--api-key-file", str(key_file), *options]
        with log_file.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = next((line.strip() for line in process.stdout if line.startswith("http://")), "")
            if not url:
                process.wait()
                lines = [line for line in log_file.read_text(encoding="utf-8").splitlines() if line.strip()]
                raise OSError(f"the cloud's server did not start: {lines[-1] if lines else 'its log is empty'}")
            yield Server(url, key, process)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
