"""What is said of one way to decode: every figure, by name, from its captions. `METRICS` is the one list of them."""

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


@dataclass(frozen=True)
class Metric:
    """A figure of a cell. `better` is None where neither direction is."""

    unit: str
    better: Literal["higher", "lower"] | None
    meaning: str


METRICS = {
    "total": Metric("s", "lower", "request (samples in memory) to the end of the caption; mean over clips"),
    "ttft": Metric(
        "s", "lower", "request to the first token with text: features, prefill of both sides, link and all; mean"
    ),
    "e2e": Metric("s", "lower", "request to the last token; mean over clips"),
    "tpot": Metric("s", "lower", "a token after the first: sum of (last - first) / sum of (N - 1)"),
    "otps": Metric(
        "tokens/s",
        "higher",
        "after the first token: sum of (N - 1) / sum of (last - first), over clips whose tokens came at more than one "
        "moment. What comes together with the first token counts as if it took no time",
    ),
    "e2e_tps": Metric("tokens/s", "higher", "over the whole request: sum of N / sum of e2e"),
    "itl_per_chunk": Metric("s", "lower", "between one moment at which tokens became visible and the next; mean"),
    "itl_per_token": Metric("s", "lower", "the same, each gap divided by the tokens that came at its end; mean"),
    "features": Metric("s", "lower", "log-mel spectrogram and prompt; mean over clips"),
    "edge_prefill": Metric("s", "lower", "the edge's audio encoder and prefill; mean over clips"),
    "cloud_prefill": Metric(
        "s",
        "lower",
        "waiting for the cloud's, its queue and the link on the way there, as far as the edge was not at work "
        "meanwhile; mean over clips that waited",
    ),
    "discarded_draft": Metric("s", "lower", "spent on draft tokens that were thrown away; mean over clips"),
    "round_trip_exposed": Metric(
        "s", "lower", "waited for verdicts, from sending a draft or from drafting ahead to the answer; mean over clips"
    ),
    "round_trip_hidden": Metric(
        "s", "higher", "of the way of verdicts, passed while the edge drafted ahead; mean over clips"
    ),
    "cpu_percent": Metric("%", None, "CPU seconds of the process / wall seconds: above 100 on several cores"),
    "rss_peak": Metric("MB", "lower", "highest resident memory of the process while captioning; largest over clips"),
    "rss_mean": Metric("MB", "lower", "mean resident memory of the process while captioning; mean over clips"),
    "gpu_percent": Metric("%", None, "mean of NVML's utilisation of the cloud's GPU, or the first; mean over clips"),
    "gpu_memory": Metric("MB", "lower", "highest memory in use on that GPU, by whatever process; largest over clips"),
    "bleu1": Metric("0 to 1", "higher", "corpus BLEU-1"),
    "bleu2": Metric("0 to 1", "higher", "corpus BLEU-2"),
    "bleu3": Metric("0 to 1", "higher", "corpus BLEU-3"),
    "bleu4": Metric("0 to 1", "higher", "corpus BLEU-4"),
    "meteor": Metric("0 to 1", "higher", "METEOR (needs Java)"),
    "rouge_l": Metric("0 to 1", "higher", "ROUGE-L, mean over clips"),
    "cider": Metric("0 to 10", "higher", "CIDEr-D, mean over clips"),
    "bertscore_precision": Metric("0 to 1", "higher", "BERTScore precision, mean over clips (see --bertscore-model)"),
    "bertscore_recall": Metric("0 to 1", "higher", "BERTScore recall, mean over clips"),
    "bertscore_f1": Metric("0 to 1", "higher", "BERTScore F1, mean over clips"),
    "language_match": Metric("0 to 1", "higher", "captions in the language asked for / captions"),
    "acceptance_rate": Metric(
        "0 to 1", "higher", "accepted / draft tokens sent for verification; local tokens and corrections are neither"
    ),
    "mean_acceptance_length": Metric("tokens", "higher", "accepted, correction and bonus tokens / verify calls"),
    "correction_rate": Metric("0 to 1", "lower", "corrections / cloud calls"),
    "cloud_call_rate": Metric("0 to 1", "lower", "rounds that went to the cloud / rounds"),
    "cloud_calls_per_token": Metric("calls", "lower", "cloud calls / N"),
    "covered_share": Metric("0 to 1", None, "tokens that the cloud verified or wrote / N"),
    "local_share": Metric("0 to 1", None, "local tokens / N"),
    "waste": Metric("0 to 1", "lower", "discarded / drafted tokens"),
    "waste_ahead": Metric("0 to 1", "lower", "wasted / made of the tokens drafted ahead of a verdict, with guesses"),
    "wire_up_per_token": Metric("bytes", "lower", "sent to the cloud / N: requests with their HTTP heads"),
    "wire_down_per_token": Metric("bytes", "lower", "sent back / N"),
    "never_sent": Metric("0 to 1", "higher", "captions of which nothing was sent to the cloud / captions"),
    "cloud_faults": Metric("attempts", "lower", "attempts on the cloud that failed; mean over clips"),
    "degraded": Metric("0 to 1", "lower", "captions that the edge finished alone, the cloud having failed / captions"),
    "useless_escalations": Metric("0 to 1", "lower", "escalated drafts in which nothing was corrected / escalated"),
    "missed_corrections": Metric("0 to 1", "lower", "local tokens that the cloud would have replaced / local tokens"),
    "gate_auroc": Metric(
        "0 to 1", "higher", "chance that the gate scores a draft that the cloud rejects above one that it accepts"
    ),
}


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
    breakdown: LatencyBreakdown
    hindsight: metrics.Hindsight | None = None

    @property
    def after_first(self) -> tuple[int, float] | None:
        """(tokens, s) that OTPS is of: after the first token with text; None for a caption that came at one moment."""
        if self.otps is None or self.ttft is None or self.e2e is None:
            return None
        return self.counts.tokens - 1, self.e2e - self.ttft


def clip_result(
    clip: Clip,
    trace: Trace,
    used: Utilization,
    decode: metrics.DecodeText,
    hindsight: metrics.Hindsight | None = None,
) -> ClipResult:
    """All that is said of one caption, from its trace."""
    first, last = metrics.ttft(trace, decode), metrics.e2e(trace)
    n = len(trace.tokens)
    return ClipResult(
        clip,
        caption=decode(trace.tokens),
        trace=trace,
        used=used,
        ttft=first,
        e2e=last,
        otps=metrics.otps(n, first, last),
        counts=metrics.counts(trace),
        breakdown=latency_breakdown(trace),
        hindsight=hindsight,
    )


@dataclass(frozen=True)
class Summary:
    """One cell. Rates over clips are ratios of sums; a figure that is undefined is None and has a reason."""

    clips: int
    figures: dict[str, float | None]  # by the names of FIGURES
    reasons: dict[str, str]  # for the figures that are None, and for what was measured in part
    counts: metrics.Counts
    acceptance_by_position: tuple[float, ...]
    breakdown: LatencyBreakdown  # mean over clips
    # sum of a breakdown / wall seconds by another clock, None where the clock was virtual: median, and furthest from 1
    closure_median: float | None
    closure_worst: float | None
    unnamed_median: float | None  # share of the wall seconds in no part but `other`
    tokenizer: str
    bertscore_model: str | None
    empty_captions: int


def summarise(
    results: Sequence[ClipResult],
    language: str,
    bertscore_model: str | None = None,
    meaningless: str | None = None,
) -> tuple[Summary, quality.Quality]:
    """The figures of one cell, and the quality that they rest on, as `quality.score` has it. `results` must not be
    empty."""
    captions, references = [each.caption for each in results], [each.clip.references for each in results]
    scores = quality.score(captions, references, language, bertscore_model, meaningless)
    total: metrics.Counts = reduce(add, (each.counts for each in results))
    traces = [each.trace for each in results]
    spread = [part for each in results if (part := each.after_first)]
    tokens, after_first = sum(n for n, _ in spread), sum(s for _, s in spread)
    ended = [each for each in results if each.e2e is not None]
    wire = [found for trace in traces if (found := metrics.wire_bytes(trace))]
    looks = [each.hindsight for each in results if each.hindsight]
    used = [each.used for each in results]
    cpu = [each.cpu for each in used if each.cpu is not None]
    figures: dict[str, float | None] = {
        "total": fmean(trace.seconds for trace in traces),
        "ttft": mean_or_none(each.ttft for each in results),
        "e2e": mean_or_none(each.e2e for each in results),
        "tpot": metrics.tpot(tokens + 1, 0.0, after_first),
        "otps": metrics.otps(tokens + 1, 0.0, after_first),
        "e2e_tps": metrics.e2e_tps(sum(each.counts.tokens for each in ended), sum(each.e2e or 0.0 for each in ended)),
        "itl_per_chunk": mean_or_none(gap for trace in traces for gap in metrics.itl_per_chunk(trace)),
        "itl_per_token": mean_or_none(gap for trace in traces for gap in metrics.itl_per_token(trace)),
        "features": mean_or_none(map(metrics.feature_seconds, traces)),
        "edge_prefill": mean_or_none(metrics.prefill_seconds(trace, "edge") for trace in traces),
        "cloud_prefill": mean_or_none(metrics.prefill_seconds(trace, "cloud") for trace in traces),
        "discarded_draft": fmean(each.breakdown.discarded for each in results) if total.rounds else None,
        "round_trip_exposed": fmean(each.breakdown.exposed for each in results) if total.cloud_calls else None,
        "round_trip_hidden": fmean(each.breakdown.hidden for each in results) if total.ahead else None,
        "cpu_percent": 100 * sum(cpu) / sum(each.wall for each in used) if len(cpu) == len(used) else None,
        "rss_peak": max_or_none(each.rss_peak_mb for each in used),
        "rss_mean": mean_or_none(each.rss_mean_mb for each in used),
        "gpu_percent": mean_or_none(each.gpu_percent for each in used),
        "gpu_memory": max_or_none(each.gpu_memory_mb for each in used),
        **scores.corpus,
        **{name: getattr(total, name) for name in COUNT_RATES},
        "wire_up_per_token": sum(up for up, _ in wire) / total.tokens if wire else None,
        "wire_down_per_token": sum(down for _, down in wire) / total.tokens if wire else None,
        "never_sent": fmean(up == 0 for up, _ in wire) if wire else None,
        "cloud_faults": fmean(map(metrics.failed_attempts, traces)) if wire else None,
        "degraded": fmean(metrics.degraded_reason(trace) is not None for trace in traces) if wire else None,
        "useless_escalations": metrics.useless_escalations(traces),
        "missed_corrections": metrics.missed_corrections(
            looks, sum(each.counts.local for each in results if each.hindsight)
        ),
        "gate_auroc": metrics.auroc(looks),
    }
    timed = [each for each in results if each.used.cpu is not None]  # the others' wall time is their trace's own
    closures = [each.breakdown.closure(each.used.wall) for each in timed]
    summary = Summary(
        clips=len(results),
        figures={name: figures[name] for name in METRICS},
        reasons=_reasons(figures, results, scores.reasons, total),
        counts=total,
        acceptance_by_position=tuple(metrics.acceptance_by_position(traces)),
        breakdown=mean_breakdown(each.breakdown for each in results),
        closure_median=median(closures) if closures else None,
        closure_worst=max(closures, key=lambda closure: abs(closure - 1), default=None),
        unnamed_median=median(each.breakdown.unnamed(each.used.wall) for each in timed) if timed else None,
        tokenizer=scores.tokenizer,
        bertscore_model=scores.bertscore_model,
        empty_captions=scores.empty,
    )
    return summary, scores


# Figures that are properties of the counts
COUNT_RATES = (
    "acceptance_rate", "mean_acceptance_length", "correction_rate", "cloud_call_rate", "cloud_calls_per_token",
    "covered_share", "local_share", "waste", "waste_ahead",
)  # fmt: skip


def _reasons(
    figures: dict[str, float | None],
    results: Sequence[ClipResult],
    known: dict[str, str],
    total: metrics.Counts,
) -> dict[str, str]:
    """Why each figure that is None is so."""
    reasons = dict(known)
    for each in results:
        reasons |= {name.removesuffix("_mb"): reason for name, reason in each.used.reasons.items()}
    one_moment = "no caption has a token later than its first with text"
    no_link = "there is no link to cross"
    no_ahead = "nothing was drafted ahead of a verdict (see --draft-ahead)"
    verified = "nothing was verified" if total.rounds else "this mode has no rounds"
    looked = (
        ""
        if any(each.hindsight for each in results)
        else "the cloud was not asked afterwards (see --shadow; not under rule synthetic)"
    )
    if looked and not total.cloud_calls:
        looked = "no draft went to the cloud"
    guesses = {
        "ttft": "every caption is empty",
        "tpot": one_moment,
        "otps": one_moment,
        "itl_per_chunk": "no caption came at more than one moment",
        "itl_per_token": "no caption came at more than one moment",
        "edge_prefill": "this mode does not open the edge",
        "cloud_prefill": "no draft was escalated" if total.rounds else "this mode does not open the cloud",
        "discarded_draft": "this mode has no rounds",
        "waste": "this mode has no rounds",
        "waste_ahead": no_ahead,
        "round_trip_exposed": verified,
        "round_trip_hidden": no_ahead,
        "cloud_call_rate": verified,
        "cloud_calls_per_token": verified,
        "acceptance_rate": verified,
        "mean_acceptance_length": verified,
        "correction_rate": verified,
        "wire_up_per_token": no_link,
        "wire_down_per_token": no_link,
        "never_sent": no_link,
        "cloud_faults": no_link,
        "degraded": no_link,
        "useless_escalations": verified,
        "missed_corrections": looked or "no token was local",
        "gate_auroc": looked or "the gate scored no drafts of both kinds, rejected and accepted",
    }
    missing = [name for name, value in figures.items() if value is None]
    return reasons | {name: guesses[name] for name in missing if name not in reasons}


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def min_or_none(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def max_or_none(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
