"""Pocket clips on disk: wav files and one manifest per language, synthesised from seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.dataset import MANIFEST_NAMES, SAMPLE_RATE, find_manifest
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.host.files import build_folder, cache_root
from edgecloud_sd.pocket import synthesis, voices

POCKET = "pocket"  # the name of this data set in --dataset-path
# The number of a set is part of the seed of each of its clips, so that no two sets share a clip.
SETS = {"train": 1, "evaluation": 2, "held-out": 3, "calibration": 4}
EVALUATION_CLIPS = 20  # per language
FORMAT_VERSION = 1  # increase it when a seed gives another clip or manifest, so that no old set is reused


@dataclass(frozen=True)
class PocketClip:
    """A synthesised clip with the attributes that it was synthesised from."""

    attributes: voices.Attributes
    samples: NDArray[np.float32]
    transcription: str
    seed: tuple[int, int]

    def caption(self, language: str, is_free: bool = False) -> str:
        """Return the caption in `language`; the clip's seed draws the form of a free one."""
        if is_free:
            return voices.write_free_caption(self.attributes, language, self.seed)
        return voices.write_caption(self.attributes, language)


def make_clip(set_name: str, index: int) -> PocketClip:
    """Return clip `index` of a set of `SETS`, the same on every call."""
    seed = SETS[set_name], index
    rng = np.random.default_rng(seed)
    attributes = voices.draw_attributes(rng)
    samples, transcription = synthesis.synthesise(attributes, rng)
    return PocketClip(attributes, samples, transcription, seed)


def manifest_name(language: str) -> str:
    """Return the file name of the manifest in `language`."""
    return f"manifest_{language}.json"


def cache_folder() -> Path:
    """Return the folder of the evaluation clips, in the user's cache."""
    return cache_root() / f"pocket-{FORMAT_VERSION}"


def evaluation_set(folder: Path | None = None) -> Path:
    """Return the folder of the evaluation clips (20 per language) and write them on first use.

    The folder is there whole or not at all. Raise FileExistsError if it contains other files.
    """
    folder = folder or cache_folder()
    if _is_complete(folder):
        return folder
    check_new_folder(folder)
    try:
        with build_folder(folder) as building:
            write_clips(building, "evaluation", EVALUATION_CLIPS)
    except OSError:
        if not _is_complete(folder):  # else another process was first, with the same set
            raise
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / manifest_name(language)).is_file() for language in LANGUAGES)


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "contains other files" if folder.is_dir() else "is a file"
        raise FileExistsError(f"{folder}: {problem}: name a new or empty folder, or delete it")


def write_clips(folder: Path, set_name: str, per_language: int, is_free: bool = False) -> None:
    """Write `per_language` clips of a set for each language: wav files (16 kHz, 16 bits) and a manifest.

    `is_free` writes free captions.
    """
    import soundfile

    (folder / "wav").mkdir(parents=True)
    for number, language in enumerate(LANGUAGES):
        entries = []
        for position in range(per_language):
            index = number * per_language + position
            clip = make_clip(set_name, index)
            name = f"pocket_{set_name}_{index:04d}"
            soundfile.write(folder / "wav" / f"{name}.wav", clip.samples, SAMPLE_RATE, subtype="PCM_16")
            entries.append(_manifest_entry(name, position, clip, language, clip.caption(language, is_free)))
        text = json.dumps(entries, ensure_ascii=False, indent=1)
        (folder / manifest_name(language)).write_text(text, encoding="utf-8")


def _manifest_entry(name: str, position: int, clip: PocketClip, language: str, caption: str) -> dict[str, object]:
    entry: dict[str, object] = dict.fromkeys(
        f"{other}_{field}" for field in ("caption", "transcription") for other in LANGUAGES
    )
    return entry | {
        "file_id": name,
        "dataset": "pocket",
        "audio_path": f"wav/{name}.wav",
        "caption": caption,
        "transcription": clip.transcription,
        f"{language}_caption": caption,
        f"{language}_transcription": clip.transcription,
        "index": position,
    }


def manifest_path(dataset: str | Path, language: str) -> Path:
    """Return the manifest of `POCKET`, of a manifest file, or of a folder. Raise BadClip if there is none.

    A folder without a common manifest may have one per language.
    """
    if str(dataset) == POCKET:
        return evaluation_set() / manifest_name(language)
    own = Path(dataset) / manifest_name(language)
    has_common = any((own.parent / name).is_file() for name in MANIFEST_NAMES)
    return own if own.is_file() and not has_common else find_manifest(Path(dataset))
