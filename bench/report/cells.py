"""What the reports of one file and of two have in common: how cells are called, chosen and described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.comparison import Document
from bench.report.page import DASH
from bench.report.runs import Run
from edgecloud_sd.measure.metrics import Interval

MAIN = (
    "ttft", "otps", "total", "bleu4", "cider", "meteor", "bertscore_f1", "acceptance_rate", "cloud_call_rate",
    "useless_escalations", "missed_corrections", "cpu_percent", "rss_peak",
)  # fmt: skip
OUTPUT = "exact: the cloud's own tokens; near-exact: the same but for near-ties; lossy: neither"
FEW = 20  # clips below which an interval is too narrow to rely on


@dataclass(frozen=True)
class ReportOptions:
    """`quality`: the figure of FIGURES that is set against latency; `clips`: how many are shown with their captions."""

    quality: str = "bleu4"
    clips: int = 20


Cells = Mapping[str, Document]  # by label


def experiment(document: Document) -> dict[str, Any]:
    """What a cell was."""
    found: dict[str, Any] = document["experiment_config"]
    return found


def languages(documents: Iterable[Document]) -> list[tuple[str, str]]:
    """Each language of the cells, with what to add to a title: nothing where there is but one."""
    found = [*dict.fromkeys(experiment(document)["language"] for document in documents)]
    return [(each, f" ({each})" if len(found) > 1 else "") for each in found]


def cell_label(document: Document) -> str:
    """What tells a cell from the others of a run, shorter than its id."""
    cell = experiment(document)
    words = [cell["mode"]] if cell["mode"] != "speculative" else [cell["gate"], f"k{cell['k']}", cell["rule"]]
    words += ["lazy"] if cell["open"] == "lazy" else []
    words += [cell["link"]] if cell["link"] not in (None, "none") else []
    return " ".join(map(str, words))


def labelled(documents: Iterable[Document], language: str) -> dict[str, Document]:
    """The cells in a language by label; by id where labels would be alike."""
    documents = [document for document in documents if experiment(document)["language"] == language]
    short = [cell_label(document) for document in documents]
    unique = len(set(short)) == len(short)
    return {text if unique else experiment(each)["case"]: each for text, each in zip(short, documents, strict=True)}


def facts(run: Run) -> list[tuple[str, str]]:
    """What a run was and ran on, line by line; several values where its cells differ."""
    documents = list(run.cells.values())

    def of(part: str, *keys: str, form: str = "{}") -> str:
        """The values of these keys; `form` says them all."""
        values = [[document[part].get(key) for key in keys] for document in documents]
        return "; ".join(dict.fromkeys(form.format(*each) for each in values if None not in each))

    def together(*values: str) -> str:
        return ", ".join(value for value in values if value) or DASH

    def side(which: str) -> str:
        return together(*(of("experiment_config", f"{which}_{what}") for what in ("model", "device", "dtype")))

    counts = [len(document["detailed_results"]) for document in documents]
    few, many = min(counts), max(counts)
    return [
        ("pair", together(of("experiment_config", "pair"))),
        ("edge", side("edge")),
        ("cloud", side("cloud")),
        (
            "cloud's place",
            together(
                of("experiment_config", "cloud_url", form="a service ({})"),
                of("experiment_config", "cloud_engine", form="engine {}"),
            ),
        ),
        ("clock", together(of("experiment_config", "clock"), of("experiment_config", "profile", form="profile {}"))),
        ("data", together(of("experiment_config", "dataset_path"))),
        ("clips a cell", str(few) if few == many else f"{few} to {many}"),
        (
            "asked for",
            together(
                of("experiment_config", "caption_type", form="captions {}"),
                of("experiment_config", "prompt_type", form="prompt {}"),
                of("experiment_config", "max_new_tokens", form="at most {} tokens"),
            ),
        ),
        (
            "text compared by",
            together(of("metrics", "tokenizer"), of("metrics", "bertscore_model", form="BERTScore model {}")),
        ),
        (
            "machine",
            together(
                of("environment", "system", "machine", form="{} {}"),
                of("environment", "cpu"),
                of("environment", "cores", form="{} cores"),
                of("environment", "gpu") or "no GPU",
            ),
        ),
        (
            "software",
            together(
                *(
                    of("environment", key, form=f"{text} {{}}")
                    for key, text in {
                        "python": "Python",
                        "torch": "torch",
                        "transformers": "transformers",
                        "edgecloud_sd": "edgecloud_sd",
                    }.items()
                )
            ),
        ),
        (
            "in force",
            together(
                of("in_force", "cores", form="on cores {}"),
                of("in_force", "torch_threads", form="torch threads {}"),
                of("in_force", "memory_bytes", form="at most {} bytes of memory"),
            ),
        ),
        ("saved", run.saved or DASH),
    ]


def interval(found: Interval | None) -> str:
    """`1.23 [1.10, 1.40]`, or a dash."""
    return DASH if found is None else str(found)


def caveat(clips: int) -> str:
    """What an interval over so many clips does not say."""
    few = f" Over {clips} clips an interval comes out too narrow." if clips < FEW else ""
    return f"They hold what differs from clip to clip, not what the machine did in between.{few}"
