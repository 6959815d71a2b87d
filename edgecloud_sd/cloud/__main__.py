"""`python -m edgecloud_sd.cloud serve`: the cloud's side as a service for many edges."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd.cloud import engine as engines
from edgecloud_sd.cloud.keys import read_keys
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.models import devices, pairs
from edgecloud_sd.models.devices import choose_threads, use_threads

if TYPE_CHECKING:
    import uvicorn

LOOPBACK = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> None:
    options = serve_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        serve(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def serve_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m edgecloud_sd.cloud", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model until stopped")
    add, limits = serve.add_argument, ServiceLimits()
    shown = "(default: %(default)s)"
    add("--model", default=pairs.PAIRS["pocket"].cloud, help="a folder or a hub name (default: the pocket pair's)")
    add("--engine", choices=engines.ENGINE_NAMES, default=engines.ENGINE_NAMES[0], help=f"what computes {shown}")
    add("--device", default="cpu", help=f"torch device, or auto: a GPU where there is one {shown}")
    add("--weights", default=pairs.REAL, choices=pairs.WEIGHTS, help=f"dummy ones are random {shown}")
    dtypes = ", ".join(devices.DTYPES_OR_AUTO)
    add("--dtype", default="float32", help=f"number format: {dtypes}; auto is by the device {shown}")
    add("--threads", type=int, help="CPU threads of torch (default: one for models under 50 M parameters)")
    add("--host", default=LOOPBACK, help=f"address to listen on {shown}")
    add("--port", type=int, default=8700, help=f"0 takes a free one and prints it {shown}")
    add("--api-key-file", type=Path, help="keys that clients must show, one a line, each a client of its own")
    add("--insecure", action="store_true", help="listen off loopback without a key: whoever reaches it may use it")
    add("--max-sessions", type=int, default=limits.max_sessions, help=f"prompts open at once {shown}")
    add("--idle-timeout", type=float, default=limits.idle_timeout, help=f"close one after s without a call {shown}")
    add("--max-audio-seconds", type=float, default=limits.max_audio_seconds, help=f"s of one prompt {shown}")
    add("--max-tokens", type=int, default=limits.max_tokens, help=f"of a prompt and its caption together {shown}")
    add("--until-stdin-closes", action="store_true", help="stop with the process that holds the other end")
    add(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine argument of vLLM, e.g. tensor_parallel_size=2; may be repeated",
    )
    return made


def serve(options: argparse.Namespace) -> None:
    """Load, listen, say where in one line on stdout, return when stopped. ValueError or OSError for bad options."""
    import uvicorn  # which no help text should wait for, as for what the two below bring

    from edgecloud_sd.cloud.server import create_app
    from edgecloud_sd.cloud.transport import KEEP_ALIVE

    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    for name in ("max_sessions", "idle_timeout", "max_audio_seconds", "max_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: must be a number above 0, not {value}")
    try:
        asked = devices.parse_cloud_dtype(options.dtype)
    except ValueError as error:
        raise ValueError(f"--dtype: {options.dtype!r} {error}") from None
    limits = ServiceLimits(options.max_sessions, options.idle_timeout, options.max_audio_seconds, options.max_tokens)
    given = flags(options.engine_option)
    if given and options.engine != "vllm":
        raise ValueError("--engine-option: is for --engine vllm")
    listening = listen(options.host, options.port, anyone=bool(keys) or options.insecure)  # before minutes of loading
    with listening:
        if options.until_stdin_closes:
            threading.Thread(target=stop_with_stdin, daemon=True).start()
        device, dtype = devices.resolve_device(options.device, asked)
        engine = engines.load_engine(options.engine, options.model, device, dtype, given, options.weights)
        if isinstance(engine, engines.Transformers):
            use_threads(choose_threads(options.threads, [engine.model.thinker.num_parameters()]))
        app = create_app(engine, limits, keys)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,  # whoever has no key is told by an address, which must not be their own word
                ws="none",
                timeout_keep_alive=int(KEEP_ALIVE) + 15,
                timeout_graceful_shutdown=5,
            )
        )
        host, port = listening.getsockname()[:2]
        asyncio.run(announced(server, listening, f"http://{f'[{host}]' if ':' in host else host}:{port}"))


async def announced(server: uvicorn.Server, listening: socket.socket, url: str) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        print(url, flush=True)
    await serving


def listen(host: str, port: int, anyone: bool = False) -> socket.socket:
    """A socket that listens, for this machine alone unless for `anyone`. ValueError for an address that others reach,
    OSError where it cannot be listened on."""
    try:
        if not 0 <= port < 2**16:  # or it would be taken modulo that
            raise OverflowError("ports are below 65536")
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not anyone and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise ValueError(
                f"--host: {host} can be reached by others: give --api-key-file, or --insecure if that is meant"
            )
        # with its protocol named, or asyncio would leave Nagle's algorithm on: 40 ms an answer
        with ExitStack() as stack:
            made = stack.enter_context(socket.socket(family, kind, socket.IPPROTO_TCP))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
            stack.pop_all()
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): choose another --port, or 0 for a free one") from None
    return made


def flags(given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as YAML reads the value."""
    import yaml

    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--engine-option: {each!r} is not NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--engine-option: {value!r} is not YAML") from None
    return found


def stop_with_stdin() -> None:
    """As a signal would, be it while the model is loading."""
    while os.read(sys.stdin.fileno(), 4096):  # past the buffer, whose lock would be held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
