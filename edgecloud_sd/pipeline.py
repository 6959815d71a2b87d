"""A loaded pair that decodes requests, for the command line, the suite and your own code.

pipeline = Pipeline.load("pocket")
caption = pipeline.caption("speech.wav", language="english", strategy=Strategy("speculative", k=4))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgecloud_sd.cloud.local import Cloud, LocalCloud
from edgecloud_sd.data import audio, dataset, prompts
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import Event, Prepared, Prompt, Trace
from edgecloud_sd.fields import check_type, whole_number
from edgecloud_sd.forecast.adaptive_k import AdaptiveK
from edgecloud_sd.forecast.budgets import calibrated_strategy
from edgecloud_sd.forecast.calibration import Conditions
from edgecloud_sd.gate import ALWAYS
from edgecloud_sd.host.limits import Limits, LimitsInForce, apply_limits, memory_limit_paused
from edgecloud_sd.lookup import CaptionHistory, Lookup
from edgecloud_sd.models import checkpoint, devices, pairs, traits
from edgecloud_sd.session import Model
from edgecloud_sd.stopping import MAX_NEW_TOKENS, LengthLimit, Stopping, check_length
from edgecloud_sd.strategy import LOSSLESS, Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness, start_background_thread
from edgecloud_sd.timing.link import NO_LINK, Link
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault, FailedVerifier, Verifier

if TYPE_CHECKING:
    from edgecloud_sd.config import Settings
    from edgecloud_sd.models.frontend import Frontend
    from edgecloud_sd.models.hf import HFModel


@dataclass(frozen=True)
class Request:
    """One clip to caption: mono float32 samples at 16 kHz, and the wording of the prompt.

    `Request.of` makes a request from a file or an array. Raise ValueError for an unknown language or prompt type, and
    TypeError or ValueError for samples that are not mono, empty or not finite.
    """

    samples: NDArray[np.float32]
    language: str = "chinese"
    prompt_type: str = "default"
    transcription: str | None = None
    task: str | None = None  # the text of the task, instead of the prompt type's

    def __post_init__(self) -> None:
        check_type("language", self.language, str, f"choose one of {', '.join(prompts.LANGUAGES)}")
        check_type("prompt_type", self.prompt_type, str, f"choose one of {', '.join(prompts.PROMPT_TYPES)}")
        for name, text in (("transcription", self.transcription), ("task", self.task)):
            if text is not None:
                check_type(name, text, str, "give a text, or None")
        prompts.format_task(self.language, self.prompt_type, self.transcription, self.task)  # raises ValueError
        object.__setattr__(self, "samples", audio.check_samples(self.samples))

    @classmethod
    def of(
        cls,
        source: str | Path | ArrayLike,
        sampling_rate: int = dataset.SAMPLE_RATE,
        language: str = "chinese",
        prompt_type: str = "default",
        transcription: str | None = None,
        task: str | None = None,
    ) -> Request:
        """Return a request for an audio file, or for an array as `audio.as_samples` takes it.

        Raise ValueError for audio that cannot be used. A file has its own sampling rate.
        """
        if isinstance(source, str | Path):
            samples = dataset.load_audio(source)
        else:
            samples = audio.as_samples(source, sampling_rate)
        return cls(samples, language, prompt_type, transcription, task)


@dataclass(frozen=True)
class Caption:
    """The text of a generation, its token ids and its trace."""

    text: str
    tokens: tuple[int, ...]
    trace: Trace


def generation_events(
    build_prompt: Callable[[], Prompt],
    strategy: Strategy,
    stopping: Stopping,
    edge: Model | None,
    cloud: Cloud | None,
    harness: Harness | None = None,
    *,
    adaptive_k: AdaptiveK | None = None,
    finish_alone: bool = False,
    fault: CloudFault | None = None,
    shared_ids: int | None = None,
    open_lookup: Callable[[Sequence[int]], Lookup] | None = None,
) -> Iterator[Event]:
    """Yield the events of one generation, from its features to its last token.

    Mode cloud needs no `edge`, and a strategy that never asks the cloud needs none. `adaptive_k` is for a strategy
    without a k. `fault` is a failure of the cloud before this generation, which may `finish_alone`. `shared_ids` is
    `Runtime.shared_ids`. `open_lookup` takes the ids of the prompt, and is for drafters that look up.
    """
    harness = harness or Harness()
    finish_alone = finish_alone and strategy.needs_edge
    prompt = harness.prepared(build_prompt)
    yield Prepared(len(prompt.ids))
    verifier = None
    if cloud and strategy.asks_cloud:
        verifier = _open_verifier(cloud, strategy, harness, fault, finish_alone)
    lengths = adaptive_k.for_generation() if adaptive_k else None
    lookup = open_lookup(prompt.ids) if open_lookup else None
    runtime = Runtime(
        choose_k=lengths.choose_k if lengths else None,
        background=harness.background_verification if strategy.draft_ahead else None,
        finish_alone=finish_alone,
        shared_ids=shared_ids,
        lookup=lookup,
    )
    timed_edge = harness.edge(edge) if edge else None
    events = decode(prompt, harness.timed_strategy(strategy), stopping, timed_edge, verifier, runtime)
    events = lookup.observe(events) if lookup else events
    observed = lengths.observe(events, harness.watch.seconds) if lengths else events
    yield from harness.with_corrections(observed)  # outside, so that adaptive k takes no correction for a step


def _open_verifier(
    cloud: Cloud, strategy: Strategy, harness: Harness, fault: CloudFault | None, finish_alone: bool
) -> Verifier:
    """Return the verifier of a generation. After a fault of the cloud it fails, if the edge may finish alone."""
    start = harness.watch.seconds()
    verifier: Verifier
    try:
        if fault:
            raise fault
        verifier = cloud.verifier(strategy.rule, harness, strategy.wants_rest)
    except CloudFault as error:
        if not finish_alone:
            raise
        if not fault:
            harness.record_fault(error, start)
        harness.count_messages()
        harness.mark_breaker(error)
        verifier = FailedVerifier(error)
    return harness.deferred(verifier, strategy.prefill) if strategy.is_speculative else verifier


def count_shared_ids(edge: HFModel, cloud_size: int) -> int | None:
    """Return `Runtime.shared_ids` of an edge and the vocabulary size of a cloud."""
    return None if edge.vocab_size == cloud_size else min(edge.vocab_size, cloud_size)


class Pipeline:
    """A pair that decodes requests. Each side loads when a strategy first needs it: mode edge never loads the cloud.

    Threads and interleaved generators may share a pipeline. `threads` sets the CPU threads of torch for the whole
    process; None chooses them by the size of the models. `finish_alone` lets the edge finish if the cloud fails.
    """

    def __init__(
        self,
        pair: pairs.Pair = pairs.PAIRS["pocket"],
        cloud: Cloud | None = None,
        *,
        edge_device: str = "cpu",
        edge_dtype: str = "float32",
        threads: int | None = None,
        finish_alone: bool = False,
    ) -> None:
        check_type("pair", pair, pairs.Pair, f"write Pipeline.load(name), with a name of {', '.join(pairs.PAIRS)}")
        if threads is not None:
            threads = whole_number("threads", threads, 1, ", or None to choose by the size of the models")
        self.pair = pair
        self.cloud: Cloud = cloud or LocalCloud(pair.cloud, weights=pair.weights)
        self.finish_alone = finish_alone
        self._edge_device = edge_device
        self._edge_dtype = edge_dtype
        self._threads = threads
        self._lock = RLock()
        self._ready: dict[str, tuple[Frontend, int]] = {}  # mode: front end, number of torch threads
        self._adaptive: dict[tuple[object, ...], AdaptiveK] = {}
        self._histories: dict[tuple[object, ...], CaptionHistory] = {}

    @classmethod
    def load(
        cls,
        pair: str | pairs.Pair = "pocket",
        *,
        edge_device: str = "cpu",
        edge_dtype: str = "float32",
        cloud_device: str = "cpu",
        cloud_dtype: str = "float32",
        threads: int | None = None,
    ) -> Pipeline:
        """Load both sides of a pair into this process.

        Raise ValueError for an unknown pair, device or dtype, or if the checkpoints are no pair or do not fit in
        memory. Raise OSError for a checkpoint that cannot be read.
        """
        pair = pairs.find_pair(pair) if isinstance(pair, str) else pair
        pipeline = cls(pair, edge_device=edge_device, edge_dtype=edge_dtype, threads=threads)
        pipeline.cloud = LocalCloud(pair.cloud, cloud_device, cloud_dtype, pair.weights)
        pipeline.prepare("speculative")
        return pipeline

    @classmethod
    def from_settings(cls, settings: Settings, cloud: Cloud) -> Pipeline:
        """Return the pipeline that the settings of a run ask for, with a cloud of `connect.connect`."""
        return cls(
            settings.run_pair,
            cloud,
            edge_device=settings.edge_device,
            edge_dtype=settings.edge_dtype,
            threads=settings.threads,
            finish_alone=settings.on_cloud_fault == "edge",
        )

    def with_cloud(self, cloud: Cloud) -> Pipeline:
        """Return a pipeline with this one's edge and another cloud. Its edge does not finish alone after a fault."""
        other = Pipeline(self.pair, cloud, threads=self._threads)
        other.edge = self.edge
        return other

    @cached_property
    def edge(self) -> HFModel:
        """The edge's model. It loads when it is first needed."""
        from edgecloud_sd.models.load import load_model  # help texts must not wait for torch

        front = vars(self).get("front_end")
        return load_model(self.pair.edge, self._edge_device, self._edge_dtype, self.pair.weights, front)

    @cached_property
    def front_end(self) -> Frontend:
        """The edge's front end without its weights."""
        from edgecloud_sd.models.load import load_frontend

        return load_frontend(self.pair.edge, self.pair.weights)

    @cached_property
    def edge_weights(self) -> str:
        """The digest of the edge's weights."""
        with memory_limit_paused():  # not loading, and on threads
            return checkpoint.weights_digest(self.pair.edge, self.pair.weights)

    @property
    def cloud_model(self) -> HFModel:
        """The cloud's model in this process. Raise ValueError if the cloud runs elsewhere."""
        if not isinstance(self.cloud, LocalCloud):
            raise ValueError(f"{self.cloud.identity.name} runs elsewhere, not in this process")
        return self.cloud.model

    @contextmanager
    def limited(self, limits: Limits) -> Iterator[LimitsInForce]:
        """Hold this process, as the edge, to limits in the block: loading and decoding. Raise LimitError.

        Libraries, the front end and a thread start before, because they may abort the process when memory ends. Their
        memory counts.
        """
        if limits.memory_gb is not None:
            from edgecloud_sd.models.load import import_libraries

            import_libraries()
            devices.start_threads()
            start_background_thread(devices.start_threads)
            _ = self.front_end
        with apply_limits(limits) as in_force:
            yield in_force

    def prepare(self, mode: str) -> Frontend:
        """Load the sides that a mode needs, check that they are a pair, and return the edge's front end.

        It builds the prompts of every mode, so that modes can be compared. Mode cloud loads no weights of the edge.
        """
        with self._lock:
            if mode not in self._ready:
                self._ready[mode] = self._load_sides(mode)
            front, threads = self._ready[mode]
        devices.use_threads(threads)
        return front

    def prepare_for(self, strategy: Strategy, harness: Harness | None = None) -> tuple[str, CloudFault | None]:
        """Load the sides that a strategy needs. Return the mode they are loaded for, and the fault of a dead cloud.

        Raise that fault instead unless the edge may finish alone. The edge is then all that is loaded. The watch of
        `harness` begins when all is loaded, or with the call that a dead cloud did not answer.
        """
        check_type("strategy", strategy, Strategy, 'write Strategy("edge")')
        harness = harness or Harness()
        may_finish_alone = self.finish_alone and strategy.needs_edge
        if may_finish_alone:
            self.prepare("edge")
        harness.watch.restart()
        try:
            self.prepare(strategy.load_mode)
        except CloudFault as fault:
            if not may_finish_alone:
                raise
            harness.record_fault(fault, 0.0)
            return "edge", fault
        harness.watch.restart()
        return strategy.load_mode, None

    def _load_sides(self, mode: str) -> tuple[Frontend, int]:
        front: Frontend = self.edge if mode != "cloud" or "edge" in vars(self) else self.front_end
        parameters = [] if mode == "cloud" else [self.edge.thinker.num_parameters()]
        if mode != "edge":
            cloud = self.cloud.identity
            traits.check_pair(front.name, traits.frontend_traits(front), cloud.name, cloud.traits)
            if cloud.has_dummy_weights != (self.pair.weights == pairs.DUMMY):
                raise ValueError(
                    f"{cloud.name}, at the cloud, and {front.name} do not both have dummy weights: --weights"
                )
            if mode == "speculative" and self.pair.weights == pairs.DUMMY:
                from edgecloud_sd.models import dummy

                dummy.check_vocab_sizes(self.edge.vocab_size, cloud.vocab_size)
            parameters.append(self.cloud.local_parameters)
        return front, devices.choose_threads(self._threads, parameters)

    def conditions(self, settings: Settings, strategy: Strategy, language: str) -> Conditions:
        """Return what a calibration depends on, for a strategy with a level. Both sides are loaded."""
        self.prepare("speculative")
        cloud = self.cloud.identity
        task = prompts.format_task(language, settings.prompt_type, None, settings.own_task(language))
        text = f"{task}\ntranscription: {settings.with_transcription}"
        return Conditions(
            pair=self.pair.name,
            edge_weights=self.edge_weights,
            cloud_weights=cloud.weights or cloud.name,
            edge_dtype=self._edge_dtype,
            cloud_dtype=cloud.dtype,
            language=language,
            prompt=hashlib.sha256(text.encode()).hexdigest()[:16],
            strategy=calibrated_strategy(strategy).label,
            max_new_tokens=settings.max_new_tokens,
        )

    def prompt(self, request: Request, mode: str = "speculative") -> Prompt:
        """Return the prompt of a request: its features, and its ids."""
        front = self.prepare(mode)
        return prompts.build_prompt(
            request.samples,
            front.tokenizer,
            front.extractor,
            language=request.language,
            prompt_type=request.prompt_type,
            transcription=request.transcription,
            task=request.task,
        )

    def caption(
        self,
        source: str | Path | ArrayLike,
        *,
        sampling_rate: int = dataset.SAMPLE_RATE,
        language: str = "chinese",
        prompt_type: str = "default",
        transcription: str | None = None,
        task: str | None = None,
        strategy: Strategy = LOSSLESS,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Caption:
        """Caption an audio file, or an array of samples (see `audio.as_samples`) at a sampling rate in Hz.

        Raise ValueError for audio, a language or another argument that cannot be used, and CloudFault if a remote
        cloud fails.
        """
        request = Request.of(source, sampling_rate, language, prompt_type, transcription, task)
        trace = self.trace(request, strategy, max_new_tokens)
        return Caption(self.text(trace.tokens, strategy.load_mode), trace.tokens, trace)

    def events(
        self,
        request: Request,
        strategy: Strategy,
        max_new_tokens: int = MAX_NEW_TOKENS,
        harness: Harness | None = None,
    ) -> Iterator[Event]:
        """Return the events of one request as they come. Its time begins when both sides are loaded."""
        check_type("request", request, Request, "write Request.of(file)")
        harness = harness or Harness()
        mode, fault = self.prepare_for(strategy, harness)
        front = self.prepare(mode)
        history = self.history(strategy, request.language, harness.link, harness.profile)

        def build_prompt() -> Prompt:
            prompt = self.prompt(request, mode)
            self.check_fits(prompt, mode, max_new_tokens)
            if mode != "edge" and strategy.is_speculative:
                self.cloud.identity.check_draft(strategy.longest_draft(max_new_tokens))
            return prompt

        return generation_events(
            build_prompt,
            strategy,
            Stopping(front.eos, max_new_tokens),
            None if mode == "cloud" else self.edge,
            self.cloud,
            harness,
            adaptive_k=self.adaptive_k(strategy, request.language, harness.link, harness.profile),
            finish_alone=self.finish_alone,
            fault=fault,
            shared_ids=count_shared_ids(self.edge, self.cloud.identity.vocab_size) if mode == "speculative" else None,
            open_lookup=partial(Lookup, history, front.eos, prompts.control_ids(front.tokenizer)) if history else None,
        )

    def check_fits(self, prompt: Prompt, mode: str, max_new_tokens: int) -> None:
        """Raise ValueError unless a prompt and its output fit on each side that a mode loads."""
        limits: list[LengthLimit] = []
        if mode != "cloud":
            limits.append(LengthLimit(self.edge.max_length, f"the maximum length of the edge's model {self.edge.name}"))
        if mode != "edge":
            limits += self.cloud.identity.length_limits
            self.cloud.identity.check_audio(prompt)
        check_length(len(prompt.ids), max_new_tokens, limits)

    def trace(
        self,
        request: Request,
        strategy: Strategy,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        link: Link = NO_LINK,
        profile: Profile | None = None,
        seed: str = "",
        on_finished: Callable[[], None] = lambda: None,
    ) -> Trace:
        """Decode one request over a link, and return its trace: on the real clock, or on a virtual one under `profile`.

        `seed` draws the link's jitter. `on_finished` is called at the last event, before anything is cleaned up.
        """
        import torch

        check_type("link", link, Link, "write find_link('4g')")
        harness = Harness(profile, link, seed)
        with torch.inference_mode():
            return stamp(self.events(request, strategy, max_new_tokens, harness), harness.watch, on_finished)

    def text(self, tokens: Sequence[int], mode: str = "speculative") -> str:
        """Return the text of token ids, without special tokens."""
        front = self.prepare(mode) if mode == "cloud" else self.edge  # which needs no cloud that may be dead
        text: str = front.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def adaptive_k(
        self, strategy: Strategy, language: str, link: Link = NO_LINK, profile: Profile | None = None
    ) -> AdaptiveK | None:
        """Return the statistics of adaptive k for requests that are alike, or None for a strategy with a k.

        They belong to this pipeline's run.
        """
        if strategy.k is not None:
            return None
        with self._lock:
            key = (strategy, language, link, profile)
            correction = profile.correction if profile else 0.0
            return self._adaptive.setdefault(key, AdaptiveK.for_strategy(strategy, correction))

    def history(
        self, strategy: Strategy, language: str, link: Link = NO_LINK, profile: Profile | None = None
    ) -> CaptionHistory | None:
        """Return the captions that lookup draws on for requests that are alike, or None for drafter model.

        They belong to this pipeline's run. No strategy sees the captions of another, which may be of the same clips.
        All levels of a gate share a history, because the feedback of a budget moves the level between captions.
        """
        if strategy.drafter == "model":
            return None
        with self._lock:
            alike = replace(strategy, gate=ALWAYS, draft_stop=None), strategy.gate.name
            return self._histories.setdefault((*alike, language, link, profile), CaptionHistory())

    def forget_captions(self) -> None:
        """Empty every history, as after a warm-up on a clip that is captioned again."""
        with self._lock:
            for history in self._histories.values():
                history.clear()
