"""The main job: caption every clip of the data set in every case of the grid, one round per clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import tables
from bench.cases import Case, group_name, plain_params
from bench.clip_text import describe_clip, describe_late_scores
from bench.resume import SavedClips
from bench.session import DataSet, Progress, errors_in_one_line
from edgecloud_sd.acceptance import GREEDY, Synthetic
from edgecloud_sd.config import Settings
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import BREAKER_OPENED, Finished, Trace
from edgecloud_sd.forecast.adaptive_k import AdaptiveK
from edgecloud_sd.forecast.budgets import gate_at
from edgecloud_sd.grid import find_feedback, has_chosen_level
from edgecloud_sd.host import limits
from edgecloud_sd.host.utilization import Meter, Utilization, unmeasured
from edgecloud_sd.lookup import CaptionHistory
from edgecloud_sd.measure import results
from edgecloud_sd.measure.audit import is_drawn
from edgecloud_sd.measure.metrics import Hindsight, counts, degraded_reason
from edgecloud_sd.measure.shadow import rejected_places, shadow_verify
from edgecloud_sd.measure.summary import ClipResult, clip_result
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import VirtualClock, garbage_collector_frozen
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault

Measured = tuple[Trace, Utilization, Hindsight | None]


@dataclass
class Captioning:
    """One case of the grid: how its clips are decoded, measured and kept."""

    case: Case
    pipeline: Pipeline
    settings: Settings
    profile: Profile | None
    saved: SavedClips
    captions: list[ClipResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.feedback = find_feedback(self.settings, self.case.strategy)

    @property
    def strategy(self) -> Strategy:
        """The strategy of the next caption: that of the case, at the level that the feedback of a budget gives."""
        strategy = self.case.strategy
        return replace(strategy, gate=gate_at(strategy.gate, self.feedback.level)) if self.feedback else strategy

    def decode(
        self,
        clip: Clip,
        request: Request,
        on_finished: Callable[[], None] = lambda: None,
    ) -> Trace:
        """Return the trace of one clip. Fail with one line for an expected failure."""
        with self.one_line(clip):
            return self.pipeline.trace(
                request,
                self.strategy,
                self.settings.max_new_tokens,
                link=self.case.link,
                profile=self.profile,
                seed=clip.file_id,
                on_finished=on_finished,
            )

    def one_line(self, clip: Clip) -> AbstractContextManager[None]:
        """Return a block whose expected failures are one line each, with the clip and the finished captions."""
        return errors_in_one_line(f"\n({self.saved.describe_kept()})", f"{clip.file_id}: ")

    def without_cloud(self) -> AbstractContextManager[None]:
        """Return a block for a question beside the captions. It ends at a fault of the cloud if the edge may go on."""
        return suppress(CloudFault) if self.pipeline.finish_alone else nullcontext()

    def cloud_tokens(self, clip: Clip, request: Request) -> tuple[int, ...]:
        """Return the cloud's own caption of a clip. Raise CloudFault if it fails."""
        trace = self.pipeline.trace(request, Strategy("cloud"), self.settings.max_new_tokens, seed=clip.file_id)
        return trace.tokens

    def check_saved(self, clip: Clip, request: Request) -> None:
        """Fail with one line if the saved caption of a clip is not the cloud's own. The cloud needs one pass for it."""
        if clip.file_id not in self.saved.records:
            return
        trace, _, _ = results.measurement_from_json(self.saved.records[clip.file_id])
        if degraded_reason(trace):
            return
        with self.one_line(clip), self.without_cloud():
            cloud = self.pipeline.cloud.verifier(GREEDY, Harness())
            is_own = not rejected_places(
                trace.tokens, self.pipeline.prompt(request, self.case.strategy.model_mode), cloud
            )
            # rounding may break a near-tie differently in one pass over all tokens
            if not is_own and trace.tokens != self.cloud_tokens(clip, request):
                raise pytest.fail.Exception(
                    f"{clip.file_id}: the saved caption is not the cloud's own, though {self.case.id} is lossless; "
                    "leave out --resume to start over",
                    pytrace=False,
                )

    def measure(self, clip: Clip, request: Request) -> Measured:
        """Return the trace of one clip with the use of this process, or what an earlier run saved of them."""
        if clip.file_id in self.saved.records:
            measured = results.measurement_from_json(self.saved.records[clip.file_id])
            if statistics := self._adaptive_k():
                statistics.replay(measured[0])
            if history := self._history():
                history.add(measured[0].tokens)
            return measured
        if self.profile:
            trace = self.decode(clip, request)
            return trace, unmeasured(trace.seconds, "the clock was virtual"), None
        with Meter(self.settings.cloud_device) as meter:
            trace = self.decode(clip, request, on_finished=meter.stop)
        return trace, meter.used, None

    def keep(self, clip: Clip, request: Request, measured: Measured) -> ClipResult:
        """Add a caption off the clock: ask the cloud about local tokens, and save the record."""
        trace, used, hindsight = measured
        is_own = self.saved.records.get(clip.file_id, {}).get("is_own")
        if clip.file_id not in self.saved.records:
            fault, harness = None, Harness()
            try:
                hindsight = self._shadow(trace, request, harness)
                is_own = self._audit(clip, trace, request, hindsight, harness)
            except CloudFault as error:
                fault = error
            trace = with_openings(trace, harness)
            with errors_in_one_line():
                self.saved.add(results.measurement_to_json(clip.file_id, trace, used, hindsight, is_own))
            if fault:
                with self.one_line(clip):
                    raise fault
        self.captions.append(clip_result(clip, trace, used, self._text, hindsight, is_own))
        if self.feedback:
            self.feedback.observe_counts(self.captions[-1].counts)
        return self.captions[-1]

    def _shadow(self, trace: Trace, request: Request, harness: Harness) -> Hindsight | None:
        """Return the cloud's verdict on local tokens, or None if it is not asked, says nothing of a gate, or fails.

        A cloud that has just failed a caption is not asked. Raise its CloudFault unless the edge may go on alone.
        """
        if self.has_shadow and degraded_reason(trace) is None:
            with self.without_cloud():
                self.pipeline.prepare(self.case.strategy.model_mode)
                cloud = self.pipeline.cloud.verifier(self.case.strategy.rule, harness)
                prompt = self.pipeline.prompt(request, self.case.strategy.model_mode)
                return shadow_verify(trace, prompt, cloud, self.case.strategy.gate)
        return None

    def _audit(
        self, clip: Clip, trace: Trace, request: Request, hindsight: Hindsight | None, harness: Harness
    ) -> bool | None:
        """Return whether a drawn caption is the cloud's own, or None for any other caption and without an answer."""
        strategy, share = self.case.strategy, self.settings.audit
        is_lossy = strategy.is_speculative and not strategy.is_lossless
        if share and is_lossy and is_drawn(clip.file_id, share) and not degraded_reason(trace):
            if strategy.rule.is_lossless and (hindsight or not counts(trace).local):
                return not (hindsight and hindsight.missed)
            with self.without_cloud():
                self.pipeline.prepare(strategy.model_mode)
                cloud = self.pipeline.cloud.verifier(GREEDY, harness)
                return not rejected_places(trace.tokens, self.pipeline.prompt(request, strategy.model_mode), cloud)
        return None

    def check_calibration(self) -> None:
        """Fail with one line if the level was calibrated under other conditions than those of the case."""
        if (calibrated := self.settings.calibrated) and has_chosen_level(self.settings, self.case.strategy):
            with self.without_cloud(), errors_in_one_line():
                calibrated.check(self.pipeline.conditions(self.settings, self.case.strategy, self.case.language))

    @property
    def has_shadow(self) -> bool:
        """Return whether the case has shadow verification."""
        strategy = self.case.strategy
        return self.settings.shadow == "yes" and strategy.is_speculative and not isinstance(strategy.rule, Synthetic)

    def load(self) -> None:
        """Load all that the case and its shadow verification need. Skip a case that is nothing without its cloud."""
        if self.has_shadow:
            with self.without_cloud():
                self.pipeline.prepare(self.case.strategy.model_mode)
        try:
            self.pipeline.prepare_for(self.case.strategy)
        except CloudFault as fault:
            if not self.pipeline.finish_alone:
                raise
            pytest.skip(f"mode {self.case.strategy.mode} has no edge that could go on alone: {fault}")

    def _adaptive_k(self) -> AdaptiveK | None:
        return self.pipeline.adaptive_k(self.case.strategy, self.case.language, self.case.link, self.profile)

    def _history(self) -> CaptionHistory | None:
        return self.pipeline.history(self.case.strategy, self.case.language, self.case.link, self.profile)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.pipeline.text(tokens, self.case.strategy.load_mode)


def test_captioning(
    case: Case,
    run_clock: VirtualClock,  # before `benchmark`, which takes it for its timer
    benchmark: BenchmarkFixture,
    pipeline: Pipeline,
    data: Callable[[str], DataSet],
    settings: Settings,
    profile: Profile | None,
    saved_clips: Callable[[Case], SavedClips],
    report: Callable[[Case, list[ClipResult], DataSet, limits.LimitsInForce], dict[str, Any]],
    progress: Callable[[int, str], Progress],
    show_lines: Callable[[Callable[[], list[str]]], None],
    cloud_tokens: dict[str, tuple[int, ...]],
    process_limits: ExitStack,
) -> None:
    """Caption every clip, check every caption, and record what they took."""
    clips = data(case.language)
    with errors_in_one_line():
        requests = [(clip, clips.request(clip)) for clip in clips.clips]  # all samples are in memory before the limits
        process_limits.enter_context(pipeline.limited(settings.process_limits))
        job = Captioning(case, pipeline, settings, profile, saved_clips(case))
        job.load()  # before anything is timed
        job.check_calibration()
        front = pipeline.prepare(pipeline.prepare_for(case.strategy)[0])
        cloud = tables.cloud_identity(case.strategy, pipeline)
    bar = progress(len(clips.clips), case.id)
    is_lossless = tables.output_promise(case.strategy, cloud.dtype if cloud else "") == "lossless"
    warm_up(job, *requests[0], is_lossless)
    if is_lossless:
        for clip, request in requests:
            job.check_saved(clip, request)

    waiting = chain(requests, repeat(requests[0]))  # --benchmark-cprofile decodes one clip once more
    measured: list[Measured] = []

    def decode(clip: Clip, request: Request) -> None:
        if len(job.captions) == len(requests):
            job.decode(clip, request)
            return
        measured.append(job.measure(clip, request))
        run_clock.advance(measured[-1][1].wall)

    def keep(clip: Clip, request: Request) -> None:
        if not measured:  # the clip of --benchmark-cprofile
            return
        with limits.memory_limit_paused():  # none of this is the edge's work
            result = job.keep(clip, request, measured.pop())
            bar.advance(result)
            place, unscored = f"{len(job.captions)} of {len(requests)}", tables.why_meaningless(settings, case)
            show_lines(lambda: describe_clip(result, place, settings.score_normalisation, unscored))

    benchmark.params = plain_params(settings, case.strategy, case.language, case.link)
    benchmark.group = group_name(settings)
    with garbage_collector_frozen():
        benchmark.pedantic(decode, setup=lambda: (next(waiting), {}), teardown=keep, rounds=len(requests), iterations=1)
    for result in job.captions:
        check_trace(result.trace, front.eos, settings.max_new_tokens)
        if is_lossless and not degraded_reason(result.trace):
            expected = cloud_tokens.setdefault(f"{case.language} {result.clip.file_id}", result.trace.tokens)
            assert result.trace.tokens == expected, f"{result.clip.file_id}: the output differs from the cloud's own"
    in_force = limits.read_limits()
    process_limits.close()  # scoring the captions is no work of the edge
    with errors_in_one_line(), job.saved.keep_clips():
        document = report(case, job.captions, clips, in_force)
    benchmark.extra_info["results"] = document
    show_lines(lambda: describe_late_scores(document["detailed_results"]))
    job.saved.finish()


def with_openings(trace: Trace, harness: Harness) -> Trace:
    """Return a trace that also has the openings of the breaker by questions after its caption, off its clock."""
    openings = [span for span in harness.watch.spans if span.part == BREAKER_OPENED]
    at_end = (replace(span, start=trace.seconds, end=trace.seconds) for span in openings)
    return replace(trace, spans=(*trace.spans, *at_end))


def warm_up(job: Captioning, clip: Clip, request: Request, is_lossless: bool) -> None:
    """Decode the first clip once, and check the lossless promise on it before anything is timed.

    Lookup forgets its caption, which would give away that of the first timed clip.
    """
    trace = job.decode(clip, request)
    job.pipeline.forget_captions()
    if is_lossless and not degraded_reason(trace):
        with job.one_line(clip), job.without_cloud():
            assert trace.tokens == job.cloud_tokens(clip, request), "the output differs from the cloud's own"


def check_trace(trace: Trace, eos: frozenset[int], max_new_tokens: int) -> None:
    """Check that a caption has one end, and that it ends for the reason that it gives."""
    finished = trace.events[-1][1]
    assert isinstance(finished, Finished)
    assert not eos.intersection(trace.tokens[:-1]), "tokens follow the end of the caption"
    assert (trace.tokens[-1] in eos) == (finished.reason == "eos")
    assert len(trace.tokens) == max_new_tokens or finished.reason == "eos"
