"""More edges than sessions: each edge needs one session, and the server may take one away to admit another edge."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from bench.attacks.table import AttackTable, Cell
from bench.attacks.target import NO_ANSWER, Client, Place, RemoteCaption, start_target, text_ids
from edgecloud_sd import wire

CROWD_SESSIONS = 8
CROWDS = {"8-edges": 8, "9-edges": 9, "12-edges": 12}
CROWD_SECONDS = 6.0
CROWD_IDS, CROWD_DRAFT, CROWD_ROUNDS = 400, 4, 12  # a caption
BUSY_PAUSE = 0.2  # s after a refusal; a client of this package waits as long as it is told


def measure_crowding(names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """Yield the throughput for each number of edges, on a server of its own."""
    for name in names:
        edges = CROWDS[name]
        target_options = ("--max-sessions", str(CROWD_SESSIONS))
        with start_target(*target_options, clients=edges) as target, ThreadPoolExecutor(edges) as threads:
            ends = [time.monotonic() + CROWD_SECONDS] * edges
            counts = threads.map(run_edge, [target.place] * edges, range(edges), ends)
            yield describe_edges(sum(counts, Counter()))


def describe_edges(statuses: Counter[str]) -> Sequence[Cell]:
    """Return the cells of a row from the number of calls by their outcome: verified, lost, refused, captions."""
    verifications = statuses["verified"] + statuses["lost"]
    share = 100 * statuses["verified"] / verifications if verifications else None
    return statuses["verified"] / CROWD_SECONDS, share, statuses["captions"], statuses["refused"]


def run_edge(place: Place, number: int, end: float) -> Counter[str]:
    """Decode captions until `end`, and return the number of calls by their outcome."""
    outcomes: Counter[str] = Counter()
    client = Client(place, number)
    while time.monotonic() < end:
        caption = RemoteCaption(client, text_ids(CROWD_IDS, number))
        with suppress(*NO_ANSWER, wire.WireError):
            done = 0
            while done < CROWD_ROUNDS and time.monotonic() < end:
                if not caption.session:
                    if caption.open() >= 300:
                        outcomes["refused"] += 1
                        time.sleep(BUSY_PAUSE)
                    continue
                if caption.verify(text_ids(CROWD_DRAFT, done)) < 300:
                    outcomes["verified"] += 1
                    done += 1
                else:
                    outcomes["lost"] += 1
                    caption.session = ""
            outcomes["captions"] += done == CROWD_ROUNDS
            if caption.session:
                caption.close()
    client.close()
    return outcomes


CROWDING = AttackTable(
    title="Crowding",
    attacks={name: f"{edges} edges on {CROWD_SESSIONS} sessions" for name, edges in CROWDS.items()},
    headings=("verifications/s", "session there %", "captions", "opens refused"),
    measure=measure_crowding,
    note=(
        f"Each edge has a key, and decodes captions of {CROWD_IDS} ids in {CROWD_ROUNDS} rounds for "
        f"{CROWD_SECONDS:.0f} s. It opens its prompt again if the session is gone, and waits "
        f"{BUSY_PAUSE} s after a refusal."
    ),
)
