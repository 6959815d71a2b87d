"""Tiny files in the shape of each generation of published results, and of recorded runs with a caption a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMES = {"itps": 99.0, "otps": 3.0, "oet": 2.25, "total_time": 2.5, "input_tokens": 165, "output_tokens": 8}
SAMPLES = {"cpu_percent": 0.33, "ram_gb": 2.0, "gpu_util": 56, "gpu_memory_gb": 22.5}
MONITORED = {"cpu_avg": 190.0, "cpu_max": 209.0, "memory_avg_gb": 2.0, "memory_max_gb": 3.0}
ROUND_COUNTS = {"cloud_calls": 2, "total_draft_tokens": 17, "total_accepted_tokens": 15, "total_corrections": 1}
RATES = {"acceptance_rate": 0.9375, "correction_rate": 0.5, "cloud_call_rate": 0.4}
NAMED = {"file_id": "a", "dataset": "toy"}
TEXTS = NAMED | {"reference_caption": "他很悲伤", "generated_text": "悲伤，低沉。"}
SCORES = {"bleu_score": 0.5, "cider_score": 0.25}
LABELS = {"caption_type": "audio_only", "language": "chinese", "prompt_type": "default"}
HARDWARE = {"max_cpu_cores": 2, "max_memory_gb": 16.0}

CLIPS: dict[str, dict[str, Any]] = {
    "baseline": NAMED
    | {"prediction": "悲伤，低沉。<|im_end|>", "reference": "他很悲伤", "latency": 1.5, "tokens_generated": 20}
    | {"bleu": 0.5, "cider": 0.25},
    "latency": TEXTS | SCORES | LABELS | {"latency": 2.0},
    "at once": TEXTS | SCORES | LABELS | {"latency_metrics": TIMES | {"ttft": 2.25}},
    "evaluated": {"file_id": "a", "audio_path": "/home/someone/a.wav", "reference_text": "他很悲伤"}
    | {"generated_text": "悲伤，低沉。", "generation_time": 2.5, "evaluation_metrics": {"bleu_1": 0.5}}
    | {"latency_metrics": TIMES | SAMPLES | {"ttft": 0.5}},
    "streamed": TEXTS
    | SCORES
    | LABELS
    | {"latency_metrics": TIMES | SAMPLES | {"ttft": 0.5, "streaming_metrics": {"step_times": [0.5, 2.25]}}},
    "rounds": NAMED
    | SCORES
    | {"ground_truth_caption": "他很悲伤", "generated_text": "悲伤，低沉。", "total_tokens": 22, "accepted_tokens": 22}
    | {"rejected_tokens": 0, "total_latency": 14.5, "edge_latency": 14.0, "cloud_latency": 0.0, "total_rounds": 5}
    | {"acceptance_rate": 1.0, "tokens_per_second": 1.5, "sample_time": 14.5, "success": True}
    | {
        "latency_metrics": {"ttft": 14.0, "oet": 14.25, "total_time": 14.5, "input_tokens": 0, "output_tokens": 22}
        | SAMPLES
    },
    "counts": TEXTS
    | SCORES
    | LABELS
    | {
        "latency_metrics": TIMES
        | SAMPLES
        | MONITORED
        | ROUND_COUNTS
        | RATES
        | {"ttft": 20.0, "oet": 24.25, "total_time": 24.5, "input_tokens": 821, "output_tokens": 15}
        | {"prefill_time": 18.0},
        "speculative_decoding_metrics": ROUND_COUNTS | RATES,
        "speculative_decoding_config": {"entropy_threshold": 4.0, "k": 5},
        "hardware_config": HARDWARE,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rounds": {"language": "chinese", "uncertainty_threshold": 1.2, "k": 7, "max_tokens": 100},
    "counts": LABELS
    | {"dataset_path": "/home/someone/manifest.json", "hardware_config": HARDWARE}
    | {"speculative_decoding_config": {"entropy_threshold": 4.0, "k": 5}},
}
RECORDED_LINES = [
    {"mode": mode, "file_id": file_id, "reference": "他很悲伤", "caption": caption, "total_s": total, "ttft_s": 1.0}
    | {"output_tokens": 9, "cloud_calls": calls, "drafted": calls and 6 * calls, "corrections": calls and 1}
    for mode, caption, total, calls in (
        ("edge", "他很高兴", 2.0, None),
        ("cloud", "他很悲伤", 1.5, None),
        ("speculative", "他悲伤", 3.0, 2),
    )
    for file_id in ("a", "b")
]


def write_published(path: Path, generation: str, clips: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a results file of a generation with these clips, or with the one of `CLIPS`, and return its path."""
    content = {
        "experiment_config": CONFIGS.get(generation, LABELS),
        "metrics": {"avg_bleu": 0.5, "avg_acceptance_rate": 1.0},
        "detailed_results": [*clips] or [CLIPS[generation]],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write a file with one caption a line, and return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
