"""The metrics of one cell of the grid, computed from its captions. `METRICS` is the only list of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from statistics import fmean, median
from typing import Literal

from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import Trace
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import metrics, quality
from edgecloud_sd.measure.breakdown import LatencyBreakdown, latency_breakdown, mean_breakdown
from edgecloud_sd.measure.normalisation import DEFAULT_NORMALISATION

Figures = dict[str, float | None]  # keys are the names in METRICS


@dataclass(frozen=True)
class Metric:
    """The description of a metric. `better` is None if neither direction is better."""

    unit: str
    better: Literal["higher", "lower"] | None
    meaning: str


PERCENTILES = (50, 95, 99)
METRICS = {
    "total": Metric(
        "s", "lower", "Seconds from the request (samples in memory) to the end of the caption; mean over clips"
    ),
    "ttft": Metric(
        "s",
        "lower",
        "Seconds from the request to the first shown text: features, prefill on both sides and the link included; "
        "mean over clips",
    ),
    "ttft_final": Metric(
        "s", "lower", "Seconds from the request to the first text that no verdict can take back; mean over clips"
    ),
    **{
        f"{name}_p{percent}": Metric("s", "lower", f"{meaning}; {percent}th percentile over clips, interpolated")
        for name, meaning in (
            ("total", "Seconds from the request to the end of the caption"),
            ("ttft", "Seconds from the request to the first shown text"),
        )
        for percent in PERCENTILES
    },
    "e2e": Metric("s", "lower", "Seconds from the request to the last token, and until it is final; mean over clips"),
    "tpot": Metric(
        "s",
        "lower",
        "Seconds per token after the first: sum of (e2e - ttft) / sum of (N - 1); clips with all tokens at one "
        "moment are left out",
    ),
    "otps": Metric(
        "tokens/s",
        "higher",
        "Tokens per second after the first: sum of (N - 1) / sum of (e2e - ttft); clips with all tokens at one "
        "moment are left out. Tokens that arrive with the first one count as if they took no time",
    ),
    "e2e_tps": Metric("tokens/s", "higher", "Tokens per second over the whole request: sum of N / sum of e2e"),
    "itl_per_chunk": Metric(
        "s",
        "lower",
        "Seconds between two consecutive moments at which tokens became visible, without those that were taken back; "
        "mean over all gaps",
    ),
    "itl_per_token": Metric(
        "s",
        "lower",
        "Seconds between two consecutive chunks of visible tokens / tokens of the later chunk; mean over all gaps",
    ),
    "features": Metric("s", "lower", "Seconds for the log-mel spectrogram and the prompt; mean over clips"),
    "edge_prefill": Metric("s", "lower", "Seconds for the edge's audio encoder and prefill; mean over clips"),
    "cloud_prefill": Metric(
        "s",
        "lower",
        "Seconds that the edge waited for the cloud's audio encoder and prefill, with the cloud's queue and the "
        "uplink; mean over clips that waited",
    ),
    "discarded_draft": Metric("s", "lower", "Seconds spent on draft tokens that were thrown away; mean over clips"),
    "round_trip_exposed": Metric(
        "s",
        "lower",
        "Seconds that the edge waited for verdicts, after it had sent the draft and had finished drafting ahead; "
        "mean over clips",
    ),
    "round_trip_hidden": Metric(
        "s", "higher", "Seconds of the round trips of verdicts during which the edge drafted ahead; mean over clips"
    ),
    "cpu_percent": Metric(
        "%", None, "CPU seconds of the process / wall seconds; ratio of sums, above 100 on several cores"
    ),
    "rss_peak": Metric("MB", "lower", "Highest resident memory of the process during decoding; maximum over clips"),
    "rss_mean": Metric("MB", "lower", "Mean resident memory of the process during decoding; mean over clips"),
    "gpu_percent": Metric(
        "%", None, "Utilisation of the cloud's GPU, or of the first GPU, as NVML reports it; mean over clips"
    ),
    "gpu_memory": Metric(
        "MB",
        "lower",
        "Highest memory in use by all processes on the cloud's GPU, or on the first GPU; maximum over clips",
    ),
    "bleu1": Metric("0 to 1", "higher", "BLEU-1 of the corpus, from summed counts"),
    "bleu2": Metric("0 to 1", "higher", "BLEU-2 of the corpus, from summed counts"),
    "bleu3": Metric("0 to 1", "higher", "BLEU-3 of the corpus, from summed counts"),
    "bleu4": Metric("0 to 1", "higher", "BLEU-4 of the corpus, from summed counts"),
    "meteor": Metric("0 to 1", "higher", "METEOR of the corpus, from summed statistics (needs Java)"),
    "rouge_l": Metric("0 to 1", "higher", "ROUGE-L; mean over clips"),
    "cider": Metric("0 to 10", "higher", "CIDEr-D; mean over clips"),
    "bertscore_precision": Metric("0 to 1", "higher", "BERTScore precision; mean over clips (see --bertscore-model)"),
    "bertscore_recall": Metric("0 to 1", "higher", "BERTScore recall; mean over clips (see --bertscore-model)"),
    "bertscore_f1": Metric("0 to 1", "higher", "BERTScore F1; mean over clips (see --bertscore-model)"),
    "language_match": Metric("0 to 1", "higher", "Captions in the script of the requested language / captions"),
    "acceptance_rate": Metric(
        "0 to 1", "higher", "Accepted draft tokens / verified draft tokens; local tokens and corrections are in neither"
    ),
    "mean_acceptance_length": Metric(
        "tokens",
        "higher",
        "Tokens committed per answered cloud call: accepted, correction and bonus tokens / answered calls",
    ),
    "correction_rate": Metric("0 to 1", "lower", "Corrections / answered cloud calls"),
    "cloud_call_rate": Metric("0 to 1", "lower", "Escalated rounds / rounds"),
    "cloud_calls": Metric(
        "calls", "lower", "Cloud calls, answered or not; mode cloud has one for each caption; mean over clips"
    ),
    "cloud_calls_per_token": Metric("calls", "lower", "Cloud calls, answered or not / N"),
    "unanswered_calls": Metric(
        "calls", "lower", "Cloud calls that failed for good, without a verdict; mean over clips"
    ),
    "written_share": Metric("0 to 1", "lower", "Tokens that the cloud wrote / N: corrections, bonus and cloud tokens"),
    "cloud_positions_per_token": Metric(
        "positions", "lower", "Tokens that the cloud computed after its prefill / N: context, draft and its own tokens"
    ),
    "covered_share": Metric("0 to 1", None, "Tokens that the cloud accepted or wrote / N"),
    "local_share": Metric("0 to 1", None, "Local tokens / N"),
    "edge_passes_per_token": Metric("passes", "lower", "Forward passes of the edge after its prefill / N"),
    "retracted": Metric("tokens", "lower", "Tokens that were shown, and that a verdict took back; mean over clips"),
    "waste": Metric("0 to 1", "lower", "Discarded draft tokens / draft tokens"),
    "waste_ahead": Metric(
        "0 to 1",
        "lower",
        "Discarded tokens / all tokens that were drafted ahead of a verdict, guesses of the bonus included",
    ),
    "wire_up_per_token": Metric("bytes", "lower", "Bytes sent to the cloud / N, HTTP headers included"),
    "wire_down_per_token": Metric("bytes", "lower", "Bytes received from the cloud / N, HTTP headers included"),
    "never_sent": Metric(
        "0 to 1", "higher", "Captions for which nothing was sent to the cloud / captions without a fault of the cloud"
    ),
    "cloud_faults": Metric("attempts", "lower", "Failed attempts on the cloud; mean over clips"),
    "degraded": Metric(
        "0 to 1", "lower", "Captions that the edge finished alone after the cloud had failed / captions"
    ),
    "breaker_openings": Metric(
        "openings",
        "lower",
        "Failures, shadow verification included, after which the cloud was not tried for a while; sum over clips",
    ),
    "breaker_open": Metric("captions", "lower", "Captions for which the breaker was open; sum over clips"),
    "useless_escalations": Metric(
        "0 to 1", "lower", "Answered cloud calls that changed no text of the edge / answered cloud calls"
    ),
    "missed_corrections": Metric(
        "0 to 1", "lower", "Local tokens that the cloud would have replaced / local tokens (see --shadow)"
    ),
    "gate_auroc": Metric(
        "0 to 1",
        "higher",
        "Chance that the gate scores a draft that the cloud changes above one that it accepts; ties count one half "
        "(see --shadow)",
    ),
}

# Metrics that are properties of metrics.Counts
COUNT_RATES = (
    "acceptance_rate", "mean_acceptance_length", "correction_rate", "cloud_call_rate", "cloud_calls_per_token",
    "written_share", "cloud_positions_per_token", "covered_share", "local_share", "edge_passes_per_token", "waste",
    "waste_ahead",
)  # fmt: skip

# Metrics that a mode without rounds does not have
ROUND_METRICS = frozenset(
    ("discarded_draft", "round_trip_exposed", "acceptance_rate", "mean_acceptance_length", "correction_rate",
     "cloud_call_rate", "cloud_calls_per_token", "unanswered_calls", "edge_passes_per_token", "retracted", "waste",
     "useless_escalations")
)  # fmt: skip

# Metrics that need an answer of the cloud
ANSWER_METRICS = frozenset(
    ("acceptance_rate", "mean_acceptance_length", "correction_rate", "round_trip_exposed", "round_trip_hidden",
     "useless_escalations", "never_sent")
)  # fmt: skip

# Metrics of a cloud behind a link
LINK_METRICS = (
    "wire_up_per_token", "wire_down_per_token", "never_sent", "cloud_faults", "degraded", "breaker_openings",
    "breaker_open",
)  # fmt: skip

NO_ROUNDS = "this mode has no rounds"
NO_SHADOW = (
    "shadow verification did not run: it needs mode speculative, --shadow yes, a rule other than synthetic, and a "
    "cloud that answers"
)
NOT_AFTER_FIRST = "no caption has a token that became visible after its first text"
ONE_MOMENT = "in every caption all tokens became visible at one moment"
NO_TEXT = "every caption is empty"
NOT_VERIFIED = "no draft was verified"
NO_DRAFT_TOKEN = "no draft with a token was verified"
NOT_ANSWERED = "the cloud failed before it had verified a draft"
NOT_AHEAD = "no token was drafted ahead of a verdict (see --draft-ahead)"
NO_MESSAGES = "no message crossed a link"

PERCENTILE_REASONS = {
    f"{name}_p{percent}": f"needs at least {100 // (100 - percent)} clips with this time"
    for name in ("total", "ttft")
    for percent in PERCENTILES
}

# The reason for each metric that is None although its mode has rounds and shadow verification ran
NULL_REASONS = {
    "ttft": NO_TEXT,
    "ttft_final": NO_TEXT,
    **PERCENTILE_REASONS,
    "tpot": NOT_AFTER_FIRST,
    "otps": NOT_AFTER_FIRST,
    "itl_per_chunk": ONE_MOMENT,
    "itl_per_token": ONE_MOMENT,
    "edge_prefill": "this mode does not open the edge",
    "cloud_prefill": "no caption opened the cloud: no draft was escalated, or the cloud failed",
    "waste_ahead": NOT_AHEAD,
    "round_trip_exposed": NOT_VERIFIED,
    "round_trip_hidden": NOT_AHEAD,
    "acceptance_rate": NO_DRAFT_TOKEN,
    "mean_acceptance_length": NOT_VERIFIED,
    "correction_rate": NOT_VERIFIED,
    "wire_up_per_token": NO_MESSAGES,
    "wire_down_per_token": NO_MESSAGES,
    "never_sent": NO_MESSAGES,
    "cloud_faults": NO_MESSAGES,
    "degraded": NO_MESSAGES,
    "breaker_openings": NO_MESSAGES,
    "breaker_open": NO_MESSAGES,
    "useless_escalations": NOT_VERIFIED,
    "missed_corrections": "no token was local",
    "gate_auroc": "the gate did not score both a draft that the cloud changes and one that it accepts",
}


@dataclass(frozen=True)
class ClipResult:
    """One caption with its trace and its measurements."""

    clip: Clip
    caption: str
    trace: Trace
    utilization: Utilization
    ttft: float | None
    ttft_final: float | None
    e2e: float | None
    otps: float | None
    counts: metrics.Counts
    breakdown: LatencyBreakdown
    hindsight: metrics.Hindsight | None = None
    is_own: bool | None = None  # the audit's answer: the caption is the cloud's own; None if it was not drawn

    @property
    def after_first(self) -> tuple[int, float] | None:
        """The tokens and seconds after the first text, whose ratio is `otps`, or None where that is None."""
        if self.otps is None or self.ttft is None or self.e2e is None:
            return None
        return self.counts.tokens - 1, self.e2e - self.ttft


def clip_result(
    clip: Clip,
    trace: Trace,
    utilization: Utilization,
    decode: metrics.DecodeText,
    hindsight: metrics.Hindsight | None = None,
    is_own: bool | None = None,
) -> ClipResult:
    """Return the caption of a trace with its metrics."""
    ttft, e2e = metrics.ttft(trace, decode), metrics.e2e(trace)
    return ClipResult(
        clip,
        caption=decode(trace.tokens),
        trace=trace,
        utilization=utilization,
        ttft=ttft,
        ttft_final=metrics.ttft_final(trace, decode),
        e2e=e2e,
        otps=metrics.otps(len(trace.tokens), ttft, e2e),
        counts=metrics.counts(trace),
        breakdown=latency_breakdown(trace),
        hindsight=hindsight,
        is_own=is_own,
    )


@dataclass(frozen=True)
class Summary:
    """The metrics of one cell. A rate over clips is a ratio of sums."""

    clips: int
    figures: Figures
    reasons: dict[str, str]  # for each metric that is None, and for each that was measured in part
    counts: metrics.Counts  # summed over clips
    acceptance_by_position: tuple[float, ...]
    accepted_lengths: tuple[int, ...]  # number of verifications that accepted 0, 1, 2, ... draft tokens
    breakdown: LatencyBreakdown  # mean over clips
    closure_median: float | None  # sum of parts / wall seconds by another clock; None on the virtual clock
    closure_worst: float | None  # the ratio of the clip that is furthest from 1
    unnamed_median: float | None  # share of wall time in no part but `other`
    tokenizer: str
    normalisation: str
    bertscore_model: str | None
    empty_captions: int


def summarise(
    results: Sequence[ClipResult],
    language: str,
    bertscore_model: str | None = None,
    meaningless: str | None = None,
    normalisation: str = DEFAULT_NORMALISATION,
) -> tuple[Summary, quality.Quality]:
    """Return the metrics of one cell, and the quality scores of its captions (see `quality.score`).

    `results` must not be empty.
    """
    captions, references = [result.caption for result in results], [result.clip.references for result in results]
    traces = [result.trace for result in results]
    scores = quality.score(captions, references, language, bertscore_model, meaningless, normalisation)
    counts: metrics.Counts = reduce(add, (result.counts for result in results))
    figures = {
        **_time_figures(results),
        **_round_figures(results, counts),
        **_utilization_figures([result.utilization for result in results]),
        **scores.corpus,
        **_link_figures(results, counts.tokens),
        **_gate_figures(results),
    }
    summary = Summary(
        clips=len(results),
        figures={name: figures[name] for name in METRICS},
        reasons=_reasons(figures, results, scores.reasons),
        counts=counts,
        acceptance_by_position=tuple(metrics.acceptance_by_position(traces)),
        accepted_lengths=tuple(metrics.accepted_lengths(traces)),
        breakdown=mean_breakdown(result.breakdown for result in results),
        **_closure(results),
        tokenizer=scores.tokenizer,
        normalisation=scores.normalisation,
        bertscore_model=scores.bertscore_model,
        empty_captions=scores.empty,
    )
    return summary, scores


def _time_figures(results: Sequence[ClipResult]) -> Figures:
    traces = [result.trace for result in results]
    totals = [trace.seconds for trace in traces]
    ttfts = [result.ttft for result in results if result.ttft is not None]
    after_first = [pair for result in results if (pair := result.after_first)]
    tokens, seconds = sum(n for n, _ in after_first), sum(s for _, s in after_first)
    with_tokens = [(result.counts.tokens, result.e2e) for result in results if result.e2e is not None]
    return {
        "total": fmean(totals),
        "ttft": mean_or_none(ttfts),
        "ttft_final": mean_or_none(result.ttft_final for result in results),
        **percentile_figures(totals, ttfts),
        "e2e": mean_or_none(result.e2e for result in results),
        "tpot": metrics.tpot(tokens + 1, 0.0, seconds),
        "otps": metrics.otps(tokens + 1, 0.0, seconds),
        "e2e_tps": metrics.e2e_tps(sum(n for n, _ in with_tokens), sum(e2e for _, e2e in with_tokens)),
        "itl_per_chunk": mean_or_none(gap for trace in traces for gap in metrics.itl_per_chunk(trace)),
        "itl_per_token": mean_or_none(gap for trace in traces for gap in metrics.itl_per_token(trace)),
        "features": mean_or_none(map(metrics.feature_seconds, traces)),
        "edge_prefill": mean_or_none(metrics.prefill_seconds(trace, "edge") for trace in traces),
        "cloud_prefill": mean_or_none(metrics.prefill_seconds(trace, "cloud") for trace in traces),
    }


def percentile_figures(totals: Sequence[float], ttfts: Sequence[float]) -> Figures:
    """Return the percentiles of the seconds of whole captions and of TTFT."""
    series = {"total": totals, "ttft": ttfts}
    return {f"{name}_p{p}": metrics.percentile(series[name], p) for name in series for p in PERCENTILES}


def _round_figures(results: Sequence[ClipResult], counts: metrics.Counts) -> Figures:
    breakdowns = [result.breakdown for result in results]
    has_hidden = counts.ahead and counts.answered_calls
    return {
        "discarded_draft": fmean(breakdown.discarded for breakdown in breakdowns) if counts.rounds else None,
        "round_trip_exposed": fmean(breakdown.exposed for breakdown in breakdowns) if counts.answered_calls else None,
        "round_trip_hidden": fmean(breakdown.hidden for breakdown in breakdowns) if has_hidden else None,
        "cloud_calls": fmean(metrics.caption_calls(result.counts) for result in results),
        "unanswered_calls": counts.unanswered_calls / len(results) if counts.rounds else None,
        "retracted": counts.retracted / len(results) if counts.rounds else None,
        **{name: getattr(counts, name) for name in COUNT_RATES},
    }


def _utilization_figures(utilizations: Sequence[Utilization]) -> Figures:
    cpu = [block.cpu for block in utilizations if block.cpu is not None]
    has_all_cpu = len(cpu) == len(utilizations)
    return {
        "cpu_percent": 100 * sum(cpu) / sum(block.wall for block in utilizations) if has_all_cpu else None,
        "rss_peak": max_or_none(block.rss_peak_mb for block in utilizations),
        "rss_mean": mean_or_none(block.rss_mean_mb for block in utilizations),
        "gpu_percent": mean_or_none(block.gpu_percent for block in utilizations),
        "gpu_memory": max_or_none(block.gpu_memory_mb for block in utilizations),
    }


def _link_figures(results: Sequence[ClipResult], tokens: int) -> Figures:
    traces = [result.trace for result in results]
    sizes = [size for trace in traces if (size := metrics.wire_bytes(trace))]
    if not sizes:
        return dict.fromkeys(LINK_METRICS)
    return {
        "wire_up_per_token": sum(up for up, _ in sizes) / tokens,
        "wire_down_per_token": sum(down for _, down in sizes) / tokens,
        "never_sent": mean_or_none(
            size[0] == 0
            for trace in traces
            if (size := metrics.wire_bytes(trace)) and not metrics.degraded_reason(trace)
        ),
        "cloud_faults": fmean(map(metrics.failed_attempts, traces)),
        "degraded": fmean(metrics.degraded_reason(trace) is not None for trace in traces),
        "breaker_openings": sum(map(metrics.breaker_openings, traces)),
        "breaker_open": sum(map(metrics.met_open_breaker, traces)),
    }


def _gate_figures(results: Sequence[ClipResult]) -> Figures:
    hindsights = [result.hindsight for result in results if result.hindsight]
    local = sum(result.counts.local for result in results if result.hindsight)
    return {
        "useless_escalations": metrics.useless_escalations([result.trace for result in results]),
        "missed_corrections": metrics.missed_corrections(hindsights, local),
        "gate_auroc": metrics.auroc(hindsights),
    }


def _closure(results: Sequence[ClipResult]) -> Figures:
    """Return how well the parts of the latency breakdowns add up to wall time, by the fields of `Summary`."""
    # without CPU seconds nothing was measured, and the wall time is that of the trace itself
    timed = [(result.breakdown, result.utilization.wall) for result in results if result.utilization.cpu is not None]
    ratios = [breakdown.closure(wall) for breakdown, wall in timed]
    return {
        "closure_median": median(ratios) if ratios else None,
        "closure_worst": max(ratios, key=lambda ratio: abs(ratio - 1), default=None),
        "unnamed_median": median(breakdown.unnamed(wall) for breakdown, wall in timed) if timed else None,
    }


def _reasons(figures: Figures, results: Sequence[ClipResult], quality_reasons: dict[str, str]) -> dict[str, str]:
    """Return the reason for each metric that is None, and for each that was measured in part."""
    reasons = dict(quality_reasons)
    for result in results:
        reasons |= {name.removesuffix("_mb"): reason for name, reason in result.utilization.reasons.items()}
    has_rounds = any(result.counts.rounds for result in results)
    is_degraded = any(metrics.degraded_reason(result.trace) for result in results)
    has_hindsight = any(result.hindsight for result in results)
    for name, value in figures.items():
        if value is not None or name in reasons:
            continue
        if name in ROUND_METRICS and not has_rounds:
            reasons[name] = NO_ROUNDS
        elif name in ("missed_corrections", "gate_auroc") and not has_hindsight:
            reasons[name] = NO_SHADOW
        elif is_degraded and name in ANSWER_METRICS:
            reasons[name] = NOT_ANSWERED
        else:
            reasons[name] = NULL_REASONS[name]
    return reasons


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if all are None."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def min_or_none(values: Iterable[float | None]) -> float | None:
    """Return the smallest value that is not None, or None if all are None."""
    return min((value for value in values if value is not None), default=None)


def max_or_none(values: Iterable[float | None]) -> float | None:
    """Return the largest value that is not None, or None if all are None."""
    return max((value for value in values if value is not None), default=None)
