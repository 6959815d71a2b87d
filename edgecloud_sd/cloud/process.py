"""A server on loopback for one run, in a process of its own: `--cloud-url auto`."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd.cloud.client import PATIENCE, Connection
from edgecloud_sd.cloud.keys import read_keys
from edgecloud_sd.config import AUTO
from edgecloud_sd.data.dataset import MAX_CLIP_SECONDS
from edgecloud_sd.models import pairs
from edgecloud_sd.verifier import CloudFault

if TYPE_CHECKING:
    from edgecloud_sd.config import Settings


MOST_TOKENS = 32_768  # of a prompt and its caption: what the published models take


@contextmanager
def connect(settings: Settings) -> Iterator[Connection | None]:
    """The connection that a run asks for, to a server that is there or to one started for it; None without either.

    ValueError, OSError or CloudFault where there is no such server.
    """
    if settings.cloud_url is None or settings.mode == ("edge",):
        yield None
        return
    patience = PATIENCE[settings.on_cloud_fault]
    with ExitStack() as stack:
        url, key = settings.cloud_url, None
        if settings.cloud_key_file:
            key = read_keys(Path(settings.cloud_key_file))[0]
        if url == AUTO:
            pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights)
            # whatever the data set may hold: this server is this run's alone
            more = ["--max-audio-seconds", str(MAX_CLIP_SECONDS), "--max-tokens", str(MOST_TOKENS)]
            more += ["--threads", str(settings.threads)] if settings.threads else []
            more += ["--weights", pair.weights]
            server = stack.enter_context(run_server(pair.cloud, settings.cloud_device, settings.cloud_dtype, more))
            url, key = server.url, server.key
        connection = Connection(url, key, settings.cloud_timeout, patience)
        stack.callback(connection.close)
        try:
            _ = connection.remote
        except CloudFault as fault:
            raise CloudFault(f"--cloud-url: {url}: {fault}") from None
        yield connection


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
