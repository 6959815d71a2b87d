"""The settings files of the published project: their keys, and what each means here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_GREEDY = "decoding is greedy"
_ENTROPY = "the gate reads the entropy"
# Key, or the first part of several keys -> the option that it is here, or the reason why it has no meaning here
PUBLISHED_SETTINGS = {
    "models.edge.name": "--edge-model",
    "models.edge.device": "--edge-device",
    "models.edge.dtype": "--edge-dtype",
    "models.cloud.name": "--cloud-model",
    "models.cloud.device": "--cloud-device",
    "models.cloud.dtype": "--cloud-dtype",
    "decoding.max_tokens": "--max-new-tokens",
    "decoding.draft_length": "--k",
    "decoding.temperature": _GREEDY,
    "decoding.top_p": _GREEDY,
    "uncertainty.entropy_threshold": "--entropy-threshold",
    "uncertainty.margin_threshold": _ENTROPY,
    "uncertainty.log_prob_threshold": _ENTROPY,
    "audio": "the checkpoint has its own feature extractor",
    "content_rules": "no rule reads the content",
    "cache": "caches grow as they need",
    "memory": "--max-memory-gb limits memory",
    "evaluation": "every metric is computed, on the whole data set",
    "logging": "--verbose and --results-dir do this",
    "data": "--dataset-path names the data",
    "training": "nothing is trained",
}


@dataclass(frozen=True)
class PublishedSettings:
    """The settings of a file: values by option, keys by the reason why they mean nothing here, and unknown keys."""

    options: Mapping[str, Any]
    unused: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]

    @property
    def note(self) -> str:
        """The keys that are not used, with their reasons, in one line; empty if there are none."""
        return "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in self.unused.items())


def translate_settings(groups: Mapping[str, Any]) -> PublishedSettings:
    """Return what the nested settings of a published file mean here."""
    options: dict[str, Any] = {}
    unused: dict[str, tuple[str, ...]] = {}
    unknown = []
    for key, value in _flatten(groups):
        meaning = _look_up(key)
        if meaning is None:
            unknown.append(key)
        elif meaning.startswith("--") and " " not in meaning:
            options[meaning.removeprefix("--")] = value
        else:
            unused[meaning] = (*unused.get(meaning, ()), key)
    return PublishedSettings(options, unused, tuple(unknown))


def is_published_group(key: str) -> bool:
    """Return whether a top-level key names a group of settings of the published project."""
    return any(known.split(".")[0] == key for known in PUBLISHED_SETTINGS)


def _flatten(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each setting. An empty group has no settings."""
    for key, value in group.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif value is not None or _look_up(name):
            yield name, value


def _look_up(key: str) -> str | None:
    """Return the meaning of a key, or of the longest first part of it that has one."""
    parts = key.split(".")
    firsts = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((PUBLISHED_SETTINGS[first] for first in firsts if first in PUBLISHED_SETTINGS), None)
