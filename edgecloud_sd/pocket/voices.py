"""The voices of pocket clips: six acoustic attributes, the emotions that favour them, and the captions.

The caption is a function of the attributes alone, so that a model that recognises the attributes can write it. Its
emotion is the one whose typical voice shares most attributes with the clip (on a tie, the first in `EMOTIONS`).

A free caption says the same in a free form, which a seed draws: one of several orders of the parts, and one of two
wordings of each class. The emotion decides which order is usual, and a class that is not typical of the emotion usually
has its other wording. A model that recognises the attributes can therefore write the usual form.
"""

from __future__ import annotations

from collections.abc import Sequence
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
# The other wordings, in free captions only. Their lengths differ, so that the parts of two captions rarely coincide.
OTHER_WORDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "english": {
        "pitch": ("a deep register", "a middle register", "a bright register"),
        "range": ("hardly any melody", "a mild melody", "a rich melody"),
        "rate": ("unhurried words", "measured words", "hasty words"),
        "loudness": ("a quiet delivery", "a moderate delivery", "a powerful delivery"),
        "tremor": ("no tremble at all", "a strong tremble"),
        "voice": ("an airy timbre", "a clean timbre", "a rough timbre"),
    },
    "chinese": {
        "pitch": ("嗓音压得很低", "嗓音不高不低", "嗓音拔得很高"),
        "range": ("几乎没有抑扬", "抑扬不大", "抑扬分明"),
        "rate": ("说得很慢", "说得不紧不慢", "说得很快"),
        "loudness": ("声音轻", "声音不大不小", "声音洪大"),
        "tremor": ("呼吸稳定", "呼吸一直发抖"),
        "voice": ("带着气声", "干净清亮", "粗糙刺耳"),
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
FREE_TEMPLATES: dict[Language, tuple[str, ...]] = {
    "english": (
        TEMPLATES["english"],
        "With {loudness}, {rate} and {tremor}, the speaker sounds {emotion}, with {voice}, {pitch} and {range}.",
        "There is {pitch}, {voice}, {range}, {tremor}, {rate} and {loudness}: someone who sounds {emotion}.",
        "Sounding {emotion}, the voice has {tremor}, {rate}, {range}, {voice}, {loudness} and {pitch}.",
    ),
    "chinese": (
        TEMPLATES["chinese"],
        "{loudness}，{rate}，{tremor}，听来{emotion}，而且{voice}，{pitch}，{range}。",
        "此人{pitch}，{voice}，{range}，{tremor}，{rate}，{loudness}，显得{emotion}。",
        "{emotion}的语气，{tremor}，{rate}，{range}，{voice}，{loudness}，{pitch}。",
    ),
}
USUAL_PROBABILITY = 0.8  # probability that the order, or the wording of a class, is the usual one


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


def write_free_caption(attributes: Attributes, language: Language, seed: Sequence[int]) -> str:
    """Return a sentence that describes `attributes` in `language`, in the form that `seed` draws."""
    rng = np.random.default_rng([*seed, 1 + list(WORDS).index(language)])  # 0 at the end would change nothing
    emotion, templates = find_emotion(attributes), FREE_TEMPLATES[language]
    is_unusual = rng.random(1 + len(ATTRIBUTE_NAMES)) >= USUAL_PROBABILITY
    order = EMOTIONS.index(emotion) + int(is_unusual[-1] * rng.integers(1, len(templates)))
    words = {}
    for name, has_unusual_words in zip(ATTRIBUTE_NAMES, is_unusual, strict=False):
        number = getattr(attributes, name)
        is_typical = number == getattr(emotion.typical, name)
        words[name] = (WORDS if is_typical != has_unusual_words else OTHER_WORDS)[language][name][number]
    return templates[order % len(templates)].format(emotion=emotion.word(language), **words)


def read_attributes(text: str, language: Language) -> Attributes | None:
    """Return the attributes that a caption describes, or None unless it names one class of each."""
    classes = {name: number for name, number in find_named_classes(text, language).items() if number is not None}
    return Attributes(**classes) if len(classes) == len(ATTRIBUTE_NAMES) else None


def find_named_classes(text: str, language: Language) -> dict[str, int | None]:
    """Return the class that a caption names for each attribute, or None if it names none or several."""
    classes: dict[str, int | None] = {}
    for name in ATTRIBUTE_NAMES:
        wordings = zip(WORDS[language][name], OTHER_WORDS[language][name], strict=True)
        matches = [number for number, wording in enumerate(wordings) if any(words in text for words in wording)]
        classes[name] = matches[0] if len(matches) == 1 else None
    return classes
