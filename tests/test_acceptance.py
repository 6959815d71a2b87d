"""Acceptance rules: the verdict of each rule, their texts and labels, and the draws of rule synthetic."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from urllib.parse import quote

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import acceptance, probs
from edgecloud_sd.cloud.server import MAX_RULE_LENGTH
from edgecloud_sd.events import Verdict
from tests.support.strategies import logit_rows

fractions = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("r", "draft", "expected"),
    [
        (1, [0, 1], Verdict(2, 2)),  # both are the cloud's own tokens, so the next is a bonus
        (1, [0, 2], Verdict(1, 1)),  # the second is rejected and corrected
        (2, [0, 2], Verdict(2, 2)),
        (2, [2, 1], Verdict(0, 0, (1,))),  # nothing after a rejected token is accepted, but it gets an opinion
        (1, [2, 0], Verdict(0, 0, (1,))),
        (2, [2, 2], Verdict(0, 0, (2,))),  # the rule would accept it
        (1, [], Verdict(0, 0)),
    ],
)
def test_rule_rank_accepts_tokens_up_to_its_rank(r: int, draft: list[int], expected: Verdict) -> None:
    rows = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert acceptance.Rank(r)(draft, rows) == expected


def test_a_rule_is_parsed_from_its_name_and_arguments() -> None:
    assert acceptance.parse_rule("synthetic(0.78)") == acceptance.Synthetic((0.78,))
    assert acceptance.parse_rule("synthetic(1/.5/0)") == acceptance.Synthetic((1.0, 0.5, 0.0))
    assert acceptance.parse_rule("synthetic(0.9/0.8/1)").label == "synthetic0.9_0.8_1"
    assert acceptance.parse_rule("greedy") == acceptance.Rank(1)
    assert acceptance.parse_rule("rank", 5) == acceptance.Rank(5)
    assert acceptance.parse_rule("rank(7)").label == "rank7"
    assert acceptance.parse_rule("rank").label == "rank20"


@given(st.integers(1).map(acceptance.Rank) | fractions.map(tuple).map(acceptance.Synthetic))
def test_the_text_of_a_rule_parses_to_it_and_fits_a_query_and_its_label_fits_a_file_name(rule: acceptance.Rule) -> None:
    assert acceptance.parse_rule(rule.text) == rule
    assert quote(rule.text, safe="()/") == rule.text
    assert re.fullmatch(r"[\w.-]+", rule.label)
    assert rule.is_lossless == (rule == acceptance.GREEDY)


@pytest.mark.parametrize(
    "rule",
    [
        *("nucleus", "rank()", "rank(-1)", "", "greedy ", "rank(٣)"),
        *("synthetic", "synthetic()", "synthetic(-1)", "synthetic(1/)", "synthetic(nan)", "synthetic(0.5,0.5)"),
        *("synthetic(0.5 )", "synthetic(٣)"),
    ],
)
def test_an_unknown_rule_is_refused_with_the_known_ones(rule: str) -> None:
    with pytest.raises(ValueError, match=r"choose one of greedy, rank, rank\(r\), synthetic\(p\)"):
        acceptance.parse_rule(rule)


def test_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        acceptance.parse_rule("rank(0)")


def test_a_rate_above_1_is_refused() -> None:
    for text in ("synthetic(0.5/1.5)", "synthetic(9999)"):
        with pytest.raises(ValueError, match=r"a rate of synthetic must be 0 to 1, not (1\.5|9999)"):
            acceptance.parse_rule(text)


@pytest.mark.parametrize("count", [0, 11])
def test_no_rate_and_more_rates_than_fit_a_request_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"synthetic takes 1 to 10 rates, not {count}"):
        acceptance.Synthetic((0.5,) * count)
    longest = acceptance.Synthetic((1.2345678901234567e-300,) * 10)
    assert len(longest.text) <= MAX_RULE_LENGTH


@pytest.mark.parametrize(
    ("text", "uniforms", "expected"),
    [
        ("synthetic(0.5)", (0.4, 0.49), Verdict(2, 2)),  # the bonus is the cloud's most likely token
        ("synthetic(0.5)", (0.4, 0.5), Verdict(1, 2)),  # 1 is rejected, so 2 corrects it
        ("synthetic(0.5)", (0.9, 0.0), Verdict(0, 0, (1,))),
        ("synthetic(0.5)", (0.9, 0.9), Verdict(0, 0, (1,))),  # an opinion is the most likely token of all
        ("synthetic(1/0.5/0)", (0.99, 0.4), Verdict(2, 2)),
        ("synthetic(0.5/1)", (0.4, 0.99), Verdict(2, 2)),
        ("synthetic(1/0)", (0.99, 0.0), Verdict(1, 2)),
    ],
)
def test_a_synthetic_rule_accepts_while_the_draw_is_below_the_rate(
    text: str, uniforms: tuple[float, ...], expected: Verdict
) -> None:
    rows = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert acceptance.parse_rule(text)([1, 1], rows, uniforms) == expected


@given(logit_rows, st.data())
def test_rate_1_accepts_all_and_rate_0_corrects_to_the_most_likely_other_token(
    row: torch.Tensor, data: st.DataObject
) -> None:
    draft = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=4))
    top = int(row.argmax())
    rows, uniforms = row.repeat(len(draft) + 1, 1), data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=4))
    assert acceptance.Synthetic((1.0,))(draft, rows, uniforms) == Verdict(len(draft), top)
    verdict = acceptance.Synthetic((0.0,))(draft, rows, uniforms)
    ranks = {token: probs.rank(row, token) for token in range(len(row))}
    correction = min((token for token in ranks if token != draft[0]), key=ranks.__getitem__)
    assert verdict == Verdict(0, correction, (top,) * (len(draft) - 1))


def test_the_draw_for_a_place_never_changes() -> None:
    """Saved runs can only be compared with new ones if the draws stay the same."""
    draws = [acceptance.uniform(b"clip", place) for place in (0, 1, 2**40)]
    assert draws == [0.49387617557847374, 0.05612093846526123, 0.08414888872867443]


@pytest.mark.parametrize("p", [0.02, 0.5, 0.78, 0.99])
def test_the_share_of_draws_below_a_rate_is_the_rate_over_places_and_over_clips(p: float) -> None:
    count = 10_000
    tolerance = 5 * math.sqrt(count * p * (1 - p))  # five standard deviations of the binomial distribution
    for draws in (
        [acceptance.uniform(b"clip", place) for place in range(count)],
        [acceptance.uniform(b"%d" % clip, 7) for clip in range(count)],
    ):
        assert all(0 <= draw < 1 for draw in draws)
        assert abs(sum(draw < p for draw in draws) - count * p) < tolerance
        # successive draws are independent
        both_below = sum(first < p and second < p for first, second in pairwise(draws))
        assert abs(both_below - (count - 1) * p**2) < 2 * tolerance


def test_no_token_after_a_rejected_one_is_judged_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def rank(row: torch.Tensor, token: int) -> int:
        judged.append(token)
        return 9

    monkeypatch.setattr(probs, "rank", rank)
    logits = torch.eye(4)  # the target's own tokens are 0, 1, 2, 3
    assert acceptance.Rank(2)((3, 2, 1), logits, wants_rest=False) == Verdict(0, 0)
    assert judged == [3]
    assert acceptance.Rank(2)((3, 2, 1), logits) == Verdict(0, 0, (1, 2))
