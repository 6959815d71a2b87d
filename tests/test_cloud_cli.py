"""`python -m edgecloud_sd.cloud serve`, and the server that a run starts for itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from edgecloud_sd import wire
from edgecloud_sd.cloud import __main__ as cli
from edgecloud_sd.cloud import process
from edgecloud_sd.events import Prompt
from edgecloud_sd.models import pairs
from tests.support.asgi import KEY

RUN = [sys.executable, "-m", "edgecloud_sd.cloud"]
POCKET = pairs.PAIRS["pocket"].cloud


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    return file


def test_help_says_what_every_option_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for option in (
        "--host HOST address to listen on (default: 127.0.0.1)",
        "--port PORT 0 takes a free one and prints it (default: 8700)",
        "--api-key-file API_KEY_FILE keys that clients must show, one a line",
        "--insecure listen off loopback without a key: whoever reaches it may use it",
        "--max-sessions MAX_SESSIONS prompts open at once (default: 64)",
        "--idle-timeout IDLE_TIMEOUT close one after s without a call (default: 300.0)",
        "--max-audio-seconds MAX_AUDIO_SECONDS s of one prompt (default: 60.0)",
        "--until-stdin-closes stop with the process that holds the other end",
    ):
        assert option in said


@pytest.mark.slow
def test_what_is_wrong_is_told_without_loading_torch() -> None:
    code = "import sys; from edgecloud_sd.cloud import __main__ as cli; assert 'torch' not in sys.modules; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--host", "0.0.0.0"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --host: 0.0.0.0 can be reached by others: give --api-key-file, or --insecure")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached by others"),
        (["--host", "::"], "--host: :: can be reached by others"),
        (["--host", ""], "can be reached by others|cannot listen"),
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
        (["--engine-option", "a=1"], "--engine-option: is for --engine vllm"),
        (["--engine", "vllm", "--engine-option", "a"], "--engine-option: 'a' is not NAME=VALUE"),
        (["--engine", "vllm", "--engine-option", "a={"], "--engine-option: '{' is not YAML"),
        (["--api-key-file", "nowhere"], "key file nowhere: cannot be read"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line(arguments: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{why}"):
        cli.main(["serve", "--port", "0", *arguments])


@pytest.mark.parametrize("arguments", [["serve", "--max-sessions", "1.5"], ["serve", "--idle-timeout", "long"], []])
def test_an_option_of_another_kind_is_argparses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_port_in_use_is_told() -> None:
    with cli.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*choose another --port"):
            cli.listen("127.0.0.1", port)


def test_others_are_listened_to_only_where_that_is_meant() -> None:
    for host in ("127.0.0.1", "127.5.6.7", "localhost"):
        cli.listen(host, 0).close()
    with pytest.raises(ValueError, match="can be reached by others"):
        cli.listen("0.0.0.0", 0)
    cli.listen("0.0.0.0", 0, anyone=True).close()


def test_no_answer_is_delayed_to_be_sent_with_the_next() -> None:
    with cli.listen("127.0.0.1", 0) as made:
        assert made.proto == socket.IPPROTO_TCP  # by which asyncio knows that it may turn Nagle's algorithm off


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, by the URL that it says it is at."""
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


def said(url: str, body: bytes | None = None, key: str = KEY, content: str = "application/json") -> bytes:
    request = Request(url, body, {"Authorization": f"Bearer {key}", "Content-Type": content})
    with urlopen(request, timeout=10) as answer:
        read: bytes = answer.read()
        return read


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stdin"])
def test_a_server_says_where_it_is_and_stops_within_seconds_even_in_a_stream(how: str, keys: Path) -> None:
    with serving("--api-key-file", str(keys), "--until-stdin-closes") as (server, url):
        assert url.startswith("http://127.0.0.1:")
        assert said(f"{url}/health", key="none") == b'{"status":"ok"}'
        with pytest.raises(HTTPError, match="401"):
            said(f"{url}/v1/model", key="none")
        assert b'"engine":"transformers"' in said(f"{url}/v1/model")
        body = wire.encode_prompt(Prompt((30, 31, 32)))
        begun = wire.prompt_checksum(body, "greedy")
        opened = said(f"{url}/v1/sessions?rule=greedy&check={begun}", body, content=wire.OCTETS)
        session, _ = wire.read_opened(opened, begun)
        asked = wire.dumps(wire.build_generate_request(begun, [], (), 400))
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stream:
            head = f"POST /v1/sessions/{session}/generate HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
            stream.sendall(head.encode() + asked)
            assert b"200 OK" in stream.recv(100)  # and nobody reads on
            began = time.monotonic()
            if how == "stdin":
                assert server.stdin is not None
                server.stdin.close()
            else:
                server.send_signal(getattr(signal, how))
            code = server.wait(15)
        assert time.monotonic() - began < 9
        # 0: of a process that was started in the background, where shells have SIGINT ignored
        assert code in {"SIGTERM": (-15,), "SIGINT": (130, -2, 0), "stdin": (-15,)}[how]
        assert server.stderr is not None
        assert "KeyboardInterrupt" not in server.stderr.read()


@pytest.mark.slow
def test_a_server_of_ones_own_ends_with_its_parent() -> None:
    code = "import sys, time; from edgecloud_sd.cloud import process\nwith process.run_server(sys.argv[1]) as server:\n"
    code += "    print(server.url, server.process.pid, flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, POCKET], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url, pid = parent.stdout.readline().split()
        assert said(f"{url}/health") == b'{"status":"ok"}'
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(int(pid)):
        assert time.monotonic() < deadline, "the server runs on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # nobody may be there to collect it
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_of_ones_own_that_does_not_start_says_why() -> None:
    why = "^the cloud's server did not start: error: --threads: must be a number above 0, not 0$"
    with pytest.raises(OSError, match=why), process.run_server(POCKET, more=["--threads", "0"]):
        raise AssertionError("it started")


@pytest.mark.slow
def test_a_server_of_ones_own_without_its_model_says_so() -> None:
    why = "^the cloud's server did not start: error: no checkpoint 'nowhere'"
    with pytest.raises(OSError, match=why), process.run_server("nowhere"):
        raise AssertionError("it started")
