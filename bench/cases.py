"""The grid of a run as benchmark cases with stable ids."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgecloud_sd.config import Settings
from edgecloud_sd.grid import cells
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.link import NO_LINK, Link

SETTINGS = pytest.StashKey[Settings]()  # the root conftest stores the settings of the run here
LANGUAGE_CODES = {"chinese": "zh", "english": "en"}


@dataclass(frozen=True)
class Case:
    """One benchmark: a strategy over a link, in one language. Two runs are comparable if their ids are equal."""

    id: str
    strategy: Strategy
    link: Link
    language: str


def cases(settings: Settings) -> list[Case]:
    """Return the cases of a run."""
    return [
        Case(case_id(settings, strategy, link, language), strategy, link, language)
        for strategy, link in cells(settings)
        for language in settings.language
    ]


def case_id(settings: Settings, strategy: Strategy, link: Link, language: str) -> str:
    """Return `<mode>-<pair>-<details>-<place>-<limits>-<link>-<clock>-<language>`, without the parts that are usual."""
    parts = [strategy.mode, settings.run_pair.name, *strategy.details]
    if strategy.mode != "edge" and settings.cloud_url:
        parts.append("served")
    if settings.max_cpu_cores:
        parts.append(f"cpu{settings.max_cpu_cores}")
    if settings.max_memory_gb:
        parts.append(f"mem{settings.max_memory_gb:g}")
    if link != NO_LINK:
        parts.append(link.name)
    if settings.clock == "virtual":
        parts += ["virtual", settings.profile_name]
    return "-".join([*parts, LANGUAGE_CODES[language]])
