"""Many edges on one cloud: recorded drafts of real captions, replayed by 1, 4 and 16 edges at once.

The server is the one of `--cloud-url`, or one that is started for it on loopback, in a process of its own. Every call
must be answered at once, and every verdict be the one that was recorded when there was one edge alone. `bench.load`
says what is measured, and for which runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import SETTINGS
from bench.conftest import DONE, DataSet, Done, problems_in_one_line
from bench.load import (
    LOAD_CLIPS,
    LoadCase,
    LoadError,
    RecordedCaption,
    Replay,
    load_cases,
    load_metrics,
    record_rounds,
    replay_rounds,
    shares,
)
from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.config import Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Captioner, Cell
from edgecloud_sd.timing.clock import garbage_collector_frozen

STRICT = Cell("speculative", gate.ALWAYS, GREEDY, k=4)  # asks the cloud about every draft


CLOUD = ("name", "engine", "dtype", "device", "max_rank", "fingerprint")  # what a result states of it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    made = load_cases(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("load", made, ids=[load.id for load in made])


@contextmanager
def lost_in_one_line() -> Iterator[None]:
    """What an edge was not answered is no fault of the code that a traceback would show."""
    try:
        yield
    except LoadError as lost:
        raise pytest.fail.Exception(str(lost), pytrace=False) from None


@pytest.fixture(scope="module")
def pair(
    settings: Settings, connection: Connection | None, captioner: Captioner
) -> Iterator[tuple[Captioner, Connection]]:
    """The run's own where its cloud is a server, or one whose cloud is a server started here."""
    if connection is not None:
        yield captioner, connection
        return
    served = replace(settings, cloud_url=AUTO, on_cloud_fault="error")
    with ExitStack() as stack:
        with problems_in_one_line():
            started = stack.enter_context(connect(served))
            assert started is not None
            served_by = captioner.elsewhere(started)
        yield served_by, started


@pytest.fixture(scope="module")
def clips(
    settings: Settings, pair: tuple[Captioner, Connection], data: Callable[[str], DataSet]
) -> list[RecordedCaption]:
    """The drafts of some captions and the verdicts on them, from one edge alone."""
    captioner, _ = pair
    chosen = data(settings.language[0])
    found = []
    for clip in chosen.clips[:LOAD_CLIPS]:
        with problems_in_one_line(), lost_in_one_line():
            request = chosen.request(clip)
            trace = captioner.trace(request, STRICT, settings.max_new_tokens)
            found.append(record_rounds(clip.file_id, captioner.prompt(request, STRICT.mode), trace))
    return found


def test_load(
    load: LoadCase,
    benchmark: BenchmarkFixture,
    pair: tuple[Captioner, Connection],
    clips: list[RecordedCaption],
    settings: Settings,
    pytestconfig: pytest.Config,
) -> None:
    remote = pair[1].remote
    verifier = partial(pair[1].verifier, GREEDY)
    exact = remote.dtype in LOSSLESS_DTYPES
    each = shares(clips, load.edges, load.clips)
    done: list[Replay] = []
    benchmark.group = "many edges on one cloud"  # seconds a replay: nothing to rank captions with
    with lost_in_one_line():
        # so that every edge's connection stands before anything is timed
        replay_rounds([[replace(share[0], rounds=share[0].rounds[:1])] for share in each], verifier, exact)
        with garbage_collector_frozen():
            benchmark.pedantic(
                lambda: done.append(replay_rounds(each, verifier, exact)), rounds=load.rounds, iterations=1
            )
    found = load_metrics(done)
    benchmark.extra_info["load"] = {
        "figures": found,
        "edges": load.edges,
        "captions_an_edge": len(each[0]),
        "clips": [clip.clip for clip in clips],
        "verifications": sum(call.verify for one in done for calls in one.edges for call in calls),
        "lost": 0,  # or there were no figures
        "tried_again": 0,
        "cloud": {name: getattr(remote, name) for name in CLOUD},
        "k": STRICT.k,
        "rule": STRICT.rule.label,
        "language": load.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
    pytestconfig.stash.setdefault(DONE, Done()).loads[load.id] = load, found
