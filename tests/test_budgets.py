"""Levels of a gate: the promise holds on exchangeable clips, and budgets are kept."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.events import Trace
from edgecloud_sd.forecast.budgets import (
    ALWAYS_SEND,
    LEVEL_RANGES,
    NEVER_SEND,
    Budget,
    Ending,
    LevelCost,
    LevelFeedback,
    LevelRange,
    budget_level,
    calibrated_strategy,
    ending_at,
    gate_at,
    level_costs,
    own_level,
    own_score,
    trace_endings,
)
from edgecloud_sd.gate import Gate, risk_gate
from edgecloud_sd.measure import metrics
from edgecloud_sd.revise import REVISE_NAMES
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.harness import Harness
from tests.support.strategies import Case, Scene, ks, scenes


def caption(*risks: float, is_own_at_last: bool = True) -> tuple[Ending, ...]:
    """Return the endings of a caption that the cloud corrects at each ending but the last."""
    return (
        *(Ending(risk, n, n, 20, is_own_at_last and n == len(risks) - 1) for n, risk in enumerate(risks)),
        Ending(-math.inf, len(risks), len(risks), 20, True),
    )


def draw_caption(rng: random.Random) -> tuple[Ending, ...]:
    """Return a caption whose endings are riskier while it differs from the cloud's own. Risks may be equal."""
    wrong = [round(rng.random(), 2) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    return caption(*wrong, round(rng.random() ** 3, 2))


@pytest.mark.parametrize(
    ("n", "own", "place"),
    [
        (99, 0.9, 10),
        (100, 0.9, 10),
        (108, 0.9, 10),
        (109, 0.9, 11),
        (19, 0.95, 1),
        (18, 0.95, 0),
        (9, 0.9, 1),
        (8, 0.9, 0),
    ],
)
def test_the_level_is_just_below_the_promised_place_in_the_scores(n: int, own: float, place: int) -> None:
    scores = [number / 1000 for number in range(1, n + 1)]
    level = own_level(random.Random(0).sample(scores, n), own)
    assert level == (math.nextafter(place / 1000, 0) if place else ALWAYS_SEND)


def test_captions_that_never_differ_are_all_ending_at() -> None:
    assert own_level([0.4, *[math.inf] * 98], 0.9) == NEVER_SEND
    assert own_level([0.0] * 99, 0.9) < 0  # a caption that differs at no risk at all is never let go


RISKS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0, math.inf])


@given(st.lists(RISKS, min_size=2, max_size=30), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_of_all_clips_that_may_be_the_new_one_few_enough_differ(scores: list[float], own: float) -> None:
    """The promise itself: exchangeable clips are equally likely to be the new one, and equal scores are allowed."""
    others = [[*scores[:new], *scores[new + 1 :]] for new in range(len(scores))]
    wrong = sum(score <= own_level(rest, own) for score, rest in zip(scores, others, strict=True))
    assert wrong <= (1 - own) * len(scores) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("n", "own"), [(9, 0.8), (20, 0.9), (50, 0.8), (19, 0.95)])
def test_the_promise_holds_over_many_calibrations(n: int, own: float) -> None:
    rng = random.Random(n)
    trials = 3000
    wrong = sum(
        not ending_at(draw_caption(rng), own_level([own_score(draw_caption(rng)) for _ in range(n)], own)).is_own
        for _ in range(trials)
    )
    assert wrong / trials <= 1 - own + 3 * math.sqrt(own * (1 - own) / trials)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3), min_size=1, max_size=6))
def test_a_caption_differs_exactly_from_its_score_on(risks: list[list[float]]) -> None:
    for endings in (caption(*row) for row in risks):
        for level in (ALWAYS_SEND, 0.0, 0.1, 0.3, 0.5, 1.0):
            assert ending_at(endings, level).is_own == (level < own_score(endings))


@given(st.integers(0, 2**32), st.sampled_from(["calls", "written_share"]), st.floats(0.01, 2))
def test_a_budget_is_kept_by_the_lowest_level_that_keeps_it(seed: int, kind: str, limit: float) -> None:
    rng = random.Random(seed)
    costs = level_costs([draw_caption(rng) for _ in range(20)])
    budget = Budget(kind, limit)
    level = budget_level(costs, budget)
    assert next(cost.level for cost in costs if budget.is_kept(cost)) == level
    assert costs[0].level == ALWAYS_SEND
    assert costs[-1].calls == 0


def test_fields_that_change_no_token_are_no_condition() -> None:
    plain = Strategy(gate=risk_gate(), revise="context")
    other = replace(
        plain, k=None, draft_ahead=4, prefill="lazy", drafter="model+lookup", gate=risk_gate(send_above=0.3)
    )
    assert calibrated_strategy(other) == calibrated_strategy(plain)
    for change in ({"revise": "repeat"}, {"rule": Rank(2)}, {"gate": risk_gate(opinion_risk=0.01)}):
        assert calibrated_strategy(replace(plain, **change)).label != calibrated_strategy(plain).label


def test_a_budget_below_all_costs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.1 is less than any level of this gate needs, 0\.5"):
        budget_level([LevelCost(-1, 2, 0.1), LevelCost(1, 0.5, 0.02)], Budget("calls", 0.1))


@given(
    st.integers(0, 2**32), st.sampled_from([Budget("calls", 1.0), Budget("calls", 0.3), Budget("written_share", 0.04)])
)
def test_feedback_spends_no_more_than_its_bound(seed: int, budget: Budget) -> None:
    rng = random.Random(seed)
    feedback = LevelFeedback(budget, 0.3, LevelRange(ALWAYS_SEND, NEVER_SEND, 0.05))
    excesses = []
    for _ in range(100):
        scale = rng.choice((0.01, 1.0))
        end = ending_at(caption(*(scale * rng.random() for _ in range(rng.randrange(1, 4)))), feedback.level)
        feedback.observe(end.calls, end.written, end.tokens)
        excesses.append(budget.excess(end.calls, end.written, end.tokens))
        assert ALWAYS_SEND <= feedback.level <= NEVER_SEND
        largest = max(*excesses, 0.0)
        assert sum(excesses) <= (NEVER_SEND - ALWAYS_SEND + 0.05 * largest) / 0.05 + 1e-9


def test_feedback_reaches_a_budget_from_both_sides() -> None:
    for start in (ALWAYS_SEND, NEVER_SEND):
        rng = random.Random(7)
        feedback = LevelFeedback(Budget("calls", 1.0), start, LEVEL_RANGES["risk"])
        calls = 0
        for _ in range(800):
            end = ending_at(draw_caption(rng), feedback.level)
            feedback.observe(end.calls, end.written, end.tokens)
            calls += end.calls
        assert calls / 800 == pytest.approx(1.0, abs=0.05)


@given(
    scenes(),
    st.builds(risk_gate, st.sampled_from([0.6, 1.0]), st.just(ALWAYS_SEND), st.sampled_from([0.01, 0.2])),
    st.sampled_from([GREEDY, Rank(2)]),
    ks,
    st.sampled_from(REVISE_NAMES),
)
def test_one_decode_shows_what_every_send_level_does(scene: Scene, gate: Gate, rule: Rank, k: int, revise: str) -> None:
    strategy = Strategy("speculative", gate, rule, k, draft_ahead=k % 4, prefill="lazy", revise=revise)

    def decode(strategy: Strategy, level: float) -> Trace:
        return Case(scene, replace(strategy, gate=gate_at(gate, level))).play(Harness())

    trace = decode(calibrated_strategy(strategy), ALWAYS_SEND)
    endings = trace_endings(trace, gate)
    for level in (NEVER_SEND, *(ending.risk for ending in endings[:2] if ending.risk >= 0)):
        decoded, expected = decode(strategy, level), ending_at(endings, level)
        counts = metrics.counts(decoded)
        assert counts.cloud_calls == expected.calls
        assert counts.correction + counts.bonus == expected.written
        assert len(decoded.tokens) == expected.tokens
        assert (decoded.tokens == trace.tokens) == expected.is_own
        assert expected.is_own == (level < own_score(endings))
