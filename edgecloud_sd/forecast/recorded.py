"""The forecast of a saved run: from its traces, or from its counts alone.

Counts do not tell the passes of the edge. Each draft token is assumed to take a pass, as in the published loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecloud_sd.forecast.estimate import estimate_workload
from edgecloud_sd.forecast.model import Forecast, Workload, forecast
from edgecloud_sd.measure.traces import trace_from_json
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.link import NO_LINK, Link
from edgecloud_sd.timing.profile import Profile


@dataclass(frozen=True)
class RoundCounts:
    """The counts of a speculative run, summed over its generations.

    The published loop commits no bonus, so a recorded run has none.
    """

    tokens: int
    drafted: int
    verifications: int
    corrections: int
    bonus: int = 0
    generations: int | None = None


def workload_from_counts(counts: RoundCounts, k: int, scores_per_token: int = 0) -> Workload:
    """Return the workload of a run with drafts of `k` tokens from its counts.

    If every draft has `k` tokens, the forecast's seconds per token times the tokens are exactly the seconds of the
    drafted tokens, the verifications and the corrections. The last draft of a generation may be shorter. The counts do
    not tell at which positions tokens were rejected. The first positions are assumed to accept as many as they can.

    Raise ValueError for counts without a verification, and for counts that drafts of `k` tokens cannot give.
    """
    if not counts.verifications:
        raise ValueError("no draft was verified, so there is nothing to forecast from")
    missing_tokens = k * counts.verifications - counts.drafted  # below 0 with local rounds
    local = max(-missing_tokens, 0)
    accepted = counts.tokens - local - counts.corrections - counts.bonus
    is_possible = counts.corrections + counts.bonus <= counts.verifications
    is_possible &= missing_tokens <= (k - 1) * (counts.generations or 0)
    if not is_possible or not 0 <= accepted <= k * counts.verifications:
        raise ValueError(f"drafts of k={k} tokens cannot give {counts}: give the k of the run")
    whole = 1 - counts.corrections / counts.verifications  # p_k
    # the sum of p_1 to p_(k-1) above p_k, in units of 1 - p_k, goes to the first positions
    surplus = (accepted / counts.verifications - k * whole) / (1 - whole) if whole < 1 else 0.0
    shares = (min(max(surplus - position, 0.0), 1.0) for position in range(k - 1))
    return Workload(
        k=k,
        acceptance_by_position=(*(whole + share * (1 - whole) for share in shares), whole),
        gate_rate=min(k * counts.verifications / counts.drafted, 1.0),
        scores_per_token=scores_per_token,
        has_bonus=counts.bonus > 0,
        tokens_per_generation=counts.tokens / counts.generations if counts.generations else None,
        is_lossless=False,
    )


def counts_from_results(document: Mapping[str, Any]) -> RoundCounts:
    """Return the counts of a results file. Raise ValueError if it lacks one that the forecast needs."""
    saved = document["metrics"]["speculative_decoding_metrics"]
    values = {name: saved[name] for name in ("tokens", "drafted", "cloud_calls", "correction")}
    if missing := [name for name, value in values.items() if value is None]:
        raise ValueError(f"the file does not have the count {' and '.join(missing)}, which the forecast needs")
    tokens, drafted, calls, corrections = values.values()
    verifications = calls - (saved["unanswered_calls"] or 0)
    generations = len(document["detailed_results"])
    return RoundCounts(tokens, drafted, verifications, corrections, saved["bonus"] or 0, generations)


def forecast_from_results(
    document: Mapping[str, Any], profile: Profile, link: Link = NO_LINK, k: int | None = None
) -> Forecast:
    """Return the forecast of a results file: from its traces, or from its counts if it has none.

    `k` is for files that do not name their draft length. Raise ValueError for a file that cannot be forecast.
    """
    saved = document["experiment_config"]["strategy"]
    if saved["mode"] != "speculative":
        raise ValueError(f"mode {saved['mode']} drafts nothing; give the file of a speculative run")
    clips = document["detailed_results"]
    if not clips or not all(clip.get("trace") for clip in clips):
        return forecast(profile, link, _workload_without_traces(document, k))
    strategy = Strategy.from_json(saved)
    workload = estimate_workload([trace_from_json(clip["trace"]) for clip in clips], strategy)
    if workload is None:
        raise ValueError("no draft was verified, so there is nothing to forecast from")
    return forecast(profile, link, workload, strategy.needs_edge)


def _workload_without_traces(document: Mapping[str, Any], k: int | None) -> Workload:
    strategy = document["experiment_config"]["strategy"]
    length = k if k is not None else strategy["k"]
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"the draft length is {length}; python -m edgecloud_sd.forecast takes one from 1 with --k")
    gate = strategy["gate"] or ""
    if strategy.get("look_back") or gate.startswith(("token", "risk")):
        raise ValueError(f"its rounds (gate {gate}) cannot be told from counts; give the file with its traces")
    return workload_from_counts(counts_from_results(document), length, int(gate == "entropy"))
