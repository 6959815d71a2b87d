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

from bench.cases import SETTINGS, group_name, plain_params
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
from bench.session import DataSet, errors_in_one_line, outcomes
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.config import Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import garbage_collector_frozen

LOSSLESS_K4 = Strategy("speculative", k=4)  # verifies every draft

CLOUD_FIELDS = ("name", "engine", "dtype", "device", "max_rank", "fingerprint")  # fields of the identity in a result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each number of edges."""
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
def served(settings: Settings, pipeline: Pipeline) -> Iterator[Pipeline]:
    """Yield the run's own pipeline if its cloud is a server, or else one with a server started here."""
    if settings.cloud_url:
        yield pipeline
        return
    with ExitStack() as stack:
        with errors_in_one_line():
            cloud = stack.enter_context(connect(replace(settings, cloud_url=AUTO, on_cloud_fault="error")))
            served = pipeline.with_cloud(cloud)
        yield served


@pytest.fixture(scope="module")
def clips(settings: Settings, served: Pipeline, data: Callable[[str], DataSet]) -> list[RecordedCaption]:
    """Return the drafts of some captions with their verdicts, recorded with one edge alone."""
    dataset = data(settings.language[0])
    captions = []
    for clip in dataset.clips[:LOAD_CLIPS]:
        with errors_in_one_line(), load_errors_in_one_line():
            request = dataset.request(clip)
            trace = served.trace(request, LOSSLESS_K4, settings.max_new_tokens)
            captions.append(record_rounds(clip.file_id, served.prompt(request, LOSSLESS_K4.mode), trace))
    return captions


def test_load(
    load: LoadCase,
    benchmark: BenchmarkFixture,
    served: Pipeline,
    clips: list[RecordedCaption],
    settings: Settings,
    pytestconfig: pytest.Config,
) -> None:
    """Replay the recorded drafts of all edges at once. Fail if a verdict differs from the recorded one."""
    make_verifier = partial(served.cloud.verifier, GREEDY)
    is_exact = served.cloud.identity.dtype in LOSSLESS_DTYPES
    assignments = assign_captions(clips, load.edges, load.clips)
    replays: list[Replay] = []

    def replay() -> None:
        replays.append(replay_rounds(assignments, make_verifier, is_exact))

    benchmark.params = plain_params(settings, LOSSLESS_K4, load.language, edges=load.edges)
    benchmark.group = group_name(settings, "many edges on one cloud")  # not comparable with the seconds of captions
    with load_errors_in_one_line():
        # a first round for each edge opens all sockets before anything is timed
        first_rounds = [[replace(captions[0], rounds=captions[0].rounds[:1])] for captions in assignments]
        replay_rounds(first_rounds, make_verifier, is_exact)
        with garbage_collector_frozen():
            benchmark.pedantic(replay, rounds=load.rounds, iterations=1)
    del replays[load.rounds :]  # --benchmark-cprofile replays once more
    metrics = compute_load_metrics(replays)
    benchmark.extra_info["load"] = {
        "figures": metrics,
        "edges": load.edges,
        "captions_an_edge": len(assignments[0]),
        "clips": [clip.clip for clip in clips],
        "verifications": sum(call.is_verification for done in replays for calls in done.edges for call in calls),
        "lost": 0,  # a lost call or a second attempt raises LoadError
        "tried_again": 0,
        "cloud": {name: getattr(served.cloud.identity, name) for name in CLOUD_FIELDS},
        "k": LOSSLESS_K4.k,
        "rule": LOSSLESS_K4.rule.label,
        "language": load.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
    outcomes(pytestconfig).loads[load.id] = load, metrics
