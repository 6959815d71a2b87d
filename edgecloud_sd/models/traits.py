"""The properties that make two checkpoints a pair: the same ids for the same text, and the same audio features."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecloud_sd.host.errors import is_out_of_memory
from edgecloud_sd.models.frontend import Frontend

TOKENIZER_PARTS = (
    "vocabulary",
    "merges",
    "tokenizer_model",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "added_tokens",
    "special_tokens",
    "chat_format",
)
# Each kind of property, as an error names it, with its fields.
_KINDS = {
    "tokenizers": TOKENIZER_PARTS,
    "end-of-caption ids": ("eos",),
    "audio tokens": ("audio_token", "audio_bos", "audio_eos"),
    "audio features": (
        "sampling_rate",
        "mel_bins",
        "mel_filters",
        "hop_length",
        "n_fft",
        "max_samples",
        "padding_value",
        "dither",
    ),
}
_DIGESTS = frozenset((*TOKENIZER_PARTS, "mel_filters"))
_MEL_DECIMALS = 6  # two machines compute the filters with errors far below this
_CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "system"}]},
    {"role": "user", "content": [{"type": "audio", "audio": ""}, {"type": "text", "text": "task"}]},
]


@dataclass(frozen=True)
class Traits:
    """Properties that both sides of a pair must share, on whichever machines they run.

    The vocabulary size is not one of them: the published checkpoints pad theirs differently. Padding and truncation of
    the tokenizer, the version of its file and the order of keys are none either, because they change no prompt.
    """

    vocabulary: str  # digest, like all texts here
    merges: str
    tokenizer_model: str  # its kind and its options
    normalizer: str
    pre_tokenizer: str
    post_processor: str
    decoder: str
    added_tokens: str  # with their flags
    special_tokens: str
    chat_format: str  # one turn as its chat template writes it; empty without a template, which differs from none
    eos: tuple[int, ...]  # ids that end a caption, in ascending order
    audio_token: int  # id of the audio placeholder
    audio_bos: int
    audio_eos: int
    sampling_rate: int  # Hz
    mel_bins: int
    mel_filters: str
    hop_length: int  # samples
    n_fft: int  # samples
    max_samples: int  # the length of the longest clip
    padding_value: float
    dither: float


def frontend_traits(side: Frontend) -> Traits:
    """Return the traits of a front end, or of a loaded model."""
    parts = json.loads(side.tokenizer.backend_tokenizer.to_str())
    model, extractor = parts["model"], side.extractor
    filters = np.round(np.asarray(extractor.mel_filters, dtype="<f8"), _MEL_DECIMALS) + 0.0  # no negative zeros
    is_cleaned_up = bool(side.tokenizer.clean_up_tokenization_spaces)
    return Traits(
        vocabulary=_digest(model.pop("vocab", None)),
        merges=_digest(model.pop("merges", None)),
        tokenizer_model=_digest(model),
        normalizer=_digest(parts.get("normalizer")),
        pre_tokenizer=_digest(parts.get("pre_tokenizer")),
        post_processor=_digest(parts.get("post_processor")),
        decoder=_digest([parts.get("decoder"), is_cleaned_up]),
        added_tokens=_digest(sorted(parts.get("added_tokens", []), key=lambda token: token["id"])),
        special_tokens=_digest(side.tokenizer.special_tokens_map),
        chat_format=_chat_format(side.tokenizer),
        eos=tuple(sorted(side.eos)),
        audio_token=side.audio_token,
        audio_bos=side.audio_bos,
        audio_eos=side.audio_eos,
        sampling_rate=extractor.sampling_rate,
        mel_bins=extractor.feature_size,
        mel_filters=hashlib.sha256(filters.tobytes()).hexdigest(),
        hop_length=extractor.hop_length,
        n_fft=extractor.n_fft,
        max_samples=extractor.n_samples,
        padding_value=float(extractor.padding_value),
        dither=float(extractor.dither),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _chat_format(tokenizer: Any) -> str:
    """Return the digest of one turn as the tokenizer's own chat template writes it, or of a template that cannot."""
    if not tokenizer.chat_template:
        return ""
    try:
        return _digest(tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # a template is a program, and can fail in any way
        return _digest(tokenizer.chat_template)


def check_pair(edge_name: str, edge: Traits, cloud_name: str, cloud: Traits) -> None:
    """Raise ValueError, with every property that differs, unless the sides are a pair."""
    kinds = []
    for kind, names in _KINDS.items():
        if differing := [_describe(name, edge, cloud) for name in names if _differs(name, edge, cloud)]:
            kinds.append(f"{kind} ({', '.join(differing)})")
    if kinds:
        raise ValueError(
            f"{edge_name} and {cloud_name} have different {' and '.join(kinds)}, so they are not a pair: "
            "choose checkpoints of one family with --edge-model and --cloud-model (every mode builds its prompts with "
            "the edge's tokenizer)"
        )


def _differs(name: str, edge: Traits, cloud: Traits) -> bool:
    values = (getattr(edge, name), getattr(cloud, name))
    return values[0] != values[1] and (name != "chat_format" or all(values))


def _describe(name: str, edge: Traits, cloud: Traits) -> str:
    if name in _DIGESTS:
        return name
    return f"{name} {_text(getattr(edge, name))} and {_text(getattr(cloud, name))}"


def _text(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
