"""The metrics of the published project under its own names, computed by its formulas from our traces.

`CLIP_METRICS` and `RUN_METRICS` are the only list of them. A key is a path in a published file: of a clip, or of the
whole file. Where generations of the published files disagree, the latest one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgecloud_sd.events import Prepared
from edgecloud_sd.measure import metrics, quality
from edgecloud_sd.measure.summary import (
    NOT_VERIFIED,
    ClipResult,
    Summary,
    max_or_none,
    mean_or_none,
    min_or_none,
)

MB_PER_GIB = 1024**3 / 1e6
NO_DRAFTS = "only mode speculative sends drafts to a cloud"
NO_FEATURES = "no time passed before the prompt was ready"
EDGE_PARTS, CLOUD_PARTS = ("edge_prefill", "draft", "gate"), ("cloud_prefill", "cloud_queue", "verify", "cloud_decode")


@dataclass(frozen=True)
class PublishedClip:
    """One caption, its scores by name, and the mode and k of its strategy. Adaptive k is no number."""

    result: ClipResult
    scores: Mapping[str, float | None]
    mode: str
    k: int | str | None

    @property
    def ready(self) -> float:
        """Seconds until the prompt is ready, at which the published clock of a generation starts."""
        return metrics.feature_seconds(self.result.trace) or 0.0

    @property
    def steps(self) -> list[float]:
        """Seconds from then to each moment at which tokens became visible."""
        return [seconds - self.ready for seconds, _ in metrics.chunks(self.result.trace)]

    @property
    def output_time(self) -> float:
        """Seconds from then to the end of the caption."""
        return self.result.trace.seconds - self.ready

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, audio positions included."""
        return next(event.prompt_tokens for _, event in self.result.trace.events if isinstance(event, Prepared))

    @property
    def taken(self) -> int | None:
        """Tokens that the published code counts as accepted: verified or not, and corrections."""
        counts = self.result.counts
        return counts.local + counts.accepted + counts.correction if self.mode == "speculative" else None

    @property
    def is_unanswered(self) -> bool:
        """True if the cloud was asked and never answered."""
        counts = self.result.counts
        return 0 < counts.cloud_calls == counts.unanswered_calls

    def count(self, name: str) -> int | None:
        """Return a count of `metrics.Counts`, or None in the modes edge and cloud."""
        value: int = getattr(self.result.counts, name)
        return value if self.mode == "speculative" else None


@dataclass(frozen=True)
class PublishedMetric:
    """The description of a published metric. `ours` is our nearest metric, whose reason explains a null, if any."""

    unit: str
    definition: str
    ours: str
    function: Callable[..., Any]
    reason: str = NO_DRAFTS


def _over(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _rate(part: float | None, whole: float | None, clip: PublishedClip) -> float | None:
    return None if clip.is_unanswered else _over(part, whole)  # a cloud that never answered has a rate of nothing


def _spent(parts: Sequence[str], clip: PublishedClip) -> float:
    return sum(clip.result.breakdown.parts[part] for part in parts)


def _gib(megabytes: float | None) -> float | None:
    return None if megabytes is None else megabytes / MB_PER_GIB


def _score(name: str, clip: PublishedClip) -> float | None:
    return clip.scores[name]


def _stream_speed(clip: PublishedClip) -> float | None:
    return _over(clip.result.counts.tokens, clip.output_time - clip.steps[0]) if len(clip.steps) > 1 else None


def _cloud_call_rate(clip: PublishedClip) -> float | None:
    drafted = clip.count("drafted")
    return _over(clip.count("cloud_calls"), drafted // clip.k + 1) if drafted and isinstance(clip.k, int) else None


def _scores(suffix: str = "_score") -> dict[str, PublishedMetric]:
    sentence = "of this clip; theirs smooths with NLTK's method 1"
    plain = {
        f"bleu{suffix}": ("bleu4", f"BLEU-4 {sentence}"),
        f"bleu_1{suffix}": ("bleu1", f"BLEU-1 {sentence}"),
        f"bleu_4{suffix}": ("bleu4", f"BLEU-4 {sentence}"),
        f"meteor{suffix}": ("meteor", "METEOR of this clip; theirs splits Chinese where it has spaces"),
        f"rouge_l{suffix}": ("rouge_l", "ROUGE-L of this clip with beta 1.2; theirs is F1 of stemmed Latin words"),
        f"cider{suffix}": ("cider", "CIDEr-D of this clip, 0 to 10; theirs is a cosine of counts, or always 0"),
        **{name: (name, "BERTScore of this clip, not rescaled; some of theirs are") for name in quality.BERTSCORE},
    }
    return {
        name: PublishedMetric("", text, ours, partial(_score, ours), "this score was not measured")
        for name, (ours, text) in plain.items()
    }


_TIMES = {
    "ttft": PublishedMetric(
        "s", "Prompt ready to the first committed token; early files give the end of the output",
        "ttft", lambda clip: clip.steps[0] if clip.steps else None, "no token was committed"),
    "itps": PublishedMetric(
        "tokens/s", "Prompt tokens / seconds to prepare the prompt: no prefill is in it",
        "features", lambda clip: _over(clip.prompt_tokens, clip.ready), NO_FEATURES),
    "otps": PublishedMetric(
        "tokens/s", "N / oet, prefill included; one generation divides by the sum of the moments of all steps",
        "otps", lambda clip: _over(clip.result.counts.tokens, clip.output_time)),
    "oet": PublishedMetric("s", "Prompt ready to the end", "total", lambda clip: clip.output_time),
    "total_time": PublishedMetric("s", "Request to the end", "total", lambda clip: clip.result.trace.seconds),
    "input_tokens": PublishedMetric("tokens", "Tokens of the prompt", "", lambda clip: clip.prompt_tokens),
    "output_tokens": PublishedMetric("tokens", "N", "", lambda clip: clip.result.counts.tokens),
}  # fmt: skip
_USE = {
    "cpu_percent": PublishedMetric(
        "%", "CPU seconds / wall seconds; theirs is a mean of readings, 0.1 at least; early files count otherwise",
        "cpu_percent", lambda clip: clip.result.utilization.cpu_percent),
    "ram_gb": PublishedMetric(
        "GiB", "Mean resident memory of the process",
        "rss_mean", lambda clip: _gib(clip.result.utilization.rss_mean_mb)),
    "gpu_util": PublishedMetric(
        "%", "Mean of the readings of the GPU; theirs is the largest, and 0 without a GPU",
        "gpu_percent", lambda clip: clip.result.utilization.gpu_percent),
    "gpu_memory_gb": PublishedMetric(
        "GiB", "Largest reading of the whole GPU's memory; theirs is the last one, and 0 without a GPU",
        "gpu_memory", lambda clip: _gib(clip.result.utilization.gpu_memory_mb)),
}  # fmt: skip
_COUNTS = {
    "cloud_calls": PublishedMetric(
        "calls", "Escalated rounds", "cloud_call_rate", lambda clip: clip.count("cloud_calls")),
    "total_draft_tokens": PublishedMetric("tokens", "Draft tokens", "", lambda clip: clip.count("drafted")),
    "total_accepted_tokens": PublishedMetric(
        "tokens", "Local tokens, accepted tokens and corrections: local ones that nobody verified count",
        "", lambda clip: clip.taken),
    "total_corrections": PublishedMetric("tokens", "Corrections", "", lambda clip: clip.count("correction")),
    "cloud_verified_tokens": PublishedMetric(
        "tokens", "Verified draft tokens", "", lambda clip: clip.count("verified")),
    "acceptance_rate": PublishedMetric(
        "0 to 1", "total_accepted_tokens / total_draft_tokens: near 1 if little is verified",
        "acceptance_rate", lambda clip: _rate(clip.taken, clip.count("drafted"), clip)),
    "correction_rate": PublishedMetric(
        "0 to 1", "Corrections / answered cloud calls; theirs is 0 without a call",
        "correction_rate", lambda clip: clip.result.counts.correction_rate, NOT_VERIFIED),
    "token_level_cloud_rate": PublishedMetric(
        "0 to 1", "Verified draft tokens / N: rejected ones count, so it may exceed 1",
        "acceptance_rate", lambda clip: _rate(clip.count("verified"), clip.result.counts.tokens, clip)),
    "corrected_token_rate": PublishedMetric(
        "0 to 1", "Corrections / N",
        "correction_rate", lambda clip: _rate(clip.count("correction"), clip.result.counts.tokens, clip)),
    "cloud_call_rate": PublishedMetric(
        "0 to 1", "Cloud calls / (draft tokens // k + 1), in place of the rounds",
        "", _cloud_call_rate, "modes edge and cloud verify nothing, and k may be adaptive"),
}  # fmt: skip
_STREAM = {
    **{name: metric for name, metric in _TIMES.items() if name not in ("otps", "itps", "oet", "total_time")},
    "itps": PublishedMetric("tokens/s", "Always 0 there", "", lambda clip: None, "no stream has a speed of its input"),
    "otps": PublishedMetric(
        "tokens/s", "N / (oet - ttft): N tokens in the time of N - 1",
        "otps", _stream_speed, "all tokens became visible at one moment"),
    "oet": _TIMES["oet"],
    "total_time": PublishedMetric("s", "The same as oet there", "total", lambda clip: clip.output_time),
    "first_token_time": _TIMES["ttft"],
    "step_times": PublishedMetric(
        "s", "Moments at which tokens became visible, from the prompt on", "", lambda clip: clip.steps),
    "text_chunks": PublishedMetric(
        "", "The text of each step", "", lambda clip: None, "a caption is decoded whole; token_ids has its tokens"),
}  # fmt: skip
_ROUNDS = {
    "total_tokens": _TIMES["output_tokens"],
    "accepted_tokens": _COUNTS["total_accepted_tokens"],
    "rejected_tokens": PublishedMetric(
        "tokens", "Draft tokens that were thrown away", "waste", lambda clip: clip.count("discarded")),
    "total_latency": _TIMES["oet"],
    "edge_latency": PublishedMetric("s", "Prefill, drafts and gate of the edge", "", partial(_spent, EDGE_PARTS)),
    "cloud_latency": PublishedMetric(
        "s", "Prefill, queue and passes of the cloud, if the edge waited for them", "", partial(_spent, CLOUD_PARTS)),
    "total_rounds": PublishedMetric("rounds", "Rounds", "", lambda clip: clip.count("rounds")),
    "acceptance_rate": _COUNTS["acceptance_rate"],
    "tokens_per_second": _TIMES["otps"],
    "sample_time": _TIMES["total_time"],
    "success": PublishedMetric("", "A clip that fails ends the run here", "", lambda clip: True),
}  # fmt: skip
_LIMITED = {
    "cpu_avg": _USE["cpu_percent"],
    "cpu_max": PublishedMetric("%", "Largest reading", "", lambda clip: None, "no reading of the CPU is kept"),
    "memory_avg_gb": _USE["ram_gb"],
    "memory_max_gb": PublishedMetric(
        "GiB", "Highest resident memory; theirs is the largest reading",
        "rss_peak", lambda clip: _gib(clip.result.utilization.rss_peak_mb)),
    "prefill_time": PublishedMetric(
        "s", "Audio encoder and prefill of the edge",
        "edge_prefill", lambda clip: metrics.prefill_seconds(clip.result.trace, "edge"), "the edge was not opened"),
}  # fmt: skip


def _under(prefix: str, table: Mapping[str, PublishedMetric]) -> dict[str, PublishedMetric]:
    return {f"{prefix}.{name}": metric for name, metric in table.items()}


CLIP_METRICS = {
    **_scores(),
    **_under("latency_metrics", _TIMES | _USE | _LIMITED | _COUNTS),
    **_under("latency_metrics.streaming_metrics", _STREAM),
    **_under(
        "speculative_decoding_metrics",
        {name: _TIMES[name] for name in ("total_time", "output_tokens")} | _COUNTS,
    ),
    **_ROUNDS,
}
STATISTICS = {"mean": mean_or_none, "min": min_or_none, "max": max_or_none}


def _statistic(name: str, kind: str) -> Callable[[Sequence[PublishedClip], Summary], float | None]:
    metric = (_TIMES | _USE)[name]
    return lambda clips, _: STATISTICS[kind](metric.function(clip) for clip in clips)


def _sum(name: str) -> Callable[[Sequence[PublishedClip], Summary], int | None]:
    metric = (_COUNTS | _TIMES | _ROUNDS)[name]
    return lambda clips, _: sum(values) if None not in (values := [metric.function(clip) for clip in clips]) else None


def _acceptance_rate(clips: Sequence[PublishedClip], summary: Summary) -> float | None:
    if all(clip.is_unanswered for clip in clips):
        return None
    return _over(_sum("total_accepted_tokens")(clips, summary), _sum("total_draft_tokens")(clips, summary))


def _mean_of(name: str) -> Callable[[Sequence[PublishedClip], Summary], float | None]:
    metric = (_COUNTS | _TIMES | _ROUNDS)[name]
    return lambda clips, _: mean_or_none(metric.function(clip) for clip in clips)


def _mean_score(name: str) -> Callable[[Sequence[PublishedClip], Summary], float | None]:
    return lambda clips, _: mean_or_none(clip.scores[name] for clip in clips)


def _figure(name: str) -> Callable[[Sequence[PublishedClip], Summary], float | None]:
    return lambda _, summary: summary.figures[name]


def _averages() -> dict[str, PublishedMetric]:
    """Return the averages of the scores of clips, of each generation."""
    names = {
        "avg_bleu": "bleu_score", "avg_bleu_sentence": "bleu_score", "avg_bleu_1_sentence": "bleu_1_score",
        "avg_bleu_4_sentence": "bleu_4_score", "avg_meteor_sentence": "meteor_score",
        "avg_rouge_l_sentence": "rouge_l_score", "avg_cider": "cider_score",
        **{f"avg_{name}": name for name in quality.BERTSCORE},
    }  # fmt: skip
    return {
        name: PublishedMetric(
            "", f"Mean of {clip} over clips", CLIP_METRICS[clip].ours, _mean_score(CLIP_METRICS[clip].ours)
        )
        for name, clip in names.items()
    }


def _corpus() -> dict[str, PublishedMetric]:
    """Return the scores of the corpus. The published names end in the first letters of the language."""
    text = "of the corpus; theirs is sacrebleu's, with 13a or zh, here with our tokenizer"
    bleu = {
        f"corpus_bleu{order}_{code}": PublishedMetric("0 to 1", f"BLEU-{order[1:] or 4} {text}", name, _figure(name))
        for order, name in (("", "bleu4"), ("_1", "bleu1"), ("_4", "bleu4"))
        for code in ("ch", "en")
    }
    return bleu | {
        f"corpus_{name}": PublishedMetric("", f"The cell's {name}; see the score of a clip", name, _figure(name))
        for name in ("meteor", "rouge_l", "cider")
    }


RUN_METRICS = {
    **_under("metrics", _averages() | _corpus()),
    **{
        f"metrics.latency_metrics.{name}_{kind}": PublishedMetric(
            metric.unit, f"{kind} over clips of {name}", metric.ours, _statistic(name, kind), metric.reason
        )
        for name, metric in (_TIMES | _USE).items()
        for kind in STATISTICS
        if not name.endswith("_tokens")
    },
    **{
        f"metrics.latency_metrics.{kind}_{name}": PublishedMetric(
            "tokens", f"{kind} over clips of {name}", "", _mean_of(name) if kind == "avg" else _sum(name)
        )
        for name in ("input_tokens", "output_tokens")
        for kind in ("avg", "total")
    },
    **_under("metrics.speculative_decoding_metrics", {
        "total_time_mean": PublishedMetric("s", "mean over clips of total_time", "total", _mean_of("total_time")),
        "avg_cloud_calls": PublishedMetric("calls", "Cloud calls / clips", "", _mean_of("cloud_calls")),
        "avg_acceptance_rate": PublishedMetric(
            "0 to 1", "total_accepted_tokens / total_draft_tokens, both summed: tokens that nobody verified count",
            "acceptance_rate", _acceptance_rate),
        "avg_correction_rate": PublishedMetric(
            "0 to 1", "Corrections / answered cloud calls, both summed; theirs is 0 without a call",
            "correction_rate", _figure("correction_rate"), NOT_VERIFIED),
        "avg_cloud_call_rate": PublishedMetric(
            "calls", "Cloud calls / clips, so no rate: the same as avg_cloud_calls", "", _mean_of("cloud_calls")),
        "avg_token_level_cloud_rate": PublishedMetric(
            "0 to 1", "mean over clips of token_level_cloud_rate",
            "acceptance_rate", _mean_of("token_level_cloud_rate")),
        "avg_corrected_token_rate": PublishedMetric(
            "0 to 1", "mean over clips of corrected_token_rate", "correction_rate", _mean_of("corrected_token_rate")),
        "total_samples": PublishedMetric("clips", "Clips", "", lambda clips, _: len(clips)),
    }),
    **_under("speculative_metrics", {
        "avg_latency": PublishedMetric("s", "mean over clips of oet", "", _mean_of("oet")),
        "avg_tokens_per_second": PublishedMetric("tokens/s", "mean over clips of otps", "", _mean_of("otps")),
        "avg_acceptance_rate": PublishedMetric(
            "0 to 1", "mean over clips of acceptance_rate", "acceptance_rate", _mean_of("acceptance_rate")),
        "avg_rounds": PublishedMetric("rounds", "Rounds / clips", "", _mean_of("total_rounds")),
        "total_tokens": PublishedMetric("tokens", "N, summed", "", _sum("output_tokens")),
        "total_cloud_calls": PublishedMetric("calls", "Cloud calls, summed", "", _sum("cloud_calls")),
        "cloud_call_rate": PublishedMetric("calls", "Cloud calls / clips, so no rate", "", _mean_of("cloud_calls")),
    }),
}  # fmt: skip


def published_section(
    results: Sequence[ClipResult], summary: Summary, scores: quality.Quality, strategy: Mapping[str, Any], language: str
) -> dict[str, Any]:
    """Return the published metrics of a cell, nested as in a published file, with the reason for each null."""
    per_clip = scores.per_clip
    clips = [
        PublishedClip(
            result, {name: values[index] for name, values in per_clip.items()}, strategy["mode"], strategy["k"]
        )
        for index, result in enumerate(results)
    ]
    other_language = "_en" if language == "chinese" else "_ch"
    values = {
        name: metric.function(clips, summary)
        for name, metric in RUN_METRICS.items()
        if not name.endswith(other_language)
    }
    records = [{name: metric.function(clip) for name, metric in CLIP_METRICS.items()} for clip in clips]
    reasons = {name: _explain(RUN_METRICS[name], summary) for name, value in values.items() if value is None}
    for name, metric in CLIP_METRICS.items():
        if any(record[name] is None for record in records):
            reasons[f"detailed_results.{name}"] = _explain(metric, summary)
    nested = [
        {"file_id": clip.result.clip.file_id} | _nest(record) for clip, record in zip(clips, records, strict=True)
    ]
    return _nest(values) | {"detailed_results": nested, "reasons": reasons}


def _explain(metric: PublishedMetric, summary: Summary) -> str:
    return summary.reasons.get(metric.ours, metric.reason)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted path as nested objects."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree
