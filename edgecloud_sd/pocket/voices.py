"""The voices of pocket clips: six acoustic attributes, the emotions that favour them, and the captions.

The caption is a function of the attributes alone, so that a model that recognises the attributes can write it. Its
emotion is the one whose typical voice shares most attributes with the clip (on a tie, the first in `EMOTIONS`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

Language = str  # "chinese" or "english"


@dataclass(frozen=True)
class Attributes:
    """One class index for each acoustic attribute, a position in `WORDS`."""

    pitch: int
    range: int
    rate: int
    loudness: int
    tremor: int
    voice: int


ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))

# The words for each class of each attribute. Each phrase occurs nowhere else in a caption, so that
# `find_named_classes` can search for it.
WORDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "english": {
        "pitch": ("low pitch", "medium pitch", "high pitch"),
        "range": ("flat intonation", "gentle intonation", "lively intonation"),
        "rate": ("slow pace", "even pace", "fast pace"),
        "loudness": ("soft volume", "normal volume", "loud volume"),
        "tremor": ("steady breath", "trembling breath"),
        "voice": ("breathy tone", "clear tone", "harsh tone"),
    },
    "chinese": {
        "pitch": ("音调低沉", "音调适中", "音调高亢"),
        "range": ("语调平直", "语调柔和", "语调起伏"),
        "rate": ("语速缓慢", "语速均匀", "语速急促"),
        "loudness": ("音量微弱", "音量正常", "音量响亮"),
        "tremor": ("气息平稳", "气息颤抖"),
        "voice": ("音色沙哑", "音色清晰", "音色粗粝"),
    },
}


@dataclass(frozen=True)
class Emotion:
    """An emotion: its word in each language and its typical voice."""

    english: str
    chinese: str
    typical: Attributes

    def word(self, language: Language) -> str:
        """Return the word for this emotion in `language`."""
        return self.english if language == "english" else self.chinese


EMOTIONS = (
    Emotion("happy", "开心", Attributes(2, 2, 2, 1, 0, 1)),
    Emotion("sad", "悲伤", Attributes(0, 0, 0, 0, 1, 0)),
    Emotion("angry", "愤怒", Attributes(1, 2, 2, 2, 0, 2)),
    Emotion("afraid", "害怕", Attributes(2, 1, 2, 0, 1, 0)),
    Emotion("calm", "平静", Attributes(1, 1, 1, 1, 0, 1)),
    Emotion("disgusted", "厌恶", Attributes(0, 1, 0, 1, 0, 2)),
    Emotion("excited", "激动", Attributes(2, 2, 1, 2, 1, 1)),
)

TYPICAL_PROBABILITY = 0.65  # probability that an attribute has its emotion's typical class
TEMPLATES: dict[Language, str] = {
    "english": "The speaker sounds {emotion}, with {pitch}, {range}, {rate}, {loudness}, {tremor} and {voice}.",
    "chinese": "语气{emotion}，{pitch}，{range}，{rate}，{loudness}，{tremor}，{voice}。",
}


def count_classes(name: str) -> int:
    """Return the number of classes of the attribute `name`."""
    return len(WORDS["english"][name])


def draw_attributes(rng: np.random.Generator) -> Attributes:
    """Draw an emotion, then each attribute: the typical class with `TYPICAL_PROBABILITY`, or else another one."""
    typical = EMOTIONS[rng.integers(len(EMOTIONS))].typical
    classes = {}
    for name in ATTRIBUTE_NAMES:
        usual = getattr(typical, name)
        others = [other for other in range(count_classes(name)) if other != usual]
        classes[name] = usual if rng.random() < TYPICAL_PROBABILITY else int(rng.choice(others))
    return Attributes(**classes)


def find_emotion(attributes: Attributes) -> Emotion:
    """Return the emotion whose typical voice shares most attributes with `attributes`."""

    def count_shared(emotion: Emotion) -> int:
        return sum(getattr(emotion.typical, name) == getattr(attributes, name) for name in ATTRIBUTE_NAMES)

    return max(EMOTIONS, key=count_shared)  # max returns the first of equals


def write_caption(attributes: Attributes, language: Language) -> str:
    """Return the sentence that describes `attributes` in `language`."""
    words = {name: WORDS[language][name][getattr(attributes, name)] for name in ATTRIBUTE_NAMES}
    return TEMPLATES[language].format(emotion=find_emotion(attributes).word(language), **words)


def find_named_classes(text: str, language: Language) -> dict[str, int | None]:
    """Return the class that a caption names for each attribute, or None if it names none or several."""
    classes: dict[str, int | None] = {}
    for name in ATTRIBUTE_NAMES:
        matches = [number for number, words in enumerate(WORDS[language][name]) if words in text]
        classes[name] = matches[0] if len(matches) == 1 else None
    return classes
