"""The recipe of `cloud/nginx.md` under a real nginx, with the real server behind it: TLS, a path and rate limits."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

import pytest
import torch

from edgecloud_sd import wire
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection, RemoteVerifier
from edgecloud_sd.cloud.retry import Refused
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.events import Event, Prompt, Trace, Verified
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from tests.support.asgi import KEY
from tests.support.service import Service

NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
OPENSSL = shutil.which("openssl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
    pytest.mark.skipif(OPENSSL is None, reason="openssl, which makes the certificate, is not installed"),
]

DOCUMENT = Path(__file__).parents[1] / "edgecloud_sd" / "cloud" / "nginx.md"
REQUEST = Request(clips.make_clip("evaluation", 7).samples)
LOSSLESS_K2 = Strategy("speculative", k=2)
CLOUD = Strategy("cloud")
LENGTH = 32
PROMPT = Prompt((30, 31, 32))
PROMPT_BODY = wire.encode_prompt(PROMPT)
PROMPT_CHECK = wire.prompt_checksum(PROMPT_BODY, "greedy")
OPEN_PATH = f"/v1/sessions?rule=greedy&check={PROMPT_CHECK}"
LONG = Stopping(frozenset(), 400)


@dataclass(frozen=True)
class Proxied:
    """The server, and the URL of nginx in front of it."""

    service: Service
    port: int
    authority: Path  # the certificate that clients trust

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/cloud"

    def connection(self, timeout: float = 10.0) -> Connection:
        return Connection(self.url, KEY, timeout)

    @contextmanager
    def raw_connection(self) -> Iterator[ssl.SSLSocket]:
        """Yield a TLS connection to nginx."""
        context = ssl.create_default_context(cafile=str(self.authority))
        with (
            socket.create_connection(("localhost", self.port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            yield encrypted

    def status(self, path: str) -> int:
        """Return the status of a GET request without a key."""
        try:
            with urlopen(f"{self.url}{path}", context=ssl.create_default_context(cafile=str(self.authority))) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    def metric(self, name: str) -> float:
        """Return a metric of the server, as it tells without nginx."""
        request = HTTPRequest(f"{self.service.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urlopen(request) as answer:
            text = answer.read().decode()
        (number,) = re.findall(rf"^{name} (\S+)", text, re.MULTILINE)
        return float(number)

    def request(self, path: str, body: bytes, media_type: str) -> bytes:
        """Return a whole POST request."""
        head = [f"POST /cloud{path} HTTP/1.1", "Host: localhost", "Connection: close", f"Authorization: Bearer {KEY}"]
        return (
            "\r\n".join([*head, f"Content-Type: {media_type}", f"Content-Length: {len(body)}", "", ""]).encode() + body
        )


def write_config(folder: Path, port: int, upstream_port: int) -> Path:
    """Write nginx's configuration: the recipe, with other ports and another certificate, and paths in `folder`."""
    (recipe,) = re.findall(r"^```nginx\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for written, replacement in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "127.0.0.1:8700": f"127.0.0.1:{upstream_port}",
        "/etc/ssl/certs/cloud.example.pem": f"{folder}/certificate.pem",
        "/etc/ssl/private/cloud.example.key": f"{folder}/certificate.key",
    }.items():
        assert recipe.count(written) == 1
        recipe = recipe.replace(written, replacement)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    config = folder / "nginx.conf"
    # one process, which runs as the user of the test
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; events {{}}"
    config.write_text(f"{main}\nhttp {{ access_log off; {paths}\n{recipe}}}\n", encoding="utf-8")
    return config


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    assert NGINX
    assert OPENSSL
    folder = tmp_path_factory.mktemp("nginx")
    certificate, key_file = folder / "certificate.pem", folder / "keys"
    command = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(folder / "certificate.key")]
    subprocess.run([*command, "-out", str(certificate)], check=True, capture_output=True)
    key_file.touch(mode=0o600)
    key_file.write_text(f"{KEY}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = Service("--api-key-file", str(key_file))
    config = write_config(folder, port, service.port)
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([NGINX, "-e", str(folder / "log"), "-p", str(folder), "-c", str(config)]) as nginx,
    ):
        patch.setenv("SSL_CERT_FILE", str(certificate))
        try:
            proxied = Proxied(service, port, certificate)
            wait_until_listening(proxied, nginx, folder / "log")
            yield proxied
        finally:
            nginx.terminate()
            service.kill()


def wait_until_listening(proxied: Proxied, nginx: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert nginx.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        try:
            return socket.create_connection(("127.0.0.1", proxied.port)).close()
        except ConnectionRefusedError:
            time.sleep(0.01)


@pytest.mark.parametrize("strategy", [LOSSLESS_K2, CLOUD], ids=lambda strategy: strategy.mode)
def test_captions_through_nginx_are_the_local_ones(pipeline: Pipeline, proxied: Proxied, strategy: Strategy) -> None:
    with closing(proxied.connection()) as connection:
        remote = Pipeline(cloud=connection).trace(REQUEST, strategy, LENGTH)
    assert remote.tokens == pipeline.trace(REQUEST, strategy, LENGTH).tokens


def test_only_calls_with_a_key_pass_to_the_model(proxied: Proxied) -> None:
    paths = ("/health/live", "/health/ready", "/v1/model", "/metrics", "/nothing")
    assert [proxied.status(path) for path in paths] == [200, 200, 401, 401, 401]


def test_each_token_of_a_stream_arrives_on_its_own(proxied: Proxied) -> None:
    with closing(proxied.connection()) as connection:
        answer = connection.transport.call("POST", OPEN_PATH, PROMPT_BODY, wire.OCTETS)
    session, _ = wire.read_opened(answer.content, PROMPT_CHECK)
    message = wire.dumps(wire.build_generate_request(PROMPT_CHECK, (), (), LENGTH))
    with proxied.raw_connection() as raw:
        raw.sendall(proxied.request(f"/v1/sessions/{session}/generate", message, wire.JSON))
        records = list(iter(lambda: raw.recv(2**16), b""))  # one TLS record at most in each
    lines = b"".join(records).count(b'"token"')
    assert lines == LENGTH
    assert sum(b'"token"' in record for record in records) > 0.8 * lines


def test_the_server_stops_a_stream_whose_client_leaves_nginx(proxied: Proxied) -> None:
    before = proxied.metric("edgecloud_written_tokens_total")
    harness = Harness()
    harness.count_messages()
    with closing(proxied.connection()) as connection:
        tokens = RemoteVerifier(connection, GREEDY, harness).open(PROMPT).generate(LONG)
        next(tokens)
        tokens.close()
        generated = -1.0
        while (now := proxied.metric("edgecloud_written_tokens_total")) != generated:
            generated = now
            time.sleep(0.1)
    assert generated - before < LONG.max_new_tokens / 2


def test_a_prompt_whose_client_leaves_nginx_opens_no_session(proxied: Proxied) -> None:
    before = proxied.metric("edgecloud_sessions")
    proxied.service.pause()
    with proxied.raw_connection() as raw:
        raw.sendall(proxied.request(OPEN_PATH, PROMPT_BODY, wire.OCTETS))
        time.sleep(0.1)  # for nginx to pass it on
    proxied.service.resume()
    with closing(proxied.connection()) as connection:
        connection.transport.call("POST", OPEN_PATH, PROMPT_BODY, wire.OCTETS)  # the server runs it after the first
    assert proxied.metric("edgecloud_sessions") == before + 1


def test_the_calls_of_one_address_that_run_at_once_are_limited(proxied: Proxied) -> None:
    answers: list[bytes] = []
    with ExitStack() as stack:
        waiting = [stack.enter_context(proxied.raw_connection()) for _ in range(70)]
        for raw in waiting:
            raw.sendall(b"POST /cloud/health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n")
            raw.settimeout(0.01)
        while len(waiting) > 64:
            for raw in list(waiting):
                with suppress(TimeoutError):
                    answers.append(raw.recv(2**16))
                    waiting.remove(raw)
        assert len(answers) == 6
        for answer in answers:
            assert re.match(rb"HTTP/1.1 429 (?s:.*)\r\nRetry-After: 1\r\n", answer)
        for raw in waiting:
            raw.settimeout(30)
            raw.sendall(b"x")
            assert raw.recv(2**16).startswith(b"HTTP/1.1 413 ")  # the server's own answer to this body


def test_a_caption_waits_as_long_as_the_rate_limit_says(pipeline: Pipeline, proxied: Proxied) -> None:
    delays: list[float] = []

    def sleep(seconds: float) -> None:
        delays.append(seconds)
        time.sleep(seconds)

    def flood() -> None:
        call = b"GET /cloud/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        while not delays:
            with proxied.raw_connection() as raw:
                raw.sendall(call * 200)
                for _ in range(200):
                    if not raw.recv(2**16) or delays:
                        break

    with closing(Connection(proxied.url, KEY, 10.0, sleep=sleep)) as connection, ThreadPoolExecutor(4) as threads:
        floods = [threads.submit(flood) for _ in range(4)]
        try:
            trace = Pipeline(cloud=connection).trace(REQUEST, LOSSLESS_K2, LENGTH)
            while not delays:  # the flood came too late for the caption
                trace = Pipeline(cloud=connection).trace(REQUEST, LOSSLESS_K2, LENGTH)
        finally:
            delays.append(0)
        for running in floods:
            running.result()
    assert trace.tokens == pipeline.trace(REQUEST, LOSSLESS_K2, LENGTH).tokens
    assert max(delays) >= 1


def test_a_body_over_the_limit_is_refused_with_its_reason(proxied: Proxied) -> None:
    largest = ServiceLimits().max_prompt_bytes(128)  # nginx passes it on, and the service refuses a longer one itself
    with closing(proxied.connection()) as connection:
        for size, reason in [(largest + 9999, "the body is larger than [0-9]+"), (2**23, "client_max_body_size")]:
            prompt = Prompt((1, 2, 3), torch.zeros(128, size // 256))
            verification = connection.verifier(GREEDY, Harness()).open(prompt)
            with pytest.raises(Refused, match=f"413 .*{reason}"):
                verification.wait()


def test_a_restart_of_the_server_behind_nginx_changes_no_token(pipeline: Pipeline, proxied: Proxied) -> None:
    statuses: list[int] = []

    def events(remote: Pipeline, harness: Harness) -> Iterator[Event]:
        for event in remote.events(REQUEST, LOSSLESS_K2, LENGTH, harness):
            yield event
            if isinstance(event, Verified) and not statuses:
                proxied.service.kill()
                statuses.append(proxied.status("/health/ready"))
                proxied.service.start()

    harness = Harness()
    with closing(proxied.connection()) as connection:
        trace: Trace = stamp(events(Pipeline(cloud=connection), harness), harness.watch)
    proxied.service.wait_until_ready()
    assert trace.tokens == pipeline.trace(REQUEST, LOSSLESS_K2, LENGTH).tokens
    assert statuses == [502]
    assert proxied.status("/health/ready") == 200
