"""The results file: one experiment (one cell of the grid, in one language), in the published structure.

`results.schema.json` beside this module is its JSON Schema; nothing is written that does not satisfy it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from importlib import metadata
from operator import add
from pathlib import Path
from typing import Any

from edgecloud_sd import metrics, quality
from edgecloud_sd.dataset import Skipped
from edgecloud_sd.files import write_whole
from edgecloud_sd.records import Clip, Prepared, Trace
from edgecloud_sd.utilization import Utilization

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")


@dataclass(frozen=True)
class ClipResult:
    """One caption, with what it took."""

    clip: Clip
    caption: str
    trace: Trace
    used: Utilization
    ttft: float | None
    e2e: float | None
    otps: float | None
    counts: metrics.Counts


def clip_result(clip: Clip, trace: Trace, used: Utilization, decode: metrics.Text) -> ClipResult:
    """All that is said of one caption, from its trace."""
    first, last = metrics.ttft(trace, decode), metrics.e2e(trace)
    n = len(trace.tokens)
    return ClipResult(
        clip, decode(trace.tokens), trace, used, first, last, metrics.otps(n, first, last), metrics.counts(trace)
    )


@dataclass(frozen=True)
class Summary:
    """One row of the table. Rates over clips are ratios of sums; what is undefined is None and has a reason."""

    clips: int
    ttft_s: float | None
    otps: float | None
    total_s: float
    cpu_percent: float
    ram_mb: float
    gpu_percent: float | None
    bleu1: float | None
    bleu4: float | None
    cider: float | None
    acceptance_rate: float | None
    cloud_call_rate: float | None
    correction_rate: float | None
    counts: metrics.Counts
    acceptance_by_position: tuple[float, ...]
    tokenizer: str
    empty_captions: int
    reasons: dict[str, str]


def summarise(results: Sequence[ClipResult], language: str) -> tuple[Summary, quality.Quality]:
    """The row of one cell, and the quality it rests on. `results` must not be empty."""
    scores = quality.score([each.caption for each in results], [each.clip.references for each in results], language)
    total: metrics.Counts = reduce(add, (each.counts for each in results))
    reasons = dict(scores.reasons)
    for each in results:
        reasons |= each.used.reasons
    rates = ("acceptance_rate", "correction_rate", "cloud_call_rate")
    for name in rates:
        if getattr(total, name) is None:
            reasons[name] = "nothing was verified" if total.rounds else "this mode has no rounds"
    timed = [each for each in results if each.otps is not None]
    after_first = sum(each.e2e - each.ttft for each in timed if each.e2e is not None and each.ttft is not None)
    otps = sum(each.counts.tokens - 1 for each in timed) / after_first if after_first else None
    if otps is None:
        reasons["otps"] = "no caption has a token later than its first with text"
    ttft = _mean(each.ttft for each in results)
    if ttft is None:
        reasons["ttft_s"] = "every caption is empty"
    return Summary(
        clips=len(results),
        ttft_s=ttft,
        otps=otps,
        total_s=sum(each.trace.seconds for each in results) / len(results),
        cpu_percent=100 * sum(each.used.cpu for each in results) / sum(each.used.wall for each in results),
        ram_mb=max(each.used.rss_mb for each in results),
        gpu_percent=_mean(each.used.gpu_percent for each in results),
        bleu1=scores.bleu1,
        bleu4=scores.bleu4,
        cider=scores.cider,
        **{name: getattr(total, name) for name in rates},
        counts=total,
        acceptance_by_position=tuple(metrics.acceptance_by_position([each.trace for each in results])),
        tokenizer=scores.tokenizer,
        empty_captions=scores.empty,
        reasons=reasons,
    ), scores


def document(
    experiment: dict[str, Any],
    results: Sequence[ClipResult],
    summary: Summary,
    scores: quality.Quality,
    skipped: Iterable[Skipped],
) -> dict[str, Any]:
    """The results file of one experiment, with the published top-level keys."""
    counts = summary.counts
    series: dict[str, list[float | None]] = {
        "ttft": [each.ttft for each in results],
        "otps": [each.otps for each in results],
        "total_time": [each.trace.seconds for each in results],
        "cpu_percent": [each.used.cpu_percent for each in results],
        "ram_mb": [each.used.rss_mb for each in results],
        "gpu_util": [each.used.gpu_percent for each in results],
        "gpu_memory_mb": [each.used.gpu_memory_mb for each in results],
        "output_tokens": [each.counts.tokens for each in results],
        "features": [metrics.features(each.trace) for each in results],
        "edge_prefill": [metrics.opening(each.trace, "edge") for each in results],
        "cloud_prefill": [metrics.opening(each.trace, "cloud") for each in results],
    }
    latency = {
        f"{name}_{kind}": function(values)
        for name, values in series.items()
        for kind, function in {"mean": _mean, "min": _least, "max": _most}.items()
    }
    rates = (
        "acceptance_rate", "mean_accepted_length", "correction_rate", "cloud_call_rate", "cloud_calls_per_token",
        "edge_share", "waste",
    )  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment_config": experiment,
        "environment": environment(),
        "metrics": {
            "avg_bleu": summary.bleu4,
            "avg_bleu1": summary.bleu1,
            "avg_cider": summary.cider,
            "avg_bertscore_precision": None,
            "avg_bertscore_recall": None,
            "avg_bertscore_f1": None,
            "tokenizer": summary.tokenizer,
            "empty_captions": summary.empty_captions,
            "otps_of_sums": summary.otps,
            "latency_metrics": latency,
            "speculative_decoding_metrics": asdict(counts)
            | {"discarded": counts.discarded}
            | {name: getattr(counts, name) for name in rates}
            | {"acceptance_by_position": list(summary.acceptance_by_position)},
            "reasons": summary.reasons | {"avg_bertscore": "not measured by this version"},
        },
        "detailed_results": [
            {
                "file_id": each.clip.file_id,
                "dataset": each.clip.dataset,
                "index": each.clip.index,
                "generated_text": each.caption,
                "reference_captions": list(each.clip.references),
                "prompt_tokens": next(e.prompt_tokens for _, e in each.trace.events if isinstance(e, Prepared)),
                "token_ids": list(each.trace.tokens),
                "finish_reason": each.trace.events[-1][1].reason,  # type: ignore[union-attr]
                "bleu_score": bleu4,
                "ttft": each.ttft,
                "otps": each.otps,
                "total_time": each.trace.seconds,
                "cpu_percent": each.used.cpu_percent,
                "ram_mb": each.used.rss_mb,
                "gpu_util": each.used.gpu_percent,
                "counts": asdict(each.counts),
            }
            for each, bleu4 in zip(results, scores.per_clip_bleu4, strict=True)
        ],
        "skipped_clips": [asdict(each) for each in skipped],
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on, without a host name or a path."""
    import torch

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": metadata.version("transformers"),
        "edgecloud_sd": metadata.version("edgecloud_sd"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Check against the schema, then write whole. Raises jsonschema.ValidationError, or ValueError for nan."""
    validate(results)
    write_whole(path, json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A results file, checked against the schema. Raises jsonschema.ValidationError, or ValueError for bad JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path}: holds {constant}, which is no JSON number")

    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    validate(results)
    return results


def validate(results: dict[str, Any]) -> None:
    """jsonschema.ValidationError unless `results` satisfies the schema."""
    import jsonschema

    jsonschema.validate(results, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _over(reduce_known: Callable[[list[float]], float]) -> Callable[[Iterable[float | None]], float | None]:
    def reduced(values: Iterable[float | None]) -> float | None:
        known = _known(values)
        return reduce_known(known) if known else None

    return reduced


_mean = _over(lambda known: sum(known) / len(known))
_least = _over(min)
_most = _over(max)
