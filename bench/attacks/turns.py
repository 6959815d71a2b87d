"""Attacks with a key: one client sends what the limits allow, and a polite one waits for its turns beside it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from bench.attacks.table import AttackTable, Cell, Latencies, divide
from bench.attacks.target import (
    HOST,
    NO_ANSWER,
    RULE,
    Client,
    Place,
    RemoteCaption,
    open_request,
    request_head,
    start_target,
    text_ids,
)
from edgecloud_sd import wire
from edgecloud_sd.cloud.transport import MODEL_PATH, SESSIONS_PATH

TURN_SECONDS = 6.0  # s of measurement for each pattern
GREEDY_START = 1.0  # s between the start of the greedy client and the measurement
GREEDY_THREADS = 4  # threads of the greedy client
MOST_IDS = 4000  # ids of a prompt or a draft: the default limit is 4096
GREEDY_DRAFTS = (MOST_IDS, 1024, 256, 64, 16)  # the greedy client takes the longest that the server accepts
POLITE_IDS, POLITE_DRAFT, POLITE_ROUNDS = 120, 4, 16  # a caption of the polite client
REFUSED_PAUSE = 0.05  # s of the polite client after a refusal
REFUSED_BODY = 8 * 2**20  # bytes, beyond every limit on a body

Send = Callable[[int], object]  # sends one greedy request; its argument differs between calls


def prepare_opens(place: Place, client: Client) -> Send:
    """Return a function that opens a long prompt."""

    def send(number: int) -> None:
        path, body, _ = open_request(text_ids(MOST_IDS, number))
        client.request("POST", path, body, wire.OCTETS)

    return send


def prepare_drafts(place: Place, client: Client) -> Send:
    """Return a function that verifies the longest draft that the server accepts."""
    caption = RemoteCaption(client, text_ids(16))
    caption.open()
    length = next((length for length in GREEDY_DRAFTS if caption.verify(text_ids(length)) < 300), GREEDY_DRAFTS[-1])

    def send(number: int) -> None:
        caption.context, caption.agreed = caption.context[:1], 0
        if caption.verify(text_ids(length, number)) >= 400:
            caption.open()

    return send


def prepare_feeds(place: Place, client: Client) -> Send:
    """Return a function that verifies one token after a long context, which it sends whole with base 0."""
    caption = RemoteCaption(client, text_ids(16))
    caption.open()

    def send(number: int) -> None:
        caption.context, caption.agreed = [*caption.context[:1], *text_ids(MOST_IDS - 100, number)], 0
        if caption.verify(text_ids(1)) >= 400:
            caption.open()

    return send


def prepare_generates(place: Place, client: Client) -> Send:
    """Return a function that generates as many tokens as the limit allows, without an end token."""
    caption = RemoteCaption(client, text_ids(16))
    caption.open()

    def send(number: int) -> None:
        request = wire.build_generate_request(caption.check, (), (), MOST_IDS - 100)
        path = f"{SESSIONS_PATH}/{caption.session}/generate"
        if client.request("POST", path, wire.dumps(request), wire.JSON)[0] >= 400:
            caption.open()

    return send


def prepare_refused_bodies(place: Place, client: Client) -> Send:
    """Return a function that sends a body larger than every limit."""
    body = bytes(REFUSED_BODY)
    return lambda number: client.request("POST", f"{SESSIONS_PATH}?rule={RULE}&check=0", body, wire.OCTETS)


def prepare_tiny_requests(place: Place, client: Client) -> Send:
    """Return a function that asks for the model's identity."""
    return lambda number: client.request("GET", MODEL_PATH)


def prepare_abandoned_opens(place: Place, client: Client) -> Send:
    """Return a function that opens a long prompt and closes the connection at once."""
    return lambda number: abandon_open(place, 1, text_ids(MOST_IDS, number))


GREEDY_PATTERNS: Mapping[str, Callable[[Place, Client], Send]] = {
    "opens": prepare_opens,
    "drafts": prepare_drafts,
    "feeds": prepare_feeds,
    "generates": prepare_generates,
    "refused-bodies": prepare_refused_bodies,
    "tiny-requests": prepare_tiny_requests,
    "abandoned-opens": prepare_abandoned_opens,
}


def abandon_open(place: Place, key: int, ids: Sequence[int], wait: float = 0.0) -> None:
    """Send an open of a prompt, and close the connection after `wait` seconds without an answer."""
    path, body, _ = open_request(ids)
    with suppress(OSError), socket.create_connection((HOST, place.port), timeout=5) as connection:
        connection.sendall(request_head("POST", path, place.keys[key], len(body)) + body)
        connection.settimeout(wait)
        if wait:
            connection.recv(1)


def measure_turns(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield the latencies of the polite client beside each pattern, all on one server, after those alone."""
    with start_target() as target:
        alone = verify_politely(target.place, TURN_SECONDS)
        for name in names:
            with greedy_client(target.place, name):
                beside = verify_politely(target.place, TURN_SECONDS)
            yield compare_latencies(alone, beside)


def compare_latencies(alone: Latencies, beside: Latencies) -> Sequence[Cell]:
    """Return the cells of a row: verifications answered, p50 and p99 alone and beside, and the ratio of the p99."""
    ratio = divide(beside.percentile(99), alone.percentile(99))
    latencies = [side.percentile(percent) for percent in (50, 99) for side in (alone, beside)]
    return (len(beside.seconds), beside.unanswered, *latencies, ratio)


def verify_politely(place: Place, seconds: float) -> Latencies:
    """Decode captions with one open request at a time, and return the latencies of their opens and verifications."""
    client, end = Client(place), time.monotonic() + seconds
    answered: list[float] = []
    unanswered = number = 0
    while time.monotonic() < end:
        number += 1
        caption = RemoteCaption(client, text_ids(POLITE_IDS, number))
        drafts = [text_ids(POLITE_DRAFT, place) for place in range(POLITE_ROUNDS)]
        calls: list[Callable[[], int]] = [caption.open, *(partial(caption.verify, draft) for draft in drafts)]
        with suppress(*NO_ANSWER):
            for call in calls:
                start = time.monotonic()
                if call() >= 300:
                    unanswered += 1
                    time.sleep(REFUSED_PAUSE)
                    break
                answered.append(time.monotonic() - start)
                if time.monotonic() > end:
                    break
            if caption.session:
                caption.close()
    client.close()
    return Latencies(tuple(answered), unanswered)


@contextmanager
def greedy_client(place: Place, name: str) -> Iterator[None]:
    """Run the threads of a greedy client in a process of its own, whose work does not delay the polite client's."""
    process = multiprocessing.get_context("spawn").Process(target=send_greedily, args=(place, name), daemon=True)
    process.start()
    try:
        time.sleep(GREEDY_START)
        yield
    finally:
        process.kill()
        process.join()


def send_greedily(place: Place, name: str) -> None:
    """Send requests of one pattern from all threads, until this process is killed."""
    os.nice(19)  # a client elsewhere would take no core of the server
    threads = [threading.Thread(target=_repeat, args=(place, name, number)) for number in range(GREEDY_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _repeat(place: Place, name: str, number: int) -> None:
    send = None
    while True:
        number += GREEDY_THREADS
        with suppress(*NO_ANSWER, wire.WireError):
            send = send or GREEDY_PATTERNS[name](place, Client(place, 1))
            send(number)


TURNS = AttackTable(
    title="Turns",
    attacks={
        "opens": f"opens of {MOST_IDS} ids",
        "drafts": "drafts at the cap",
        "feeds": f"contexts of {MOST_IDS - 100} ids with base 0",
        "generates": f"generations of {MOST_IDS - 100} tokens",
        "refused-bodies": f"bodies of {REFUSED_BODY // 2**20} MiB, which are refused",
        "tiny-requests": "tiny requests at full rate",
        "abandoned-opens": f"opens of {MOST_IDS} ids, closed at once",
    },
    headings=("answered", "refused", "p50 alone ms", "beside", "p99 alone ms", "beside", "p99 ratio"),
    measure=measure_turns,
    note=(
        f"A polite client opens prompts and verifies {POLITE_ROUNDS} drafts of {POLITE_DRAFT} tokens in each, one "
        f"request at a time, for {TURN_SECONDS:.0f} s. Another client with a key of its own sends the pattern "
        f"on {GREEDY_THREADS} threads. The service aims at a ratio of 4 at most."
    ),
)
