"""The answer to "does it pay?"."""

from __future__ import annotations

import pytest

from bench.payoff import Payoff, payoff_rows, payoff_sentence
from bench.reasons import explain_dashes
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.summary import Figures

FASTER, SLOWER, UNSURE = Interval(2.0, 1.5, 2.5), Interval(0.5, 0.4, 0.6), Interval(1.1, 0.9, 1.3)


BETTER, WORSE = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
WITHIN_NOISE, FEW_DIFFER = Interval(-0.1, -0.3, 0.1), Interval(-0.1, None, None, "too few clips differ")


def row(
    baseline: str,
    captions: Interval,
    typical: Interval | None = None,
    differing: int = 0,
    difference: Interval | None = BETTER,
    is_lesser: bool = False,
) -> Payoff:
    typical = typical or captions
    return Payoff(baseline, 20, captions, typical, captions, 0.5, 0.7, difference, 0.012, differing, is_lesser)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [row("edge", SLOWER, differing=9), row("cloud", FASTER)],
            "Does not pay against the edge alone, the faster baseline: 0.50 [0.40, 0.60] times as fast per caption, "
            "BLEU-4 0.700 against 0.500 (difference +0.200 [+0.100, +0.300], p 0.012). "
            "Against the cloud alone: 2.00 [1.50, 2.50] times as fast per caption, the same captions (BLEU-4 0.700).",
        ),
        (
            [row("cloud", FASTER)],
            "Pays against the cloud alone: 2.00 [1.50, 2.50] times as fast per caption, "
            "the same captions (BLEU-4 0.700). The edge alone did not run.",
        ),
        (
            [row("edge", UNSURE), row("cloud", FASTER)],
            "Not decided against the edge alone, the faster baseline: 1.10 [0.90, 1.30] times as fast per caption, "
            "the same captions (BLEU-4 0.700). Against the cloud alone: 2.00 [1.50, 2.50] times as fast per caption, "
            "the same captions (BLEU-4 0.700).",
        ),
        (
            [],
            "Not decided: neither the edge alone nor the cloud alone captioned these clips; run them too.",
        ),
    ],
)
def test_a_strategy_pays_if_it_beats_the_faster_baseline(rows: list[Payoff], text: str) -> None:
    assert payoff_sentence(rows, "BLEU-4") == text


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        (  # the edge is faster, but its captions are worse than the cloud's
            [row("edge", SLOWER, differing=9, is_lesser=True), row("cloud", FASTER)],
            "Pays against the cloud alone, the baseline of higher quality: 2.00 [1.50, 2.50] times as fast per "
            "caption, the same captions (BLEU-4 0.700). Against the edge alone: 0.50 ",
        ),
        (  # faster than both, at a lower quality than the better one
            [row("edge", FASTER, differing=9, is_lesser=True), row("cloud", FASTER, differing=9, difference=WORSE)],
            "Not compared at equal quality with the cloud alone, the baseline of higher quality: 2.00 ",
        ),
        (  # both baselines are equal up to noise, and the slower one is better than the strategy beyond it
            [row("edge", UNSURE, differing=9), row("cloud", FASTER, differing=9, difference=WORSE)],
            "Not compared at equal quality with the cloud alone: 2.00 ",
        ),
        ([row("cloud", FASTER, differing=9, difference=WITHIN_NOISE)], "Pays against the cloud alone: 2.00 "),
        ([row("cloud", FASTER, differing=2, difference=FEW_DIFFER)], "Pays against the cloud alone: 2.00 "),
        (
            [row("cloud", FASTER, differing=9, difference=None)],
            "Not decided without a measured quality against the cloud alone: 2.00 ",
        ),
    ],
)
def test_a_strategy_pays_at_equal_quality_only(rows: list[Payoff], start: str) -> None:
    assert payoff_sentence(rows, "BLEU-4").startswith(start)


def test_a_ratio_that_few_long_captions_carry_is_said_to_be_one() -> None:
    sentence = payoff_sentence([row("cloud", FASTER, typical=UNSURE)], "BLEU-4")
    assert "a few long captions carry this ratio, which is 1.10 [0.90, 1.30] for the typical caption" in sentence


def test_the_table_has_a_row_per_baseline_with_the_forecast_beside_the_measurement() -> None:
    rows = payoff_rows([row("edge", SLOWER), row("cloud", FASTER)], {"over_edge": 0.6, "over_cloud": 1.9})
    assert [cells[0] for cells in rows] == ["edge alone", "cloud alone"]
    assert [cells[-1] for cells in rows] == ["0.60", "1.90"]
    assert payoff_rows([row("edge", SLOWER)], None)[0][-1] == "-"


def test_the_reason_for_a_dash_names_its_cells() -> None:
    names = {"a": "A", "b": "B", "c": "C"}
    cells: dict[str, tuple[Figures, dict[str, str]]] = {
        "one": ({"a": None, "b": None, "c": None}, {"a": "no Java", "b": "no Java", "c": "no GPU"}),
        "two": ({"a": None, "b": 1.0, "c": None}, {"a": "no Java", "c": "no GPU"}),
    }
    assert explain_dashes(names, cells) == [("A", "no Java"), ("B (one)", "no Java"), ("C", "no GPU")]
