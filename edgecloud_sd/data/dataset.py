"""Manifests and audio files: read, check, write; and importers for published data sets.

A manifest is a JSON list of objects with the published keys `file_id`, `dataset`, `audio_path` (relative to the
manifest), `caption`, `transcription`, `chinese_caption`, `english_caption`, `chinese_transcription`,
`english_transcription` and `index`. A caption is a string or a list of references.

    python -m edgecloud_sd.data secap FOLDER     turn SECap's published layout into a manifest
    python -m edgecloud_sd.data check MANIFEST   read every clip and list what is wrong
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.prompts import LANGUAGES

SAMPLE_RATE = 16_000
SHORTEST = 0.025  # s: one window of the feature extractor
MAX_CLIP_SECONDS = 300.0  # the most that the feature extractor of Qwen2.5-Omni reads
SECAP_CAPTIONS = "fid2captions.json"  # of SECap's published layout
CAPTION_TYPES = ("audio_only", "original")
MANIFEST_ADVICE = "choose another --language or --caption-type"
ON_BAD_CLIP = ("error", "skip")


@dataclass(frozen=True)
class Clip:
    """One entry of a manifest, in one language. `references` are the captions to score against."""

    file_id: str
    audio_path: Path
    language: str
    references: tuple[str, ...]
    transcription: str | None = None  # given to the prompt where the caption type allows it
    dataset: str = ""
    index: int = 0


class BadClip(ValueError):
    """A clip that cannot be used: the message names the file and the field, and what is wrong with it."""


@dataclass(frozen=True)
class Skipped:
    """A clip that was left out, and why."""

    file_id: str
    reason: str


def load_audio(file: str | Path) -> NDArray[np.float32]:
    """Mono samples at `SAMPLE_RATE` from any file that libsndfile reads (wav of every kind, FLAC, MP3, Ogg).

    They lie in [-1, 1], but for float files that go beyond it themselves.

    Channels are averaged; other rates are resampled with soxr. Raises BadClip for a missing, corrupt or empty file, one
    longer than `MAX_CLIP_SECONDS`, or one with samples that are not numbers.
    """
    import soundfile
    import soxr

    path = Path(file)
    try:
        if not path.is_file():
            raise BadClip(f"{path}: no such audio file")
        if _cut_off(path):
            raise BadClip(f"{path}: cannot be read as audio (the file is shorter than its header says)")
        with soundfile.SoundFile(path) as audio:
            rate = audio.samplerate
            if (
                audio.frames > MAX_CLIP_SECONDS * rate
            ):  # before anything is allocated: a corrupt header may promise terabytes
                raise BadClip(
                    f"{path}: lasts {audio.frames / rate:.3f} s, and a clip may last {MAX_CLIP_SECONDS:g} s at most"
                )
            samples = audio.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise BadClip(f"{path}: cannot be read as audio ({error.error_string.strip()})") from error
    except (OSError, TypeError) as error:  # TypeError: a raw file, which does not say its rate
        raise BadClip(f"{path}: cannot be read as audio ({error})") from error
    if not len(samples):
        raise BadClip(f"{path}: holds no audio (0 samples)")
    if not np.isfinite(samples).all():
        raise BadClip(f"{path}: holds samples that are not finite numbers")
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
        if not len(mono):
            raise BadClip(f"{path}: holds no audio (0 samples at {SAMPLE_RATE} Hz)")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _cut_off(path: Path) -> bool:
    """Whether a wav file ends before its header says. libsndfile would read what is left as if it were all."""
    with path.open("rb") as file:
        head = file.read(12)
    size = int.from_bytes(head[4:8], "little")
    streamed = size == 0 or size >= 0x7FFFF000  # written by a program that did not know the length
    return head[:4] == b"RIFF" and head[8:] == b"WAVE" and not streamed and path.stat().st_size < size + 8


def find_manifest(path: Path) -> Path:
    """Return a manifest file: `path` itself, or `manifest.json` in that folder. Raise BadClip if there is none."""
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return path / "manifest.json"
        is_secap = (path / SECAP_CAPTIONS).is_file()
        hint = " (this is SECap's layout: run python -m edgecloud_sd.data secap on it)" if is_secap else ""
        raise BadClip(f"{path}: holds no manifest.json{hint}")
    if not path.is_file():
        raise BadClip(f"{path}: no such manifest; give a manifest file, a folder with manifest.json, or 'pocket'")
    return path


def load_manifest(
    path: Path, language: str, caption_type: str = "audio_only", on_bad_clip: str = "error", limit: int | None = None
) -> tuple[list[Clip], list[Skipped]]:
    """The clips of a manifest, in its order, and those left out; with `limit`, the first so many good ones.

    `audio_only` scores against `<language>_caption` and gives the model audio alone; `original` scores against
    `caption` and gives it the transcription too, where there is one. Raises BadClip for the first bad clip unless
    `on_bad_clip` is `skip`; a manifest that is no list of objects, or in which no clip is good, is always an error.
    """
    entries = _entries(path)
    clips: list[Clip] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        if limit is not None and len(clips) == limit:
            break
        try:
            clip = _clip(path, number, entry, language, caption_type)
            if clip.file_id in seen:
                raise BadClip(f"{path}, entry {number}, file_id: {clip.file_id!r} stands twice")
            seen.add(clip.file_id)
            seconds = len(load_audio(clip.audio_path)) / SAMPLE_RATE
            if not SHORTEST <= seconds <= MAX_CLIP_SECONDS:
                raise BadClip(
                    f"{clip.audio_path}: lasts {seconds:.3f} s, and a clip may last "
                    f"{SHORTEST} to {MAX_CLIP_SECONDS:g} s"
                )
        except BadClip as error:
            if on_bad_clip == "error":
                raise
            named = entry.get("file_id") if isinstance(entry, dict) else None
            skipped.append(Skipped(str(named or f"entry {number}"), str(error)))
        else:
            clips.append(clip)
    if not clips:
        first = f"; the first: {skipped[0].reason}" if skipped else ""
        raise BadClip(f"{path}: holds no usable clip{first}")
    return clips, skipped


def _entries(path: Path) -> list[Any]:
    entries = read_json(path)
    if not isinstance(entries, list):
        raise BadClip(f"{path}: must be a JSON list of clips, not {type(entries).__name__}")
    return entries


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number without end
        raise BadClip(f"{path}: is not JSON ({error})") from error


def _clip(path: Path, number: int, entry: Any, language: str, caption_type: str) -> Clip:
    if not isinstance(entry, dict):
        raise BadClip(f"{path}, entry {number}: must be an object, not {type(entry).__name__}")

    def text(field: str, required: bool = True) -> str:
        value = entry.get(field)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or (required and not value.strip()):
            raise BadClip(f"{path}, entry {number}, {field}: must be a text that is not empty, not {value!r}")
        return value

    file_id = text("file_id")
    field = "caption" if caption_type == "original" else f"{language}_caption"
    value = entry.get(field)
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        if value is None:
            raise BadClip(f"{path}, {file_id}, {field}: there is no {language} caption; {MANIFEST_ADVICE}")
        raise BadClip(f"{path}, {file_id}, {field}: must be a text or a list of texts, not {value!r}")
    references = [each.strip() for each in references if each.strip()]
    if not references:
        raise BadClip(f"{path}, {file_id}, {field}: is empty; {MANIFEST_ADVICE}")
    transcription = None
    if caption_type == "original":
        others = [each for each in LANGUAGES if each != language and entry.get(f"{each}_caption") == value]
        if others and entry.get(f"{language}_caption") != value:
            raise BadClip(f"{path}, {file_id}, caption: is the {others[0]} one, not {language}; {MANIFEST_ADVICE}")
        said = (text(f"{language}_transcription", False).strip(), text("transcription", False).strip())
        transcription = said[0] or said[1] or None
    index = entry.get("index", number)
    if not isinstance(index, int) or isinstance(index, bool):
        raise BadClip(f"{path}, {file_id}, index: must be a whole number, not {index!r}")
    return Clip(
        file_id=file_id,
        audio_path=path.parent / text("audio_path"),
        language=language,
        references=tuple(references),
        transcription=transcription,
        dataset=text("dataset", False),
        index=index,
    )


def check_manifest(path: Path, languages: Iterable[str] = LANGUAGES) -> tuple[bool, list[str]]:
    """Whether every clip is good in some language, and what to say: how many are, then a line a bad one."""
    usable, lines = False, []
    for language in languages:
        try:
            clips, skipped = load_manifest(path, language, on_bad_clip="skip")
        except BadClip as error:
            lines.append(f"{language}: {error}")
            continue
        usable |= not skipped
        lines.append(f"{language}: {len(clips)} clips are good, {len(skipped)} are not")
        lines.extend(f"  {each.file_id}: {each.reason}" for each in skipped)
    return usable, lines
