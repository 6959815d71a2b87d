"""The main job: caption every clip of the data set, in every cell of the grid, one round a clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from pytest_benchmark.fixture import BenchmarkFixture

from bench import table
from bench.cases import Case
from bench.conftest import DataSet, problems_in_one_line
from edgecloud_sd import results
from edgecloud_sd.captioner import Captioner, Cell, Request
from edgecloud_sd.clock import stamp
from edgecloud_sd.config import Settings
from edgecloud_sd.records import Clip, Finished, Trace
from edgecloud_sd.utilization import Meter, Utilization


def test_captioning(
    case: Case,
    benchmark: BenchmarkFixture,
    captioner: Captioner,
    data: Callable[[str], DataSet],
    settings: Settings,
    report: Callable[[Case, list[results.ClipResult], DataSet], results.Summary],
    progress: Callable[[int, str], Callable[[], None]],
    cloud_tokens: dict[str, tuple[int, ...]],
) -> None:
    chosen = data(case.language)
    with problems_in_one_line():
        captioner.load(case.cell.mode)
    advance = progress(len(chosen.clips), case.id)
    exact = table.promise(case, settings.cloud_dtype) == "exact"

    def decode(request: Request, cell: Cell = case.cell) -> Trace:
        return stamp(captioner.events(request, cell, settings.max_new_tokens))

    # the warm-up proves the promise on the first clip before anything is timed
    first = chosen.request(chosen.clips[0])
    warm = decode(first)
    if exact:
        assert warm.tokens == decode(first, Cell("cloud")).tokens, "the output differs from the cloud's own"

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
    eos = captioner.load(case.cell.mode).eos
    for each in captions:
        check(each.trace, eos, settings.max_new_tokens)
        if exact:  # and where cloud mode ran before, on every clip
            own = cloud_tokens.setdefault(f"{case.language} {each.clip.file_id}", each.trace.tokens)
            assert each.trace.tokens == own, f"{each.clip.file_id}: the output differs from the cloud's own"
    summary = report(case, captions, chosen)
    benchmark.extra_info.update(table.describe(case, captioner.pair, settings) | asdict(summary))


def check(trace: Trace, eos: frozenset[int], limit: int) -> None:
    """What must hold of every caption: one end, where it says."""
    finished = trace.events[-1][1]
    assert isinstance(finished, Finished)
    assert not eos.intersection(trace.tokens[:-1]), "tokens follow the end of the caption"
    assert (trace.tokens[-1] in eos) == (finished.reason == "eos")
    assert len(trace.tokens) == limit or finished.reason == "eos"
