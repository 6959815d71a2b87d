"""How a run is shown: the tables of a terminal, the words that describe a cell, and the names of the results files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import comparison
from bench.cases import Case, cases
from bench.comparison import Document
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.config import Settings
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.summary import Summary
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Captioner
from edgecloud_sd.timing.profile import Profile

# heading -> name in summary.FIGURES, format, factor
SUMMARY_COLUMNS: dict[str, tuple[str, str, float]] = {
    "TTFT ms": ("ttft", ".1f", 1e3),
    "OTPS": ("otps", ".1f", 1),
    "total ms": ("total", ".1f", 1e3),
    "CPU %": ("cpu_percent", ".0f", 1),
    "RAM MB": ("rss_peak", ".0f", 1),
    "GPU %": ("gpu_percent", ".0f", 1),
    "BLEU-1": ("bleu1", ".3f", 1),
    "BLEU-4": ("bleu4", ".3f", 1),
    "METEOR": ("meteor", ".3f", 1),
    "CIDEr": ("cider", ".2f", 1),
    "acceptance": ("acceptance_rate", ".3f", 1),
    "cloud calls": ("cloud_call_rate", ".3f", 1),
    "corrections": ("correction_rate", ".3f", 1),
    "missed": ("missed_corrections", ".3f", 1),
}


def results_file(settings: Settings, case: Case) -> Path:
    """`<output_name>.json` for a run of one cell; a grid writes one file a cell, `<output_name>-<id>.json`."""
    alone = len(cases(settings)) == 1
    name = settings.output_name if alone else f"{settings.output_name}-{case.id}"
    return Path(settings.results_dir) / f"{name}.json"


def describe_case(case: Case, captioner: Captioner, settings: Settings, profile: Profile | None) -> dict[str, Any]:
    """What a cell was: for `extra_info` and the results file. The settings that make the grid are the cell's own."""
    cell = case.cell
    speculative = cell.mode == "speculative"
    remote = captioner.remote if cell.mode != "edge" else None
    shared = {name: value for name, value in asdict(settings).items() if not isinstance(value, tuple)}
    for name in ("results_dir", "cloud_key_file"):  # where things lie is no part of what they are
        del shared[name]
    if remote:  # it decides, whatever was asked for
        shared |= {"cloud_model": remote.name, "cloud_device": remote.device, "cloud_dtype": remote.dtype}
    return shared | {
        "case": case.id,
        "pair": captioner.pair.name,
        "cloud_url": settings.cloud_url and (AUTO if settings.cloud_url == AUTO else "elsewhere"),  # no host names
        "cloud_engine": remote.engine if remote else None,
        "cloud_fingerprint": remote.fingerprint if remote else None,
        "open": cell.open if speculative else None,
        "mode": cell.mode,
        "language": case.language,
        "gate": cell.gate.label if speculative else None,
        "entropy_threshold": cell.gate.threshold if cell.gate.score else None,
        "k": (cell.k or AUTO) if speculative else None,
        "draft_stop": cell.stop.label if cell.stop else None,
        "draft_ahead": cell.ahead if speculative else None,
        "rule": cell.rule.label if speculative else None,
        "rank": cell.rule.r if speculative and isinstance(cell.rule, Rank) else None,
        "link": cell.link.name if cell.mode != "edge" else None,
        "profile": settings.profile_name or None,
        "profile_costs": asdict(profile) if profile else None,
        "output": output_promise(case, captioner.cloud_dtype if cell.mode != "edge" else ""),
    }


def output_promise(case: Case, cloud_dtype: str) -> str | None:
    """How the output relates to the cloud's own: exact, near-exact (half precision) or lossy; None for the edge's."""
    if case.cell.mode == "edge":
        return None
    if case.cell.mode == "cloud":
        return "exact"
    if not case.cell.is_lossless:
        return "lossy"
    return "exact" if cloud_dtype in LOSSLESS_DTYPES else "near-exact"


def render_summaries(rows: Mapping[str, Summary]) -> str:
    """One row a cell, then the reason for each dash."""
    lines = []
    for name, summary in rows.items():
        line = [name, str(summary.clips)]
        for figure, form, factor in SUMMARY_COLUMNS.values():
            value = summary.figures[figure]
            line.append("-" if value is None else format(value * factor, form))
        lines.append(line)
    return "\n".join([grid(lines, ["case", "clips", *SUMMARY_COLUMNS]), *_dashes(rows), *_clouds(rows)])


def render_breakdowns(rows: Mapping[str, Summary]) -> str:
    """Where the time of a caption goes, ms by part, and how near the parts come to the wall time."""
    used = [part for part in PARTS if any(summary.breakdown.parts[part] for summary in rows.values())]
    beside = {"discarded draft": "discarded"}
    if any(summary.breakdown.hidden for summary in rows.values()):
        beside |= {"round trip exposed": "exposed", "hidden": "hidden"}
    lines = [
        [name]
        + [format(1e3 * summary.breakdown.parts[part], ".1f") for part in used]
        + [format(1e3 * getattr(summary.breakdown, field), ".1f") for field in beside.values()]
        + [
            "-" if summary.closure_median is None else f"{summary.closure_median:.2%}",
            "-" if summary.closure_worst is None else f"{summary.closure_worst:.2%}",
        ]
        for name, summary in rows.items()
    ]
    headings = [part.replace("_", " ") for part in used]
    return grid(lines, ["ms a caption", *headings, *beside, "sum / wall", "worst clip"])


def render_speedups(cells: Mapping[str, Document]) -> str:
    """Each speculative cell against the edge and the cloud alone, with 95 % intervals; empty where neither ran."""
    lines = []
    for name, ours in cells.items():
        if ours["experiment_config"]["mode"] != "speculative":
            continue
        columns = []
        for mode in ("edge", "cloud"):
            base = comparison.find_baseline(ours, mode, cells.values())
            for by in (comparison.caption_speedup, comparison.token_speedup):
                columns.append(_shown(by(base, ours) if base else None))
        if set(columns) != {"-"}:
            lines.append([name, *columns])
    headings = ["speed-up", "over edge", "per token", "over cloud", "per token"]
    return grid(lines, headings) if lines else ""


def _shown(value: object | None) -> str:
    return "-" if value is None else str(value)


def grid(lines: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    """A table as a terminal shows it: the first column to the left, the others to the right, numbers as they are."""
    return tabulate(lines, headings, disable_numparse=True, colalign=["left"] + ["right"] * (len(headings) - 1))


def _clouds(rows: Mapping[str, Summary]) -> list[str]:
    """What a cloud elsewhere did to the captions of a cell, where it is worth a line."""
    said = {
        "never_sent": "{:.0%} of the captions were never sent to the cloud",
        "cloud_faults": "{:.2f} attempts on the cloud failed a caption",
        "degraded": "{:.0%} of the captions were finished by the edge alone: the cloud had failed",
    }
    return [
        f"- {name}: {text.format(value)}"
        for name, summary in rows.items()
        for figure, text in said.items()
        if (value := summary.figures[figure])
    ]


def _dashes(rows: Mapping[str, Summary]) -> list[str]:
    headings = {figure: heading for heading, (figure, _, _) in SUMMARY_COLUMNS.items()}
    reasons: dict[str, list[str]] = {}
    for summary in rows.values():
        for figure, reason in summary.reasons.items():
            if figure in headings and summary.figures[figure] is None:
                names = reasons.setdefault(reason, [])
                if headings[figure] not in names:
                    names.append(headings[figure])
    return [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
