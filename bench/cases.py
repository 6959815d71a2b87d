"""The grid of a run: settings -> cells with stable ids. Meaningless cells are not made: edge has no threshold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from edgecloud_sd.config import Settings
from edgecloud_sd.models import pairs
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.pipeline import Cell, cells
from edgecloud_sd.timing import link

SETTINGS = pytest.StashKey[Settings]()  # where the root conftest leaves what the run was asked for
LANGUAGE_CODES = {"chinese": "zh", "english": "en"}


@dataclass(frozen=True)
class Case:
    """One benchmark: a way to decode, in one language. `id` says what makes two runs comparable."""

    id: str
    cell: Cell
    language: str


def cases(settings: Settings) -> list[Case]:
    """The grid."""
    pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights).name
    made = []
    for cell, language in itertools.product(cells(settings), settings.language):
        parts = [cell.mode, pair]
        if cell.mode == "speculative":
            parts += [cell.gate.label, f"k{cell.k or AUTO}", cell.rule.label]
            if cell.stop:
                parts.append(cell.stop.label)
            if cell.ahead:
                parts.append(f"ahead{cell.ahead}")
            if cell.open != "eager":
                parts.append(cell.open)
        if cell.mode != "edge" and settings.cloud_url:
            parts.append("served")
        if settings.max_cpu_cores:
            parts.append(f"cpu{settings.max_cpu_cores}")
        if settings.max_memory_gb:
            parts.append(f"mem{settings.max_memory_gb:g}")
        if cell.link != link.NO_LINK:
            parts.append(cell.link.name)
        if settings.clock == "virtual":
            parts += ["virtual", settings.profile_name]
        made.append(Case("-".join([*parts, LANGUAGE_CODES[language]]), cell, language))
    return made
