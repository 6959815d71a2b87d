"""The main job: caption every clip of the data set, in every cell of the grid, one round a clip."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import tables
from bench.cases import Case
from bench.conftest import DataSet, Progress, problems_in_one_line
from bench.resume import Unfinished
from edgecloud_sd.acceptance import Synthetic
from edgecloud_sd.config import Settings
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import Finished, Trace
from edgecloud_sd.host import limits
from edgecloud_sd.host.utilization import Meter, Utilization, unmeasured
from edgecloud_sd.measure import results, shadow
from edgecloud_sd.measure.metrics import Hindsight, degraded
from edgecloud_sd.measure.summary import ClipResult, clip_result
from edgecloud_sd.pipeline import Captioner, Cell, Request
from edgecloud_sd.timing.clock import VirtualClock, garbage_collector_frozen
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault


def test_captioning(
    case: Case,
    run_clock: VirtualClock,  # before `benchmark`, which takes it for its timer
    benchmark: BenchmarkFixture,
    captioner: Captioner,
    data: Callable[[str], DataSet],
    settings: Settings,
    profile: Profile | None,
    unfinished: Callable[[Case], Unfinished],
    report: Callable[[Case, list[ClipResult], DataSet, limits.LimitsInForce], dict[str, object]],
    progress: Callable[[int, str], Progress],
    cloud_tokens: dict[str, tuple[int, ...]],
    held: ExitStack,
) -> None:
    chosen = data(case.language)
    with problems_in_one_line():
        held.enter_context(limits.apply_limits(limits.Limits(settings.max_cpu_cores, settings.max_memory_gb)))
        captioner.load(case.cell.mode)
        saved = unfinished(case)
    bar = progress(len(chosen.clips), case.id)
    exact = tables.output_promise(case, captioner.cloud_dtype if case.cell.mode != "edge" else "") == "exact"
    text = captioner.text(case.cell.mode)

    def decode(
        clip: Clip, request: Request, cell: Cell = case.cell, finished: Callable[[], None] = lambda: None
    ) -> Trace:
        try:
            return captioner.trace(request, cell, settings.max_new_tokens, profile, clip.file_id, finished)
        except CloudFault as fault:
            kept = f"{len(captions)} finished captions are kept: --resume goes on from there"
            raise pytest.fail.Exception(f"{clip.file_id}: {fault}\n({kept})", pytrace=False) from None

    captions: list[ClipResult] = []
    # the warm-up proves the promise on the first clip before anything is timed
    first = chosen.clips[0], chosen.request(chosen.clips[0])
    warm = decode(*first)
    if exact and promised(warm):
        own = decode(*first, Cell("cloud", link=case.cell.link))
        assert promised(warm) == own.tokens, "the output differs from the cloud's own"

    taken: list[tuple[Trace, Utilization, Hindsight | None]] = []
    waiting = iter([(clip, chosen.request(clip)) for clip in chosen.clips])  # the samples are in memory

    def one(clip: Clip, request: Request) -> None:
        if clip.file_id in saved.done:
            trace, used, hindsight = results.measurement_from_json(saved.done[clip.file_id])
            captioner.remember(trace, case.cell, case.language, profile)
        elif profile:
            trace, hindsight = decode(clip, request), None
            used = unmeasured(trace.seconds, "the clock was virtual")
        else:
            with Meter(settings.cloud_device) as meter:
                trace, hindsight = decode(clip, request, finished=meter.stop), None
            used = meter.used
        run_clock.advance(used.wall)
        taken.append((trace, used, hindsight))

    def keep(clip: Clip, request: Request) -> None:
        """Off the clock: what the cloud says afterwards, and the record on the disk."""
        trace, used, hindsight = taken.pop()
        if clip.file_id not in saved.done:
            drawn = isinstance(case.cell.rule, Synthetic)  # verdicts that say nothing of a gate
            if settings.shadow == "yes" and case.cell.mode == "speculative" and not drawn:
                prompt = captioner.prompt(request, case.cell.mode)
                with suppress(CloudFault):  # what is not known is null
                    hindsight = shadow.shadow_verify(trace, prompt, captioner.verifier(case.cell.rule))
            saved.add(results.measurement_to_json(clip.file_id, trace, used, hindsight))
        captions.append(clip_result(clip, trace, used, text, hindsight))
        bar.advance(captions[-1])

    with garbage_collector_frozen():
        benchmark.pedantic(
            one, setup=lambda: (next(waiting), {}), teardown=keep, rounds=len(chosen.clips), iterations=1
        )
    eos = captioner.load(case.cell.mode).eos
    for each in captions:
        check_trace(each.trace, eos, settings.max_new_tokens)
        if exact and (tokens := promised(each.trace)):  # and where cloud mode ran before, on every clip
            own_tokens = cloud_tokens.setdefault(f"{case.language} {each.clip.file_id}", tokens)
            assert tokens == own_tokens, f"{each.clip.file_id}: the output differs from the cloud's own"
    in_force = limits.read_limits()
    held.close()  # what scores the captions is not the edge's
    benchmark.extra_info["results"] = report(case, captions, chosen, in_force)
    saved.finish()


def promised(trace: Trace) -> tuple[int, ...] | None:
    """The tokens, where they are promised to be the cloud's own: not where the edge had to finish alone."""
    return None if degraded(trace) else trace.tokens


def check_trace(trace: Trace, eos: frozenset[int], limit: int) -> None:
    """What must hold of every caption: one end, where it says."""
    finished = trace.events[-1][1]
    assert isinstance(finished, Finished)
    assert not eos.intersection(trace.tokens[:-1]), "tokens follow the end of the caption"
    assert (trace.tokens[-1] in eos) == (finished.reason == "eos")
    assert len(trace.tokens) == limit or finished.reason == "eos"
