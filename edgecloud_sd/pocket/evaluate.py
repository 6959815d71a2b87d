"""Quality and speed of the pocket pair on clips outside its training: `python -m edgecloud_sd.pocket evaluate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips, voices
from edgecloud_sd.session import Model
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp

CAPTION_TOKENS = 48  # captions of the pocket pair have 20 to 40 tokens
EVALUATION_K = 4
WARM_UP_STEPS = 10  # the first steps allocate memory


@dataclass(frozen=True)
class Evaluation:
    """The quality and the cost of the pair on a set of clips."""

    clips: int
    cloud_attributes: float  # share of the acoustic attributes that the captions name correctly
    edge_attributes: float
    cloud_emotions: float  # share of the captions with the correct emotion
    edge_emotions: float
    swapped_attributes: float  # the cloud's share of attributes if each clip is captioned from another clip's audio
    acceptance: float  # lossless, k = EVALUATION_K
    step_ratio: float  # time of an edge step / time of a cloud step, median of interleaved pairs
    megabytes: float  # size of both checkpoints on disk

    def __str__(self) -> str:
        rows = [
            ("clips", f"{self.clips}", ""),
            ("attributes correct, cloud", f"{self.cloud_attributes:.1%}", ">= 90 %"),
            ("attributes correct, edge", f"{self.edge_attributes:.1%}", "55 - 78 %"),
            ("emotion correct, cloud", f"{self.cloud_emotions:.1%}", ""),
            ("emotion correct, edge", f"{self.edge_emotions:.1%}", ""),
            ("attributes correct, wrong audio", f"{self.swapped_attributes:.1%}", "chance"),
            (f"lossless acceptance at k={EVALUATION_K}", f"{self.acceptance:.3f}", "0.6 - 0.9"),
            ("edge step / cloud step", f"{self.step_ratio:.3f}", "<= 0.2"),
            ("both checkpoints on disk", f"{self.megabytes:.1f} MB", "< 12 MB"),
        ]
        return "\n".join(f"{name:34} {value:>8}   {target}".rstrip() for name, value, target in rows)


def evaluate(pipeline: Pipeline, set_name: str = "evaluation", count: int = 2 * clips.EVALUATION_CLIPS) -> Evaluation:
    """Return the evaluation of the first `count` clips of a set, half of them in each language.

    The cloud's captions come from lossless speculative decoding, which gives the same tokens in less time
    (tests/test_pocket.py checks that). With another clip's audio the cloud writes that clip's caption, because the
    prompts of a language are equal otherwise. The function therefore reuses the captions in another order.
    """
    evaluated = [clips.make_clip(set_name, index) for index in range(count)]
    languages = [prompts.LANGUAGES[index * len(prompts.LANGUAGES) // count] for index in range(count)]
    strategies = {"edge": Strategy("edge"), "cloud": Strategy("speculative", k=EVALUATION_K)}
    captions: dict[str, list[str]] = {name: [] for name in strategies}
    total = metrics.Counts()
    for clip, language in zip(tqdm(evaluated, desc="captions", unit="clip", disable=None), languages, strict=True):
        for name, strategy in strategies.items():
            trace = stamp(pipeline.events(Request(clip.samples, language), strategy, CAPTION_TOKENS))
            captions[name].append(pipeline.text(trace.tokens))
            if name == "cloud":
                total += metrics.counts(trace)
    swapped = [index for language in prompts.LANGUAGES for index in _swapped_order(languages, language)]
    captions["swapped"] = [captions["cloud"][index] for index in swapped]

    truth = [clip.attributes for clip in evaluated]
    attributes = {name: share_of_attributes_named(texts, truth, languages) for name, texts in captions.items()}
    emotions = {name: share_of_emotions_named(texts, truth, languages) for name, texts in captions.items()}
    prompt = pipeline.prompt(Request(evaluated[0].samples), "edge")
    return Evaluation(
        clips=count,
        cloud_attributes=attributes["cloud"],
        edge_attributes=attributes["edge"],
        cloud_emotions=emotions["cloud"],
        edge_emotions=emotions["edge"],
        swapped_attributes=attributes["swapped"],
        acceptance=total.acceptance_rate or 0.0,
        step_ratio=measure_step_ratio(pipeline.edge, pipeline.cloud_model, prompt),
        megabytes=count_megabytes(Path(pipeline.pair.edge)) + count_megabytes(Path(pipeline.pair.cloud)),
    )


def _swapped_order(languages: Sequence[str], language: str) -> list[int]:
    """Return the clips of a language in an order that gives each the place of another one."""
    own = [index for index, other in enumerate(languages) if other == language]
    return own[len(own) // 2 :] + own[: len(own) // 2]


def share_of_attributes_named(
    captions: Sequence[str], truth: Sequence[voices.Attributes], languages: Sequence[str]
) -> float:
    """Return the share of (caption, attribute) pairs in which the caption names the clip's class and no other."""
    correct = 0
    for text, attributes, language in zip(captions, truth, languages, strict=True):
        classes = voices.find_named_classes(text, language)
        correct += sum(classes[name] == getattr(attributes, name) for name in voices.ATTRIBUTE_NAMES)
    return correct / (len(captions) * len(voices.ATTRIBUTE_NAMES))


def share_of_emotions_named(
    captions: Sequence[str], truth: Sequence[voices.Attributes], languages: Sequence[str]
) -> float:
    """Return the share of captions that name the clip's emotion."""
    correct = sum(
        voices.find_emotion(attributes).word(language) in text
        for text, attributes, language in zip(captions, truth, languages, strict=True)
    )
    return correct / len(captions)


def measure_step_ratio(edge: Model, cloud: Model, prompt: Prompt, steps: int = 60) -> float:
    """Return the median of (edge step time / cloud step time) over interleaved steps of one token after `prompt`."""
    sessions = [edge.open(prompt), cloud.open(prompt)]
    ratios = []
    with torch.inference_mode():
        for step in range(steps + WARM_UP_STEPS):
            seconds = []
            for session in sessions:
                start = time.perf_counter()
                session.extend([prompt.last])
                seconds.append(time.perf_counter() - start)
            if step >= WARM_UP_STEPS:
                ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def count_megabytes(folder: Path) -> float:
    """Return the size of all files in `folder`, in MB of 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
