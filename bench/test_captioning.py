"""The main job: caption every clip of the data set, in every cell of the grid, one round a clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from pytest_benchmark.fixture import BenchmarkFixture

from bench import table
from bench.cases import Case
from bench.conftest import DataSet
from edgecloud_sd import results
from edgecloud_sd.captioner import Captioner, Cell, Request
from edgecloud_sd.clock import stamp
from edgecloud_sd.config import Settings
from edgecloud_sd.records import Clip, Trace
from edgecloud_sd.utilization import Meter, Utilization


def test_captioning(
    case: Case,
    benchmark: BenchmarkFixture,
    captioner: Captioner,
    data: Callable[[str], DataSet],
    settings: Settings,
    report: Callable[[Case, list[results.ClipResult], DataSet], results.Summary],
    progress: Callable[[int, str], Callable[[], None]],
) -> None:
    chosen = data(case.language)
    advance = progress(len(chosen.clips), case.id)

    def decode(request: Request, cell: Cell = case.cell) -> Trace:
        return stamp(captioner.events(request, cell, settings.max_new_tokens))

    # the warm-up loads what the mode needs, and proves the promise on the first clip before anything is timed
    first = chosen.request(chosen.clips[0])
    warm = decode(first)
    if case.cell.exact:
        assert warm.tokens == decode(first, Cell("cloud")).tokens, "speculative output differs from the cloud's own"

    waiting = iter([(clip, chosen.request(clip)) for clip in chosen.clips])
    done: list[tuple[Clip, Trace, Utilization]] = []

    def one(clip: Clip, request: Request) -> None:
        with Meter() as meter:
            trace = decode(request)
        done.append((clip, trace, meter.used))

    def take() -> tuple[tuple[Clip, Request], dict[str, object]]:
        if done:
            advance()
        return next(waiting), {}

    benchmark.pedantic(one, setup=take, rounds=len(chosen.clips), iterations=1)
    text = captioner.text(case.cell.mode)
    captions = [results.clip_result(clip, trace, used, text) for clip, trace, used in done]
    for each in captions:
        check(each.counts.tokens, len(each.trace.tokens), settings.max_new_tokens)
    summary = report(case, captions, chosen)
    benchmark.extra_info.update(table.describe(case, captioner.pair) | asdict(summary))


def check(counted: int, committed: int, limit: int) -> None:
    """What must hold of every caption."""
    assert counted == committed, "tokens committed and tokens counted by origin differ"
    assert 1 <= committed <= limit, f"{committed} tokens where 1 to {limit} were asked for"
