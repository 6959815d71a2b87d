"""The labels of a report's cells are explained in words."""

from __future__ import annotations

import pytest

from bench.report.cells import ReportCell
from bench.report.label_words import explain_labels
from edgecloud_sd.acceptance import parse_rule
from edgecloud_sd.gate import NEVER, entropy_gate, parse_draft_stop, parse_gate, risk_gate
from edgecloud_sd.strategy import REVISE_LOSSLESS, Strategy

GATE = entropy_gate(1.5)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Strategy("edge"), ["the edge decodes alone"]),
        (Strategy("cloud"), ["the cloud decodes alone"]),
        (Strategy("edge", drafter="model+lookup"), ["the edge decodes alone", "checks in one pass"]),
        (Strategy(drafter="lookup"), ["every draft", "3", "own most likely", "what followed the same tokens"]),
        (Strategy(), ["every draft", "at most 3 draft tokens", "its own most likely token"]),
        (Strategy(gate=NEVER, k=None), ["no draft", "found while decoding", "own most likely"]),
        (
            Strategy(gate=GATE, rule=parse_rule("rank(20)"), draft_ahead=2, prefill="lazy"),
            ["above 1.5 nats", "at most 3", "its 20 most likely tokens", "up to 2 tokens", "at the first escalation"],
        ),
        (
            Strategy(rule=parse_rule("synthetic(0.7)"), draft_stop=parse_draft_stop("margin=0.3", GATE)),
            ["every", "3", "by chance", "by less than 0.3"],
        ),
        (REVISE_LOSSLESS, ["at its end always", "at most 1", "own", "its token or its context is the old one"]),
        (
            Strategy(gate=risk_gate(0.5, 0.2, 0.01), revise="aligned", drafter="model+lookup"),
            [
                "end if the risk since the last verdict is above 0.2, and before it above 0.5",
                "3",
                "own",
                "other places",
                "checks in one pass",
            ],
        ),
        (
            Strategy(gate=parse_gate("token(margin)", 0.3), revise="repeat", look_back=True),
            [
                "cloud writes a token itself if the edge's has a difference between its two highest",
                "3",
                "own",
                "repeat its old token",
                "take them back",
            ],
        ),
        (Strategy(gate=parse_gate("logprob", 0.7)), ["a negative log probability above 0.7 nats", "3", "own"]),
        (Strategy(gate=GATE, draft_stop=parse_draft_stop("entropy=2", GATE)), ["1.5", "3", "own", "above 2 nats"]),
    ],
)
def test_every_part_of_a_label_has_a_meaning(strategy: Strategy, words: list[str]) -> None:
    label = " ".join([*([] if strategy.is_speculative else [strategy.mode]), *strategy.details, "4g"])
    document = {"experiment_config": {"strategy": strategy.to_json(), "link": "4g"}}
    terms = explain_labels([ReportCell(label, document)] * 2)
    assert " ".join(term for term, _ in terms) == label
    for (_, meaning), expected in zip(terms, [*words, "network link"], strict=True):
        assert expected in meaning


def test_an_imported_run_has_no_label_to_explain() -> None:
    assert explain_labels([ReportCell("recorded-x", {"origin": {}})]) == []
