"""Prompts: the task for each language and prompt type, the chat format and the audio features.

The chat format is the chat template of Qwen2.5-Omni for one user turn with audio and text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.texts import check_characters
from edgecloud_sd.events import Prompt

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
SYSTEM_PROMPT = "You caption the emotion in speech."
TASKS: dict[str, dict[str, str]] = {
    "chinese": {
        "default": "请用一句中文描述说话人的情感和声音特征。",
        "detailed": "请用一句中文详细描述说话人的情感，并说明音调、语调、语速、音量、气息和音色。",
        "concise": "请用中文简短描述说话人的情感。",
    },
    "english": {
        "default": "Describe the speaker's emotion and voice in one English sentence.",
        "detailed": "Describe the speaker's emotion in one detailed English sentence, with the pitch, intonation, "
        "pace, volume, breath and tone of the voice.",
        "concise": "Describe the speaker's emotion briefly in English.",
    },
}
TRANSCRIPTION_FORMATS = {"chinese": "语音内容：{}", "english": "The speaker says: {}"}
LANGUAGES = tuple(TASKS)
PROMPT_TYPES = tuple(TASKS["english"])
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO_TOKEN, AUDIO_END = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
CONTROL_TOKENS = (TURN_START, TURN_END, AUDIO_START, AUDIO_TOKEN, AUDIO_END)


def look_up(table: Mapping[str, _T], value: str, name: str) -> _T:
    """Return the entry of a table. Raise ValueError, with the values that it has, for another one."""
    if value not in table:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(table)}")
    return table[value]


def format_task(
    language: str, prompt_type: str = "default", transcription: str | None = None, task: str | None = None
) -> str:
    """Return the text of the user's turn: the transcription, if one is given, and the task.

    The task is that of the prompt type, or the text `task` instead. Raise ValueError for an unknown language or prompt
    type, and for a text that has no UTF-8 form.
    """
    for name, text in (("transcription", transcription), ("task", task)):
        check_characters(text, name)
    shipped = look_up(look_up(TASKS, language, "language"), prompt_type, "prompt_type")
    task = shipped if task is None else task
    return f"{TRANSCRIPTION_FORMATS[language].format(transcription)}\n{task}" if transcription else task


def chat_pieces(task: str, audio_tokens: int) -> list[str]:
    """Return one user turn with `audio_tokens` placeholders, up to where the assistant's answer begins.

    Control tokens are at the odd places. Text, which may be empty, is at the even ones.
    """
    audio = [AUDIO_START, "", *[AUDIO_TOKEN, ""] * audio_tokens, AUDIO_END]
    user = ["user\n", *audio, task] if audio_tokens else [f"user\n{task}"]
    system = ["", TURN_START, f"system\n{SYSTEM_PROMPT}", TURN_END, "\n"]
    return [*system, TURN_START, *user, TURN_END, "\n", TURN_START, "assistant\n"]


def format_chat(task: str, audio_tokens: int) -> str:
    """Return `chat_pieces` as one text."""
    return "".join(chat_pieces(task, audio_tokens))


def encode_chat(tokenizer: Any, task: str, audio_tokens: int) -> tuple[int, ...]:
    """Return the ids of `chat_pieces`. The text of the task never gives a control token."""
    pieces = chat_pieces(task, audio_tokens)
    control = control_ids(tokenizer)
    plain = _plain_tokenizer(tokenizer)
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(control[CONTROL_TOKENS.index(piece)])
        elif piece:
            ids += plain.encode(piece, add_special_tokens=False).ids
    return tuple(ids)


def control_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of `CONTROL_TOKENS`."""
    return tuple(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))


def _plain_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer with the same ids for plain text, and without tokens that are matched as a whole.

    `split_special_tokens` of transformers would still match added tokens that are not special.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def count_audio_positions(frames: int) -> int:
    """Return the positions that the audio encoder emits for `frames`: a convolution of stride 2, then 2:1 pooling."""
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


def check_placeholders(prompt: Prompt, placeholder: int) -> None:
    """Raise ValueError unless the prompt has one `placeholder` for each position of its audio."""
    frames = 0 if prompt.features is None else prompt.features.shape[1]
    expected = count_audio_positions(frames) if frames else 0
    if frames and expected < 1:
        raise ValueError(f"{frames} frames are too few for the audio encoder")
    count = prompt.ids.count(placeholder)
    if count != expected:
        raise ValueError(f"the prompt has {count} audio placeholders for {frames} frames, not {expected}")


def log_mel(samples: NDArray[np.float32], extractor: Any) -> Tensor:
    """Return Whisper log-mel features [mel bins, frames] of mono samples in float32, at 100 frames per second.

    The extractor would pad each clip to its full length. Here one window of zeros follows the clip, because no frame of
    the clip reaches further: the features are equal and cost less. Raise ValueError for a clip longer than the model
    reads.
    """
    import torch

    seconds = len(samples) / extractor.sampling_rate
    limit = extractor.n_samples / extractor.sampling_rate
    if seconds > limit:
        raise ValueError(f"the clip is {seconds:.1f} s long and this model reads at most {limit:g} s: cut it first")
    padded = np.pad(samples, (0, extractor.n_fft))
    # truncation would drop the window of zeros of a clip of nearly full length
    batch = extractor(padded, sampling_rate=extractor.sampling_rate, padding=False, truncation=False)
    frames = math.ceil(len(samples) / extractor.hop_length)
    return torch.as_tensor(np.asarray(batch["input_features"][0])[:, :frames], dtype=torch.float32)


def build_prompt(
    samples: NDArray[np.float32],
    tokenizer: Any,
    extractor: Any,
    *,
    language: str,
    prompt_type: str = "default",
    transcription: str | None = None,
    task: str | None = None,
) -> Prompt:
    """Return the prompt for mono samples in [-1, 1] at the extractor's rate: the audio, then the text of the turn.

    Raise ValueError for a clip that is too short for one position of the audio encoder or longer than it reads.
    """
    features = log_mel(samples, extractor)
    positions = count_audio_positions(features.shape[1])
    if positions < 1:
        raise ValueError(f"the clip has {len(samples)} samples, too few for one position of the audio encoder")
    task = format_task(language, prompt_type, transcription, task)
    return Prompt(encode_chat(tokenizer, task, positions), features)
