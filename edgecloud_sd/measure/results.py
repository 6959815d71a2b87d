"""The results file: one experiment (one cell of the grid, in one language), in the published structure.

`results.schema.json` beside this module is its JSON Schema; nothing is written that does not satisfy it.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgecloud_sd.data.dataset import SkippedClip
from edgecloud_sd.events import Prepared, Trace
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import metrics, quality, traces
from edgecloud_sd.measure.summary import ClipResult, Summary, max_or_none, mean_or_none, min_or_none

SCHEMA_VERSION = 5
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")


def results_document(
    experiment: dict[str, Any],
    results: Sequence[ClipResult],
    summary: Summary,
    scores: quality.Quality,
    held: LimitsInForce,
    skipped: Iterable[SkippedClip],
) -> dict[str, Any]:
    """The results file of one experiment, with the published top-level keys."""
    clips = [_clip(each, scores, index) for index, each in enumerate(results)]
    latency = {
        f"{name}_{kind}": function(each[name] for each in clips)
        for name in CLIP_SERIES
        for kind, function in {"mean": mean_or_none, "min": min_or_none, "max": max_or_none}.items()
    }
    figures, counts = summary.figures, summary.counts
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment_config": experiment,
        "environment": environment(),
        "in_force": asdict(held) | {"cores": held.cores and list(held.cores)},
        "metrics": {
            "avg_bleu": figures["bleu4"],
            "avg_cider": figures["cider"],
            "avg_bertscore_precision": figures["bertscore_precision"],
            "avg_bertscore_recall": figures["bertscore_recall"],
            "avg_bertscore_f1": figures["bertscore_f1"],
            "tokenizer": summary.tokenizer,
            "bertscore_model": summary.bertscore_model,
            "empty_captions": summary.empty_captions,
            "latency_metrics": latency,
            "speculative_decoding_metrics": asdict(counts)
            | {"discarded": counts.discarded, "acceptance_by_position": list(summary.acceptance_by_position)},
            "figures": figures,
            "latency_breakdown": summary.breakdown.parts,
            "breakdown_closure": {
                "median": summary.closure_median,
                "worst": summary.closure_worst,
                "unnamed_median": summary.unnamed_median,
            },
            "reasons": summary.reasons,
        },
        "detailed_results": clips,
        "skipped_clips": [asdict(each) for each in skipped],
    }


# Fields of a clip that `latency_metrics` sums up
CLIP_SERIES = (
    "ttft", "otps", "total_time", "cpu_percent", "ram_mb", "ram_peak_mb", "gpu_util", "gpu_memory_mb", "output_tokens",
    "features", "edge_prefill", "cloud_prefill",
)  # fmt: skip


def measurement_to_json(
    file_id: str, trace: Trace, used: Utilization, hindsight: metrics.Hindsight | None
) -> dict[str, Any]:
    """What one caption took, as the results file has it, and enough to compute everything else again."""
    return {
        "file_id": file_id,
        "wall_time": used.wall,
        "cpu_seconds": used.cpu,
        "ram_mb": used.rss_mean_mb,
        "ram_peak_mb": used.rss_peak_mb,
        "gpu_util": used.gpu_percent,
        "gpu_memory_mb": used.gpu_memory_mb,
        "not_measured": used.reasons,
        "hindsight": asdict(hindsight) if hindsight else None,
        "trace": traces.trace_to_json(trace),
    }


def measurement_from_json(saved: dict[str, Any]) -> tuple[Trace, Utilization, metrics.Hindsight | None]:
    """What `measurement_to_json` made this of."""
    used = Utilization(
        wall=saved["wall_time"],
        cpu=saved["cpu_seconds"],
        rss_mean_mb=saved["ram_mb"],
        rss_peak_mb=saved["ram_peak_mb"],
        gpu_percent=saved["gpu_util"],
        gpu_memory_mb=saved["gpu_memory_mb"],
        reasons=saved["not_measured"],
    )
    looked = saved["hindsight"]
    hindsight = metrics.Hindsight(looked["missed"], tuple(map(tuple, looked["drafts"]))) if looked else None
    return traces.trace_from_json(saved["trace"]), used, hindsight


def _clip(each: ClipResult, scores: quality.Quality, index: int) -> dict[str, Any]:
    wire = metrics.wire_bytes(each.trace)
    figures = measurement_to_json(each.clip.file_id, each.trace, each.used, each.hindsight)
    trace = figures.pop("trace")  # the longest goes last
    return {
        "file_id": each.clip.file_id,
        "dataset": each.clip.dataset,
        "index": each.clip.index,
        "generated_text": each.caption,
        "reference_captions": list(each.clip.references),
        "prompt_tokens": next(e.prompt_tokens for _, e in each.trace.events if isinstance(e, Prepared)),
        "output_tokens": each.counts.tokens,
        "after_first_chunk": list(metrics.after_first_chunk(each.trace) or ()) or None,
        "token_ids": list(each.trace.tokens),
        "finish_reason": each.trace.events[-1][1].reason,  # type: ignore[union-attr]
        "bleu_score": scores.per_clip["bleu4"][index],
        "scores": {name: values[index] for name, values in scores.per_clip.items()},
        "ttft": each.ttft,
        "e2e": each.e2e,
        "otps": each.otps,
        "total_time": each.trace.seconds,
        "features": metrics.feature_seconds(each.trace),
        "edge_prefill": metrics.prefill_seconds(each.trace, "edge"),
        "cloud_prefill": metrics.prefill_seconds(each.trace, "cloud"),
        "cpu_percent": each.used.cpu_percent,
        "wire_bytes_up": wire[0] if wire else None,
        "wire_bytes_down": wire[1] if wire else None,
        "cloud_faults": metrics.failed_attempts(each.trace),
        "degraded": metrics.degraded_reason(each.trace),
        "counts": asdict(each.counts),
        "latency_breakdown": each.breakdown.parts,
        "discarded_draft": each.breakdown.discarded,
        **figures,
        "trace": trace,
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on, without a host name or a path."""
    import torch

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "edgecloud_sd": metadata.version("edgecloud_sd"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _cpu() -> str | None:
    """The processor's name: Linux has it in a file (py-cpuinfo takes seconds to find more), others tell Python."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None) or (
        platform.processor() or None
    )


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Check against the schema, then write whole. ValueError for what the schema refuses, and for nan."""
    validate_results(results)
    text = json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False)
    # a list of plain values takes one line; a string holds no newline, so none is changed
    text = re.sub(r"\[[^\[\]{}]*\]", lambda plain: re.sub(r"\s*\n\s*", " ", plain[0]), text)
    write_whole(path, text + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """A results file, checked against the schema. ValueError for what that refuses, and for bad JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path}: holds {constant}, which is no JSON number")

    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    validate_results(results)
    return results


def validate_results(results: Any, with_traces: bool = True) -> None:
    """ValueError, naming the place, unless `results` satisfies the schema. `with_traces`: whether the clips' must be
    there."""
    from jsonschema.exceptions import best_match

    if error := best_match(_validator(with_traces).iter_errors(results)):
        where = "/".join(map(str, error.absolute_path)) or "the whole"
        raise ValueError(f"{where}: {error.message[:200]}")


@cache
def _validator(with_traces: bool) -> Any:
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    if not with_traces:
        schema["properties"]["detailed_results"]["items"]["required"].remove("trace")
    return Draft202012Validator(schema)
