"""Manifests and audio files.

A manifest is a JSON list of objects, or a file `.jsonl` with one object a line. The objects have the published keys
`file_id`, `dataset`, `audio_path`, `caption`, `transcription`, `chinese_caption`, `english_caption`,
`chinese_transcription`, `english_transcription` and `index`. A caption is a string or a list of references. An audio
path is relative to the folder of the manifest, or else to the nearest folder above it that has such a file.

    python -m edgecloud_sd.data secap FOLDER     write a manifest for SECap's published layout
    python -m edgecloud_sd.data check DATASET    read every clip and list the ones that cannot be used
"""

from __future__ import annotations

import mmap
import os
import shlex
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data import containers
from edgecloud_sd.data.doubts import find_doubts
from edgecloud_sd.data.prompts import LANGUAGES, TASKS, look_up
from edgecloud_sd.data.texts import (
    BadText,
    check_characters,
    has_visible_text,
    parse_json,
    parse_json_lines,
    read_utf8,
)
from edgecloud_sd.host.stderr import silent_stderr

SAMPLE_RATE = 16_000  # Hz, of the feature extractor of Qwen2.5-Omni
MIN_CLIP_SECONDS = 0.025  # one window of the feature extractor (n_fft = 400 samples)
MAX_CLIP_SECONDS = 300.0  # the longest audio that the feature extractor of Qwen2.5-Omni reads
MAX_SAMPLE = 2.0**31  # integer PCM of 32 bits that was never scaled; above it the features may overflow
BLOCK_FRAMES = 1 << 18
UNKNOWN_FRAMES = 1 << 62  # libsndfile gives more for a stream without a length
SECAP_CAPTIONS_FILE = "fid2captions.json"  # part of SECap's published layout
CAPTION_TYPES = ("original", "audio_only")
CAPTION_ADVICE = "choose another --language or --caption-type"
ON_BAD_CLIP = ("error", "skip")
MANIFEST_NAMES = ("manifest.json", "manifest.jsonl")


@dataclass(frozen=True)
class Clip:
    """One entry of a manifest in one language; `references` are the captions to score against."""

    file_id: str
    audio_path: Path
    language: str
    references: tuple[str, ...]
    transcription: str | None = None  # the spoken words, if they are part of the prompt
    dataset: str = ""
    index: int = 0
    doubts: tuple[str, ...] = ()  # about its audio


class BadClip(ValueError):
    """An error for a clip that cannot be used; the message names the file, the field and the reason."""


@dataclass(frozen=True)
class SkippedClip:
    """A clip that was left out, with the reason."""

    file_id: str
    reason: str


@dataclass(frozen=True)
class Audio:
    """The mono samples of a file at `SAMPLE_RATE`, and what is doubtful about them."""

    samples: NDArray[np.float32]
    doubts: tuple[str, ...] = ()  # each names the file


def load_audio(file: str | Path) -> NDArray[np.float32]:
    """Return the samples of `read_audio`."""
    return read_audio(file).samples


def read_audio(file: str | Path) -> Audio:
    """Return a whole file in a format of `containers.CHECKS` as libsndfile reads it.

    Samples are in [-1, 1], except those of float files that exceed it. Channels are averaged, and other rates are
    resampled with soxr. Raise BadClip for a missing, corrupt, cut or empty file, and for one longer than
    `MAX_CLIP_SECONDS`. Raise it for samples that are not finite, or so large that arithmetic on them is not.
    """
    import soxr

    path = Path(file)
    with silent_stderr():  # the MP3 decoder writes to it
        samples, rate = _read_samples(path)
    if not len(samples):
        raise BadClip(f"{path}: contains no audio (0 samples)")
    if not np.isfinite(samples).all():
        raise BadClip(f"{path}: contains samples that are not finite numbers")
    channels = samples.astype(np.float64)
    if (peak := np.abs(channels).max()) > MAX_SAMPLE:
        raise BadClip(f"{path}: reaches {peak:g}, and arithmetic on such samples is not finite; scale it to [-1, 1]")
    mixed = mono = channels.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
        if not len(mono):
            raise BadClip(f"{path}: contains no audio (0 samples at {SAMPLE_RATE} Hz)")
    doubts = tuple(f"{path}: {doubt}" for doubt in find_doubts(channels, mixed))
    return Audio(np.ascontiguousarray(mono, dtype=np.float32), doubts)


def _read_samples(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return samples [frames, channels] and their rate in Hz. Raise BadClip for a file that is unreadable or cut."""
    import soundfile

    if os.path.isdir(path):
        raise BadClip(f"{path}: is a folder, not an audio file")
    try:
        if not path.is_file():
            raise BadClip(f"{path}: no such audio file")
        if not path.stat().st_size:
            raise BadClip(f"{path}: cannot be read as audio (the file is empty)")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if kind := containers.find_foreign_format(content):
                raise BadClip(f"{path}: cannot be read as audio ({kind}); {_conversion_hint(path)}")
            with soundfile.SoundFile(path) as audio:
                if audio.format not in containers.CHECKS:
                    raise BadClip(f"{path}: cannot be read as audio ({audio.format_info}); {_conversion_hint(path)}")
                if audio.format == "FLAC" and audio.frames > UNKNOWN_FRAMES:
                    reason = "a FLAC stream without a length, which libsndfile cannot end"
                    raise BadClip(f"{path}: cannot be read as audio ({reason}); {_conversion_hint(path)}")
                if cut := containers.find_cut(content, audio.format):
                    raise BadClip(f"{path}: cannot be read as audio ({cut})")
                return _read_frames(path, audio), audio.samplerate
    except BadClip:
        raise
    except soundfile.LibsndfileError as error:
        hint = f"; {_conversion_hint(path)}" if path.suffix.lower() in containers.FOREIGN_SUFFIXES else ""
        raise BadClip(f"{path}: cannot be read as audio ({error.error_string.strip()}){hint}") from error
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # TypeError: a raw file, which has no rate
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadClip(f"{path}: cannot be read as audio ({reason})") from error


def _conversion_hint(path: Path) -> str:
    source, target = (shlex.quote(str(name)) for name in (path, path.with_suffix(".wav").name))
    return f"convert it: ffmpeg -i {source} -ar {SAMPLE_RATE} -ac 1 {target}"


def _read_frames(path: Path, audio: Any) -> NDArray[np.float32]:
    """Return every frame of an open file. Raise BadClip for one that is too long, or shorter than it promises."""
    promised, limit = audio.frames, MAX_CLIP_SECONDS * audio.samplerate
    blocks: list[NDArray[np.float32]] = []
    # in blocks: a corrupt header may promise terabytes, and some codecs have no length
    while not blocks or len(blocks[-1]) == BLOCK_FRAMES:
        frames = promised if limit < promised < UNKNOWN_FRAMES else sum(map(len, blocks))
        if frames > limit:
            seconds = frames / audio.samplerate
            raise BadClip(f"{path}: lasts {seconds:.3f} s or more, and a clip may last {MAX_CLIP_SECONDS:g} s at most")
        blocks.append(audio.read(BLOCK_FRAMES, dtype="float32", always_2d=True))
    samples = np.concatenate(blocks)
    if audio.format != "MP3" and len(samples) < promised < UNKNOWN_FRAMES:  # MP3 counts the padding of its codec
        count = f"{len(samples)} of the {promised} frames that its header promises"
        raise BadClip(f"{path}: cannot be read as audio (the file has {count})")
    return samples


def find_manifest(path: Path) -> Path:
    """Return a manifest file: `path` itself, or the one in that folder. Raise BadClip if there is none."""
    if path.is_dir():
        for name in MANIFEST_NAMES:
            if (path / name).is_file():
                return path / name
        is_secap = (path / SECAP_CAPTIONS_FILE).is_file()
        hint = " (this is SECap's layout: run python -m edgecloud_sd.data secap on it)" if is_secap else ""
        raise BadClip(f"{path}: contains no manifest.json or manifest.jsonl{hint}")
    if not path.is_file():
        raise BadClip(f"{path}: no such manifest; give a manifest file, a folder with one, or 'pocket'")
    return path


def load_manifest(
    path: Path,
    language: str,
    caption_type: str = CAPTION_TYPES[0],
    on_bad_clip: str = "error",
    limit: int | None = None,
    with_transcription: bool = False,
) -> tuple[list[Clip], list[SkippedClip]]:
    """Return the clips of a manifest in its order, the first `limit` usable ones, and the skipped clips.

    `caption_type` chooses the references: `original` is the field `caption`, and `audio_only` is `<language>_caption`.
    `with_transcription` reads `<language>_transcription`, or else `transcription`, for the prompt of a clip that has
    one. Raise BadClip for the first bad clip unless `on_bad_clip` is "skip", for a manifest that is not a list, and for
    one without a usable clip. Raise ValueError for an unknown language.
    """
    look_up(TASKS, language, "language")
    clips: list[Clip] = []
    skipped: list[SkippedClip] = []
    file_ids: set[str] = set()
    for number, (place, entry) in enumerate(_read_entries(path)):
        if limit is not None and len(clips) == limit:
            break
        try:
            with text_errors():
                check_characters(entry, place)
            clip = _parse_entry(path, place, number, entry, language, caption_type, with_transcription)
            if clip.file_id in file_ids:
                raise BadClip(f"{place}, file_id: {clip.file_id!r} occurs twice")
            file_ids.add(clip.file_id)
            clip = replace(clip, doubts=_check_audio(clip.audio_path).doubts)
        except BadClip as error:
            if on_bad_clip == "error":
                raise
            file_id = entry.get("file_id") if isinstance(entry, dict) else None
            has_name = isinstance(file_id, str) and file_id.isprintable()  # half a character is not printable either
            skipped.append(SkippedClip(file_id if file_id and has_name else f"entry {number}", str(error)))
        else:
            clips.append(clip)
    if not clips:
        first = f"; the first: {skipped[0].reason}" if skipped else ""
        raise BadClip(f"{path}: contains no usable clip{first}")
    return clips, skipped


def _check_audio(path: Path) -> Audio:
    audio = read_audio(path)
    seconds = len(audio.samples) / SAMPLE_RATE
    if not MIN_CLIP_SECONDS <= seconds <= MAX_CLIP_SECONDS:
        bounds = f"{MIN_CLIP_SECONDS} to {MAX_CLIP_SECONDS:g} s"
        raise BadClip(f"{path}: lasts {seconds:.3f} s, and a clip may last {bounds}")
    return audio


@contextmanager
def text_errors() -> Iterator[None]:
    """Raise a BadText of the block as a BadClip."""
    try:
        yield
    except BadText as error:
        raise BadClip(str(error)) from error


def _read_entries(path: Path) -> list[tuple[str, Any]]:
    """Return place and value of each entry of a manifest. The values may hold characters that cannot be used."""
    with text_errors():
        text = read_utf8(path, "JSON")
        if path.suffix.lower() == ".jsonl":
            return [(f"{path}, line {number}", entry) for number, entry in parse_json_lines(text, str(path))]
        entries = parse_json(text, str(path))
    if not isinstance(entries, list):
        raise BadClip(f"{path}: must be a JSON list of clips, not {type(entries).__name__}")
    return [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries)]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raise BadClip unless it is JSON in which every text can be written again."""
    with text_errors():
        content = parse_json(read_utf8(path, "JSON"), str(path))
        check_characters(content, str(path))
    return content


def _parse_entry(
    path: Path, start: str, number: int, entry: Any, language: str, caption_type: str, with_transcription: bool
) -> Clip:
    if not isinstance(entry, dict):
        raise BadClip(f"{start}: must be an object, not {type(entry).__name__}")

    def read_text(field: str, is_required: bool = True) -> str:
        value = entry.get(field)
        if value is None and not is_required:
            return ""
        if not isinstance(value, str) or (is_required and not has_visible_text(value)):
            raise BadClip(f"{start}, {field}: must be a text that is not empty, not {value!r}")
        return value

    file_id, audio_path = read_text("file_id"), read_text("audio_path")
    for field, value in (("file_id", file_id), ("audio_path", audio_path)):
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
            raise BadClip(f"{start}, {field}: must be a text without line breaks and control characters, not {value!r}")
    place = f"{path}, {file_id}"
    references = _parse_references(place, entry, language, caption_type)
    # read in any case, so that a check of the manifest and every run agree about a clip
    own, common = (read_text(field, False).strip() for field in (f"{language}_transcription", "transcription"))
    index = entry.get("index", number)
    if not isinstance(index, int) or isinstance(index, bool):
        raise BadClip(f"{place}, index: must be a whole number, not {index!r}")
    return Clip(
        file_id=file_id,
        audio_path=_find_audio(path, audio_path),
        language=language,
        references=references,
        transcription=(own or common or None) if with_transcription else None,
        dataset=read_text("dataset", False),
        index=index,
    )


def _find_audio(manifest: Path, name: str) -> Path:
    """Return the audio file in the folder of the manifest or in the nearest folder above it. Raise BadClip for none.

    Published manifests name audio files from the folder of their project.
    """
    path = manifest.parent / name
    folders = [] if Path(name).is_absolute() else manifest.resolve().parent.parents
    for candidate in (path, *(folder / name for folder in folders)):
        if os.path.exists(candidate):
            return candidate
    tried = f" there, and no {name} in {', '.join(map(str, folders))}" if folders else ""
    raise BadClip(f"{path}: no such audio file{tried}")


def _parse_references(place: str, entry: dict[str, Any], language: str, caption_type: str) -> tuple[str, ...]:
    """Return the captions of an entry. Raise BadClip, beginning with `place`, if there are none in this language."""
    field = "caption" if caption_type == "original" else f"{language}_caption"
    value = entry.get(field)
    if value is None:
        raise BadClip(f"{place}, {field}: is missing, so the clip has no {language} caption; {CAPTION_ADVICE}")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadClip(f"{place}, {field}: must be a text or a list of texts, not {value!r}")
    references = tuple(text.strip() for text in texts if has_visible_text(text))
    if not references:
        raise BadClip(f"{place}, {field}: is empty; {CAPTION_ADVICE}")
    if caption_type == "original" and entry.get(f"{language}_caption") != value:
        others = [other for other in LANGUAGES if other != language and entry.get(f"{other}_caption") == value]
        if others:
            raise BadClip(f"{place}, caption: is in {others[0]}, not in {language}; {CAPTION_ADVICE}")
    return references


def check_manifest(
    path: Path, languages: Iterable[str] = LANGUAGES, caption_type: str = CAPTION_TYPES[0]
) -> tuple[bool, list[str]]:
    """Return whether some language can use every clip, and a report: the counts per language and each bad clip."""
    is_usable, lines = False, []
    for language in languages:
        try:
            clips, skipped = load_manifest(path, language, caption_type, on_bad_clip="skip")
        except BadClip as error:
            lines.append(f"{language}: {error}")
            continue
        is_usable |= not skipped
        lines.append(f"{language}: {len(clips)} clips can be used, {len(skipped)} cannot")
        lines.extend(f"  {clip.file_id}: {clip.reason}" for clip in skipped)
        lines.extend(f"  {clip.file_id}: warning: {doubt}" for clip in clips for doubt in clip.doubts)
    return is_usable, lines
