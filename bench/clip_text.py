"""The lines that --verbose prints for a clip, and the sentence for a cell that verified nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgecloud_sd.__main__ import summary_line
from edgecloud_sd.events import Drafted
from edgecloud_sd.host.terminal import join_lines
from edgecloud_sd.measure import metrics, quality
from edgecloud_sd.measure.summary import ClipResult
from edgecloud_sd.strategy import Strategy

EMPTY = "(empty)"
EARLY_SCORES = {**{f"bleu{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}, "rouge_l": "ROUGE-L"}
LATE_SCORES = {"meteor": "METEOR", "cider": "CIDEr", "bertscore_f1": "BERTScore F1"}  # for the whole cell at once


def describe_clip(result: ClipResult, place: str, normalisation: str, unscored: str | None = None) -> list[str]:
    """Return the reference, caption, scores, times and counts of a clip. `place` is its place in the run.

    The scores are those that need no other clip. `unscored` is a reason to score nothing.
    """
    used = result.utilization
    times = [
        _number("TTFT", result.ttft, "{:.1f} ms", 1e3),
        _number("OTPS", result.otps, "{:.1f}"),
        _number("total", result.trace.seconds, "{:.1f} ms", 1e3),
        _number("CPU", used.cpu_percent, "{:.0f} %"),
        _number("RAM", used.rss_peak_mb, "{:.0f} MB"),
        _number("GPU", used.gpu_percent, "{:.0f} %"),
    ]
    scores = quality.score_alone(result.caption, result.clip.references, result.clip.language, normalisation)
    shown = [f"{label} {scores[name]:.3f}" for name, label in EARLY_SCORES.items()]
    return [
        f"{result.clip.file_id} ({place})",
        *(f"  reference: {join_lines(text) or EMPTY}" for text in result.clip.references),
        f"  caption:   {join_lines(result.caption) or EMPTY}",
        f"  scores:    {unscored or ', '.join(shown)}",
        f"  times:     {', '.join(filter(None, times))}",
        f"  counts:    {summary_line(result.trace)}",
    ]


def describe_late_scores(clips: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each clip of a results file with the scores that need the whole cell, if there are any."""
    lines = []
    for clip in clips:
        shown = [_number(label, clip["scores"].get(name), "{:.3f}") for name, label in LATE_SCORES.items()]
        if any(shown):
            lines.append(f"{clip['file_id']}: {', '.join(filter(None, shown))}")
    return lines


def explain_no_escalation(strategy: Strategy, results: Sequence[ClipResult]) -> str | None:
    """Return why the cloud verified no draft of a cell, or None if it did or the mode has no drafts."""
    if not strategy.is_speculative or any(result.counts.answered_calls for result in results):
        return None
    if not strategy.gate.can_escalate:
        return "the gate never asks the cloud"
    if faults := [reason for result in results if (reason := metrics.degraded_reason(result.trace))]:
        return f"the cloud failed ({faults[0]})"
    gate = strategy.gate
    scores = [score for result in results if (score := gate.draft_score(_scores(result))) is not None]
    largest = max(scores, default=math.nan)
    if gate.statistic == "risk":
        return f"no caption's risk exceeded {gate.send_above:g}; the largest was {largest:.3g}"
    if gate.statistic == "margin":
        return f"no draft's margin was below {gate.limit:g}; the smallest was {-largest:.3g}"
    name = "surprisal" if gate.statistic == "logprob" else "entropy"
    return f"no draft's {name} exceeded {gate.limit:g} nats; the largest was {largest:.3g}"


def _scores(result: ClipResult) -> list[float]:
    return [score for _, event in result.trace.events if isinstance(event, Drafted) for score in event.draft.scores]


def _number(label: str, value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else f"{label} {form.format(factor * value)}"
