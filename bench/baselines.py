"""Compare this project's modes with transformers' own `generate`, greedy and assisted, on the same clips.

Compared: each clip is captioned in every way of WAYS before the next clip is. All ways share the loaded models and the
threads of one process. Each clip begins with another way, so that a disturbance of the machine does not favour one way.

Equal tokens: every way decodes greedily or losslessly, so in float32 each must write the tokens of greedy `generate`.
Half precision can break a near-tie differently, and the table then counts the captions that differ.

Timed: decoding, from a finished prompt with its input tensors to the last token. Both audio encoders and both prefills
are inside; the features are outside, for every way. Our modes reuse the computation of the prompt's part before the
audio after the first clip, as in normal use; transformers repeats it for each clip. Drafts have the constant length k,
or a length that is found at run time: by `--k auto` in our mode, by the default schedule in transformers.

The bound: the forward passes of the lossless caption alone, replayed with the same ids on the same cache lengths, one
after the other, with nothing between them.

Audio for the assistant: `generate` gives the audio to its assistant. Transformers 5.23 also tells the assistant that
its first pass is a later one (`is_first_iteration=not generation_config.is_assistant`). A Qwen2.5-Omni thinker
therefore drops the audio and drafts without it. The way `assisted_audio` mends this; `assisted` leaves it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.cases import data_parts, model_parts
from bench.tables import grid
from edgecloud_sd.config import Settings
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import Prompt, Trace
from edgecloud_sd.gate import ALWAYS
from edgecloud_sd.grid import has_speculative, strategies
from edgecloud_sd.measure import intervals, metrics
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.summary import Metric
from edgecloud_sd.pipeline import Pipeline, Request, count_shared_ids
from edgecloud_sd.session import Model, Session
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import real
from edgecloud_sd.verifier import LocalVerifier

if TYPE_CHECKING:
    from torch import Tensor

    from edgecloud_sd.models.hf import HFModel

BASELINE_CLIPS = 6  # most clips of a run that does not name the file
BASELINE_K = 4  # for a run without a lossless cell of constant k

WAYS = {
    "greedy": "transformers' generate, greedy",
    "assisted": "transformers' generate, assisted, default schedule",
    "assisted_k": "transformers' generate, assisted, constant k",
    "assisted_audio": "transformers' generate, assisted with audio, default schedule",
    "cloud": "our cloud mode",
    "speculative": "our speculative mode, lossless",
    "auto": "our speculative mode, lossless, --k auto",
    "bound": "forward passes of our speculative mode alone",
}
BASE_WAYS = {  # way -> heading of the speed-ups over it
    "greedy": "over greedy",
    "assisted": "over assisted",
    "assisted_k": "over assisted, k",
    "assisted_audio": "over assisted, audio",
    "cloud": "over cloud mode",
}
OWN_WAYS = {"over": "speculative", "auto_over": "auto"}  # beginning of a metric's name -> way


def _define_metrics() -> dict[str, Metric]:
    times = {
        way: Metric("s", "lower", f"seconds per token, prefill included: {meaning}") for way, meaning in WAYS.items()
    }
    speedups = {
        f"{name}_{base}": Metric("ratio", "higher", f"time per token of {WAYS[base]} / of {WAYS[way]}")
        for name, way in OWN_WAYS.items()
        for base in BASE_WAYS
    }
    return {
        **times,
        **speedups,
        "cloud_over_greedy": Metric("ratio", "higher", f"time per token of {WAYS['greedy']} / of our cloud mode"),
        "share_of_bound": Metric(
            "ratio", "higher", "time of the forward passes alone / of our speculative mode, in which passes may overlap"
        ),
        "differing": Metric(
            "captions", "lower", "captions that are not greedy's in at least one way; a failure in float32 and float64"
        ),
    }


BASELINE_METRICS = _define_metrics()


@dataclass(frozen=True)
class BaselineCase:
    """One benchmark."""

    id: str
    k: int
    language: str

    @property
    def strategy(self) -> Strategy:
        """The lossless strategy with drafts of length k."""
        return Strategy("speculative", k=self.k)


def baseline_cases(settings: Settings) -> list[BaselineCase]:
    """Return the one case of a run, or none.

    The baselines need speculative cells, the real clock, and the cloud in this process.

    The draft length is that of the run's first lossless cell of constant k whose drafts have k tokens. The language is
    the run's first.
    """
    if not has_speculative(settings) or settings.clock == "virtual" or settings.cloud_url:
        return []
    language = settings.language[0]
    lossless = (s for s in strategies(settings) if s.is_speculative and s.is_lossless and s.gate == ALWAYS)
    k = next((strategy.k for strategy in lossless if strategy.k and not strategy.draft_stop), BASELINE_K)
    parts = ["baselines", *model_parts(settings), f"k{k}", *data_parts(settings, language)]
    return [BaselineCase("-".join(parts), k, language)]


@dataclass(frozen=True)
class Pass:
    """A forward pass of one side: `ids` are fed when `cached` tokens after the prompt are in its cache."""

    side: str
    cached: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PreparedClip:
    """A clip with its prompt, the inputs of `generate`, and the tokens and passes of its speculative caption."""

    request: Request
    prompt: Prompt
    inputs: dict[str, Tensor]
    tokens: tuple[int, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class TimedCaption:
    """A caption and the seconds from its prompt to its last token."""

    tokens: tuple[int, ...]
    seconds: float


Way = Callable[[PreparedClip], TimedCaption]


def prepare_clip(pipeline: Pipeline, request: Request, strategy: Strategy, max_new_tokens: int) -> PreparedClip:
    """Return a clip with everything that is computed before the timing starts."""
    import torch

    prompt = pipeline.prompt(request, strategy.mode)
    pipeline.check_fits(prompt, strategy.mode, max_new_tokens)
    assert prompt.features is not None
    device, dtype = pipeline.cloud_model.thinker.device, pipeline.cloud_model.thinker.dtype
    ids = torch.tensor([prompt.ids], device=device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": prompt.features[None].to(device, dtype),
        "feature_attention_mask": torch.ones(1, prompt.features.shape[1], dtype=torch.long, device=device),
    }
    return PreparedClip(request, prompt, inputs, *record_passes(pipeline, prompt, strategy, max_new_tokens))


def record_passes(
    pipeline: Pipeline, prompt: Prompt, strategy: Strategy, max_new_tokens: int
) -> tuple[tuple[int, ...], tuple[Pass, ...]]:
    """Return the tokens of a speculative caption, and its forward passes after the prefills in their order."""
    passes: list[Pass] = []
    edge = _RecordingModel("edge", pipeline.edge, passes)
    cloud = _RecordingModel("cloud", pipeline.cloud_model, passes)
    stopping = Stopping(cloud.eos, max_new_tokens)
    runtime = Runtime(shared_ids=count_shared_ids(pipeline.edge, pipeline.cloud_model.vocab_size))
    events = decode(
        prompt, strategy, stopping, edge, LocalVerifier(cloud, strategy.rule, wants_rest=strategy.wants_rest), runtime
    )
    return Trace(tuple((0.0, event) for event in events)).tokens, tuple(passes)


@dataclass(frozen=True)
class _RecordingModel:
    """A model whose sessions append each forward pass to `passes`."""

    side: str
    model: Model
    passes: list[Pass]

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def open(self, prompt: Prompt) -> Session:
        return _RecordingSession(self, self.model.open(prompt))


@dataclass(frozen=True)
class _RecordingSession:
    recorder: _RecordingModel
    session: Session

    @property
    def tokens(self) -> Sequence[int]:
        return self.session.tokens

    def extend(self, tokens: Sequence[int]) -> Tensor:
        self.recorder.passes.append(Pass(self.recorder.side, len(self.tokens), tuple(tokens)))
        return self.session.extend(tokens)

    def truncate(self, length: int) -> None:
        self.session.truncate(length)


def build_ways(pipeline: Pipeline, strategy: Strategy, max_new_tokens: int) -> dict[str, Way]:
    """Return a function for each way of WAYS. The generation configs of the loaded models are not changed."""
    edge, cloud = pipeline.edge, pipeline.cloud_model

    def use_mode(strategy: Strategy) -> Way:
        return lambda clip: time_from_prompt(pipeline.trace(clip.request, strategy, max_new_tokens))

    def use_generate(assistant: Any = None) -> Way:
        return lambda clip: time_generate(cloud, clip, max_new_tokens, assistant)

    constant_k: dict[str, object] = {
        "num_assistant_tokens": strategy.k,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    ways: dict[str, Way] = {
        "greedy": use_generate(),
        "assisted": use_generate(build_assistant(edge.thinker)),
        "assisted_k": use_generate(build_assistant(edge.thinker, **constant_k)),
        "assisted_audio": use_generate(keep_audio(build_assistant(edge.thinker))),
        "cloud": use_mode(Strategy("cloud")),
        "speculative": use_mode(strategy),
        "auto": use_mode(replace(strategy, k=None)),
        "bound": lambda clip: TimedCaption(
            clip.tokens, replay_passes({"edge": edge, "cloud": cloud}, clip.prompt, clip.passes)
        ),
    }
    return {way: ways[way] for way in WAYS}


def time_from_prompt(trace: Trace) -> TimedCaption:
    """Return the caption of a trace without the seconds of its features."""
    return TimedCaption(trace.tokens, trace.seconds - (metrics.feature_seconds(trace) or 0.0))


def time_generate(model: HFModel, clip: PreparedClip, max_new_tokens: int, assistant: Any = None) -> TimedCaption:
    """Return the caption of transformers' `generate`, assisted if an assistant is given."""
    import torch

    eos = sorted(model.eos)
    options = {} if assistant is None else {"assistant_model": assistant}
    with torch.inference_mode():
        start = real()
        output = model.thinker.generate(
            **clip.inputs,
            **options,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0],
        )
        tokens = tuple(output[0, len(clip.prompt.ids) :].tolist())
        return TimedCaption(tokens, real() - start)


def build_assistant(thinker: Any, **schedule: object) -> Any:
    """Return a thinker on the same weights with its own generation config, changed by `schedule`."""
    assistant = copy.copy(thinker)
    assistant.generation_config = copy.deepcopy(thinker.generation_config)
    assistant.generation_config.update(**schedule)
    return assistant


def keep_audio(assistant: Any) -> Any:
    """Return an assistant on the same weights that encodes the audio in its first pass (see the module's text)."""
    with_audio = copy.copy(assistant)
    prepare = assistant.prepare_inputs_for_generation
    cache_name = "cache" if "cache" in inspect.signature(prepare).parameters else "past_key_values"  # before 5.24

    @functools.wraps(prepare)  # transformers reads its signature
    def prepare_with_audio(
        *args: Any,
        is_first_iteration: bool = False,
        input_features: Any = None,
        **options: Any,
    ) -> Any:
        return prepare(
            *args,
            is_first_iteration=is_first_iteration or not options[cache_name].get_seq_length(),
            input_features=None if input_features is None else input_features.to(assistant.dtype),
            **options,
        )

    with_audio.prepare_inputs_for_generation = prepare_with_audio
    return with_audio


def replay_passes(models: Mapping[str, HFModel], prompt: Prompt, passes: Sequence[Pass]) -> float:
    """Return the seconds of both prefills and of the passes alone. `models` has both sides by name."""
    import torch

    inputs = [torch.tensor(step.ids, device=models[step.side].thinker.device) for step in passes]
    with torch.inference_mode():
        start = real()
        caches = {side: model.prefill(prompt) for side, model in models.items()}
        prompt_lengths = {side: cache.length for side, cache in caches.items()}
        for step, ids in zip(passes, inputs, strict=True):
            caches[step.side].length = prompt_lengths[step.side] + step.cached
            models[step.side].logits(ids, caches[step.side])
        for model in models.values():
            _wait_for_device(model)
        return real() - start


def _wait_for_device(model: HFModel) -> None:
    """Wait until a GPU has finished all queued work. Work on a CPU is already finished."""
    import torch

    if model.thinker.device.type == "cuda":
        torch.cuda.synchronize(model.thinker.device)


def order_ways(number: int) -> list[str]:
    """Return the ways in the order for clip `number`: each way is the first in turn."""
    names = list(WAYS)
    first = number % len(names)
    return [*names[first:], *names[:first]]


def list_differing_ways(captions: Mapping[str, TimedCaption]) -> list[str]:
    """Return the ways whose caption of one clip is not that of transformers' greedy `generate`."""
    return [way for way, caption in captions.items() if caption.tokens != captions["greedy"].tokens]


def way_seconds_per_token(clips: Sequence[Mapping[str, TimedCaption]], way: str) -> float:
    """Return the seconds per token: summed seconds / summed tokens over the clips."""
    return sum(clip[way].seconds for clip in clips) / sum(len(clip[way].tokens) for clip in clips)


def way_speedup(clips: Sequence[Mapping[str, TimedCaption]], base: str, way: str) -> Interval:
    """Return the time per token of `base` / of `way`, with its interval. Raise ValueError for no clips."""
    base_captions, captions = ([(len(clip[name].tokens), clip[name].seconds) for clip in clips] for name in (base, way))
    speedup = intervals.length_matched_speedup(base_captions, captions)
    if speedup is None:
        raise ValueError("no clips to compare on")
    return speedup


def way_ratios(clips: Sequence[Mapping[str, TimedCaption]]) -> dict[str, Interval]:
    """Return the metrics of BASELINE_METRICS that are ratios, by name, with their intervals."""
    speedups = {f"{name}_{base}": way_speedup(clips, base, way) for name, way in OWN_WAYS.items() for base in BASE_WAYS}
    return {
        **speedups,
        "cloud_over_greedy": way_speedup(clips, "greedy", "cloud"),
        "share_of_bound": way_speedup(clips, "bound", "speculative"),
    }


def baseline_metrics(clips: Sequence[Mapping[str, TimedCaption]]) -> dict[str, float]:
    """Return the value of each metric of BASELINE_METRICS. Raise ValueError for no clips."""
    values = {
        **{name: interval.value for name, interval in way_ratios(clips).items()},
        **{way: way_seconds_per_token(clips, way) for way in WAYS},
        "differing": float(_count_differing(clips)),
    }
    return {name: values[name] for name in BASELINE_METRICS}


def _count_differing(clips: Sequence[Mapping[str, TimedCaption]]) -> int:
    return sum(bool(list_differing_ways(clip)) for clip in clips)


def render_baselines(runs: Mapping[str, Sequence[Mapping[str, TimedCaption]]]) -> str:
    """Return a table per run: one row per way, with its speed-ups and their 95 % intervals."""
    return "\n\n".join("\n".join(_render_run(name, clips)) for name, clips in runs.items())


def _render_run(name: str, clips: Sequence[Mapping[str, TimedCaption]]) -> Iterator[str]:
    rows = [
        [
            meaning,
            format(1e3 * way_seconds_per_token(clips, way), ".2f"),
            *("-" if way == base else str(way_speedup(clips, base, way)) for base in BASE_WAYS),
            way_speedup(clips, "bound", way).shown(".0%") if way == "speculative" else "-",  # its passes were recorded
        ]
        for way, meaning in WAYS.items()
    ]
    headings = [f"{name}, {len(clips)} clips", "ms per token", *BASE_WAYS.values(), "share of bound"]
    yield grid(rows, headings)
    if differing := _count_differing(clips):
        yield f"- {differing} captions are not the same in every way, because half precision can break near-ties"
