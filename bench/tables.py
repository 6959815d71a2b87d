"""The tables that a run prints at its end, the description of a case, and the names of the results files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate
from wcwidth import wcswidth

from bench import payoff
from bench.cases import Case, cases, dataset_name
from bench.comparison import Document
from bench.forecasts import answer_sentence
from bench.reasons import explain_dashes
from edgecloud_sd.acceptance import Synthetic
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.config import Settings
from edgecloud_sd.forecast.model import Forecast
from edgecloud_sd.host.paths import hide_folders
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.summary import Figures, Summary
from edgecloud_sd.models.devices import AUTO, LOSSLESS_DTYPES
from edgecloud_sd.models.pairs import DUMMY, checkpoint_name
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault

MAX_TABLE_WIDTH = 140
# heading -> name in summary.METRICS, format, factor from the metric's unit to the heading's
SUMMARY_COLUMNS: dict[str, tuple[str, str, float]] = {
    "TTFT ms": ("ttft", ".1f", 1e3),
    "OTPS": ("otps", ".1f", 1),
    "total ms": ("total", ".1f", 1e3),
    "CPU %": ("cpu_percent", ".0f", 1),
    "RAM MB": ("rss_peak", ".0f", 1),
    "GPU %": ("gpu_percent", ".0f", 1),
    "BLEU-1": ("bleu1", ".3f", 1),
    "BLEU-4": ("bleu4", ".3f", 1),
    "METEOR": ("meteor", ".3f", 1),
    "CIDEr": ("cider", ".2f", 1),
    "acceptance": ("acceptance_rate", ".3f", 1),
    "cloud calls": ("cloud_calls", ".2f", 1),
    "corrections": ("correction_rate", ".3f", 1),
    "missed": ("missed_corrections", ".3f", 1),
}


def results_file(settings: Settings, case: Case) -> Path:
    """Return `<output_name>.json` for a run of one cell, or `<output_name>-<id>.json` for a cell of a grid."""
    is_alone = len(cases(settings)) == 1
    name = settings.output_name if is_alone else f"{settings.output_name}-{case.id}"
    return Path(settings.results_dir) / f"{name}.json"


def profile_file(settings: Settings) -> Path:
    """Return the file of the profile that `--profile measure` writes."""
    return Path(settings.results_dir) / f"{settings.output_name}-profile.yaml"


def describe_case(
    case: Case, pipeline: Pipeline, settings: Settings, profile: Profile | None, dataset_digest: str
) -> dict[str, Any]:
    """Return the experiment of a case, for `extra_info` and the results file.

    The settings of the grid appear once, as the case's own strategy, link and language. A checkpoint and a data set
    have a name and a digest in place of a path, because a path says nothing about the experiment.
    """
    cloud = cloud_identity(case.strategy, pipeline)
    tasks = settings.own_tasks
    shared = {name: value for name, value in asdict(settings).items() if not isinstance(value, tuple)}
    for name in ("results_dir", "cloud_key_file"):
        del shared[name]
    for name in ("edge_model", "cloud_model", "bertscore_model"):
        if shared[name] and Path(shared[name]).is_dir():
            shared[name] = checkpoint_name(shared[name])
    if settings.calibrated:
        shared["calibration"] = settings.calibrated.name
    if cloud:
        shared |= {"cloud_model": cloud.name, "cloud_device": cloud.device, "cloud_dtype": cloud.dtype}
    experiment = shared | {
        "case": case.id,
        "pair": pipeline.pair.name,
        "edge_weights": pipeline.edge_weights if case.strategy.needs_edge else None,
        "dataset_path": dataset_name(settings),
        "dataset_digest": dataset_digest,
        "cloud_url": settings.cloud_url and (AUTO if settings.cloud_url == AUTO else "elsewhere"),
        "cloud_engine": cloud.engine if cloud else None,
        "cloud_fingerprint": cloud.fingerprint if cloud else None,
        "strategy": case.strategy.to_json(),
        "language": case.language,
        "prompt_file": tasks.name if tasks else None,
        "prompt_digest": tasks.digest(case.language) if tasks else None,
        "prompt_text": tasks.text(case.language) if tasks else None,
        "link": case.link.name if cloud else None,
        "profile": settings.profile_name or None,
        "profile_costs": asdict(profile) if profile else None,
        "output": output_promise(case.strategy, cloud.dtype if cloud else ""),
    }
    hidden: dict[str, Any] = hide_folders(experiment)
    return hidden


def cloud_identity(strategy: Strategy, pipeline: Pipeline) -> Identity | None:
    """Return the identity of the cloud that a strategy asks, or None if there is none.

    A dead cloud has none. Raise its CloudFault unless the run goes on without it.
    """
    try:
        mode, _ = pipeline.prepare_for(strategy)
    except CloudFault:
        if not pipeline.finish_alone:
            raise
        return None
    return pipeline.cloud.identity if mode != "edge" else None


def output_promise(strategy: Strategy, cloud_dtype: str) -> str | None:
    """Return how the output relates to the cloud's own: lossless, near-lossless, lossy, or None for mode edge.

    Half precision makes it near-lossless: passes over one and over many tokens differ in their last bits.
    """
    if strategy.mode == "edge":
        return None
    if not strategy.is_lossless:
        return "lossy"
    return "lossless" if strategy.mode == "cloud" or cloud_dtype in LOSSLESS_DTYPES else "near-lossless"


def why_meaningless(settings: Settings, case: Case) -> str | None:
    """Return why captions of this case have no quality, or None if they have."""
    if settings.weights == DUMMY:
        return "weights are random, so captions mean nothing"
    if isinstance(case.strategy.rule, Synthetic):
        return f"rule {case.strategy.rule.text} accepts tokens by chance, so captions mean nothing"
    return None


def render_summaries(summaries: Mapping[str, Summary]) -> str:
    """Return a table with one row per case, and below it the ids of short names and the reason for each dash."""
    labels = short_names(summaries)
    summaries = {labels[case]: summary for case, summary in summaries.items()}
    rows = []
    for case, summary in summaries.items():
        values = [(summary.figures[metric], form, factor) for metric, form, factor in SUMMARY_COLUMNS.values()]
        cells = ["-" if value is None else format(value * factor, form) for value, form, factor in values]
        rows.append([case, str(summary.clips), *cells])
    table = grid(rows, ["case", "clips", *SUMMARY_COLUMNS])
    lengths = [
        f"- accepted lengths ({label}): {describe_lengths(summary.accepted_lengths)}"
        for label, summary in summaries.items()
        if sum(summary.accepted_lengths)
    ]
    costs = [
        f"- costs at the cloud ({label}): {describe_costs(summary.figures)}"
        for label, summary in summaries.items()
        if summary.figures["cloud_calls"]
    ]
    legend = [f"{case} = {label}" for case, label in labels.items() if case != label]
    return "\n".join([table, *legend, *_reasons(summaries), *_cloud_notes(summaries), *costs, *lengths])


def render_breakdowns(summaries: Mapping[str, Summary]) -> str:
    """Return the latency breakdown of each case in ms per caption, and its closure (sum of the parts / wall time)."""
    breakdowns = [summary.breakdown for summary in summaries.values()]
    parts = [part for part in PARTS if any(breakdown.parts[part] for breakdown in breakdowns)]
    attributes = {"discarded draft": "discarded"}
    if any(breakdown.hidden for breakdown in breakdowns):
        attributes |= {"round trip exposed": "exposed", "hidden": "hidden"}
    labels, rows = short_names(summaries), []
    for case, summary in summaries.items():
        seconds = [summary.breakdown.parts[part] for part in parts]
        seconds += [getattr(summary.breakdown, attribute) for attribute in attributes.values()]
        closures = (summary.closure_median, summary.closure_worst)
        rows.append(
            [labels[case]]
            + [milliseconds(value) for value in seconds]
            + ["-" if closure is None else f"{closure:.2%}" for closure in closures]
        )
    headings = [*(part.replace("_", " ") for part in parts), *attributes, "sum / wall", "worst clip"]
    return grid(rows, ["ms per caption", *headings])


def render_payoff(documents: Mapping[str, Document], forecasts: Mapping[str, Forecast | str]) -> str:
    """Return if each speculative case pays: a table of its speed-ups, then a sentence per case and per forecast.

    The text is empty without speculative cases.
    """
    rows, sentences, labels = [], [], short_names(documents)
    for case, document in documents.items():
        if document["experiment_config"]["strategy"]["mode"] != "speculative":
            continue
        compared = payoff.payoffs(document, documents.values(), "bleu4")
        forecast = forecasts.get(case)
        numbers = None if forecast is None or isinstance(forecast, str) else asdict(forecast)
        rows += [[labels[case], *row] for row in payoff.payoff_rows(compared, numbers)]
        sentences.append(f"- {labels[case]}: {payoff.payoff_sentence(compared, 'BLEU-4')}")
    if not sentences:
        return ""
    table = [grid(rows, ["case", "times as fast as", *payoff.SPEEDUPS])] if rows else []
    answers = [
        f"- forecast for {labels.get(case, case)}: {answer_sentence(answer)}" for case, answer in forecasts.items()
    ]
    return "\n".join([*table, *sentences, *answers])


def milliseconds(seconds: float) -> str:
    """Return seconds in ms with one digit. A remainder that rounds to zero has no sign."""
    return format(round(1e3 * seconds, 1) + 0.0, ".1f")


def short_names(cases: Iterable[str]) -> dict[str, str]:
    """Return a short name for each case id: its parts that some other id lacks. Ids stay if names would be equal."""
    parts = {case: case.split("-") for case in cases}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    names = {}
    for case, words in parts.items():
        own = [word for word in words if word not in common]
        is_told_by_details = len(own) > 1 and own[0] == "speculative"
        names[case] = " ".join(own[is_told_by_details:])
    is_usable = all(names.values()) and len(set(names.values())) == len(names)
    return names if is_usable else {case: case for case in parts}


def grid(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    """Return a table for a terminal. The first column is aligned left, the others right.

    Columns are two blanks apart, or one in a table that would be wider than `MAX_TABLE_WIDTH`.
    """
    wide, narrow = (_grid(rows, headings, gap) for gap in ("  ", " "))
    return wide if wcswidth(wide.partition("\n")[0]) <= MAX_TABLE_WIDTH else narrow


def _grid(rows: Sequence[Sequence[str]], headings: Sequence[str], gap: str) -> str:
    cells, line = DataRow("", gap, ""), Line("", "-", gap, "")
    layout = TableFormat(None, line, None, None, cells, cells, 0, None)
    # headings as a row: tabulate makes columns wider than their headings
    lines = tabulate(
        [headings, SEPARATING_LINE, *rows],
        tablefmt=layout,
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headings) - 1),
    )
    return "\n".join(line.rstrip() for line in lines.splitlines())


def describe_costs(figures: Figures) -> str:
    """Return the four costs at the cloud, of which no single one stands for the others."""
    forms = {
        "cloud_calls": "{:.2f} calls per caption",
        "written_share": "{:.3f} of the tokens written",
        "covered_share": "{:.3f} written or accepted",
        "cloud_positions_per_token": "{:.2f} positions computed per token",
    }
    return ", ".join(form.format(value) for name, form in forms.items() if (value := figures[name]) is not None)


def describe_lengths(counts: Sequence[int]) -> str:
    """Return the share of the verifications that accepted so many draft tokens, without those that are 0."""
    total = sum(counts)
    shares = ", ".join(f"{length} in {count / total:.0%}" for length, count in enumerate(counts) if count)
    return f"{shares} of {total} verifications"


def _cloud_notes(summaries: Mapping[str, Summary]) -> list[str]:
    """Return a line for each case in which some captions were never sent, had cloud faults or were degraded."""
    notes = {
        "never_sent": "{:.0%} of the captions were never sent to the cloud",
        "cloud_faults": "{:.2f} attempts to reach the cloud failed per caption",
        "degraded": "{:.0%} of the captions were finished by the edge alone, because the cloud failed",
        "breaker_open": "{:.0f} captions did not try the cloud, because it had failed repeatedly before",
    }
    return [
        f"- {case}: {note.format(value)}"
        for case, summary in summaries.items()
        for metric, note in notes.items()
        if (value := summary.figures[metric])
    ]


def _reasons(summaries: Mapping[str, Summary]) -> list[str]:
    """Return a line per reason for null metrics, with their columns and cases."""
    names = {metric: heading for heading, (metric, _, _) in SUMMARY_COLUMNS.items()}
    cells = {case: (summary.figures, summary.reasons) for case, summary in summaries.items()}
    return [f"- {columns}: {reason}" for columns, reason in explain_dashes(names, cells)]
