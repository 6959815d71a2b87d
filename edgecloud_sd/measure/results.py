"""The results file of one experiment, which is one cell of the grid in one language.

Its top-level keys are those of the published results. `results.schema.json`, beside this module, is its JSON Schema.
Every file is checked against it before it is written.
"""

from __future__ import annotations

import copy
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgecloud_sd.data.dataset import SkippedClip
from edgecloud_sd.events import Prepared, Trace
from edgecloud_sd.host.cores import usable_cores
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.host.paths import hide_folders
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import metrics, quality, traces
from edgecloud_sd.measure.published_metrics import published_section
from edgecloud_sd.measure.summary import ClipResult, Figures, Summary, max_or_none, mean_or_none, min_or_none

SCHEMA_VERSION = 7
WITHOUT_BUDGET = {"budget": None, "audit": None, "reasons": {"budget": "none was set", "audit": "none was set"}}
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
CHECKOUT = Path(__file__).parents[2]  # the folder of the package's repository, if there is one


def results_document(
    experiment: dict[str, Any],
    results: Sequence[ClipResult],
    summary: Summary,
    scores: quality.Quality,
    in_force: LimitsInForce,
    skipped: Iterable[SkippedClip],
    budget: Mapping[str, Any] = WITHOUT_BUDGET,
) -> dict[str, Any]:
    """Return the contents of the results file of one experiment. `budget` is of `bench.budget.budget_parts`."""
    clips = [_clip_record(result, scores, index) for index, result in enumerate(results)]
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment_config": experiment,
        "environment": environment(),
        "in_force": asdict(in_force)
        | {"cores": in_force.cores and list(in_force.cores), "excess_gb": in_force.excess_gb},
        "metrics": published_quality(summary.figures, scores)
        | {
            "latency_metrics": summarise_series(clips),
            "speculative_decoding_metrics": _speculative_metrics(summary),
            "figures": summary.figures,
            "latency_breakdown": summary.breakdown.parts,
            "breakdown_closure": {
                "median": summary.closure_median,
                "worst": summary.closure_worst,
                "unnamed_median": summary.unnamed_median,
            },
            "budget": budget["budget"],
            "audit": budget["audit"],
            "reasons": summary.reasons | budget["reasons"],
        },
        "published": published_section(results, summary, scores, experiment["strategy"], experiment["language"]),
        "detailed_results": clips,
        "skipped_clips": [asdict(clip) for clip in skipped],
    }


def published_quality(figures: Figures, scores: quality.Quality) -> dict[str, Any]:
    """Return the quality of a cell under the published names, and what it depends on."""
    return {
        "avg_bleu": figures["bleu4"],
        "avg_cider": figures["cider"],
        "avg_bertscore_precision": figures["bertscore_precision"],
        "avg_bertscore_recall": figures["bertscore_recall"],
        "avg_bertscore_f1": figures["bertscore_f1"],
        "tokenizer": scores.tokenizer,
        "score_normalisation": scores.normalisation,
        "bertscore_model": scores.bertscore_model,
        "empty_captions": scores.empty,
    }


# Fields of a clip that `latency_metrics` summarises
CLIP_SERIES = (
    "ttft", "otps", "total_time", "cpu_percent", "ram_mb", "ram_peak_mb", "gpu_util", "gpu_memory_mb", "output_tokens",
    "features", "edge_prefill", "cloud_prefill",
)  # fmt: skip


def summarise_series(clips: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return mean, minimum and maximum over the clips of each field in `CLIP_SERIES`."""
    return {
        f"{name}_{kind}": function(clip[name] for clip in clips)
        for name in CLIP_SERIES
        for kind, function in {"mean": mean_or_none, "min": min_or_none, "max": max_or_none}.items()
    }


def _speculative_metrics(summary: Summary) -> dict[str, Any]:
    return asdict(summary.counts) | {
        "discarded": summary.counts.discarded,
        "acceptance_by_position": list(summary.acceptance_by_position),
        "accepted_lengths": list(summary.accepted_lengths),
    }


def measurement_to_json(
    file_id: str,
    trace: Trace,
    utilization: Utilization,
    hindsight: metrics.Hindsight | None,
    is_own: bool | None = None,
) -> dict[str, Any]:
    """Return the measurements of one caption, from which every other field of its clip can be computed again."""
    return {
        "file_id": file_id,
        "wall_time": utilization.wall,
        "cpu_seconds": utilization.cpu,
        "ram_mb": utilization.rss_mean_mb,
        "ram_peak_mb": utilization.rss_peak_mb,
        "gpu_util": utilization.gpu_percent,
        "gpu_memory_mb": utilization.gpu_memory_mb,
        "not_measured": utilization.reasons,
        "hindsight": asdict(hindsight) if hindsight else None,
        "is_own": is_own,
        "trace": traces.trace_to_json(trace),
    }


def measurement_from_json(saved: dict[str, Any]) -> tuple[Trace, Utilization, metrics.Hindsight | None]:
    """Return the measurements that `measurement_to_json` saved."""
    utilization = Utilization(
        wall=saved["wall_time"],
        cpu=saved["cpu_seconds"],
        rss_mean_mb=saved["ram_mb"],
        rss_peak_mb=saved["ram_peak_mb"],
        gpu_percent=saved["gpu_util"],
        gpu_memory_mb=saved["gpu_memory_mb"],
        reasons=saved["not_measured"],
    )
    shadow = saved["hindsight"]
    hindsight = metrics.Hindsight(shadow["missed"], tuple(map(tuple, shadow["drafts"]))) if shadow else None
    return traces.trace_from_json(saved["trace"]), utilization, hindsight


def _clip_record(result: ClipResult, scores: quality.Quality, index: int) -> dict[str, Any]:
    trace, clip = result.trace, result.clip
    measurement = measurement_to_json(clip.file_id, trace, result.utilization, result.hindsight, result.is_own)
    saved_trace = measurement.pop("trace")
    return {
        "file_id": clip.file_id,
        "dataset": clip.dataset,
        "index": clip.index,
        "generated_text": result.caption,
        "reference_captions": list(clip.references),
        "prompt_tokens": next(event.prompt_tokens for _, event in trace.events if isinstance(event, Prepared)),
        "output_tokens": result.counts.tokens,
        "after_first_chunk": list(metrics.after_first_chunk(trace) or ()) or None,
        "token_ids": list(trace.tokens),
        "finish_reason": trace.events[-1][1].reason,  # type: ignore[union-attr]
        "bleu_score": scores.per_clip["bleu4"][index],
        "scores": {name: values[index] for name, values in scores.per_clip.items()},
        **_clip_metrics(result),
        **measurement,
        "trace": saved_trace,  # last, because it is the longest
    }


def _clip_metrics(result: ClipResult) -> dict[str, Any]:
    bytes_up, bytes_down = metrics.wire_bytes(result.trace) or (None, None)
    return {
        "ttft": result.ttft,
        "ttft_final": result.ttft_final,
        "e2e": result.e2e,
        "otps": result.otps,
        "total_time": result.trace.seconds,
        "features": metrics.feature_seconds(result.trace),
        "edge_prefill": metrics.prefill_seconds(result.trace, "edge"),
        "cloud_prefill": metrics.prefill_seconds(result.trace, "cloud"),
        "cpu_percent": result.utilization.cpu_percent,
        "wire_bytes_up": bytes_up,
        "wire_bytes_down": bytes_down,
        "cloud_faults": metrics.failed_attempts(result.trace),
        "degraded": metrics.degraded_reason(result.trace),
        "counts": asdict(result.counts),
        "latency_breakdown": result.breakdown.parts,
        "discarded_draft": result.breakdown.discarded,
    }


def environment() -> dict[str, Any]:
    """Return the machine and the software that the numbers depend on, without a host name or a path."""
    import torch

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        **{name: metadata.version(name) for name in ("tokenizers", "numpy", "soundfile", "soxr")},
        "edgecloud_sd": metadata.version("edgecloud_sd"),
        "commit": checkout_commit(CHECKOUT),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


@cache  # the code in memory stays that of the first call, even if a later commit changes the files
def checkout_commit(folder: Path) -> str | None:
    """Return the short id of the commit checked out in `folder`, or None without a repository or without git."""
    git_folder = folder / ".git"
    if not git_folder.exists():
        return None
    command = ["git", f"--git-dir={git_folder}", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    """Return the processor's name from /proc/cpuinfo, or from Python where that file has none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the whole file or nothing, without the folders of this machine.

    Raise ValueError for contents that violate the schema, and for NaN.
    """
    validate_results(results)
    text = json.dumps(hide_folders(results), ensure_ascii=False, indent=1, allow_nan=False)
    # a list of plain values goes on one line; JSON strings have no newline, so this changes no string
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)
    write_whole(path, text + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Return the contents of a results file. Raise ValueError for bad JSON and for contents that violate the schema."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path}: {constant} is not a JSON number: remove the file and run again")

    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=refuse)
    validate_results(results)
    return results


def validate_results(results: Any, with_traces: bool = True) -> None:
    """Raise ValueError, with the place of the error, if `results` violates the schema.

    `with_traces` requires the trace of each clip, which pytest-benchmark's files leave out.
    """
    from jsonschema.exceptions import best_match

    if error := best_match(_validator(with_traces).iter_errors(results)):
        place = "/".join(map(str, error.absolute_path)) or "top level"
        raise ValueError(f"{place}: {error.message[:200]}")


@cache
def load_schema() -> dict[str, Any]:
    """Return the JSON Schema of results files. Copy it before you change it."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


@cache
def _validator(with_traces: bool) -> Any:
    from jsonschema import Draft202012Validator

    schema = copy.deepcopy(load_schema())
    if not with_traces:
        schema["properties"]["detailed_results"]["items"]["required"].remove("trace")
    return Draft202012Validator(schema)
