"""The importer for SECap's published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgecloud_sd.data.dataset import SECAP_CAPTIONS_FILE, BadClip, read_json, text_errors
from edgecloud_sd.data.texts import has_visible_text, read_utf8, split_lines
from edgecloud_sd.host.files import write_whole


def import_secap(folder: Path, manifest: Path) -> int:
    """Write a manifest for SECap's layout (`fid2captions.json`, `text.txt`, `wav/`) and return its number of clips.

    `audio_path` is relative if the manifest lies beside or above the audio, and absolute otherwise. Raise BadClip for a
    missing or malformed file, and for a caption without audio.
    """
    captions_file, texts_file = folder / SECAP_CAPTIONS_FILE, folder / "text.txt"
    for file in (captions_file, texts_file):
        if not file.is_file():
            raise BadClip(f"{file}: no such file; SECap's layout has fid2captions.json, text.txt and wav/")
    captions = _read_captions(captions_file)
    texts = _read_texts(texts_file)
    entries: list[dict[str, Any]] = []
    for index, (file_id, caption) in enumerate(sorted(captions.items())):
        audio = folder / "wav" / f"{file_id}.wav"
        if not audio.is_file():
            raise BadClip(f"{captions_file}, {file_id}: has a caption, but {audio} does not exist")
        entries.append(
            {
                "file_id": file_id,
                "dataset": "secap",
                "audio_path": str(_relative(audio, manifest.parent)),
                "caption": caption,
                "transcription": texts.get(file_id),
                "chinese_caption": caption,
                "english_caption": None,
                "chinese_transcription": texts.get(file_id),
                "english_transcription": None,
                "index": index,
            }
        )
    write_whole(manifest, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
    return len(entries)


def _read_captions(file: Path) -> dict[str, str]:
    captions = read_json(file)
    if not isinstance(captions, dict):
        raise BadClip(f"{file}: must map clip ids to captions, not be a {type(captions).__name__}")
    if not captions:
        raise BadClip(f"{file}: contains no caption")
    for file_id, caption in captions.items():
        if not isinstance(caption, str) or not has_visible_text(caption):
            raise BadClip(f"{file}, {file_id}: must have a text that is not empty, not {caption!r}")
    return captions


def _read_texts(file: Path) -> dict[str, str | None]:
    """Return the transcription of each clip, or None if its line has none."""
    with text_errors():
        lines = split_lines(read_utf8(file))
    texts: dict[str, str | None] = {}
    for number, line in enumerate(lines, 1):
        file_id, *rest = line.strip("\ufeff").split(maxsplit=1) or [""]
        if file_id in texts:
            raise BadClip(f"{file}, line {number}: {file_id} has a line already; remove one")
        if file_id:
            texts[file_id] = rest[0].strip() if rest else None
    return texts


def _relative(path: Path, start: Path) -> Path:
    path, start = path.resolve(), start.resolve()
    return path.relative_to(start) if path.is_relative_to(start) else path
