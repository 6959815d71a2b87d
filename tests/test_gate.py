"""Gates and draft stops: when a draft is escalated, and where a draft ends early."""

from __future__ import annotations

import math

import pytest
import torch

from edgecloud_sd import gate
from edgecloud_sd.events import Draft
from edgecloud_sd.gate import parse_draft_stop


@pytest.mark.parametrize(("scores", "escalated"), [((0.2, 1.5), False), ((0.2, 1.6), True), ((1.6, 0.1), True)])
def test_the_entropy_gate_compares_the_largest_score(scores: tuple[float, ...], escalated: bool) -> None:
    assert gate.entropy_gate(1.5)(Draft((1, 2), scores)) is escalated


def test_a_threshold_of_0_is_gate_always_and_an_infinite_one_is_gate_never() -> None:
    assert gate.entropy_gate(0) == gate.entropy_gate(-3) == gate.parse_gate("always", 9) == gate.ALWAYS
    assert gate.entropy_gate(math.inf) == gate.parse_gate("never", 9) == gate.NEVER
    assert gate.ALWAYS(Draft((1,)))
    assert gate.ALWAYS.can_escalate
    assert not gate.NEVER(Draft((1,)))
    assert not gate.NEVER.can_escalate


def test_an_unknown_gate_and_a_threshold_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown gate 'rank': choose one of entropy, .*, always, never"):
        gate.parse_gate("rank", 1)
    with pytest.raises(ValueError, match="not nan"):
        gate.entropy_gate(math.nan)


@pytest.mark.parametrize(
    ("text", "label"),
    [("entropy", "stopH1.5"), ("entropy=0.5", "stopH0.5"), ("margin=0.25", "stopM0.25"), ("none", None)],
)
def test_the_label_of_a_draft_stop_shows_its_statistic_and_threshold(text: str, label: str | None) -> None:
    stop = parse_draft_stop(text, gate.entropy_gate(1.5))
    assert (stop and stop.label) == label
    assert parse_draft_stop("entropy", gate.ALWAYS) is None


@pytest.mark.parametrize(
    "text", ["", "entropy=", "entropy=0", "entropy=nan", "margin", "margin=0", "margin=1.5", "top=3"]
)
def test_an_unknown_draft_stop_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="none, entropy, entropy=x, margin=x"):
        parse_draft_stop(text, gate.ALWAYS)


@pytest.mark.parametrize(("text", "stops"), [("margin=0.5", [False, True]), ("entropy=0.6", [False, True])])
def test_a_margin_stops_a_draft_below_its_threshold_and_an_entropy_above(text: str, stops: list[bool]) -> None:
    rows = torch.tensor([[4.0, 0.0], [0.5, 0.0]])  # margins 0.96 and 0.24, entropies 0.09 and 0.66 nats
    stop = parse_draft_stop(text, gate.ALWAYS)
    assert stop is not None
    assert [stop(row, []) for row in rows] == stops


RISK = gate.risk_gate(0.5, 0.2, 0.01)  # R > 0.5 at once, R > 0.2 at the end


@pytest.mark.parametrize(
    ("risks", "asks_at_once", "asks_at_end"),
    [
        ((), False, False),
        ((0.5,), False, True),
        ((0.1, 0.1), False, False),  # R = 0.19
        ((0.1, 0.2), False, True),  # R = 0.28
        ((0.3, 0.3), True, True),  # R = 0.51
        ((1.0, 0.0), True, True),
    ],
)
def test_gate_risk_sums_up_all_tokens_since_the_last_verdict(
    risks: tuple[float, ...], asks_at_once: bool, asks_at_end: bool
) -> None:
    draft = Draft((7,), risks)
    assert gate.total_risk(risks) == pytest.approx(1 - math.prod(1 - risk for risk in risks))
    assert RISK.ends_draft(risks) is RISK(draft) is asks_at_once
    assert RISK(draft, is_end=True) is asks_at_end
    assert gate.risk_gate(1.0, -0.5)(draft, is_end=True)  # below 0 it sends all
    assert not gate.risk_gate(1.0, 1.0)(draft, is_end=True)


def test_gate_risk_is_lossless_only_if_it_sends_all() -> None:
    assert [gate.risk_gate(0.5, level).sends_all for level in (-1, -1e-9, 0, 0.3)] == [True, True, False, False]
    assert gate.risk_gate() == gate.parse_gate("risk", 1.0, -1.0, 0.02)


@pytest.mark.parametrize(
    ("name", "threshold", "asks"),
    [
        ("logprob", 0.4, [False, True]),  # -ln p is 0.018 and 0.474 nats
        ("token(logprob)", 0.4, [False, True]),
        ("margin", 0.5, [False, True]),  # 0.96 and 0.24
        ("token(margin)", 0.5, [False, True]),
        ("entropy", 0.6, [False, True]),  # 0.09 and 0.66 nats
        ("token", 0.6, [False, True]),
        ("risk", 0.2, [False, True]),  # 0.018 and 0.378
    ],
)
def test_each_statistic_asks_about_the_uncertain_token(name: str, threshold: float, asks: list[bool]) -> None:
    chosen = gate.parse_gate(name, threshold)
    assert chosen.score is not None
    rows = torch.tensor([[4.0, 0.0], [0.5, 0.0]])
    assert [chosen(Draft((0,), (chosen.score(row),))) for row in rows] == asks
    assert [chosen.ends_draft([chosen.score(row)]) for row in rows] == [
        ask and (name == "risk" or name.startswith("token")) for ask in asks
    ]
    assert chosen.limit == threshold
