"""Clients that are gone: what the server still computes and keeps for requests that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from bench.attacks.table import AttackTable, Cell
from bench.attacks.target import Client, Place, RemoteCaption, start_target, text_ids, wait_until_idle
from bench.attacks.turns import MOST_IDS, abandon_open

ABANDONED_OPENS, EARLY_RETRIES = 40, 10
EARLY_TIMEOUT = 0.2  # s for which a client waits that gives up too early; one such prefill takes longer
IDLE_SECONDS = 40.0  # to wait at most until the server computes nothing


def abandon_at_once(place: Place) -> None:
    """Send opens at the same time, and close their connections at once."""
    with ThreadPoolExecutor(ABANDONED_OPENS) as threads:
        list(threads.map(lambda number: abandon_open(place, 0, text_ids(MOST_IDS, number)), range(ABANDONED_OPENS)))


def give_up_and_retry(place: Place) -> None:
    """Send the same open again after each time-out."""
    for _ in range(EARLY_RETRIES):
        abandon_open(place, 0, text_ids(MOST_IDS), EARLY_TIMEOUT)


def answer_all(place: Place) -> None:
    """Open one prompt, wait for the answer, and close it: the cost of one."""
    with closing(Client(place)) as client:
        caption = RemoteCaption(client, text_ids(MOST_IDS))
        caption.open()
        caption.close()


GONE_PATTERNS: Mapping[str, Callable[[Place], None]] = {
    "one-open": answer_all,
    "abandoned": abandon_at_once,
    "timed-out": give_up_and_retry,
}


def measure_gone(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield the CPU seconds that each pattern costs, and the sessions that it leaves, each on a server of its own."""
    for name in names:
        with start_target() as target:
            before = target.cpu_seconds()
            GONE_PATTERNS[name](target.place)
            wait_until_idle(target, IDLE_SECONDS)
            yield target.cpu_seconds() - before, target.count_sessions()


GONE = AttackTable(
    title="Gone",
    attacks={
        "one-open": f"one open of {MOST_IDS} ids, answered and closed",
        "abandoned": f"{ABANDONED_OPENS} opens of {MOST_IDS} ids at the same time, closed at once",
        "timed-out": f"one open of {MOST_IDS} ids, tried {EARLY_RETRIES} times for {EARLY_TIMEOUT} s",
    },
    headings=("CPU s", "sessions left"),
    measure=measure_gone,
    note="The CPU seconds of the server until it computes nothing, and its open sessions then, by its own metrics.",
)
