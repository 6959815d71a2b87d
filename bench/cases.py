"""The grid of a run as benchmark cases with stable ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgecloud_sd.config import Settings
from edgecloud_sd.grid import cells, find_feedback
from edgecloud_sd.host.limits import MONITOR
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.pocket.clips import POCKET
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
    """Return `<mode>-<pair>-<dtypes>-<details>-<place>-<limits>-<link>-<clock>-<data set>-<language>`.

    Parts that are usual are left out.
    """
    parts = [strategy.mode, *model_parts(settings, strategy.model_mode), *strategy.details]
    if feedback := find_feedback(settings, strategy):
        parts.append(f"{feedback.budget.kind.removesuffix('_share')}{feedback.budget.limit:g}")
    if strategy.mode != "edge" and settings.cloud_url:
        parts.append("served")
    if settings.max_cpu_cores:
        parts.append(f"cpu{settings.max_cpu_cores}")
    if settings.max_memory_gb:
        monitored = "monitored" if settings.memory_limit == MONITOR else ""
        parts.append(f"mem{settings.max_memory_gb:g}{monitored}")
    if link != NO_LINK:
        parts.append(link.name)
    if settings.clock == "virtual":
        parts += ["virtual", settings.profile_name]
    return "-".join([*parts, *data_parts(settings, language)])


def plain_params(
    settings: Settings, strategy: Strategy, language: str, link: Link = NO_LINK, edges: int = 1
) -> dict[str, Any]:
    """Return the values for `--group-by param:NAME`. Every benchmark has the same names, and null without a meaning."""
    values = strategy.to_json()
    return {
        "pair": settings.run_pair.name,
        "dataset": dataset_name(settings),
        "language": language,
        "edge_dtype": settings.edge_dtype,
        "cloud_dtype": settings.cloud_dtype,
        "link": link.name,
        "edges": edges,
        **values,
    }


def model_parts(settings: Settings, mode: str = "speculative") -> list[str]:
    """Return the name of the pair, and the number formats of the sides that decode if one is not the usual one.

    A cloud elsewhere has a format of its own, which is not known before the run.
    """
    dtypes = {"edge": settings.edge_dtype, "cloud": settings.cloud_dtype}
    if settings.cloud_url not in (None, AUTO):
        del dtypes["cloud"]
    used = {side: dtype for side, dtype in dtypes.items() if mode in (side, "speculative")}
    is_usual = all(dtype == getattr(Settings, f"{side}_dtype") for side, dtype in used.items())
    return [_plain(settings.run_pair.name), *([] if is_usual else ["+".join(used.values())])]


def data_parts(settings: Settings, language: str) -> list[str]:
    """Return the name of the data set and the parts of the request that are not usual, and the code of the language."""
    is_usual = settings.dataset_path == Settings.dataset_path
    return [
        *([] if is_usual else [_plain(dataset_name(settings))]),
        *_request_parts(settings, language),
        LANGUAGE_CODES[language],
    ]


def _request_parts(settings: Settings, language: str) -> list[str]:
    """Return what the captions are asked for and scored against, without the parts that are usual."""
    parts = []
    if settings.prompt_type != Settings.prompt_type:
        parts.append(settings.prompt_type)
    if settings.own_tasks:
        parts.append(f"prompt_{settings.own_tasks.digest(language)}")
    if settings.with_transcription == "yes":
        parts.append("transcription")
    if settings.caption_type != Settings.caption_type:
        parts.append(settings.caption_type)
    return parts


def group_name(settings: Settings, subject: str | None = None) -> str | None:
    """Return the group of a benchmark. Tables compare within a group, so another data set has groups of its own."""
    is_usual = settings.dataset_path == Settings.dataset_path
    parts = [subject, None if is_usual else f"data set {dataset_name(settings)}"]
    return ", ".join(part for part in parts if part) or None


def dataset_name(settings: Settings) -> str:
    """Return the name of the data set: that of its manifest, or of the folder of a file named `manifest`."""
    if settings.dataset_path == POCKET:
        return POCKET
    path = Path(settings.dataset_path).resolve()  # equal, however the path is spelt
    file = path.parent if path.stem == "manifest" else path
    return file.name if file.is_dir() else file.stem


def _plain(name: str) -> str:
    """Return a name without the characters that a file name or an id may not have. Letters of any script stay."""
    return re.sub(r"[^\w.+-]+", "_", name)
