"""The command `python -m edgecloud_sd.cloud serve`, and the server that a run starts for itself."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from fastapi import FastAPI

from edgecloud_sd import wire
from edgecloud_sd.cloud import __main__ as cli
from edgecloud_sd.cloud import engine, process
from edgecloud_sd.config import resolve
from edgecloud_sd.connect import connect
from edgecloud_sd.events import Prompt
from edgecloud_sd.models import pairs
from edgecloud_sd.verifier import CloudFault
from tests.support.asgi import KEY, Edge, SpyEngine

RUN = [sys.executable, "-m", "edgecloud_sd.cloud"]
POCKET = pairs.PAIRS["pocket"].cloud


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    return file


def test_help_explains_the_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--help"])
    assert stopped.value.code == 0
    help_text = capsys.readouterr().out
    text = " ".join(help_text.split())
    for option in (
        "--host HOST address to listen on (default: 127.0.0.1)",
        "--port PORT port; 0 takes a free one and prints it (default: 8700)",
        "--api-key-file FILE file with the keys that clients must send, one per line",
        "--insecure listen beyond loopback without a key, so that everybody who can reach the server may use it",
        "--max-sessions N prompts open at once (default: 64)",
        "--idle-timeout SECONDS close a prompt this time after the end of its last request (default: 300.0)",
        "--max-audio-seconds SECONDS audio of one prompt (default: 60.0)",
        "--until-stdin-closes stop when the process at the other end of stdin ends",
    ):
        assert option in text
    assert re.findall(r"^(\S.*):$", help_text, re.MULTILINE) == ["options", "model", "network and keys", "limits"]


@pytest.mark.slow
def test_a_bad_option_is_refused_without_importing_torch() -> None:
    code = "import sys; from edgecloud_sd.cloud import __main__ as cli; assert 'torch' not in sys.modules; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--host", "0.0.0.0"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --host: other machines can reach 0.0.0.0: give --api-key-file, or --insecure")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "--host: other machines can reach 0.0.0.0"),
        (["--host", "::"], "--host: other machines can reach ::"),
        (["--host", ""], "other machines can reach|cannot listen"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:0"),
        (["--host", "é" * 100], "cannot listen on"),
        (["--port", "70000"], "cannot listen on 127.0.0.1:70000"),
        (["--max-sessions", "0"], "--max-sessions: must be a number above 0, not 0"),
        (["--max-sessions", "-1"], "--max-sessions: must be"),
        (["--idle-timeout", "nan"], "--idle-timeout: must be a number above 0, not nan"),
        (["--idle-timeout", "inf"], "--idle-timeout: must be"),
        (["--idle-timeout", "0"], "--idle-timeout: must be"),
        (["--max-audio-seconds", "inf"], "--max-audio-seconds: must be"),
        (["--max-audio-seconds", "-1"], "--max-audio-seconds: must be"),
        (["--max-tokens", "0"], "--max-tokens: must be"),
        (["--threads", "0"], "--threads: must be"),
        (["--dtype", "int8"], r"--dtype: 'int8' is for the edge alone \(--edge-dtype\): choose one of auto, float32"),
        (["--dtype", "half"], "--dtype: 'half' is not one of auto, float32, float16, bfloat16, float64"),
        (["--engine-option", "a=1"], "--engine-option: a=1 works only with --engine vllm"),
        (["--engine", "vllm", "--engine-option", "a"], "--engine-option: 'a' is not NAME=VALUE"),
        (["--engine", "vllm", "--engine-option", "a={"], "--engine-option: the value '{' of a is not YAML"),
        (["--api-key-file", "nowhere"], "key file nowhere: cannot be read"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{reason}"):
        cli.main(["serve", "--port", "0", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--max-sessions", "1.5"], ["serve", "--idle-timeout", "long"], []],
)
def test_a_value_of_the_wrong_kind_is_refused_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_port_in_use_is_refused_with_a_way_out() -> None:
    with cli.open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*choose another --port"):
            cli.open_socket("127.0.0.1", port)


def test_the_server_listens_beyond_loopback_only_if_allowed() -> None:
    for host in ("127.0.0.1", "127.5.6.7", "localhost"):
        cli.open_socket(host, 0).close()
    with pytest.raises(ValueError, match="other machines can reach"):
        cli.open_socket("0.0.0.0", 0)
    cli.open_socket("0.0.0.0", 0, allow_remote=True).close()


def test_responses_are_sent_without_delay() -> None:
    with cli.open_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # without it, asyncio leaves Nagle's algorithm on


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a server and the URL that it prints."""
    with subprocess.Popen(
        [*RUN, "serve", "--port", "0", "--model", POCKET, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def call(url: str, body: bytes | None = None, key: str = KEY, content_type: str = "application/json") -> bytes:
    """Return the body of the response to a request."""
    request = Request(url, body, {"Authorization": f"Bearer {key}", "Content-Type": content_type})
    with urlopen(request, timeout=60) as response:
        content: bytes = response.read()
        return content


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["SIGTERM", "SIGINT", "stdin"])
def test_a_server_prints_its_url_and_stops_even_during_a_stream(cause: str, keys: Path) -> None:
    with serving("--api-key-file", str(keys), "--until-stdin-closes") as (server, url):
        assert url.startswith("http://127.0.0.1:")
        assert call(f"{url}/health", key="none") == b'{"status":"ok"}'
        with pytest.raises(HTTPError, match="401"):
            call(f"{url}/v1/model", key="none")
        assert b'"engine":"transformers"' in call(f"{url}/v1/model")
        body = wire.encode_prompt(Prompt((30, 31, 32)))
        check = wire.prompt_checksum(body, "greedy")
        opened = call(f"{url}/v1/sessions?rule=greedy&check={check}", body, content_type=wire.OCTETS)
        session, _ = wire.read_opened(opened, check)
        message = wire.dumps(wire.build_generate_request(check, [], (), 400))
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stream:
            head = f"POST /v1/sessions/{session}/generate HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(message)}\r\n\r\n"
            stream.sendall(head.encode() + message)
            assert b"200 OK" in stream.recv(100)  # the client reads no further
            if cause == "stdin":
                assert server.stdin is not None
                server.stdin.close()
            else:
                server.send_signal(getattr(signal, cause))
            code = server.wait(60)
        assert server.stderr is not None
        assert code == 0
        assert "Traceback" not in server.stderr.read()


@pytest.mark.slow
def test_a_server_without_keys_refuses_another_host_and_is_not_ready_after_sigterm() -> None:
    with serving() as (server, url):
        with pytest.raises(HTTPError, match="421"):
            urlopen(Request(f"{url}/v1/model", headers={"Host": "evil.example"}), timeout=60)
        assert call(f"{url}/health/ready".replace("127.0.0.1", "localhost")) == b'{"status":"ok"}'
        server.send_signal(signal.SIGTERM)
        with pytest.raises((HTTPError, ConnectionError, URLError), match=r"503|refused|reset|without response"):
            call(f"{url}/health/ready")


@pytest.mark.filterwarnings("ignore:--host 0.0.0.0")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 421),
        (["--host", "localhost"], 421),
        (["--insecure"], 200),
        (["--host", "0.0.0.0", "--insecure"], 200),
        (["--api-key-file", "keys"], 200),
    ],
)
def test_only_a_server_that_has_no_key_and_is_not_insecure_refuses_another_host(
    arguments: list[str], status: int, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []

    async def run_app(app: FastAPI, *arguments: object) -> None:
        headers = [(b"host", b"evil.example")]
        statuses.append((await Edge(app, None).request("GET", "/health", headers=headers)).status)

    keys.chmod(0o600)
    monkeypatch.chdir(keys.parent)
    monkeypatch.setattr(cli, "run_app", run_app)
    monkeypatch.setattr(engine, "load_engine", lambda *arguments: SpyEngine())
    cli.main(["serve", "--port", "0", *arguments])
    assert statuses == [status]


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_server_for_one_run_ends_with_its_parent_and_leaves_no_file(cause: str, tmp_path: Path) -> None:
    code = "import sys, time; from edgecloud_sd.cloud import process\nwith process.run_server(sys.argv[1]) as server:\n"
    code += "    print(server.url, server.process.pid, flush=True)\n    time.sleep(60)"
    command, environment = [sys.executable, "-c", code, POCKET], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        url, pid = parent.stdout.readline().split()
        assert call(f"{url}/health") == b'{"status":"ok"}'
        parent.send_signal(getattr(signal, cause))
    deadline = time.monotonic() + 60
    while is_alive(int(pid)):
        assert time.monotonic() < deadline, "the server is still running"
        time.sleep(0.05)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # Z is a zombie
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_for_one_run_that_does_not_start_raises_its_error() -> None:
    reason = "^the cloud's server did not start: error: --threads: must be a number above 0, not 0$"
    with pytest.raises(OSError, match=reason), process.run_server(POCKET, options=["--threads", "0"]):
        raise AssertionError("the server started")


@pytest.mark.slow
def test_a_server_for_one_run_without_its_model_raises_an_error() -> None:
    reason = "^the cloud's server did not start: error: no checkpoint 'nowhere'"
    with pytest.raises(OSError, match=reason), process.run_server("nowhere"):
        raise AssertionError("the server started")


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[process.Server]]:
    """Return `run_server` with a Python program in place of the server, and with short deadlines."""
    start = subprocess.Popen
    monkeypatch.setattr(process, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(process, "SERVER_START_SECONDS", 0.6)

    def run(code: str) -> AbstractContextManager[process.Server]:
        command = [sys.executable, "-IS", "-c", "import os, sys, time\n" + code]
        monkeypatch.setattr(subprocess, "Popen", lambda _, **streams: start(command, **streams))
        return process.run_server(POCKET)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "time.sleep(60)",
            r"did not start within \d+ s, \d+ of them without any work, and was killed: its log is empty",
        ),
        ("print('wait', file=sys.stderr, flush=True); os.kill(os.getpid(), 19)", "without any work.*: wait$"),
        ("while True: pass", "did not start within 1 s, 0 of them without any work, and was killed: its log is empty"),
        ("print('ready', flush=True); time.sleep(60)", "without any work, and was killed"),
        ("print('why\\n\\n', file=sys.stderr); os.close(1); sys.stdin.read()", "did not start: why$"),
        ("os.write(1, bytes([255, 10]))", "did not start: its log is empty$"),
        ("os.close(0); os.write(2, bytes([255, 10]))", "did not start: \ufffd$"),
    ],
)
def test_a_server_that_does_not_start_is_given_up(
    code: str, reason: str, fake_server: Callable[[str], AbstractContextManager[process.Server]]
) -> None:
    with pytest.raises(OSError, match=f"^the cloud's server .*{reason}"), fake_server(code):
        raise AssertionError("the server started")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "warning"), [("sys.exit('why')", "(status 1): why"), ("os.kill(os.getpid(), 9)", "(status -9): its log is")]
)
def test_a_server_that_ends_during_the_run_is_named(
    end: str, warning: str, fake_server: Callable[[str], AbstractContextManager[process.Server]]
) -> None:
    code = f"assert len(sys.stdin.readline()) > 40; print('http://here', flush=True); {end}"
    line = rf"^the cloud's server ended during the run {re.escape(warning)}"
    with pytest.warns(UserWarning, match=line), fake_server(code) as server:
        server.process.wait()


@pytest.mark.slow
def test_a_server_that_ends_as_soon_as_it_listens_is_named_without_advice_to_start_it(
    fake_server: Callable[[str], AbstractContextManager[process.Server]],
) -> None:
    with cli.open_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    fake_server(f"print('http://127.0.0.1:{port}', flush=True); sys.stdin.readline(); sys.exit('why')")
    run = resolve({"mode": "lossless", "cloud-url": "auto", "on-cloud-fault": "error"})
    with (
        pytest.warns(UserWarning, match="ended during the run .*: why"),
        pytest.raises(CloudFault, match=rf"^--cloud-url: http://127.0.0.1:{port}: [^;]*$"),
        connect(run),
    ):
        raise AssertionError("the server answered")


@pytest.mark.slow
def test_a_server_that_does_not_stop_is_killed_even_if_the_wait_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, fake_server: Callable[[str], AbstractContextManager[process.Server]]
) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.1)
    with fake_server("print('http://here', flush=True); time.sleep(60)") as server:
        pass
    assert server.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("has_keys", "problem"),
    [(True, "unencrypted: put a proxy with TLS in front"), (False, "--insecure lets everybody")],
)
def test_a_server_that_others_can_reach_gives_a_warning(has_keys: bool, problem: str) -> None:
    with cli.open_socket("127.0.0.1", 0) as inner, cli.open_socket("0.0.0.0", 0, allow_remote=True) as outer:
        cli.warn_about_exposure("127.0.0.1", inner, has_keys)
        with pytest.warns(UserWarning, match=f"^--host 0.0.0.0: .*{problem}"):
            cli.warn_about_exposure("0.0.0.0", outer, has_keys)


@pytest.mark.parametrize(
    ("line", "reason"), [(b"", "contains no key"), (b"\n", "contains no key"), (b"short", "key 1 must be")]
)
def test_a_key_on_stdin_is_checked_as_one_in_a_file(line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{KEY}\r\nmore".encode())))
    assert cli.load_keys(Path("-")) == (KEY,)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    with pytest.raises(ValueError, match=f"^--api-key-file: the first line of stdin: {reason}"):
        cli.load_keys(Path("-"))
