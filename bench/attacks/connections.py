"""Attacks before the key: connections that hold the server's descriptors and send little or nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from bench.attacks.table import AttackTable, Cell, Latencies
from bench.attacks.target import (
    HOST,
    NO_ANSWER,
    RULE,
    Client,
    Place,
    Target,
    ask_model,
    request_head,
    start_target,
)
from bench.load import compute_percentile
from edgecloud_sd.cloud.transport import SESSIONS_PATH

TARGET_DESCRIPTORS = 1024  # the server's limit on open files
HOLD_SECONDS = 25.0  # for which a connection is kept if the server does not close it
DRIP_SECONDS = 0.5  # between two bytes of one connection
ASK_SECONDS = 0.1  # between two requests of the polite client, each on a new connection
ASK_TIMEOUT = 2.0  # s
HALF_HEADER = f"GET /v1/model HTTP/1.1\r\nHost: {HOST}\r\nX-Slow: a".encode()
WRONG_KEY = request_head("POST", f"{SESSIONS_PATH}?rule={RULE}&check=0", "wrong", length=10**6)


@dataclass(frozen=True)
class HeldConnections:
    """Connections that send `first` at once, and then `drip` every `DRIP_SECONDS`."""

    connections: int
    first: bytes = b""
    drip: bytes = b""


HELD_CONNECTIONS = {
    "silent": HeldConnections(TARGET_DESCRIPTORS + 76),
    "half-header": HeldConnections(300, HALF_HEADER),
    "slow-header": HeldConnections(300, HALF_HEADER, b"a"),
    "dripped-body": HeldConnections(300, WRONG_KEY, b"a"),
}


@dataclass(frozen=True)
class Closings:
    """The outcome of one pattern: the seconds until the server closed each connection, without those still held."""

    connections: int
    seconds: tuple[float, ...]


def measure_connections(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield the cells of each pattern, on a server of its own."""
    for name in names:
        with start_target(descriptors=TARGET_DESCRIPTORS) as target:
            yield attack_with(HELD_CONNECTIONS[name], target)


def attack_with(pattern: HeldConnections, target: Target) -> Sequence[Cell]:
    """Hold connections, with a polite client beside them, and return the cells of the row."""
    size, start, over = target.log.stat().st_size, time.monotonic(), threading.Event()
    answers: list[Latencies] = []
    polite = threading.Thread(target=lambda: answers.append(ask_politely(target.place, over)))
    polite.start()
    try:
        closings = hold_connections(pattern, target.place.port)
    finally:
        over.set()
        polite.join()
    growth = (target.log.stat().st_size - size) / 1e3 / (time.monotonic() - start)
    return describe_closings(closings, growth, answers[0])


def describe_closings(closings: Closings, growth: float, polite: Latencies) -> Sequence[Cell]:
    """Return the cells of the row of a pattern. `growth` is that of the log in kB/s."""
    closed = closings.seconds
    median = compute_percentile(closed, 50) if closed else None
    held = closings.connections - len(closed)
    latencies = polite.percentile(50), polite.percentile(99)
    return (closings.connections, held, median, max(closed, default=None), growth, *latencies, 100 * polite.share)


def hold_connections(pattern: HeldConnections, port: int) -> Closings:
    """Open the connections of a pattern and keep them until the server has closed all, or for `HOLD_SECONDS`."""
    opened = {open_connection(port): time.monotonic() for _ in range(pattern.connections)}
    waiting = dict.fromkeys(opened, pattern.first)  # the bytes that each connection sends next
    seconds: list[float] = []
    end = time.monotonic() + HOLD_SECONDS
    try:
        while opened and time.monotonic() < end:
            for connection in list(opened):
                with suppress(BlockingIOError):  # not connected yet, or nothing to read
                    if exchange(connection, waiting[connection]):
                        seconds.append(time.monotonic() - opened.pop(connection))
                        connection.close()
                waiting[connection] = pattern.drip
            time.sleep(DRIP_SECONDS)
    finally:
        for connection in opened:
            connection.close()
    return Closings(pattern.connections, tuple(seconds))


def open_connection(port: int) -> socket.socket:
    """Return a socket that connects to a server, and waits for nothing."""
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex((HOST, port))
    return connection


def exchange(connection: socket.socket, data: bytes) -> bool:
    """Send bytes, drop what has arrived, and return True if the server has closed the connection.

    Raise BlockingIOError if it is open and has nothing more to read.
    """
    try:
        if data:
            connection.send(data)
        while connection.recv(2**16):
            pass
    except BlockingIOError:
        raise
    except OSError:
        return True
    return True


def ask_politely(place: Place, over: threading.Event) -> Latencies:
    """Ask for the model on a new connection every `ASK_SECONDS`, until the event. Return the latencies."""
    seconds: list[float] = []
    unanswered = 0
    while not over.wait(ASK_SECONDS):
        start = time.monotonic()
        try:
            with closing(Client(place, timeout=ASK_TIMEOUT)) as client:
                ask_model(client)
            seconds.append(time.monotonic() - start)
        except NO_ANSWER:
            unanswered += 1
    return Latencies(tuple(seconds), unanswered)


BEFORE_THE_KEY = AttackTable(
    title="Before the key",
    attacks={
        "silent": f"silent, under a limit of {TARGET_DESCRIPTORS} descriptors",
        "half-header": "half a header",
        "slow-header": f"a byte of a header every {DRIP_SECONDS} s",
        "dripped-body": f"a byte of a body every {DRIP_SECONDS} s, with a wrong key",
    },
    headings=("opened", "still held", "closed s", "last s", "log kB/s", "polite p50 ms", "p99 ms", "answered %"),
    measure=measure_connections,
    note=(
        f"Connections are kept for {HOLD_SECONDS:.0f} s. `still held` are those that the server has not closed by "
        "then; `closed` is the median time until it does, `last` the longest. A polite client with a key connects "
        f"anew {1 / ASK_SECONDS:.0f} times a second, and gives up after {ASK_TIMEOUT:.0f} s."
    ),
)
