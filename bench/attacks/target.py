"""A server that is started to be attacked, and the requests of its clients as bytes.

The clients here are no `cloud.client`: an attacker follows none of its rules, and a polite one must not try again.
"""

from __future__ import annotations

import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import psutil
import soundfile
from prometheus_client.parser import text_string_to_metric_families

from edgecloud_sd import wire
from edgecloud_sd.cloud.transport import MODEL_PATH, SESSIONS_PATH
from edgecloud_sd.data.dataset import SAMPLE_RATE
from edgecloud_sd.events import Prompt

RULE = "greedy"
HOST = "127.0.0.1"
NO_ANSWER = (OSError, HTTPException)  # errors of a request that gets no whole answer
FIRST_ID, IDS = 10, 600  # ids of the pocket pair's vocabulary that are text


@dataclass(frozen=True)
class Place:
    """The port of a server on this machine, and the keys of its clients."""

    port: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A running server, its place, and the file of its log."""

    process: psutil.Popen
    place: Place
    log: Path

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def count_sessions(self) -> float | None:
        """Return the open sessions by the server's own metrics, or None if it does not answer."""
        try:
            with closing(Client(self.place)) as client:
                _, text = client.request("GET", "/metrics")
        except NO_ANSWER:
            return None
        families = text_string_to_metric_families(text.decode())
        return next((family.samples[0].value for family in families if family.name == "edgecloud_sessions"), None)


@contextmanager
def start_target(*options: str, clients: int = 2, descriptors: int | None = None) -> Iterator[Target]:
    """Start a server of the pocket cloud on loopback, and stop it at the end.

    `descriptors` is its limit on open files. Raise OSError if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="edgecloud_sd-attacks-") as folder:
        keys = tuple(secrets.token_urlsafe(24) for _ in range(clients))
        key_file, log = Path(folder, "keys"), Path(folder, "log")
        key_file.touch(0o600)
        key_file.write_text("\n".join(keys), encoding="ascii")
        command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--port", "0", "--until-stdin-closes"]
        command += ["--api-key-file", str(key_file), *options]
        limits = (descriptors, descriptors) if descriptors else resource.getrlimit(resource.RLIMIT_NOFILE)
        with log.open("wb") as stderr:
            process = psutil.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits),
            )
        try:
            line = process.stdout.readline().decode()
            if not line.startswith("http://"):
                raise OSError(f"the server to attack did not start: {log.read_text(encoding='utf-8')[-300:]}")
            yield Target(process, Place(int(line.rpartition(":")[2]), keys), log)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def write_tone(clip: Path) -> None:
    """Write a clip of a second for the runs that are attacked."""
    soundfile.write(clip, np.sin(np.arange(SAMPLE_RATE)) / 2, SAMPLE_RATE)


def text_ids(count: int, start: int = 0) -> tuple[int, ...]:
    """Return `count` ids of text, other ones for another start."""
    return tuple(FIRST_ID + (start * 7 + place * 13) % IDS for place in range(count))


def open_request(ids: Sequence[int]) -> tuple[str, bytes, int]:
    """Return the path, the body and the check of a request that opens a prompt of text."""
    body = wire.encode_prompt(Prompt(tuple(ids)))
    check = wire.prompt_checksum(body, RULE)
    return f"{SESSIONS_PATH}?rule={RULE}&check={check}", body, check


def request_head(method: str, path: str, key: str, length: int = 0, content: str = wire.OCTETS) -> bytes:
    """Return the head of a request, for a socket without an HTTP library."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Authorization: Bearer {key}"]
    lines += [f"Content-Type: {content}", f"Content-Length: {length}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode()


class Client:
    """A client on one connection, with the key of that number. Its requests raise an error of `NO_ANSWER`."""

    def __init__(self, place: Place, key: int = 0, timeout: float = 30.0) -> None:
        self._connection = HTTPConnection(HOST, place.port, timeout=timeout)
        self._headers = {"Authorization": f"Bearer {place.keys[key]}"}

    def request(self, method: str, path: str, body: bytes | None = None, content: str = "") -> tuple[int, bytes]:
        """Return the status and the body of the answer to one request."""
        headers = self._headers | ({"Content-Type": content} if content else {})
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except NO_ANSWER:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass
class RemoteCaption:
    """An open prompt of a client, with the tokens that both sides have committed."""

    client: Client
    ids: tuple[int, ...]
    session: str = ""
    check: int = 0
    context: list[int] = field(default_factory=list)
    agreed: int = 0

    def open(self) -> int:
        """Open the prompt and return the status of the answer."""
        path, body, self.check = open_request(self.ids)
        status, answer = self.client.request("POST", path, body, wire.OCTETS)
        self.context, self.agreed = [self.ids[-1]], 0
        if status < 300:
            self.session = wire.read_opened(answer, self.check)[0]
        return status

    def verify(self, draft: Sequence[int]) -> int:
        """Verify a draft and return the status of the answer. Its tokens count as committed."""
        request = wire.build_verify_request(self.check, self.context, self.agreed, draft)
        path = f"{SESSIONS_PATH}/{self.session}/verify"
        status, answer = self.client.request("POST", path, wire.dumps(request), wire.JSON)
        if status < 300:
            verdict = wire.read_verdict(answer, len(draft), request.check)
            self.context += [*draft[: verdict.accepted], verdict.token]
            self.agreed = len(self.context) - 1  # the server has not fed its own token yet
        return status

    def close(self) -> None:
        """Close the session at the server."""
        self.client.request("DELETE", f"{SESSIONS_PATH}/{self.session}")


def wait_until_idle(target: Target, seconds: float) -> None:
    """Return when the server has used no CPU for a second, or after `seconds`."""
    end, used = time.monotonic() + seconds, -1.0
    while time.monotonic() < end and target.cpu_seconds() > used + 0.05:
        used = target.cpu_seconds()
        time.sleep(1.0)


def ask_model(client: Client) -> None:
    """Ask for the model as every run does first. Raise OSError for another status than 200."""
    status, _ = client.request("GET", MODEL_PATH)
    if status != 200:
        raise OSError(f"status {status}")
