"""The short labels of cells in words: `H1.5 k3 rank20` is a gate, a draft length and a rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bench.report.cells import ReportCell, get_experiment
from bench.report.page import Block, BulletList, Paragraph
from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.gate import DraftStop, Gate
from edgecloud_sd.strategy import ADAPTIVE_K, Strategy
from edgecloud_sd.timing.link import NO_LINK

DRAFTER_WORDS = {
    "model": [],
    "lookup": [("lookup", "drafts are what followed the same tokens in the prompt and in earlier captions")],
    "model+lookup": [("model_lookup", "the edge checks in one pass what lookup in earlier captions guesses")],
}
MODE_WORDS = {"edge": "the edge decodes alone", "cloud": "the cloud decodes alone"}


def explain_labels(cells: Iterable[ReportCell]) -> list[tuple[str, str]]:
    """Return each part of the labels once, with its meaning. An imported run has a name instead of a label."""
    terms: dict[str, str] = {}
    for cell in cells:
        if "origin" in cell.document:
            continue
        terms |= dict(_explain_strategy(cell.strategy))
        name = get_experiment(cell.document)["link"]
        if name not in (None, NO_LINK.name):
            terms[name] = "the emulated network link between edge and cloud"
    return list(terms.items())


def list_label_words(cells: Iterable[ReportCell]) -> list[Block]:
    """Return the meanings of the labels as a list of a report, or nothing for imported runs."""
    terms = explain_labels(cells)
    return [Paragraph("The names of the cells in words:"), BulletList(terms)] if terms else []


def _explain_strategy(strategy: Strategy) -> Iterator[tuple[str, str]]:
    if not strategy.is_speculative:
        yield strategy.mode, MODE_WORDS[strategy.mode]
        yield from DRAFTER_WORDS[strategy.drafter]
        return
    yield strategy.gate.label, _gate_words(strategy.gate)
    if strategy.k is None:
        yield f"k{ADAPTIVE_K}", "the draft length k is found while decoding"
    else:
        yield f"k{strategy.k}", f"draft length: at most {strategy.k} draft tokens per round"
    yield strategy.rule.label, _rule_words(strategy.rule)
    if strategy.draft_stop:
        yield strategy.draft_stop.label, _draft_stop_words(strategy.draft_stop)
    if strategy.draft_ahead:
        yield f"ahead{strategy.draft_ahead}", f"draft-ahead: up to {strategy.draft_ahead} tokens during a verification"
    if strategy.prefill == "lazy":
        yield strategy.prefill, "the cloud prefills at the first escalation, not beside the edge"
    yield from DRAFTER_WORDS[strategy.drafter]


def _gate_words(gate: Gate) -> str:
    if gate.score:
        return f"gate: a draft goes to the cloud if a token of it has an entropy above {gate.threshold:g} nats"
    return f"gate: {'every' if gate.can_escalate else 'no'} draft goes to the cloud"


def _rule_words(rule: Rule) -> str:
    if not isinstance(rule, Rank):
        return "rule: the cloud accepts draft tokens by chance, at given rates"
    if rule.is_lossless:
        return "rule: the cloud accepts a draft token if it is its own most likely token"
    return f"rule: the cloud accepts a draft token if it is among its {rule.r} most likely tokens"


def _draft_stop_words(stop: DraftStop) -> str:
    if stop.name == "margin":
        return f"a draft ends where the two most likely tokens differ by less than {stop.limit:g} in probability"
    return f"a draft ends with a token whose entropy is above {stop.limit:g} nats"
