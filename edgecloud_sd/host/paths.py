"""Texts without the folders of this machine, for files that others read."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from typing import Any

# Fields that hold the words of a user or of a model, and the ids by which clips are paired
KEPT_FIELDS = frozenset(
    ("file_id", "generated_text", "prediction", "caption", "prompt_text", "transcription", "reference_captions",
     "reference_caption", "ground_truth_caption", "reference_text", "reference")
)  # fmt: skip
SYSTEM_FOLDERS = ("/proc/", "/sys/", "/dev/")  # equal on every machine
_END = r"\s/\\'\"`<>|,;:(){}\[\]"  # characters that end a name whose folder does not exist here
_START = re.compile(r"(?:(?<=file://)|(?<![A-Za-z0-9_./\]~<]))/(?=[^\s/])")
_FOLDERS = re.compile(rf"/(?:[^{_END}]+/)*")
_WINDOWS_FOLDERS = re.compile(rf"(?<![A-Za-z0-9])[A-Za-z]:[\\/]+(?:[^{_END}]+[\\/]+)*")


def hide_folders(value: Any) -> Any:
    """Return a JSON value in which each absolute path is only its last part. The fields of `KEPT_FIELDS` stay."""
    if isinstance(value, dict):
        return {key: item if key in KEPT_FIELDS else hide_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_folders(item) for item in value]
    return _hide_in_text(value) if isinstance(value, str) and ("/" in value or "\\" in value) else value


def _hide_in_text(text: str) -> str:
    if re.match(r"/[^/\s]", text) and not re.search(r"[:,;]\s|\n|\s/", text):  # the whole text is one path
        return text if text.startswith(SYSTEM_FOLDERS) else PurePosixPath(text).name
    parts, end = [], 0
    for match in _START.finditer(text):
        if match.start() >= end and not text.startswith(SYSTEM_FOLDERS, match.start()):
            parts.append(text[end : match.start()])
            end = _end_of_folders(text, match.start())
    return _WINDOWS_FOLDERS.sub("", "".join(parts) + text[end:])


def _end_of_folders(text: str, start: int) -> int:
    """Return the end of the longest folder here that begins at `start`, which may contain blanks, or what looks so."""
    line = text[start:].partition("\n")[0]
    ends = [match.end() for match in re.finditer("/", line)]
    here = [end for end in ends if os.path.isdir(line[:end])]  # in contrast to pathlib, it takes any text
    looks = _FOLDERS.match(text, start)
    return max(start + max(here), looks.end() if looks else start)
