"""What the pocket pair can do, measured on clips it never heard: `python -m edgecloud_sd.pocket evaluate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edgecloud_sd import gate
from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Captioner, Cell, Request
from edgecloud_sd.pocket import clips, voices
from edgecloud_sd.session import Model
from edgecloud_sd.timing.clock import stamp

MAX_NEW_TOKENS = 48
EVALUATION_K = 4


@dataclass(frozen=True)
class Evaluation:
    """The pair's quality and cost on a set of clips."""

    clips: int
    cloud_attributes: float  # share of the acoustic attributes that the caption names rightly
    edge_attributes: float
    cloud_emotions: float
    edge_emotions: float
    swapped_attributes: float  # the cloud's share when each clip is captioned from another clip's audio
    acceptance: float  # strict, k = K
    step_ratio: float  # one edge step / one cloud step, median of interleaved pairs
    megabytes: float  # both checkpoints on disk

    def __str__(self) -> str:
        rows = [
            ("clips", f"{self.clips}", ""),
            ("cloud names attributes rightly", f"{self.cloud_attributes:.1%}", ">= 90 %"),
            ("edge names attributes rightly", f"{self.edge_attributes:.1%}", "55 - 78 %"),
            ("cloud names the emotion rightly", f"{self.cloud_emotions:.1%}", ""),
            ("edge names the emotion rightly", f"{self.edge_emotions:.1%}", ""),
            ("cloud given another clip's audio", f"{self.swapped_attributes:.1%}", "chance"),
            (f"strict acceptance at k={EVALUATION_K}", f"{self.acceptance:.3f}", "0.6 - 0.9"),
            ("edge step / cloud step", f"{self.step_ratio:.3f}", "<= 0.2"),
            ("both on disk", f"{self.megabytes:.1f} MB", "< 12 MB"),
        ]
        return "\n".join(f"{name:34} {value:>8}   {target}".rstrip() for name, value, target in rows)


def evaluate(captioner: Captioner, which: str = "evaluation", count: int = 2 * clips.EVALUATION_CLIPS) -> Evaluation:
    """Caption the first `count` clips of a set, half of them in each language, by the edge and by the pair.

    The cloud's captions are the pair's under strict acceptance, which are the cloud's own, token for token, in less
    time; tests/test_pocket.py proves that equality apart. Given another clip's audio the cloud writes that clip's
    caption, for the prompts of a language differ in nothing else: so that case needs no run of its own.
    """
    made = [clips.make_clip(which, index) for index in range(count)]
    languages = [prompts.LANGUAGES[index * len(prompts.LANGUAGES) // count] for index in range(count)]
    cells = {"edge": Cell("edge"), "cloud": Cell("speculative", gate.ALWAYS, k=EVALUATION_K)}
    captions: dict[str, list[str]] = {name: [] for name in cells}
    total = metrics.Counts()
    decode = captioner.text("speculative")
    for clip, language in zip(tqdm(made, desc="captions", unit="clip", disable=None), languages, strict=True):
        for name, cell in cells.items():
            trace = stamp(captioner.events(Request(clip.samples, language), cell, MAX_NEW_TOKENS))
            captions[name].append(decode(trace.tokens))
            if name == "cloud":
                total += metrics.counts(trace)
    order = [index for language in prompts.LANGUAGES for index in _rotated(languages, language)]
    captions["swapped"] = [captions["cloud"][index] for index in order]

    def share(name: str) -> float:
        return attributes_named(captions[name], [clip.attributes for clip in made], languages)

    def emotions(name: str) -> float:
        right = [
            voices.emotion_of(clip.attributes).word(language) in text
            for clip, text, language in zip(made, captions[name], languages, strict=True)
        ]
        return sum(right) / count

    prompt = captioner.prompt(Request(made[0].samples), "edge")
    return Evaluation(
        clips=count,
        cloud_attributes=share("cloud"),
        edge_attributes=share("edge"),
        cloud_emotions=emotions("cloud"),
        edge_emotions=emotions("edge"),
        swapped_attributes=share("swapped"),
        acceptance=total.acceptance_rate or 0.0,
        step_ratio=step_ratio(captioner.edge, captioner.cloud, prompt),
        megabytes=megabytes(Path(captioner.pair.edge)) + megabytes(Path(captioner.pair.cloud)),
    )


def _rotated(languages: Sequence[str], language: str) -> list[int]:
    """The clips of a language, each replaced by the one half of them away."""
    own = [index for index, each in enumerate(languages) if each == language]
    return own[len(own) // 2 :] + own[: len(own) // 2]


def attributes_named(captions: Sequence[str], truth: Sequence[voices.Attributes], languages: Sequence[str]) -> float:
    """The share of (caption, attribute) pairs in which the caption names the clip's class and no other."""
    right = 0
    for text, attributes, language in zip(captions, truth, languages, strict=True):
        found = voices.named(text, language)
        right += sum(found[name] == getattr(attributes, name) for name in voices.ATTRIBUTE_NAMES)
    return right / (len(captions) * len(voices.ATTRIBUTE_NAMES))


def step_ratio(edge: Model, cloud: Model, prompt: Prompt, steps: int = 60) -> float:
    """Median of (edge step s / cloud step s) over interleaved single-token steps after the same prompt."""
    sessions = [edge.open(prompt), cloud.open(prompt)]
    ratios = []
    with torch.inference_mode():
        for step in range(steps + 10):
            seconds = []
            for session in sessions:
                start = time.perf_counter()
                session.extend([prompt.last])
                seconds.append(time.perf_counter() - start)
            if step >= 10:  # the first calls allocate
                ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def megabytes(folder: Path) -> float:
    """Size of all files below `folder`, in MB (10^6 bytes)."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
