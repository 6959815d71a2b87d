"""What a pocket clip can sound like: six acoustic attributes, the emotions that favour them, and the captions.

The caption is a function of the attributes alone, so whoever hears the attributes can write it: the emotion that it
names is the one whose typical voice shares most attributes with the clip (ties: the first in `EMOTIONS`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

Language = str  # "chinese" or "english"


@dataclass(frozen=True)
class Attributes:
    """One class index for each acoustic attribute; the classes are the positions in `WORDS`."""

    pitch: int
    range: int
    rate: int
    loudness: int
    tremor: int
    voice: int


ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))

# attribute -> class -> the words for it. Each phrase occurs nowhere else in a caption.
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
    """Its word in each language, and the voice typical of it."""

    english: str
    chinese: str
    typical: Attributes

    def word(self, language: Language) -> str:
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

TYPICAL = 0.65  # how often an attribute takes its emotion's typical class
TEMPLATES: dict[Language, str] = {
    "english": "The speaker sounds {emotion}, with {pitch}, {range}, {rate}, {loudness}, {tremor} and {voice}.",
    "chinese": "语气{emotion}，{pitch}，{range}，{rate}，{loudness}，{tremor}，{voice}。",
}


def classes(name: str) -> int:
    """How many classes the attribute `name` has."""
    return len(WORDS["english"][name])


def draw(rng: np.random.Generator) -> Attributes:
    """Draw an emotion, then each attribute: its typical class with probability `TYPICAL`, else one of the others."""
    typical = EMOTIONS[rng.integers(len(EMOTIONS))].typical
    drawn = {}
    for name in ATTRIBUTE_NAMES:
        usual = getattr(typical, name)
        others = [c for c in range(classes(name)) if c != usual]
        drawn[name] = usual if rng.random() < TYPICAL else int(rng.choice(others))
    return Attributes(**drawn)


def emotion_of(attributes: Attributes) -> Emotion:
    """The emotion whose typical voice shares most attributes with this one."""

    def shared(emotion: Emotion) -> int:
        return sum(getattr(emotion.typical, name) == getattr(attributes, name) for name in ATTRIBUTE_NAMES)

    return max(EMOTIONS, key=shared)  # max keeps the first of equals


def caption(attributes: Attributes, language: Language) -> str:
    """The one sentence that describes these attributes in `language`."""
    words = {name: WORDS[language][name][getattr(attributes, name)] for name in ATTRIBUTE_NAMES}
    return TEMPLATES[language].format(emotion=emotion_of(attributes).word(language), **words)


def named(text: str, language: Language) -> dict[str, int | None]:
    """The class that a caption names for each attribute; None where it names none, or more than one."""
    found: dict[str, int | None] = {}
    for name in ATTRIBUTE_NAMES:
        hits = [c for c, words in enumerate(WORDS[language][name]) if words in text]
        found[name] = hits[0] if len(hits) == 1 else None
    return found
