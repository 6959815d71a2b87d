"""The tables that a run prints, the description of a case, and the names of the results files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import comparison
from bench.cases import Case, cases
from bench.comparison import Document
from edgecloud_sd.config import Settings
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.summary import Summary
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.profile import Profile

# heading -> name in summary.METRICS, format, factor
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
    """Return `<output_name>.json` for a run of one cell, or `<output_name>-<id>.json` for a cell of a grid."""
    is_alone = len(cases(settings)) == 1
    name = settings.output_name if is_alone else f"{settings.output_name}-{case.id}"
    return Path(settings.results_dir) / f"{name}.json"


def describe_case(case: Case, pipeline: Pipeline, settings: Settings, profile: Profile | None) -> dict[str, Any]:
    """Return the experiment of a case, for `extra_info` and the results file.

    The settings of the grid appear once, as the case's own strategy, link and language. Paths and host names are left
    out, because they say nothing about the experiment.
    """
    cloud = pipeline.cloud.identity if case.strategy.mode != "edge" else None
    shared = {name: value for name, value in asdict(settings).items() if not isinstance(value, tuple)}
    for name in ("results_dir", "cloud_key_file"):
        del shared[name]
    if cloud:
        shared |= {"cloud_model": cloud.name, "cloud_device": cloud.device, "cloud_dtype": cloud.dtype}
    return shared | {
        "case": case.id,
        "pair": pipeline.pair.name,
        "cloud_url": settings.cloud_url and (AUTO if settings.cloud_url == AUTO else "elsewhere"),
        "cloud_engine": cloud.engine if cloud else None,
        "cloud_fingerprint": cloud.fingerprint if cloud else None,
        "strategy": case.strategy.to_json(),
        "language": case.language,
        "link": case.link.name if cloud else None,
        "profile": settings.profile_name or None,
        "profile_costs": asdict(profile) if profile else None,
        "output": output_promise(case.strategy, cloud.dtype if cloud else ""),
    }


def output_promise(strategy: Strategy, cloud_dtype: str) -> str | None:
    """Return how the output relates to the cloud's own: lossless, near-lossless, lossy, or None for mode edge.

    Half precision makes it near-lossless: passes over one and over many tokens differ in their last bits.
    """
    if strategy.mode == "edge":
        return None
    if not strategy.is_lossless:
        return "lossy"
    return "lossless" if strategy.mode == "cloud" or cloud_dtype in LOSSLESS_DTYPES else "near-lossless"


def render_summaries(rows: Mapping[str, Summary]) -> str:
    """Return one row per cell, then the reason for each dash."""
    lines = []
    for name, summary in rows.items():
        line = [name, str(summary.clips)]
        for figure, form, factor in SUMMARY_COLUMNS.values():
            value = summary.figures[figure]
            line.append("-" if value is None else format(value * factor, form))
        lines.append(line)
    return "\n".join([grid(lines, ["case", "clips", *SUMMARY_COLUMNS]), *_dashes(rows), *_cloud_notes(rows)])


def render_breakdowns(rows: Mapping[str, Summary]) -> str:
    """Return the latency breakdown of each cell in ms per caption, and its closure."""
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
    return grid(lines, ["ms per caption", *headings, *beside, "sum / wall", "worst clip"])


def render_speedups(cells: Mapping[str, Document]) -> str:
    """Return the speed-ups of each speculative cell over modes edge and cloud, or an empty text without these modes."""
    lines = []
    for name, ours in cells.items():
        if ours["experiment_config"]["strategy"]["mode"] != "speculative":
            continue
        columns = []
        for mode in ("edge", "cloud"):
            base = comparison.find_baseline(ours, mode, cells.values())
            for by in (comparison.caption_speedup, comparison.token_speedup):
                columns.append(_text(by(base, ours) if base else None))
        if set(columns) != {"-"}:
            lines.append([name, *columns])
    headings = ["speed-up", "over edge", "per token", "over cloud", "per token"]
    return grid(lines, headings) if lines else ""


def _text(value: object | None) -> str:
    return "-" if value is None else str(value)


def grid(lines: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    """Return a table for a terminal: the first column to the left, the others to the right."""
    return tabulate(lines, headings, disable_numparse=True, colalign=["left"] + ["right"] * (len(headings) - 1))


def _cloud_notes(rows: Mapping[str, Summary]) -> list[str]:
    """Return a line for each cell in which the link or the cloud was unusual."""
    notes = {
        "never_sent": "{:.0%} of the captions were never sent to the cloud",
        "cloud_faults": "{:.2f} attempts to reach the cloud failed per caption",
        "degraded": "{:.0%} of the captions were finished by the edge alone, because the cloud failed",
    }
    return [
        f"- {name}: {text.format(value)}"
        for name, summary in rows.items()
        for figure, text in notes.items()
        if (value := summary.figures[figure])
    ]


def _dashes(rows: Mapping[str, Summary]) -> list[str]:
    """Return a line with the metrics that are null for each reason."""
    headings = {figure: heading for heading, (figure, _, _) in SUMMARY_COLUMNS.items()}
    reasons: dict[str, list[str]] = {}
    for summary in rows.values():
        for figure, reason in summary.reasons.items():
            if figure in headings and summary.figures[figure] is None:
                names = reasons.setdefault(reason, [])
                if headings[figure] not in names:
                    names.append(headings[figure])
    return [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
