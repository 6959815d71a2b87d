"""The short labels of cells in words: `H1.5 k3 rank20` is a gate, a draft length and a rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bench.report.cells import ReportCell, get_experiment
from bench.report.page import Block, BulletList, Paragraph
from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.gate import RISK_LIMIT, DraftStop, Gate
from edgecloud_sd.strategy import ADAPTIVE_K, Strategy
from edgecloud_sd.timing.link import NO_LINK

DRAFTER_WORDS = {
    "model": [],
    "lookup": [("lookup", "drafts are what followed the same tokens in the prompt and in earlier captions")],
    "model+lookup": [("model_lookup", "the edge checks in one pass what lookup in earlier captions guesses")],
}
REVISE_WORDS = {
    "repeat": "after a correction the edge takes the target's opinion where it would repeat its old token",
    "context": "after a correction the edge takes the target's opinions where its token or its context is the old one",
    "aligned": "as revise_context, and also at other places after equal tokens",
}
STATISTIC_WORDS = {
    "entropy": "an entropy above",
    "margin": "a difference between its two highest probabilities below",
    "logprob": "a negative log probability above",
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
    if strategy.revise != "none":
        yield f"revise_{strategy.revise}", REVISE_WORDS[strategy.revise]
    if strategy.look_back and strategy.gate.name != "risk":
        yield "lookback", "local tokens are sent as draft later, so that the cloud can take them back"
    yield from DRAFTER_WORDS[strategy.drafter]


def _gate_words(gate: Gate) -> str:
    if gate.name == "risk":
        return _risk_words(gate)
    if gate.score:
        beyond = f"{STATISTIC_WORDS[gate.statistic]} {gate.limit:g}{'' if gate.statistic == 'margin' else ' nats'}"
        if gate.stops_before_token:
            return f"gate: the cloud writes a token itself if the edge's has {beyond}"
        return f"gate: a draft goes to the cloud if a token of it has {beyond}"
    return f"gate: {'every' if gate.can_escalate else 'no'} draft goes to the cloud"


def _risk_words(gate: Gate) -> str:
    at_end = "always" if gate.sends_all else f"if the risk since the last verdict is above {gate.send_above:g}"
    early = "" if gate.threshold == RISK_LIMIT else f", and before it above {gate.threshold:g}"
    return (
        f"gate: a caption goes to the cloud at its end {at_end}{early}; an opinion of the target has a risk of "
        f"{gate.opinion_risk:g}"
    )


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
