"""Clouds that fail: the seconds until a caption ends, by the fault and by `--on-cloud-fault`."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from bench.attacks.table import AttackTable, Cell
from bench.attacks.target import HOST, Client, start_target, write_tone
from edgecloud_sd.cloud.transport import MODEL_PATH

FAULT_MODES = ("edge", "error", "wait")
WAIT_SCALE = 0.1  # share of the patience of `wait`, whose captions would take minutes
LONGEST_CAPTION = 45.0  # s before a caption is stopped
FAULTS_AT_ONCE = 2
DNS_SECONDS = 35.0  # s for which the hanging resolver keeps a caller
UNKNOWN_HOST = "cloud.invalid"
CLOUD_FAULTS = {
    "dead": "dead from the start",
    "hangs": "hangs from the start",
    "dns": "DNS hangs from the start",
    "then-hangs": "hangs after its first answer",
    "then-resets": "resets after its first answer",
    "then-503": "503 after its first answer",
}
ANSWER_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
PRELOADED = [
    "edgecloud_sd.__main__",
    "edgecloud_sd.models.hf",
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
]


def measure_giving_up(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield the seconds of a caption in each mode, for each fault. The modes of `FAULTS_AT_ONCE` run at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with start_target() as target, closing(Client(target.place)) as client:
        model = client.request("GET", MODEL_PATH)[1]
    with tempfile.TemporaryDirectory(prefix="edgecloud_sd-attacks-") as folder:
        clip = Path(folder, "clip.wav")
        write_tone(clip)

        def time_modes(name: str) -> list[Cell]:
            with faulty_cloud(name, model) as url, ThreadPoolExecutor(len(FAULT_MODES)) as threads:
                cells = threads.map(lambda mode: time_caption(context, str(clip), url, mode), FAULT_MODES)
                return [cell for pair in cells for cell in pair]

        with ThreadPoolExecutor(FAULTS_AT_ONCE) as threads:
            yield from threads.map(time_modes, names)


def time_caption(context: multiprocessing.context.BaseContext, clip: str, url: str, mode: str) -> tuple[Cell, str]:
    """Return the seconds of a caption in a process of its own, and its outcome: a caption, an error or no end."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_caption_seconds, args=(sender, clip, url, mode), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        receiver.recv()  # everything is loaded
        if receiver.poll(LONGEST_CAPTION):
            seconds, outcome = receiver.recv()
            return seconds, outcome
        return LONGEST_CAPTION, "no end"
    except EOFError:
        return None, "died"
    finally:
        process.kill()
        process.join()


def send_caption_seconds(sender: Pipe, clip: str, url: str, mode: str) -> None:
    """Caption a clip by the command of this package. Send when all is loaded, then the seconds and the outcome."""
    from edgecloud_sd.__main__ import main
    from edgecloud_sd.cloud import retry

    retry.PATIENCE["wait"] *= WAIT_SCALE
    socket.getaddrinfo = hang_on_unknown_host(socket.getaddrinfo)  # type: ignore[assignment]
    common = ["caption", clip, "--gate", "always", "--rule", "greedy"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([*common, "--mode", "edge"])  # so that nothing is loaded for the first time below
        sender.send("loaded")
        start, outcome = time.monotonic(), "caption"
        try:
            main([*common, "--cloud-url", url, "--on-cloud-fault", mode])
        except SystemExit:
            outcome = "error"
        except Exception as error:  # noqa: BLE001 - the table shows it
            outcome = type(error).__name__
    sender.send((time.monotonic() - start, outcome))


def hang_on_unknown_host(resolve: Callable[..., object]) -> Callable[..., object]:
    """Return a resolver that keeps callers who ask for `UNKNOWN_HOST`."""

    def resolve_slowly(host: object, *arguments: object, **options: object) -> object:
        if host in (UNKNOWN_HOST, UNKNOWN_HOST.encode()):
            time.sleep(DNS_SECONDS)
        return resolve(host, *arguments, **options)

    return resolve_slowly


@contextmanager
def faulty_cloud(name: str, model: bytes) -> Iterator[str]:
    """Yield the URL of a cloud with a fault of `CLOUD_FAULTS`. Its first answer is `model`, if it has one."""
    with socket.create_server((HOST, 0), backlog=64) as listening:
        port = listening.getsockname()[1]
        if name == "dns":
            yield f"http://{UNKNOWN_HOST}:{port}"
            return
        if name == "dead":
            listening.close()
            yield f"http://{HOST}:{port}"
            return
        kept: list[socket.socket] = []
        threading.Thread(target=_serve, args=(listening, name, model, kept), daemon=True).start()
        try:
            yield f"http://{HOST}:{port}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                connection.close()


def _serve(listening: socket.socket, name: str, model: bytes, kept: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listening.accept()
            kept.append(connection)
            threading.Thread(target=_answer, args=(connection, name, model), daemon=True).start()


def _answer(connection: socket.socket, name: str, model: bytes) -> None:
    """Answer each request for the model in full, unless the cloud fails from the start, and the others by the fault."""
    with suppress(OSError):
        while request := connection.recv(2**16):
            if name != "hangs" and f"GET {MODEL_PATH} ".encode() in request:
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(model)}\r\n\r\n"
                connection.sendall(head.encode() + model)
            elif name == "then-503":
                connection.sendall(ANSWER_503)
                connection.close()
            elif name == "then-resets":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()


GIVING_UP = AttackTable(
    title="Time to give up",
    attacks=CLOUD_FAULTS,
    headings=tuple(heading for mode in FAULT_MODES for heading in (f"{mode} s", "outcome")),
    measure=measure_giving_up,
    note=(
        "Seconds of `edgecloud-sd caption`, with everything loaded before, by --on-cloud-fault. `edge` should end in a "
        "few seconds with the caption of the edge alone, `error` after --cloud-timeout (30 s) at most. `wait` should "
        f"end when its patience does, which is {WAIT_SCALE:g} of its own here."
    ),
)
