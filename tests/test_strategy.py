"""The record of one way to decode: its label, its JSON, and the combinations that it refuses."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import config, gate
from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.grid import cells
from edgecloud_sd.lookup import DRAFTERS
from edgecloud_sd.strategy import MODES, Strategy
from tests.support.strategies import draft_stops, gates, ks, prefills, ranks, synthetics


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    """Draw any strategy."""
    mode, drafter = draw(st.sampled_from(MODES)), draw(st.sampled_from(DRAFTERS))
    if mode != "speculative":
        return Strategy(mode, drafter="model+lookup" if (mode, drafter) == ("edge", "lookup") else "model")
    if drafter == "lookup":
        return Strategy(rule=draw(ranks | synthetics), k=draw(ks), prefill=draw(prefills), drafter=drafter)
    chosen, k = draw(gates), draw(ks | st.none())
    stop, ahead = draw(draft_stops(chosen)), draw(st.integers(0, 9))
    return Strategy(mode, chosen, draw(ranks | synthetics), k, stop, ahead, draw(prefills), drafter=drafter)


def test_a_speculative_strategy_is_lossless_without_further_fields() -> None:
    strategy = Strategy("speculative", k=4)
    assert strategy.is_lossless
    assert (strategy.gate, strategy.rule) == (gate.ALWAYS, GREEDY)
    assert Strategy("cloud").is_lossless
    assert not Strategy("edge").is_lossless
    assert not Strategy("speculative", gate.entropy_gate(1.5)).is_lossless
    assert not Strategy("speculative", rule=Rank(2)).is_lossless


@given(strategies())
def test_a_strategy_survives_json_exactly(strategy: Strategy) -> None:
    assert Strategy.from_json(json.loads(json.dumps(strategy.to_json()))) == strategy


@given(strategies())
def test_a_label_is_a_file_name_and_begins_with_the_mode(strategy: Strategy) -> None:
    assert re.fullmatch(r"[\w.-]+", strategy.label)
    assert strategy.label.split("-")[0] == strategy.mode


def test_a_label_names_every_field_that_is_not_usual() -> None:
    chosen = gate.entropy_gate(1.5)
    strategy = Strategy("speculative", chosen, Rank(20), None, gate.parse_draft_stop("margin=0.3", chosen), 16, "lazy")
    assert strategy.label == "speculative-H1.5-kauto-rank20-stopM0.3-ahead16-lazy"
    assert Strategy("speculative", k=4).label == "speculative-always-k4-greedy"
    assert Strategy("cloud").label == "cloud"
    assert Strategy("edge", drafter="model+lookup").label == "edge-model_lookup"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "both"}, "unknown mode 'both': choose one of edge, cloud, speculative"),
        ({"k": 0}, "k must be at least 1, or None to find it while decoding, not 0"),
        ({"prefill": "lzay"}, "prefill must be one of eager, lazy, not 'lzay'"),
        ({"draft_ahead": -1}, "draft_ahead must be at least 0, not -1"),
        (
            {"draft_stop": gate.parse_draft_stop("entropy", gate.entropy_gate(1.5))},
            "draft_stop stopH1.5 reads the gate's score, and gate always has none",
        ),
        ({"drafter": "lokup"}, "unknown drafter 'lokup': choose one of model, lookup, model.lookup"),
        ({"drafter": "lookup", "gate": gate.NEVER}, "drafter lookup runs no model, so its gate is always, not never"),
        ({"drafter": "lookup", "draft_ahead": 2}, "drafter lookup runs no model, so its draft_ahead is 0, not 2"),
        (
            {"drafter": "lookup", "revise": "context"},
            "drafter lookup runs no model, so its revise is none, not context",
        ),
        (
            {"drafter": "lookup", "draft_stop": gate.parse_draft_stop("margin=0.3", gate.ALWAYS)},
            "drafter lookup runs no model, so its draft_stop is none, not margin=0.3",
        ),
        ({"mode": "edge", "drafter": "lookup"}, r"give drafter model or model\+lookup, not 'lookup'"),
        ({"mode": "cloud", "drafter": "model+lookup"}, "mode cloud drafts nothing, so it takes no drafter"),
        ({"mode": "edge", "k": 4}, "mode edge drafts nothing, so it takes no k"),
        ({"mode": "cloud", "rule": Rank(3)}, "mode cloud drafts nothing, so it takes no rule"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Strategy(**fields)


@pytest.mark.parametrize("saved", [{}, {"mode": "both"}, {"mode": "speculative"}, {"mode": "speculative", "gate": 3}])
def test_json_of_anything_else_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not a saved strategy|unknown mode"):
        Strategy.from_json(saved)


@pytest.mark.parametrize("threshold", [None, "", [], float("nan")])
def test_an_entropy_gate_without_its_threshold_is_never_read_as_lossless(threshold: object) -> None:
    saved = Strategy("speculative", gate.entropy_gate(1.5)).to_json()
    with pytest.raises(ValueError, match=r"not a saved strategy|threshold"):
        Strategy.from_json(saved | {"threshold": threshold})


def test_modes_that_need_the_model_draft_by_it_alone_in_place_of_lookup() -> None:
    settings = config.resolve({"mode": "edge,cloud,lossless,revise", "drafter": "lookup,model+lookup"})
    labels = [strategy.label for strategy, _ in cells(settings)]
    assert labels[:4] == ["edge", "edge-model_lookup", "cloud", "speculative-always-k3-greedy-lookup"]
    assert labels[4] == "speculative-always-k3-greedy-model_lookup"
    assert ["model_lookup" in label for label in labels[5:]] == [False, True]


def test_the_grid_has_one_cell_for_a_gate_that_never_escalates() -> None:
    settings = config.resolve(
        {
            "mode": "edge,speculative", "gate": "never,always", "k": "3,auto", "draft-ahead": "0,4",
            "open": "eager,lazy", "draft-stop": "none,margin=0.3", "link": "none,4g", "rule": "greedy,rank",
        }
    )  # fmt: skip
    grid = cells(settings)
    assert [strategy.gate.label for strategy, _ in grid if strategy.is_speculative].count("never") == 1
    assert len(grid) == 2 + 2**6
