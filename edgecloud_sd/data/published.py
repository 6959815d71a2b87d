"""Runs that other software recorded: the published results files of several generations, and recorded runs.

A results file is one JSON object with the captions of one mode. A file of recorded runs (`.jsonl`) has one caption a
line, of any mode. Only counts and times are read. The rates of these files are not, because their acceptance rate
counts tokens that nobody verified.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecloud_sd.data.dataset import BadClip, SkippedClip, read_json, text_errors
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.data.texts import check_characters, has_visible_text, parse_json_lines, read_utf8
from edgecloud_sd.host.paths import hide_folders
from edgecloud_sd.strategy import MODES

GIB_IN_MB = 1024**3 / 1e6  # the files count memory in GiB
END_MARK = "<|im_end|>"  # some captions keep this token of the chat format
# Key of a clip -> the generation that it tells, first match; dots lead into nested objects
GENERATIONS = {
    "mode": "recorded runs, a caption a line",
    "prediction": "baseline with latency alone",
    "ground_truth_caption": "speculative with rounds",
    "speculative_decoding_metrics": "speculative with counts",
    "latency_metrics": "latency metrics",
    "latency": "latency alone",
}
# Field of `RecordedClip` -> its keys in the generations
TEXT_KEYS = {
    "file_id": ("file_id",),
    "reference": ("reference_caption", "ground_truth_caption", "reference_text", "reference"),
    "caption": ("generated_text", "prediction", "caption"),
}
AMOUNT_KEYS = {
    "total": ("latency_metrics.total_time", "latency", "total_s"),
    "ttft": ("latency_metrics.ttft", "ttft_s"),
    "output_end": ("latency_metrics.oet",),
    "cpu_percent": ("latency_metrics.cpu_avg",),
    "rss_mean_mb": ("latency_metrics.memory_avg_gb",),
    "rss_peak_mb": ("latency_metrics.memory_max_gb",),
}
COUNT_KEYS = {
    "tokens": ("latency_metrics.output_tokens", "tokens_generated", "output_tokens"),
    "prompt_tokens": ("latency_metrics.input_tokens",),
    "rounds": ("total_rounds",),
    "cloud_calls": ("latency_metrics.cloud_calls", "cloud_calls"),
    "drafted": ("latency_metrics.total_draft_tokens", "drafted"),
    "corrections": ("latency_metrics.total_corrections", "corrections"),
}
# Keys that are known and not read: rates, scores, values without a stated aggregation, copies and settings
UNREAD_KEYS = frozenset(
    ("mode", "dataset", "caption_type", "language", "prompt_type", "bleu", "cider", "bleu_score", "cider_score",
     "bertscore_precision", "bertscore_recall", "bertscore_f1", "acceptance_rate", "tokens_per_second", "total_tokens",
     "accepted_tokens", "rejected_tokens", "total_latency", "edge_latency", "cloud_latency", "sample_time", "success",
     "error", "audio_path", "generation_time", "evaluation_metrics", "latency_metrics", "speculative_decoding_metrics",
     "speculative_decoding_config", "hardware_config",
     "latency_metrics.itps", "latency_metrics.otps", "latency_metrics.cpu_percent", "latency_metrics.cpu_max",
     "latency_metrics.ram_gb", "latency_metrics.gpu_util", "latency_metrics.gpu_memory_gb",
     "latency_metrics.total_accepted_tokens", "latency_metrics.acceptance_rate", "latency_metrics.correction_rate",
     "latency_metrics.cloud_call_rate", "latency_metrics.prefill_time", "latency_metrics.streaming_metrics",
     "latency_metrics.hardware_limits")
)  # fmt: skip
FILE_KEYS = frozenset(
    ("experiment_config", "experiment_type", "experiment_info", "metrics", "speculative_metrics", "detailed_results")
)
SPECULATIVE_KEYS = {
    *("speculative_metrics", "speculative_decoding_metrics", "speculative_decoding_config", "uncertainty_threshold"),
}
CLIP_KEYS = UNREAD_KEYS.union(*TEXT_KEYS.values(), *AMOUNT_KEYS.values(), *COUNT_KEYS.values())


@dataclass(frozen=True)
class RecordedClip:
    """One caption of a recorded run. A value is None if the file does not have it, or has none that can be used."""

    file_id: str
    reference: str
    caption: str
    dataset: str
    total: float | None  # s
    ttft: float | None  # s; None too if it is the moment of a whole output
    output_end: float | None  # s, on the clock of `ttft`
    cpu_percent: float | None  # mean of samples
    rss_mean_mb: float | None
    rss_peak_mb: float | None
    tokens: int | None
    prompt_tokens: int | None
    rounds: int | None
    cloud_calls: int | None
    drafted: int | None
    corrections: int | None
    record: Mapping[str, Any]  # the clip as it stands in the file, with null for NaN


@dataclass(frozen=True)
class RecordedRun:
    """The captions of one mode in one file, with the settings and metrics of the file as they stand there."""

    file: str
    name: str  # the file's stem, with the mode if the file has several
    generation: str
    mode: str
    clips: Sequence[RecordedClip]
    skipped: Sequence[SkippedClip]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def setting(self, *names: str) -> Any:
        """Return the first of these settings that the file has, or None. Nested settings count like the others."""
        nested = [value for value in self.settings.values() if isinstance(value, Mapping)]
        levels = [self.settings, *nested]
        return next((level[name] for name in names for level in levels if level.get(name) is not None), None)


def read_recorded_runs(path: Path, mode: str | None = None) -> list[RecordedRun]:
    """Return the runs in a file, one for each mode. `mode` is for files that do not say which mode they are of.

    Raise BadClip for a file of an unknown generation, for a bad value, and for a file without a caption.
    """
    if path.suffix.lower() == ".jsonl":
        return _read_lines(path, mode)
    content = read_json(path)
    _check_keys(f"{path}", content, FILE_KEYS)
    records = content.get("detailed_results")
    if not isinstance(records, list):
        raise BadClip(f"{path}, detailed_results: must be the list of captions, not {type(records).__name__}")
    settings = content.get("experiment_config", content.get("experiment_info", {}))
    if not isinstance(settings, dict):
        raise BadClip(f"{path}, experiment_config: must be an object, not {type(settings).__name__}")
    metrics = {key: content[key] for key in ("metrics", "speculative_metrics") if key in content}
    own_mode = _find_mode(path, content, mode)
    return [_build_run(path, path.stem, own_mode, records, _plain(settings), _plain(metrics))]


def _read_lines(path: Path, mode: str | None) -> list[RecordedRun]:
    """Return the runs of a file with one caption a line."""
    if mode:
        raise BadClip(f"{path}: names the mode of every caption; leave out --mode {mode}")
    with text_errors():
        lines = parse_json_lines(read_utf8(path, "JSON Lines"), f"{path}")
        check_characters([record for _, record in lines], f"{path}")
    records: dict[str, list[Any]] = {}
    for number, record in lines:
        own = record.get("mode") if isinstance(record, dict) else None
        if own not in MODES:
            raise BadClip(f"{path}, line {number}, mode: must be one of {', '.join(MODES)}, not {own!r}")
        records.setdefault(own, []).append(record)
    if not records:
        raise BadClip(f"{path}: contains no caption")
    return [_build_run(path, f"{path.stem}-{own}", own, captions, {}, {}) for own, captions in records.items()]


def _find_mode(path: Path, content: Mapping[str, Any], mode: str | None) -> str:
    """Return the mode of a results file: from its keys, else from its type or name, else `mode`."""
    parts = [content, content.get("metrics"), content.get("experiment_config")]
    keys = {key for part in parts if isinstance(part, dict) for key in part}
    names = (str(content.get("experiment_type", "")), path.stem)
    own = next((known for known in ("edge", "cloud") for name in names if name.startswith(known)), None)
    if keys & SPECULATIVE_KEYS:
        own = "speculative"
    if own is None and mode is None:
        raise BadClip(f"{path}: does not say which mode it is of; give --mode {' or '.join(MODES)}")
    if own and mode and own != mode:
        raise BadClip(f"{path}: is of mode {own}; leave out --mode {mode}")
    return own or str(mode)


def _build_run(
    path: Path, name: str, mode: str, records: Sequence[Any], settings: Mapping[str, Any], metrics: Mapping[str, Any]
) -> RecordedRun:
    """Return the run of these captions. Captions that failed, or have no reference, are skipped with a reason."""
    clips: dict[str, RecordedClip] = {}
    skipped = []
    for number, record in enumerate(records, 1):
        place = f"{path}, caption {number}"
        flat = _flatten(place, record)
        file_id = _text(place, flat, "file_id")
        if not file_id or file_id in clips:
            raise BadClip(f"{place}, file_id: must be an id that no other caption has, not {file_id!r}")
        reason = _skip_reason(place, flat)
        if reason:
            skipped.append(SkippedClip(file_id, reason))
        else:
            clips[file_id] = _build_clip(f"{path}, {file_id}", flat, _plain(record))
    if not clips:
        raise BadClip(f"{path}: contains no caption with a reference")
    generation = next(name for key, name in GENERATIONS.items() if key in records[0])
    run = RecordedRun(path.name, name, generation, mode, (*clips.values(),), skipped, settings, metrics)
    if (language := run.setting("language")) not in (None, *LANGUAGES):
        raise BadClip(f"{path}, language: must be one of {', '.join(LANGUAGES)}, not {language!r}")
    return run


def _flatten(place: str, record: Any) -> dict[str, Any]:
    """Return the values of a caption by key, those of its latency metrics too. Raise BadClip for an unknown key."""
    if not isinstance(record, dict):
        raise BadClip(f"{place}: must be an object, not {type(record).__name__}")
    nested = record.get("latency_metrics", {})
    if not isinstance(nested, dict):
        raise BadClip(f"{place}, latency_metrics: must be an object, not {type(nested).__name__}")
    flat = record | {f"latency_metrics.{key}": value for key, value in nested.items()}
    _check_keys(place, flat, CLIP_KEYS)
    if not any(key in record for key in GENERATIONS):
        keys = ", ".join(GENERATIONS)
        raise BadClip(f"{place}: has no key that tells a known generation ({keys}); its keys are {', '.join(record)}")
    return flat


def _check_keys(place: str, value: Any, known: frozenset[str]) -> None:
    """Raise BadClip unless `value` is an object whose keys are all known."""
    if not isinstance(value, dict):
        raise BadClip(f"{place}: must be an object, not {type(value).__name__}")
    for key in value:
        if key not in known:
            problem = "no known generation of published files has it; remove it if its meaning does not matter"
            raise BadClip(f"{place}: has the key {key!r}, and {problem}")


def _skip_reason(place: str, flat: Mapping[str, Any]) -> str | None:
    """Return why a caption cannot be scored, or None if it can."""
    if flat.get("success") is False:
        return f"the file says that it failed ({flat.get('error') or 'without a reason'})"
    is_scored = has_visible_text(_text(place, flat, "reference"))
    return None if is_scored else "the file has no reference with visible text for it"


def _build_clip(place: str, flat: Mapping[str, Any], record: Mapping[str, Any]) -> RecordedClip:
    amounts = {field: _amount(place, flat, keys) for field, keys in AMOUNT_KEYS.items()}
    counts = {field: _count(place, flat, keys) for field, keys in COUNT_KEYS.items()}
    for field in ("rss_mean_mb", "rss_peak_mb"):
        gib = amounts[field]
        amounts[field] = None if gib is None else gib * GIB_IN_MB
    for field in ("tokens", "prompt_tokens"):
        counts[field] = counts[field] or None  # 0 stands for "not counted"
    end = amounts["output_end"] if amounts["output_end"] is not None else amounts["total"]
    ttft = amounts["ttft"]
    # some generations write the end of the whole output, or of the edge's share, as the first token
    if ttft is not None and (ttft == flat.get("edge_latency") or end is None or ttft >= end):
        amounts["ttft"] = None
    calls, corrections = counts["cloud_calls"], counts["corrections"]
    if calls is not None and corrections is not None and corrections > calls:
        raise BadClip(f"{place}: has {corrections} corrections and {calls} cloud calls; a call corrects once at most")
    texts = {field: _text(place, flat, field) for field in TEXT_KEYS}
    texts["caption"] = texts["caption"].removesuffix(END_MARK)
    return RecordedClip(**texts, dataset=str(flat.get("dataset", "")), **amounts, **counts, record=record)  # type: ignore[arg-type]


def _text(place: str, flat: Mapping[str, Any], field: str) -> str:
    """Return the text of a field without white space around it. Raise BadClip if it is missing or no text."""
    value = next((flat[key] for key in TEXT_KEYS[field] if key in flat), None)
    if not isinstance(value, str):
        raise BadClip(f"{place}: must have a text under {' or '.join(TEXT_KEYS[field])}, not {value!r}")
    return value.strip()


def _amount(place: str, flat: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """Return the first number that is there, or None. Raise BadClip for a value that is no amount."""
    for key in keys:
        value = flat.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise BadClip(f"{place}, {key}: must be a number of at least 0, not {value!r}")
        return float(value)
    return None


def _count(place: str, flat: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first whole number that is there, or None. Raise BadClip for a value that is no count."""
    value = _amount(place, flat, keys)
    if value is None or value.is_integer():
        return None if value is None else int(value)
    raise BadClip(f"{place}, {' or '.join(keys)}: must be a whole number, not {value!r}")


def _plain(value: Any) -> Any:
    """Return the value with null for numbers that JSON lacks, and absolute paths without their folders."""
    return hide_folders(_finite(value))


def _finite(value: Any) -> Any:
    """Return the value with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":  # scoring stands above this room, and so does the command
    sys.exit("error: this module only reads; run python -m edgecloud_sd.measure.imported FILE...")
