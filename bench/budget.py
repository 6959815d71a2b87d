"""The budget, the promise and the audit of a cell: parts of its results file, and lines for the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgecloud_sd.config import BUDGETS, Settings
from edgecloud_sd.forecast.budgets import gate_at, stated_level
from edgecloud_sd.grid import find_feedback, has_chosen_level
from edgecloud_sd.measure.audit import AuditCount
from edgecloud_sd.measure.metrics import Counts, degraded_reason
from edgecloud_sd.measure.summary import ClipResult
from edgecloud_sd.strategy import Strategy

NO_DRAW = "no clip"  # begins the reason of an audit that could have drawn one
NO_BUDGET = "neither --own, --cloud-calls nor --cloud-budget chose the level of this cell's gate"


def budget_parts(settings: Settings, strategy: Strategy, captions: Sequence[ClipResult]) -> dict[str, Any]:
    """Return `budget` and `audit` of a cell for its results file. `reasons` has the reason for each that is null."""
    budget = _describe_budget(settings, strategy, captions)
    audit = count_audit(settings, strategy, captions)
    reasons = {} if budget else {"budget": NO_BUDGET}
    if isinstance(audit, str):
        return {"budget": budget, "audit": None, "reasons": reasons | {"audit": audit}}
    figures = {"rate": audit.rate, "p": audit.p, "is_broken": audit.is_broken}
    return {"budget": budget, "audit": asdict(audit) | figures | {"sentence": audit.sentence()}, "reasons": reasons}


def budget_lines(parts: dict[str, Any], name: str) -> Iterator[str]:
    """Yield the lines on the budget and the audit of a cell at the end of a run."""
    return (f"- {name}: {note}" for note in budget_notes(parts))


def budget_notes(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the budget and the audit of a cell say. Results files of an earlier version have neither."""
    if budget := parts.get("budget"):
        given = f"--{budget['option'].replace('_', '-')} {budget['value']:g} by {budget['by']}: {budget['reason']}"
        spent = (
            f"{budget['calls']:.2f} calls a caption, and the cloud wrote {budget['written_share']:.3f} of the tokens"
        )
        yield f"{given}. Here {spent}"
    if audit := parts.get("audit"):
        yield f"{'warning: ' if audit['is_broken'] else ''}audit: {audit['sentence']}"
    elif (reason := parts["reasons"].get("audit", "")).startswith(NO_DRAW):
        yield f"audit: {reason}"


def _describe_budget(settings: Settings, strategy: Strategy, captions: Sequence[ClipResult]) -> dict[str, Any] | None:
    if not has_chosen_level(settings, strategy):
        return None
    option, value = next((name, value) for name in ("own", *BUDGETS) if (value := getattr(settings, name)) is not None)
    first = last = stated_level(strategy.gate)
    if feedback := find_feedback(settings, strategy):
        for result in captions:
            feedback.observe_counts(result.counts)
        last = stated_level(gate_at(strategy.gate, feedback.level))
    counts = sum((result.counts for result in captions), Counts())
    calibrated, choice = settings.calibrated, settings.gate_choice
    return {
        "option": option,
        "value": value,
        "by": "calibration" if calibrated else "feedback",
        "calibration": calibrated.name if calibrated else None,
        "calibration_clips": len(calibrated.clips) if calibrated else None,
        "reason": choice.reason if choice else f"the level went from {first:.4g} to {last:.4g}",
        "first_level": first,
        "last_level": last,
        "calls": counts.cloud_calls / len(captions),
        "written_share": counts.written_share,
    }


def count_audit(settings: Settings, strategy: Strategy, captions: Sequence[ClipResult]) -> AuditCount | str:
    """Return the counts of an audit, or the reason why there are none."""
    if settings.audit is None:
        return "--audit is not set"
    if not strategy.is_speculative:
        return f"mode {strategy.mode} has no captions that the cloud may have left unverified"
    if strategy.is_lossless:
        return "every caption is verified, because the cell is lossless"
    drawn = [result for result in captions if result.is_own is not None]
    if not drawn:
        clips = "answered by the cloud" if any(degraded_reason(result.trace) for result in captions) else "of the cell"
        return f"{NO_DRAW} {clips} was drawn: raise --audit or caption more clips"
    promised = round(1 - settings.own, 12) if settings.own and has_chosen_level(settings, strategy) else None
    # a lossy rule accepts other tokens than the cloud's own, so its verdicts answer nothing
    verified = sum(result.counts.local > 0 or not strategy.rule.is_lossless for result in drawn)
    return AuditCount(len(drawn), verified, sum(not result.is_own for result in drawn), promised)


def shared_clip_notes(settings: Settings, strategy: Strategy, file_ids: Iterable[str]) -> Iterator[str]:
    """Yield a warning if the level of a cell was chosen on clips of the run itself: nothing is promised for those."""
    if settings.calibrated and has_chosen_level(settings, strategy):
        shared = set(settings.calibrated.clips).intersection(file_ids)
        if shared:
            yield f"warning: {settings.calibrated.name} was calibrated on {len(shared)} clips of this run: use others"
