"""Recorded runs of other software as results files of this package: `python -m edgecloud_sd.measure.imported FILE...`.

The captions are scored anew. Times and counts are copied. A value that the file does not have is null with a reason,
and no rate of the file becomes a metric here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edgecloud_sd.acceptance import Rank
from edgecloud_sd.data.dataset import BadClip, read_json
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.data.published import RecordedClip, RecordedRun, read_recorded_runs
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure import metrics, quality, results
from edgecloud_sd.measure.normalisation import DEFAULT_NORMALISATION, NORMALISATIONS
from edgecloud_sd.measure.summary import (
    METRICS,
    NO_ROUNDS,
    NOT_VERIFIED,
    PERCENTILE_REASONS,
    PERCENTILES,
    Figures,
    max_or_none,
    mean_or_none,
    percentile_figures,
)
from edgecloud_sd.strategy import MODES, Strategy

NOT_RECORDED = "the file does not record it"
NO_EVENTS = "the file has the texts, times and counts of whole captions, and no events"
END_OF_REQUEST = "measured in part: the file has the end of the request, which stands for the last token"
NO_FIRST_TOKEN = "the file has no moment of a first token: its ttft is missing, or is the end of a whole output"
NO_AGGREGATION = "the file does not say how it formed its value from samples"
# Metric -> the key of a value from samples whose aggregation is not stated
SAMPLED_KEYS = {
    "cpu_percent": "cpu_percent",
    "rss_mean": "ram_gb",
    "rss_peak": "ram_gb",
    "gpu_percent": "gpu_util",
    "gpu_memory": "gpu_memory_gb",
}
EVENT_FIELDS = ("token_ids", "finish_reason", "trace", "latency_breakdown", "discarded_draft", "hindsight", "wall_time")


def recorded_document(
    run: RecordedRun, bertscore_model: str | None = None, normalisation: str = DEFAULT_NORMALISATION
) -> dict[str, Any]:
    """Return the results file of a recorded run."""
    captions, references = [clip.caption for clip in run.clips], [[clip.reference] for clip in run.clips]
    language = run.setting("language") or find_language([text for texts in references for text in texts])
    scores = quality.score(captions, references, language, bertscore_model, normalisation=normalisation)
    clips = [_clip_record(run, clip, scores, index) for index, clip in enumerate(run.clips)]
    figures = dict.fromkeys(METRICS) | _time_figures(run) | _count_figures(run) | scores.corpus
    schema = results.load_schema()["properties"]
    return {
        "schema_version": results.SCHEMA_VERSION,
        "origin": {
            "recorded": "elsewhere",
            "file": run.file,
            "generation": run.generation,
            "experiment_config": run.settings,
            "metrics": run.metrics,
            "not_recorded": _missing_fields(run),
        },
        "experiment_config": _experiment(run, language),
        "environment": dict.fromkeys(schema["environment"]["required"]),
        "in_force": dict.fromkeys(schema["in_force"]["required"]),
        "metrics": dict.fromkeys(schema["metrics"]["required"])
        | results.published_quality(figures, scores)
        | {
            "latency_metrics": results.summarise_series(clips),
            "speculative_decoding_metrics": _sum_counts(run)
            | dict.fromkeys(("discarded", "acceptance_by_position", "accepted_lengths")),
            "figures": figures,
            "breakdown_closure": dict.fromkeys(("median", "worst", "unnamed_median")),
            "reasons": _reasons(run, figures, scores.reasons),
        },
        "detailed_results": clips,
        "skipped_clips": [{"file_id": clip.file_id, "reason": clip.reason} for clip in run.skipped],
    }


def find_language(texts: Sequence[str]) -> str:
    """Return the language whose script most of the texts have. Raise BadClip if no text has a known script."""
    votes = {language: sum(quality.is_in_language(text, language) for text in texts) for language in LANGUAGES}
    best = max(votes, key=lambda language: votes[language])
    if not votes[best]:
        raise BadClip(f"the texts are in none of {', '.join(LANGUAGES)}, and the file names no language")
    return best


def _experiment(run: RecordedRun, language: str) -> dict[str, Any]:
    """Return the settings that the file names under the names of this package, and null for the others."""
    strategy = dict.fromkeys(Strategy().to_json())
    strategy["mode"] = run.mode
    if run.mode == "speculative":
        threshold, rank = run.setting("entropy_threshold"), run.setting("rank_threshold")
        gate = run.setting("gate_type") or (None if threshold is None else "entropy")
        strategy |= {"gate": gate, "threshold": threshold if gate == "entropy" else None}
        strategy |= {"k": run.setting("k"), "rule": Rank(rank).text if isinstance(rank, int) else None}
    named = {name: run.setting(name) for name in ("max_cpu_cores", "max_memory_gb", "caption_type", "prompt_type")}
    unnamed = dict.fromkeys(("pair", "link", "cloud_url", "profile", "profile_costs", "output"))
    return {
        "case": f"recorded-{run.name}",
        "strategy": strategy,
        "language": language,
        "clock": "real",
        "max_new_tokens": run.setting("max_new_tokens", "max_tokens"),
        "dataset_path": run.setting("dataset_path"),
        **named,
        **unnamed,
    }


def _missing_fields(run: RecordedRun) -> dict[str, str]:
    """Return the reason for each part of the file that is null."""
    reasons = {
        "environment": "the file does not name the machine or the software",
        "in_force": "the file does not say which limits were in force",
        "experiment_config": "a setting of null is one that the file does not name",
        "after_first_chunk": "the file does not say how many tokens came first together",
        "counts": "the file counts drafted tokens, cloud calls and corrections at most; a null was not counted",
    }
    if not run.setting("language"):
        reasons["language"] = "the file does not name it; most references have the script of this one"
    return reasons | dict.fromkeys(EVENT_FIELDS, NO_EVENTS)


def _clip_record(run: RecordedRun, clip: RecordedClip, scores: quality.Quality, index: int) -> dict[str, Any]:
    required = results.load_schema()["properties"]["detailed_results"]["items"]["required"]
    end = _output_end(clip)
    return dict.fromkeys(required) | {
        "file_id": clip.file_id,
        "dataset": clip.dataset,
        "index": index,
        "generated_text": clip.caption,
        "reference_captions": [clip.reference],
        "prompt_tokens": clip.prompt_tokens,
        "output_tokens": clip.tokens,
        "bleu_score": scores.per_clip["bleu4"][index],
        "scores": {name: values[index] for name, values in scores.per_clip.items()},
        "ttft": clip.ttft,
        "ttft_final": _ttft_final(run.mode, clip),
        "e2e": end,
        "otps": metrics.otps(clip.tokens or 0, clip.ttft, end),
        "after_first_chunk": _after_first_token(run.mode, clip),
        "total_time": clip.total,
        "cpu_percent": clip.cpu_percent,
        "ram_mb": clip.rss_mean_mb,
        "ram_peak_mb": clip.rss_peak_mb,
        **dict.fromkeys(("features", "edge_prefill", "cloud_prefill")),
        "not_measured": _resource_reasons(clip),
        "counts": _counts(run.mode, clip),
        "recorded": dict(clip.record),
    }


def _resource_reasons(clip: RecordedClip) -> dict[str, str]:
    """Return the reason for each use of the machine that a clip lacks."""
    values = {"cpu_percent": clip.cpu_percent, "rss_mean": clip.rss_mean_mb, "rss_peak": clip.rss_peak_mb}
    recorded = clip.record.get("latency_metrics") or {}
    return {
        name: NO_AGGREGATION if recorded.get(key) is not None else NOT_RECORDED
        for name, key in SAMPLED_KEYS.items()
        if values.get(name) is None
    }


def _output_end(clip: RecordedClip) -> float | None:
    """Return the seconds to the end of the output, or to the end of the request if the file has no other."""
    return clip.total if clip.output_end is None else clip.output_end


def _ttft_final(mode: str, clip: RecordedClip) -> float | None:
    """Return the TTFT of a side that decodes alone, because nothing takes back its text."""
    return None if mode == "speculative" else clip.ttft


def _after_first_token(mode: str, clip: RecordedClip) -> list[float] | None:
    """Return [tokens, seconds] after the first token of a side that decodes alone, one token at a time."""
    end = _output_end(clip)
    if mode == "speculative" or clip.ttft is None or end is None or clip.tokens is None or clip.tokens < 2:
        return None
    return [clip.tokens - 1, end - clip.ttft]


def _counts(mode: str, clip: RecordedClip) -> dict[str, int | None]:
    """Return the counts that the file has. A side that decodes alone commits every token itself."""
    counts: dict[str, int | None] = dict.fromkeys(field.name for field in fields(metrics.Counts))
    if mode != "speculative":
        zeros = ("local", "accepted", "correction", "bonus", "cloud", "cloud_calls", "retracted", "cloud_positions")
        counts |= dict.fromkeys(zeros, 0) | {"tokens": clip.tokens}
        names = ("local",) if mode == "edge" else ("cloud", "cloud_positions")
        return counts | dict.fromkeys(names, clip.tokens)
    return counts | {
        "tokens": clip.tokens,
        "rounds": clip.rounds,
        "cloud_calls": clip.cloud_calls,
        "drafted": clip.drafted,
        "correction": clip.corrections,
    }


def _sum_counts(run: RecordedRun) -> dict[str, int | None]:
    """Return the counts summed over clips. A count that some clip lacks is null."""
    per_clip = [_counts(run.mode, clip) for clip in run.clips]
    columns = {name: [counts[name] for counts in per_clip] for name in per_clip[0]}
    return {name: None if None in values else sum(filter(None, values)) for name, values in columns.items()}


def _time_figures(run: RecordedRun) -> Figures:
    """Return the times and uses that the files state."""
    clips = run.clips
    ends = [(clip, end) for clip in clips if (end := _output_end(clip)) is not None]
    after = [
        (clip.tokens - 1, end - clip.ttft)
        for clip, end in ends
        if clip.ttft is not None and clip.tokens is not None and clip.tokens > 1
    ]
    tokens, seconds = sum(n for n, _ in after), sum(s for _, s in after)
    counted = [(clip.tokens, end) for clip, end in ends if clip.tokens is not None]
    shares = [(clip.cpu_percent, clip.total) for clip in clips]
    cpu = [(percent * total, total) for percent, total in shares if percent is not None and total is not None]
    times = [clip.total for clip in clips], [clip.ttft for clip in clips]
    return {
        "total": mean_or_none(times[0]),
        "ttft": mean_or_none(times[1]),
        "ttft_final": mean_or_none(_ttft_final(run.mode, clip) for clip in clips),
        "e2e": mean_or_none(end for _, end in ends),
        **percentile_figures(*([value for value in values if value is not None] for values in times)),
        "tpot": metrics.tpot(tokens + 1, 0.0, seconds),
        "otps": metrics.otps(tokens + 1, 0.0, seconds),
        "e2e_tps": metrics.e2e_tps(sum(n for n, _ in counted), sum(end for _, end in counted)),
        "cpu_percent": sum(c for c, _ in cpu) / sum(t for _, t in cpu) if len(cpu) == len(clips) else None,
        "rss_mean": mean_or_none(clip.rss_mean_mb for clip in clips),
        "rss_peak": max_or_none(clip.rss_peak_mb for clip in clips),
    }


def _count_figures(run: RecordedRun) -> Figures:
    """Return the rates whose counts the file has."""
    counts = _sum_counts(run)
    tokens, calls, corrections = counts["tokens"], counts["cloud_calls"], counts["correction"]
    if run.mode != "speculative":
        is_cloud = float(run.mode == "cloud")
        costs = ("cloud_calls", "written_share", "cloud_positions_per_token", "covered_share")
        return {**dict.fromkeys(costs, is_cloud), "local_share": 1 - is_cloud}
    figures: Figures = {}
    if calls and corrections is not None:
        figures = {"correction_rate": corrections / calls, "useless_escalations": (calls - corrections) / calls}
    if tokens and calls is not None:
        figures["cloud_calls_per_token"] = calls / tokens
    if calls is not None:
        figures["cloud_calls"] = calls / len(run.clips)
    return figures


def _reasons(run: RecordedRun, figures: Figures, quality_reasons: dict[str, str]) -> dict[str, str]:
    """Return the reason for each figure that is null, and for those that the file shows in part."""
    reasons = dict(quality_reasons)
    if all(clip.output_end is None for clip in run.clips):
        reasons |= {name: END_OF_REQUEST for name in ("e2e", "tpot", "otps", "e2e_tps") if figures[name] is not None}
    if figures["cpu_percent"] is not None:
        reasons["cpu_percent"] = "measured in part: mean of samples of the process, not its CPU seconds"
    for name in ("ttft", "ttft_final"):
        if figures[name] is not None:
            reasons[name] = "measured in part: the file does not say from which moment its ttft counts"
    times = {
        "total": "total",
        "ttft": "ttft",
        "ttft_final": "ttft",
        "rss_mean": "rss_mean_mb",
        "rss_peak": "rss_peak_mb",
    }
    for name, field in times.items():
        present = sum(getattr(clip, field) is not None for clip in run.clips)
        if figures[name] is not None and present < len(run.clips):
            reasons[name] = f"measured in part: {present} of {len(run.clips)} clips have it"
    known = PERCENTILE_REASONS | dict.fromkeys(("ttft", "tpot", "otps"), NO_FIRST_TOKEN)
    if figures["ttft"] is None:
        known |= dict.fromkeys(("ttft_final", *(f"ttft_p{percent}" for percent in PERCENTILES)), NO_FIRST_TOKEN)
    for clip in run.clips:
        known |= _resource_reasons(clip)
    if any("prefill_time" in (clip.record.get("latency_metrics") or {}) for clip in run.clips):
        known |= dict.fromkeys(("edge_prefill", "cloud_prefill"), "the file does not say of which side its prefill is")
    if run.mode != "speculative":
        names = ("acceptance_rate", "mean_acceptance_length", "correction_rate", "cloud_call_rate", "waste")
        more = ("cloud_calls_per_token", "edge_passes_per_token", "retracted", "useless_escalations", "discarded_draft")
        known |= dict.fromkeys((*names, *more), NO_ROUNDS)
    elif _sum_counts(run)["cloud_calls"] == 0:
        verified = ("acceptance_rate", "mean_acceptance_length", "correction_rate", "useless_escalations")
        known |= dict.fromkeys(verified, NOT_VERIFIED)
    else:
        known["acceptance_rate"] = "the file does not count verified draft tokens, and counts local ones as accepted"
    missing = {name: known.get(name, NOT_RECORDED) for name, value in figures.items() if value is None}
    return missing | reasons


def import_files(
    files: Sequence[Path],
    folder: Path,
    mode: str | None = None,
    bertscore_model: str | None = None,
    normalisation: str = DEFAULT_NORMALISATION,
) -> list[tuple[Path, dict[str, Any]]]:
    """Write a results file for each run in the files, and return their paths and contents.

    Nothing is written unless every file can be read. Raise BadClip for a file that cannot, for equal names,
    and for a file in the folder that was not imported.
    """
    runs: dict[str, RecordedRun] = {}
    for file in files:
        for run in read_recorded_runs(file, mode):
            if run.name in runs:
                raise BadClip(f"{file}: its run {run.name} has the name of one from another file; rename the file")
            if (target := folder / f"{run.name}.json").exists() and not _is_imported(target):
                raise BadClip(f"{target}: would be overwritten, and is no imported run; give another --output-dir")
            runs[run.name] = run
    written = []
    for name, run in tqdm(runs.items(), desc="scoring", unit="run", disable=None, leave=False):
        path = folder / f"{name}.json"
        try:
            document = recorded_document(run, bertscore_model, normalisation)
            results.write_results(path, document)
        except ValueError as error:
            raise BadClip(f"{run.file}: {error}") from error
        written.append((path, document))
    return written


def _is_imported(file: Path) -> bool:
    """Return whether a file is one that `import_files` wrote, which can be written again."""
    try:
        content = read_json(file)
    except (BadClip, OSError):
        return False
    return isinstance(content, dict) and "origin" in content


def main(arguments: Sequence[str] | None = None) -> None:
    """Import the files of the command line, or exit with one line that says why not."""
    parser = argparse.ArgumentParser(
        prog="python -m edgecloud_sd.measure.imported",
        description="Turn published results files, and recorded runs with a caption a line, into results files.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a published .json, or a recorded .jsonl")
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        type=Path,
        default=Path("results/recorded"),
        help="the folder for the results files, one for each mode of a file (default: %(default)s)",
    )
    parser.add_argument("--mode", choices=MODES, help="the mode of files that do not say which one they are of")
    parser.add_argument("--bertscore-model", metavar="MODEL", help="a folder or a name on the hub (default: none)")
    parser.add_argument(
        "--score-normalisation",
        choices=NORMALISATIONS,
        default=DEFAULT_NORMALISATION,
        help="the change to captions and references before they are scored, as in the suite (default: %(default)s)",
    )
    options = parser.parse_args(hyphenate(arguments))
    with errors_to_exit():
        written = import_files(
            options.files, options.output_dir, options.mode, options.bertscore_model, options.score_normalisation
        )
        for path, document in written:
            skipped = f", {len(document['skipped_clips'])} skipped" if document["skipped_clips"] else ""
            print(f"{len(document['detailed_results'])} clips in {path}{skipped}")


if __name__ == "__main__":
    main()
