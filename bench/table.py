"""How a run is shown: one row a cell, the words that describe a cell, and the names of the results files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.cases import Case, cases
from edgecloud_sd.config import Settings
from edgecloud_sd.pairs import Pair
from edgecloud_sd.results import Summary

# heading -> field of Summary, format, factor
COLUMNS: dict[str, tuple[str, str, float]] = {
    "TTFT ms": ("ttft_s", ".1f", 1e3),
    "OTPS": ("otps", ".1f", 1),
    "total ms": ("total_s", ".1f", 1e3),
    "CPU %": ("cpu_percent", ".0f", 1),
    "RAM MB": ("ram_mb", ".0f", 1),
    "GPU %": ("gpu_percent", ".0f", 1),
    "BLEU-1": ("bleu1", ".3f", 1),
    "BLEU-4": ("bleu4", ".3f", 1),
    "CIDEr": ("cider", ".2f", 1),
    "acceptance": ("acceptance_rate", ".3f", 1),
    "cloud calls": ("cloud_call_rate", ".3f", 1),
    "corrections": ("correction_rate", ".3f", 1),
}


def results_file(settings: Settings, case: Case) -> Path:
    """`<output_name>.json` for a run of one cell; a grid writes one file a cell, `<output_name>-<id>.json`."""
    alone = len(cases(settings)) == 1
    name = settings.output_name if alone else f"{settings.output_name}-{case.id}"
    return Path(settings.results_dir) / f"{name}.json"


def describe(case: Case, pair: Pair, settings: Settings) -> dict[str, Any]:
    """What a cell was: for `extra_info` and the results file. The settings that make the grid are the cell's own."""
    cell = case.cell
    speculative = cell.mode == "speculative"
    shared = {name: value for name, value in asdict(settings).items() if not isinstance(value, tuple)}
    return shared | {
        "case": case.id,
        "pair": pair.name,
        "mode": cell.mode,
        "language": case.language,
        "gate": cell.gate.label if speculative else None,
        "entropy_threshold": cell.gate.threshold if cell.gate.score else None,
        "k": cell.k if speculative else None,
        "rule": cell.rule.label if speculative else None,
        "rank": cell.rule.r if speculative else None,
        "output": promise(case, settings.cloud_dtype),
    }


def promise(case: Case, cloud_dtype: str) -> str | None:
    """How the output relates to the cloud's own: exact, near-exact (half precision) or lossy; None for the edge's."""
    if case.cell.mode == "edge":
        return None
    if case.cell.mode == "cloud":
        return "exact"
    if not case.cell.strict:
        return "lossy"
    return "exact" if cloud_dtype in ("float32", "float64") else "near-exact"


def render(rows: dict[str, Summary]) -> str:
    """One row a cell, then the reason for each dash."""
    lines = []
    for name, summary in rows.items():
        line = [name, str(summary.clips)]
        for field, form, factor in COLUMNS.values():
            value = getattr(summary, field)
            line.append("-" if value is None else format(value * factor, form))
        lines.append(line)
    text = tabulate(
        lines, ["case", "clips", *COLUMNS], disable_numparse=True, colalign=["left"] + ["right"] * (len(COLUMNS) + 1)
    )
    return "\n".join([text, *_dashes(rows)])


def _dashes(rows: dict[str, Summary]) -> list[str]:
    headings = {field: heading for heading, (field, _, _) in COLUMNS.items()}
    reasons: dict[str, list[str]] = {}
    for summary in rows.values():
        for field, reason in summary.reasons.items():
            if field in headings and getattr(summary, field) is None:
                names = reasons.setdefault(reason, [])
                if headings[field] not in names:
                    names.append(headings[field])
    return [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
