"""Many edges on one cloud: 1, 4 and 16 edges replay recorded drafts of real captions at once.

The server is the one of `--cloud-url`, or one that this module starts on loopback in a process of its own. Each call
must be answered at its first attempt, and each verdict must equal the one that was recorded with one edge alone.
`bench.load` defines the metrics and the runs that have a load.
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
    assign_captions,
    compute_load_metrics,
    list_load_cases,
    record_rounds,
    replay_rounds,
)
from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.config import Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Captioner, Cell
from edgecloud_sd.timing.clock import garbage_collector_frozen

LOSSLESS = Cell("speculative", gate.ALWAYS, GREEDY, k=4)  # verifies every draft

CLOUD_FIELDS = ("name", "engine", "dtype", "device", "max_rank", "fingerprint")  # fields of the identity in a result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = list_load_cases(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("load", cases, ids=[case.id for case in cases])


@contextmanager
def load_errors_in_one_line() -> Iterator[None]:
    """Fail the test without a traceback: a LoadError is a fault of the server, not of the code here."""
    try:
        yield
    except LoadError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(scope="module")
def pair(
    settings: Settings, connection: Connection | None, captioner: Captioner
) -> Iterator[tuple[Captioner, Connection]]:
    """Yield the run's own captioner and connection if it has a server, or else those of a server started here."""
    if connection is not None:
        yield captioner, connection
        return
    with ExitStack() as stack:
        with problems_in_one_line():
            server = stack.enter_context(connect(replace(settings, cloud_url=AUTO, on_cloud_fault="error")))
            assert server is not None
            remote_captioner = captioner.elsewhere(server)
        yield remote_captioner, server


@pytest.fixture(scope="module")
def clips(
    settings: Settings, pair: tuple[Captioner, Connection], data: Callable[[str], DataSet]
) -> list[RecordedCaption]:
    """Return the drafts of some captions with their verdicts, recorded with one edge alone."""
    captioner, _ = pair
    dataset = data(settings.language[0])
    captions = []
    for clip in dataset.clips[:LOAD_CLIPS]:
        with problems_in_one_line(), load_errors_in_one_line():
            request = dataset.request(clip)
            trace = captioner.trace(request, LOSSLESS, settings.max_new_tokens)
            captions.append(record_rounds(clip.file_id, captioner.prompt(request, LOSSLESS.mode), trace))
    return captions


def test_load(
    load: LoadCase,
    benchmark: BenchmarkFixture,
    pair: tuple[Captioner, Connection],
    clips: list[RecordedCaption],
    settings: Settings,
    pytestconfig: pytest.Config,
) -> None:
    _, connection = pair
    make_verifier = partial(connection.verifier, GREEDY)
    is_exact = connection.remote.dtype in LOSSLESS_DTYPES
    assignments = assign_captions(clips, load.edges, load.clips)
    replays: list[Replay] = []

    def replay() -> None:
        replays.append(replay_rounds(assignments, make_verifier, is_exact))

    benchmark.group = "many edges on one cloud"  # not comparable with the seconds of captions
    with load_errors_in_one_line():
        # a first round for each edge opens all sockets before anything is timed
        first_rounds = [[replace(captions[0], rounds=captions[0].rounds[:1])] for captions in assignments]
        replay_rounds(first_rounds, make_verifier, is_exact)
        with garbage_collector_frozen():
            benchmark.pedantic(replay, rounds=load.rounds, iterations=1)
    metrics = compute_load_metrics(replays)
    benchmark.extra_info["load"] = {
        "figures": metrics,
        "edges": load.edges,
        "captions_an_edge": len(assignments[0]),
        "clips": [clip.clip for clip in clips],
        "verifications": sum(call.is_verification for done in replays for calls in done.edges for call in calls),
        "lost": 0,  # a lost call or a second attempt raises LoadError
        "tried_again": 0,
        "cloud": {name: getattr(connection.remote, name) for name in CLOUD_FIELDS},
        "k": LOSSLESS.k,
        "rule": LOSSLESS.rule.label,
        "language": load.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
    pytestconfig.stash.setdefault(DONE, Done()).loads[load.id] = load, metrics
