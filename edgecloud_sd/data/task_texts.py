"""The user's own texts of the task, from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.data.texts import check_characters, has_visible_text, parse_json, parse_yaml, read_utf8

MAPPING_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class TaskTexts:
    """The texts of a prompt file by language. The name is the file's, without its folder."""

    name: str
    texts: Mapping[str, str]

    def text(self, language: str) -> str:
        """Return the text for a language. Raise ValueError if there is none."""
        if language not in self.texts:
            raise ValueError(f"{self.name} has no text for {language}: it has {', '.join(self.texts) or 'none'}")
        return self.texts[language]

    def digest(self, language: str) -> str:
        """Return eight hexadecimal digits that tell this text from another, whatever its file is called."""
        return hashlib.sha256(self.text(language).encode()).hexdigest()[:8]


def read_task_texts(path: Path) -> TaskTexts:
    """Return the texts of a file: one for every language, or a JSON or YAML mapping from languages to texts.

    White space around a text is dropped. Raise ValueError for a file that cannot be read, an unknown language, and a
    text without anything visible.
    """
    suffix = path.suffix.lower()
    try:
        content: Any = read_utf8(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if suffix in MAPPING_SUFFIXES:
        content = (parse_json if suffix == ".json" else parse_yaml)(content, str(path))
        check_characters(content, str(path))
    texts = content if isinstance(content, dict) else dict.fromkeys(LANGUAGES, content)
    if unknown := [language for language in texts if language not in LANGUAGES]:
        raise ValueError(f"{path}: unknown language {unknown[0]!r}: choose from {', '.join(LANGUAGES)}")
    return TaskTexts(path.name, {language: _check_text(path, language, text) for language, text in texts.items()})


def _check_text(path: Path, language: str, text: Any) -> str:
    if not isinstance(text, str) or not has_visible_text(text):
        raise ValueError(
            f"{path}: the text for {language} must have visible text, and is {text!r}: write the task into it"
        )
    return text.strip()
