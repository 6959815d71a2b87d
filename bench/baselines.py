"""What a user would otherwise call: transformers' own `generate`, greedy and assisted, beside this project's modes.

Every clip is captioned in every way before the next one is, by the same loaded models on the same threads, and begins
with another way than the one before: what the machine does meanwhile hits all alike. Timed is decoding, from a prompt
that is there (input tensors too) to the caption's last token: both audio encoders and prefills are inside, the features
are outside, for all ways. The bound is what the speculative caption's forward passes take alone: the same ids on the
same cache lengths, embedding, text model and head, one after the other, with nothing between them. What precedes the
audio is the same in every prompt: ours has computed it for the first clip, as in use, and transformers does every time.
Drafts are of constant length, or find it: ours by `--k auto`, theirs by their default schedule.

transformers' assisted generation gives its assistant the audio, but as of 5.23 tells it that its first pass is none
(`is_first_iteration=not generation_config.is_assistant`), whereupon a Qwen2.5-Omni thinker drops the audio and drafts
unheard. So it is compared twice: as it comes, and at its best, with an assistant that is made to hear.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.cases import LANGUAGE_CODES
from bench.tables import grid
from edgecloud_sd.config import Settings
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Prompt, Trace
from edgecloud_sd.grid import strategies
from edgecloud_sd.measure import intervals, metrics
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.summary import Metric
from edgecloud_sd.models import pairs
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.session import Model, Session
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import real
from edgecloud_sd.verifier import LocalVerifier

if TYPE_CHECKING:
    from torch import Tensor

    from edgecloud_sd.models.hf import HFModel

BASELINE_CLIPS = 6  # at most, but where the file is named
BASELINE_K = 4  # where the run has no strict cell of its own

WAYS = {
    "greedy": "transformers' generate, greedy",
    "assisted": "transformers' generate, assisted, default schedule",
    "assisted_k": "transformers' generate, assisted, constant k",
    "hearing": "the same with audio for its assistant, default schedule",
    "cloud": "our cloud mode",
    "speculative": "our speculative mode, strict",
    "auto": "the same, --k auto",
    "bound": "the same at k, its forward passes alone",
}
BASE_WAYS = {
    "greedy": "over greedy",
    "assisted": "over assisted",
    "assisted_k": "over assisted, k",
    "hearing": "over hearing",
    "cloud": "over cloud mode",
}
OWN_WAYS = {"over": ("speculative", "our speculative mode"), "auto_over": ("auto", "our speculative mode, --k auto")}
BASELINE_METRICS = {
    **{name: Metric("s", "lower", f"a token, prefill included: {meaning}") for name, meaning in WAYS.items()},
    **{
        f"{name}_{base}": Metric("ratio", "higher", f"a token's time, {WAYS[base]} / {meaning}")
        for name, (_, meaning) in OWN_WAYS.items()
        for base in BASE_WAYS
    },
    "cloud_over_greedy": Metric("ratio", "higher", f"a token's time, {WAYS['greedy']} / our cloud mode"),
    "share_of_bound": Metric("ratio", "higher", "the forward passes alone / our speculative mode; they may overlap"),
    "differing": Metric("captions", "lower", "unlike greedy's; where float32 promises that none is, a failure"),
}


@dataclass(frozen=True)
class BaselineCase:
    """One benchmark."""

    id: str
    k: int
    language: str

    @property
    def strategy(self) -> Strategy:
        """The lossless strategy at this k."""
        return Strategy("speculative", k=self.k)


def baseline_cases(settings: Settings) -> list[BaselineCase]:
    """What a run asks for: nothing without speculative cells, on a virtual clock or with a cloud elsewhere.

    k is that of the run's first strict cell with a fixed one; one language, the first.
    """
    if "speculative" not in settings.mode or settings.clock == "virtual" or settings.cloud_url:
        return []
    pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights)
    language = settings.language[0]
    k = next(
        (s.k for s in strategies(settings) if s.is_speculative and s.is_lossless and s.k and not s.draft_stop),
        BASELINE_K,
    )
    return [BaselineCase(f"baselines-{pair.name}-k{k}-{LANGUAGE_CODES[language]}", k, language)]


def is_left_out(settings: Settings) -> bool:
    """Whether a run of the whole suite leaves it out: also for pairs of which nine captions a clip take minutes."""
    pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights)
    return pair != pairs.PAIRS["pocket"] or not baseline_cases(settings)


@dataclass(frozen=True)
class Pass:
    """A forward pass of one side: `ids` fed where `held` tokens follow the prompt in its cache."""

    side: str
    held: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PreparedClip:
    """A clip with all that is made of it beforehand. `tokens` and `passes` are the speculative caption's."""

    request: Request
    prompt: Prompt
    inputs: dict[str, Tensor]  # of transformers' generate
    tokens: tuple[int, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class TimedCaption:
    """A caption in one way, and its seconds."""

    tokens: tuple[int, ...]
    seconds: float


Way = Callable[[PreparedClip], TimedCaption]


def prepare_clip(pipeline: Pipeline, request: Request, strategy: Strategy, max_new_tokens: int) -> PreparedClip:
    """Off the clock."""
    import torch

    prompt = pipeline.prompt(request, strategy.mode)
    assert prompt.features is not None
    device, dtype = pipeline.cloud_model.thinker.device, pipeline.cloud_model.thinker.dtype
    ids = torch.tensor([prompt.ids], device=device)
    heard = torch.ones(1, prompt.features.shape[1], dtype=torch.long, device=device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": prompt.features[None].to(device, dtype),
        "feature_attention_mask": heard,
    }
    return PreparedClip(request, prompt, inputs, *record_passes(pipeline, prompt, strategy, max_new_tokens))


def record_passes(
    pipeline: Pipeline, prompt: Prompt, strategy: Strategy, max_new_tokens: int
) -> tuple[tuple[int, ...], tuple[Pass, ...]]:
    """The tokens of a speculative caption, and the forward passes that it takes after the prompt, in their order."""
    passes: list[Pass] = []
    edge, cloud = (_Recorder(side, model, passes) for side, model in models_of(pipeline).items())
    stopping = Stopping(pipeline.cloud_model.eos, max_new_tokens)
    events = decode(prompt, strategy, stopping, edge, LocalVerifier(cloud, strategy.rule))
    return Trace(tuple((0.0, event) for event in events)).tokens, tuple(passes)


@dataclass(frozen=True)
class _Recorder:
    """A model of which every pass is noted."""

    side: str
    model: Model
    passes: list[Pass]

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def open(self, prompt: Prompt) -> Session:
        return _Recorded(self, self.model.open(prompt))


@dataclass(frozen=True)
class _Recorded:
    recorder: _Recorder
    session: Session

    @property
    def tokens(self) -> Sequence[int]:
        return self.session.tokens

    def extend(self, tokens: Sequence[int]) -> Tensor:
        self.recorder.passes.append(Pass(self.recorder.side, len(self.tokens), tuple(tokens)))
        return self.session.extend(tokens)

    def truncate(self, length: int) -> None:
        self.session.truncate(length)


def models_of(pipeline: Pipeline) -> dict[str, HFModel]:
    """Return both models by side."""
    return {"edge": pipeline.edge, "cloud": pipeline.cloud_model}


def ways(pipeline: Pipeline, strategy: Strategy, max_new_tokens: int) -> dict[str, Way]:
    """By the names of WAYS. The models' own settings stay as they are."""
    models = models_of(pipeline)

    def ours(way: Strategy) -> Way:
        return lambda clip: timed(pipeline.trace(clip.request, way, max_new_tokens))

    def theirs(helper: Any = None) -> Way:
        return lambda clip: generated(pipeline.cloud_model, clip, max_new_tokens, helper)

    constant: dict[str, Any] = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    constant["num_assistant_tokens"] = strategy.k
    edge = pipeline.edge.thinker
    found = {
        "greedy": theirs(),
        "assisted": theirs(assistant(edge)),
        "assisted_k": theirs(assistant(edge, **constant)),
        "hearing": theirs(hearing(assistant(edge))),
        "cloud": ours(Strategy("cloud")),
        "speculative": ours(strategy),
        "auto": ours(replace(strategy, k=None)),
        "bound": lambda clip: TimedCaption(clip.tokens, replay_passes(models, clip.prompt, clip.passes)),
    }
    return {name: found[name] for name in WAYS}


def timed(trace: Trace) -> TimedCaption:
    """A caption of ours, from its prompt on."""
    return TimedCaption(trace.tokens, trace.seconds - (metrics.feature_seconds(trace) or 0.0))


def settle(model: HFModel) -> Callable[[], None]:
    """A function to wait by until a model's GPU, where it is on one, has done what it was told to."""
    import torch

    device = model.thinker.device
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def generated(model: HFModel, clip: PreparedClip, max_new_tokens: int, helper: Any = None) -> TimedCaption:
    """A caption by transformers, helped by an `assistant` where there is one."""
    import torch

    eos = sorted(model.eos)
    helped = {"assistant_model": helper} if helper is not None else {}
    with torch.inference_mode():
        start = real()
        output = model.thinker.generate(
            **clip.inputs,
            **helped,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # whatever the checkpoint says: ours has none
            eos_token_id=eos,
            pad_token_id=eos[0],
        )
        tokens = tuple(output[0, len(clip.prompt.ids) :].tolist())
        return TimedCaption(tokens, real() - start)


def assistant(thinker: Any, **schedule: object) -> Any:
    """A thinker, on the same weights, with `schedule` in a generation config of its own."""
    made = copy.copy(thinker)
    made.generation_config = copy.deepcopy(thinker.generation_config)
    made.generation_config.update(**schedule)
    return made


def hearing(assistant: Any) -> Any:
    """An assistant, on the same weights, that is not told that its first pass is none."""
    made = copy.copy(assistant)
    prepare = assistant.prepare_inputs_for_generation

    @functools.wraps(prepare)  # transformers reads its signature
    def heard(
        *given: Any,
        past_key_values: Any = None,
        is_first_iteration: bool = False,
        input_features: Any = None,
        **named: Any,
    ) -> Any:
        return prepare(
            *given,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration or not past_key_values.get_seq_length(),
            input_features=None if input_features is None else input_features.to(assistant.dtype),
            **named,
        )

    made.prepare_inputs_for_generation = heard
    return made


def replay_passes(models: Mapping[str, HFModel], prompt: Prompt, passes: Sequence[Pass]) -> float:
    """s that both prefills and the passes take alone."""
    import torch

    fed = [(each.side, each.held, torch.tensor(each.ids, device=models[each.side].thinker.device)) for each in passes]
    settled = [settle(model) for model in models.values()]
    with torch.inference_mode():
        start = real()
        caches = {side: model.prefill(prompt) for side, model in models.items()}
        prompts = {side: cache.length for side, cache in caches.items()}
        for side, held, ids in fed:
            caches[side].length = prompts[side] + held
            models[side].logits(ids, caches[side])
        for wait in settled:
            wait()
        return real() - start


def turns(number: int) -> list[str]:
    """The ways in the order in which clip `number` takes them: each is the first in its turn."""
    names = list(WAYS)
    return [*names[number % len(names) :], *names[: number % len(names)]]


def differing(captions: Mapping[str, TimedCaption]) -> list[str]:
    """The ways in which one clip's caption is another than transformers' greedy one."""
    return [way for way, timed in captions.items() if timed.tokens != captions["greedy"].tokens]


def way_seconds_per_token(clips: Sequence[Mapping[str, TimedCaption]], way: str) -> float:
    """Seconds a token, summed over the clips."""
    return sum(clip[way].seconds for clip in clips) / sum(len(clip[way].tokens) for clip in clips)


def way_speedup(clips: Sequence[Mapping[str, TimedCaption]], base: str, way: str) -> Interval:
    """Pace of `base` / pace of `way`, with its interval. ValueError for no clips."""
    both = ([(len(clip[each].tokens), clip[each].seconds) for clip in clips] for each in (base, way))
    found = intervals.length_matched_speedup(*both)
    if found is None:
        raise ValueError("no clips to compare on")
    return found


def way_ratios(clips: Sequence[Mapping[str, TimedCaption]]) -> dict[str, Interval]:
    """Those of FIGURES that have an interval, by name."""
    return {
        **{
            f"{name}_{base}": way_speedup(clips, base, way) for name, (way, _) in OWN_WAYS.items() for base in BASE_WAYS
        },
        "cloud_over_greedy": way_speedup(clips, "greedy", "cloud"),
        "share_of_bound": way_speedup(clips, "bound", "speculative"),
    }


def baseline_metrics(clips: Sequence[Mapping[str, TimedCaption]]) -> dict[str, float]:
    """By the names of FIGURES. ValueError for no clips."""
    found = {
        **{name: interval.value for name, interval in way_ratios(clips).items()},
        **{way: way_seconds_per_token(clips, way) for way in WAYS},
        "differing": float(sum(bool(differing(clip)) for clip in clips)),
    }
    return {name: found[name] for name in BASELINE_METRICS}


def render_baselines(runs: Mapping[str, Sequence[Mapping[str, TimedCaption]]]) -> str:
    """A row a way with its ratios and their 95 % intervals, and what is no forward pass, for each run."""
    return "\n\n".join("\n".join(_lines(name, clips)) for name, clips in runs.items())


def _lines(name: str, clips: Sequence[Mapping[str, TimedCaption]]) -> Iterator[str]:
    rows = [
        [
            meaning,
            format(1e3 * way_seconds_per_token(clips, way), ".2f"),
            *("-" if way == base else str(way_speedup(clips, base, way)) for base in BASE_WAYS),
            way_speedup(clips, "bound", way).shown(".0%") if way == "speculative" else "-",  # of the same passes
        ]
        for way, meaning in WAYS.items()
    ]
    headings = [f"{name}, {len(clips)} clips", "ms a token", *BASE_WAYS.values(), "share of the bound"]
    yield grid(rows, headings)
    if others := sum(bool(differing(clip)) for clip in clips):
        yield f"- {others} captions are not the same in every way, as half precision allows"
