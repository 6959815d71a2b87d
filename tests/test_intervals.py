"""Speed-ups and differences with their bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecloud_sd.measure import intervals
from edgecloud_sd.measure.intervals import Interval

paired_seconds = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=2, max_size=8)


def columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def check_interval(interval: Interval | None, value: float) -> None:
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.value == pytest.approx(value, abs=1e-9)
    assert interval.low - 1e-9 <= interval.value <= interval.high + 1e-9


@given(paired_seconds)
def test_a_speed_up_is_the_ratio_of_sums_and_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    baseline, ours = columns(pairs)
    interval = intervals.speedup(baseline, ours)
    check_interval(interval, sum(baseline) / sum(ours))
    assert intervals.speedup(baseline, ours) == interval
    assert intervals.speedup(baseline, baseline) == Interval(1, 1, 1)  # the pairs agree, so there is no spread


@given(paired_seconds, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_one_side_scales_the_speed_up_and_its_interval(pairs: list[tuple[float, float]], factor: float) -> None:
    baseline, ours = columns(pairs)
    interval = intervals.speedup(baseline, ours)
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    expected = Interval(factor * interval.value, factor * interval.low, factor * interval.high)
    assert intervals.speedup([factor * seconds for seconds in baseline], ours) == expected


def test_one_clip_has_a_speed_up_without_bounds() -> None:
    interval = intervals.speedup([1.3], [1.0])
    assert interval == Interval(1.3, None, None)
    assert str(interval) == "1.30 [one clip]"


@given(paired_seconds)
def test_a_difference_is_the_mean_over_pairs_and_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    baseline, ours = columns(pairs)
    check_interval(intervals.difference(baseline, ours), (sum(ours) - sum(baseline)) / len(pairs))
    assert intervals.difference(ours, ours) == Interval(0, 0, 0)


def test_the_length_matched_speed_up_divides_each_sides_seconds_by_its_own_tokens() -> None:
    baseline, ours = [(10, 4.0), (30, 4.0)], [(5, 1.0), (20, 1.5)]
    check_interval(intervals.length_matched_speedup(baseline, ours), (8 / 40) / (2.5 / 25))
    assert intervals.length_matched_speedup(baseline, baseline) == Interval(1, 1, 1)


def test_the_bootstrap_draws_clips_with_replacement_and_takes_percentiles() -> None:
    # resamples of two clips have the means 0, 0.5 and 1 with probabilities 1/4, 1/2 and 1/4
    interval = intervals.bootstrap(lambda at: (at == 0).mean(-1), 2)
    assert interval == Interval(0.5, 0, 1)
    large = intervals.bootstrap(lambda at: (at < 50).mean(-1), 100)
    assert large is not None
    assert large.low is not None
    assert large.high is not None
    assert large.value == 0.5
    assert large.high - large.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)  # as for a binomial distribution


def test_resamples_with_an_undefined_statistic_are_left_out() -> None:
    def ratio(at: NDArray[np.intp]) -> NDArray[np.float64]:
        chosen: NDArray[np.float64] = np.array([0.0, 2.0])[at].sum(-1)
        return 2 / chosen

    assert intervals.bootstrap(ratio, 2) == Interval(1, 0.5, 1)


@pytest.mark.parametrize("compare", [intervals.speedup, intervals.length_matched_speedup, intervals.difference])
def test_comparing_no_clips_gives_none(compare: object) -> None:
    assert callable(compare)
    assert compare([], []) is None


@pytest.mark.parametrize("compare", [intervals.speedup, intervals.difference])
def test_sides_with_different_numbers_of_clips_are_refused(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(ValueError, match="2 clips cannot be paired with 1"):
        compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="1 clips cannot be paired with 2"):
        intervals.length_matched_speedup([(1, 2.0)], [(1, 2.0), (3, 4.0)])


def test_an_undefined_speed_up_is_none() -> None:
    assert intervals.speedup([1.0], [0.0]) is None
    assert intervals.length_matched_speedup([(0, 0.0)], [(1, 1.0)]) is None


def test_an_interval_prints_its_value_and_bounds() -> None:
    assert str(Interval(1.234, 0.999, 2)) == "1.23 [1.00, 2.00]"
