"""Pocket clips on disk: wav files and one manifest a language, made from seeds, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.dataset import SAMPLE_RATE, find_manifest
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.pocket import synthesis, voices

# Sets are disjoint by construction: the set's number is part of every clip's seed.
POCKET = "pocket"  # the name of this data set in --dataset-path
SETS = {"train": 1, "evaluation": 2, "held-out": 3}
EVALUATION_CLIPS = 20  # a language
FORMAT = 1  # raise when the sound or the manifest of a given seed changes, so that no stale set is reused


@dataclass(frozen=True)
class PocketClip:
    attributes: voices.Attributes
    samples: NDArray[np.float32]
    transcription: str


def make_clip(which: str, index: int) -> PocketClip:
    """Clip `index` of the set `which`; the same on every call."""
    rng = np.random.default_rng([SETS[which], index])
    attributes = voices.draw(rng)
    samples, transcription = synthesis.synthesise(attributes, rng)
    return PocketClip(attributes, samples, transcription)


def manifest_name(language: str) -> str:
    return f"manifest_{language}.json"


def cache_folder() -> Path:
    """Where the evaluation clips are kept: `EDGECLOUD_SD_CACHE`, else the user's cache folder."""
    root = os.environ.get("EDGECLOUD_SD_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edgecloud_sd"
    )
    return Path(root) / f"pocket-{FORMAT}"


def evaluation_set(folder: Path | None = None) -> Path:
    """The folder of the evaluation clips (20 a language), written on first use.

    It is built beside its place and renamed into it, so that a stopped run leaves no half of it. FileExistsError where
    the folder holds something else.
    """
    folder = folder or cache_folder()
    if _complete(folder):
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else: name a new or empty folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        write_clips(building, "evaluation", EVALUATION_CLIPS)
        building.rename(folder)
    except OSError:
        if not _complete(folder):  # else another process was first, and its set is the same
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / manifest_name(language)).is_file() for language in LANGUAGES)


def write_clips(folder: Path, which: str, per_language: int) -> None:
    """`per_language` clips of the set for each language: 16 kHz 16-bit wav files and a manifest."""
    import soundfile

    (folder / "wav").mkdir()
    for number, language in enumerate(LANGUAGES):
        entries = []
        for position in range(per_language):
            index = number * per_language + position
            clip = make_clip(which, index)
            name = f"pocket_{which}_{index:04d}"
            soundfile.write(folder / "wav" / f"{name}.wav", clip.samples, SAMPLE_RATE, subtype="PCM_16")
            text = voices.caption(clip.attributes, language)
            entry: dict[str, object] = dict.fromkeys(
                f"{each}_{kind}" for kind in ("caption", "transcription") for each in LANGUAGES
            )
            entry |= {
                "file_id": name,
                "dataset": "pocket",
                "audio_path": f"wav/{name}.wav",
                "caption": text,
                "transcription": clip.transcription,
                f"{language}_caption": text,
                f"{language}_transcription": clip.transcription,
                "index": position,
            }
            entries.append(entry)
        text = json.dumps(entries, ensure_ascii=False, indent=1)
        (folder / manifest_name(language)).write_text(text, encoding="utf-8")


def manifest_path(dataset: str | Path, language: str) -> Path:
    """Return the manifest of `POCKET`, of a manifest file, or of a folder. Raise BadClip if there is none."""
    return evaluation_set() / manifest_name(language) if str(dataset) == POCKET else find_manifest(Path(dataset))
