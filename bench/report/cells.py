"""The cells of a run as a report shows them. Only this module of the report names keys of `experiment_config`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from bench import comparison, forecasts
from bench.comparison import ClipRecord, Document
from bench.report.page import DASH
from edgecloud_sd.forecast.model import Forecast
from edgecloud_sd.forecast.recorded import forecast_from_results
from edgecloud_sd.measure import traces
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link
from edgecloud_sd.timing import profile as profiles

OUTPUT_MEANING = (
    "lossless: the target's own tokens; lossless but for near-ties: half precision can break a tie differently; "
    "lossy: no such promise"
)
NO_SAVED_FORECAST = (
    "no forecast: the results file of one cell does not have the costs of the cloud alone; save the run with "
    "--benchmark-save, and report that file"
)
IMPORT_PROFILE = "published-as-run"  # the costs that an imported run is forecast with
MACHINE_KEYS = ("system", "machine", "cpu", "cores", "gpu")  # times compare only if these are equal
# name of a fact -> templates over the results of a cell
FACTS = {
    "pair": ["{experiment_config[pair]}"],
    "edge": ["{experiment_config[edge_model]}", "{experiment_config[edge_device]}", "{experiment_config[edge_dtype]}"],
    "cloud": [
        "{experiment_config[cloud_model]}",
        "{experiment_config[cloud_device]}",
        "{experiment_config[cloud_dtype]}",
    ],
    "cloud service": ["{experiment_config[cloud_url]}", "engine {experiment_config[cloud_engine]}"],
    "clock": ["{experiment_config[clock]}", "cost profile {experiment_config[profile]}"],
    "data": ["{experiment_config[dataset_path]}", "digest {experiment_config[dataset_digest]:.12}"],
    "request": [
        "captions {experiment_config[caption_type]}",
        "prompt {experiment_config[prompt_type]}",
        "prompt file {experiment_config[prompt_file]} ({experiment_config[prompt_digest]})",
        "transcription in the prompt: {experiment_config[with_transcription]}",
        "at most {experiment_config[max_new_tokens]} tokens",
    ],
    "scores": [
        "tokenizer {metrics[tokenizer]}",
        "normalisation {metrics[score_normalisation]}",
        "BERTScore model {metrics[bertscore_model]}",
    ],
    "machine": [
        "{environment[system]} {environment[machine]}",
        "{environment[cpu]}",
        "{environment[cores]} cores",
    ],
    "GPU": ["{environment[gpu]}"],
    "software": [
        "Python {environment[python]}",
        "torch {environment[torch]}",
        "transformers {environment[transformers]}",
        "edgecloud_sd {environment[edgecloud_sd]}",
    ],
    "limits": [
        "cores {in_force[cores]}",
        "torch threads {in_force[torch_threads]}",
        "at most {in_force[memory_bytes]} bytes of memory",
        "{in_force[excess_gb]} GB of memory over the monitored limit",
    ],
}


@dataclass(frozen=True)
class ReportCell:
    """A cell of a run, with a label that is unique among the cells in its language."""

    label: str
    document: Document

    @property
    def mode(self) -> str:
        """`edge`, `cloud` or `speculative`."""
        return str(get_experiment(self.document)["strategy"]["mode"])

    @property
    def language(self) -> str:
        """`chinese` or `english`."""
        return str(get_experiment(self.document)["language"])

    @property
    def strategy(self) -> Strategy:
        """The way to decode."""
        return Strategy.from_json(get_experiment(self.document)["strategy"])

    @property
    def output(self) -> str:
        """The promise about the output, as OUTPUT_MEANING explains it."""
        return get_experiment(self.document)["output"] or DASH

    @property
    def case_id(self) -> str:
        """The id that the cell has in every run."""
        return get_case_id(self.document)

    @property
    def clips(self) -> dict[str, ClipRecord]:
        """The clips by file_id."""
        return comparison.clips_by_id(self.document)

    def metric(self, name: str) -> float | None:
        """Return a metric by its name in `summary.METRICS`."""
        return comparison.metric_value(self.document, name)


def get_experiment(document: Document) -> dict[str, Any]:
    """Return the settings that describe a cell."""
    experiment: dict[str, Any] = document["experiment_config"]
    return experiment


def get_case_id(document: Document) -> str:
    """Return the id that a cell has in every run."""
    return str(get_experiment(document)["case"])


def group_by_language(documents: Iterable[Document]) -> dict[str, list[ReportCell]]:
    """Return the cells by language. Labels that would be equal are replaced by case ids."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(get_experiment(document)["language"], []).append(document)
    cells = {}
    for language, group in groups.items():
        labels = [_short_label(document) for document in group]
        if len(set(labels)) < len(labels):
            labels = [get_case_id(document) for document in group]
        cells[language] = [ReportCell(*labelled) for labelled in zip(labels, group, strict=True)]
    return cells


def _short_label(document: Document) -> str:
    """Return the settings in which the cells of one run usually differ, or the name of an imported run."""
    experiment = get_experiment(document)
    if "origin" in document:  # its strategy is known in part
        return get_case_id(document)
    strategy = Strategy.from_json(experiment["strategy"])
    words = [*([] if strategy.is_speculative else [strategy.mode]), *strategy.details]
    if experiment["link"] not in (None, "none"):
        words.append(experiment["link"])
    return " ".join(words)


def list_facts(documents: Collection[Document]) -> dict[str, str]:
    """Return what the cells ran and on which machine, by name. A fact has several values if the cells differ."""
    facts = {}
    no_gpu = DASH if all("origin" in document for document in documents) else "none"  # an import has no machine
    for name, templates in FACTS.items():
        values = ["; ".join(_fill_template(template, documents)) for template in templates]
        facts[name] = ", ".join(filter(None, values)) or (no_gpu if name == "GPU" else DASH)
    counts = sorted({len(document["detailed_results"]) for document in documents})
    return facts | {"clips per cell": " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))}


def _fill_template(template: str, documents: Iterable[Document]) -> list[str]:
    """Return the different texts of a template, without cells that lack one of its values."""
    fields = re.findall(r"\{(\w+)\[(\w+)\](?::[^}]*)?\}", template)
    complete = (document for document in documents if all(document[part].get(key) is not None for part, key in fields))
    return list(dict.fromkeys(template.format_map(document) for document in complete))


def share_virtual_clock(a: Document, b: Document) -> bool:
    """Return whether both cells were timed by the same cost profile, so that their machines do not matter."""
    clocks = {get_experiment(document)["clock"] for document in (a, b)}
    return clocks == {"virtual"} and get_experiment(a)["profile_costs"] == get_experiment(b)["profile_costs"]


def forecast_results(document: Document) -> dict[str, dict[str, Any]]:
    """Return the forecast by case id, as `forecast_to_json` writes it, of a cell's results file."""
    return forecast_imported(document) if "origin" in document else forecast_from_traces(document)


def forecast_imported(document: Document) -> dict[str, dict[str, Any]]:
    """Return the forecast of an imported speculative run by case id, from its counts and the costs as published."""
    if get_experiment(document)["strategy"]["mode"] != "speculative":
        return {}
    try:
        answer: Forecast | str = forecast_from_results(document, profiles.load_profile(IMPORT_PROFILE))
    except ValueError as error:
        answer = f"no forecast: {error}"
    saved = forecasts.forecast_to_json(answer)
    sentence = f"With the costs of the profile {IMPORT_PROFILE}, from the counts of the file: {saved['sentence']}"
    return {get_case_id(document): saved | ({"sentence": sentence} if saved["forecast"] else {})}


def forecast_from_traces(document: Document) -> dict[str, dict[str, Any]]:
    """Return the forecast by case id, as `forecast_to_json` writes it, from the traces in a cell's results file."""
    experiment = get_experiment(document)
    in_one_process = experiment["clock"] == "real" and not experiment["cloud_url"]
    on_one_device = in_one_process and experiment.get("edge_device") == experiment.get("cloud_device")
    try:
        cell = forecasts.DecodedCell(
            Strategy.from_json(experiment["strategy"]),
            link.find_link(experiment["link"] or "none"),
            [traces.trace_from_json(clip["trace"]) for clip in document["detailed_results"]],
        )
        costs = experiment["profile_costs"] and profiles.profile_from_json(experiment["profile_costs"])
        answers = forecasts.forecast_cells({get_case_id(document): cell}, costs or None, on_one_device)
        if forecasts.NO_CLOUD_STEP in answers.values():  # the file of mode cloud may be beside this one
            answers = {get_case_id(document): NO_SAVED_FORECAST}
    except (ValueError, KeyError, TypeError) as error:  # this version may not know a trace or a link
        answers = {get_case_id(document): f"no forecast: {error}"}
    return {case: forecasts.forecast_to_json(answer) for case, answer in answers.items()}
