"""Serve a target model to many edges: `python -m edgecloud_sd.cloud serve`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd.cloud import engine as engines
from edgecloud_sd.cloud.keys import parse_keys, read_keys, warn_if_others_can_read
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.cloud.url import is_loopback
from edgecloud_sd.data.texts import BadText, parse_yaml
from edgecloud_sd.host.descriptors import count_open_descriptors, raise_descriptor_limit
from edgecloud_sd.host.errors import errors_to_exit, warnings_in_one_line
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.models import devices, pairs
from edgecloud_sd.models.devices import choose_threads, use_threads
from edgecloud_sd.timing.clock import garbage_collector_frozen

if TYPE_CHECKING:
    from fastapi import FastAPI

    from edgecloud_sd.cloud.connections import ConnectionLimits

LOOPBACK = "127.0.0.1"
# The model's thread takes the interpreter's lock back many times in a pass, and a busy event loop keeps it for this
# time. With Python's default of 5 ms, the p99 of a verification beside tiny requests is about three times as long.
SWITCH_SECONDS = 0.0005
BACKLOG = 1024  # connections that the system keeps until they are accepted
DEFAULT = "(default: %(default)s)"  # argparse fills it in
POSITIVE_OPTIONS = ("max_sessions", "idle_timeout", "max_audio_seconds", "max_tokens", "threads")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with one line for a bad option or any other expected failure."""
    options = serve_parser().parse_args(hyphenate(arguments))
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with errors_to_exit(), warnings_in_one_line():
        serve(options)


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m edgecloud_sd.cloud", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_command = commands.add_parser("serve", help="serve a model until stopped", description=__doc__)
    _add_model_options(serve_command.add_argument_group("model"))
    _add_network_options(serve_command.add_argument_group("network and keys"))
    _add_limit_options(serve_command.add_argument_group("limits"))
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    pocket_cloud, transformers = pairs.PAIRS["pocket"].cloud, engines.ENGINE_NAMES[0]
    add(
        "--model", default=pocket_cloud, help="checkpoint folder, or its name on the Hugging Face hub (default: pocket)"
    )
    add("--engine", choices=engines.ENGINE_NAMES, default=transformers, help=f"library that runs the model {DEFAULT}")
    text = "engine argument of vLLM, for example tensor_parallel_size=2; may be given several times"
    add("--engine-option", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("--device", default="cpu", help=f"torch device, or auto for a GPU if there is one {DEFAULT}")
    text = f"number format; auto is float16 on a GPU and float32 on a CPU {DEFAULT}"
    add("--dtype", metavar=f"{{{','.join(devices.DTYPES_OR_AUTO)}}}", default="float32", help=text)
    add("--weights", choices=pairs.WEIGHTS, default=pairs.REAL, help=f"dummy weights are random {DEFAULT}")
    add("--threads", type=int, help="CPU threads of torch (default: one for a model under 50 M parameters)")


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default=LOOPBACK, help=f"address to listen on {DEFAULT}")
    add("--port", type=int, default=8700, help=f"port; 0 takes a free one and prints it {DEFAULT}")
    text = "file with the keys that clients must send, one per line; each key is one client; - reads one line of stdin"
    add("--api-key-file", type=Path, metavar="FILE", help=text)
    text = "listen beyond loopback without a key, so that everybody who can reach the server may use it"
    add("--insecure", action="store_true", help=text)
    add("--until-stdin-closes", action="store_true", help="stop when the process at the other end of stdin ends")


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    limits = ServiceLimits()

    def add(name: str, default: float, metavar: str, text: str) -> None:
        group.add_argument(name, type=type(default), default=default, metavar=metavar, help=f"{text} {DEFAULT}")

    add("--max-sessions", limits.max_sessions, "N", "prompts open at once")
    add("--idle-timeout", limits.idle_timeout, "SECONDS", "close a prompt this time after the end of its last request")
    add("--max-audio-seconds", limits.max_audio_seconds, "SECONDS", "audio of one prompt")
    add("--max-tokens", limits.max_tokens, "N", "tokens of one prompt and its output together")


def serve(options: argparse.Namespace) -> None:
    """Load the model, print the URL on stdout, and serve until stopped.

    Raise ValueError or OSError for an option that cannot be used.
    """
    from edgecloud_sd.cloud.connections import ConnectionLimits
    from edgecloud_sd.cloud.server import create_app  # imports FastAPI, which --help does not need

    keys = load_keys(options.api_key_file) if options.api_key_file else ()
    for name in POSITIVE_OPTIONS:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: must be a number above 0, not {value}")
    try:
        requested_dtype = devices.parse_cloud_dtype(options.dtype)
    except ValueError as error:
        raise ValueError(f"--dtype: {options.dtype!r} {error}") from None
    limits = ServiceLimits(options.max_sessions, options.idle_timeout, options.max_audio_seconds, options.max_tokens)
    engine_options = parse_engine_options(options.engine_option)
    if engine_options and options.engine != "vllm":
        raise ValueError(f"--engine-option: {options.engine_option[0]} works only with --engine vllm")
    # A bad address and a low limit on open files fail here, before the minutes that loading may take.
    connection_limits = ConnectionLimits().fit(raise_descriptor_limit(), count_open_descriptors())
    allow_remote = bool(keys) or options.insecure
    with open_socket(options.host, options.port, allow_remote) as listening:
        warn_about_exposure(options.host, listening, bool(keys))
        if options.until_stdin_closes:
            threading.Thread(target=stop_when_stdin_closes, daemon=True).start()
        device, dtype = devices.resolve_device(options.device, requested_dtype)
        engine = engines.load_engine(options.engine, options.model, device, dtype, engine_options, options.weights)
        if isinstance(engine, LocalCloud):
            use_threads(choose_threads(options.threads, [engine.local_parameters]))
        asyncio.run(run_app(create_app(engine, limits, keys, allow_remote), listening, connection_limits))


def load_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file, or of the first line of stdin for `-`, which leaves no secret on the disk."""
    if str(path) == "-":
        line = sys.stdin.buffer.readline() if sys.stdin else b""
        return parse_keys(line.decode("utf-8", "replace"), "--api-key-file: the first line of stdin")
    keys = read_keys(path)
    warn_if_others_can_read(path)
    return keys


def warn_about_exposure(host: str, listening: socket.socket, has_keys: bool) -> None:
    """Warn about a server that other machines can reach, because it has no key or sends keys and audio in the clear."""
    if is_loopback(listening.getsockname()[0]):
        return
    if has_keys:
        problem = "keys and audio cross the network unencrypted: put a proxy with TLS in front"
    else:
        problem = "--insecure lets everybody who can reach it use this server: give --api-key-file instead"
    warnings.warn(f"--host {host}: {problem}", stacklevel=2)


async def run_app(app: FastAPI, listening: socket.socket, limits: ConnectionLimits) -> None:
    """Serve an application on a socket, and print its URL when it is ready."""
    from edgecloud_sd.cloud.closing import GracefulServer
    from edgecloud_sd.cloud.connections import ServerConfig
    from edgecloud_sd.cloud.log import bounded_log

    sys.setswitchinterval(SWITCH_SECONDS)
    server = GracefulServer(ServerConfig(app, limits), app.state.requests)
    with bounded_log(), garbage_collector_frozen():  # a collection of all that torch has imported takes 0.1 s or more
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            listening.listen(BACKLOG)  # asyncio has set it to the number that it accepts at once
            host, port = listening.getsockname()[:2]
            print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await serving
    os._exit(0)  # the interpreter would wait for the threads of the model, and for torch: 2.5 s on 2 busy cores


def open_socket(host: str, port: int, allow_remote: bool = False) -> socket.socket:
    """Return a socket that listens on an address.

    Raise ValueError for an address that other machines can reach, unless `allow_remote`. Raise OSError if the socket
    cannot listen there.
    """
    try:
        if not 0 <= port < 2**16:  # the system would take a larger port modulo 65536
            raise OverflowError("ports are below 65536")
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not allow_remote and not is_loopback(str(address[0])):
            raise ValueError(
                f"--host: other machines can reach {host}: give --api-key-file, or --insecure to serve without a key"
            )
        with ExitStack() as stack:
            # asyncio turns Nagle's algorithm off only if the protocol is named; it would delay responses by 40 ms.
            listening = stack.enter_context(socket.socket(family, kind, socket.IPPROTO_TCP))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
            stack.pop_all()
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): choose another --port, or 0 for a free one") from None
    return listening


def parse_engine_options(assignments: Sequence[str]) -> dict[str, object]:
    """Return the values of NAME=VALUE, each read as YAML. Raise ValueError for anything else."""
    options = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--engine-option: {assignment!r} is not NAME=VALUE")
        try:
            options[name] = parse_yaml(value, name, is_typed=True)
        except BadText:
            raise ValueError(f"--engine-option: the value {value!r} of {name} is not YAML") from None
    return options


def stop_when_stdin_closes() -> None:
    """Send SIGTERM to this process when stdin closes, even while the model is loading."""
    # os.read, because a read of sys.stdin would lock its buffer, which the interpreter needs when it ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
