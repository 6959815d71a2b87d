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
