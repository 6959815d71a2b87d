"""Speed-ups and differences with their bootstrap intervals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecloud_sd.measure import intervals, quality
from edgecloud_sd.measure.intervals import Interval

paired_seconds = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=5, max_size=9)


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


@given(paired_seconds, st.sampled_from([0.25, 3.0, 8.0]))
def test_scaling_one_side_scales_the_speed_ups_and_their_intervals(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    baseline, ours = columns(pairs)
    for compare in (intervals.speedup, intervals.typical_speedup):
        interval, scaled = compare(baseline, ours), compare([factor * seconds for seconds in baseline], ours)
        assert interval is not None
        assert scaled is not None
        assert (scaled.value, scaled.low, scaled.high) == pytest.approx(
            (factor * interval.value, factor * (interval.low or 0), factor * (interval.high or 0)), rel=1e-4
        )


def test_the_typical_speed_up_is_the_geometric_mean_of_the_clips() -> None:
    check_interval(intervals.typical_speedup([1, 4, 1, 4, 1, 1000], [1, 1, 1, 1, 1, 1000]), 2 ** (4 / 6))


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (intervals.speedup([1.3], [1.0]), "1.30 [1 clip: too few]"),
        (intervals.speedup([1.3] * 4, [1.0] * 4), "1.30 [4 clips: too few]"),
        (intervals.difference([0.0] * 20, [0.5] * 4 + [0.0] * 16), "0.10 [4 of 20 clips differ: too few]"),
        (intervals.difference([0.5] * 20, [0.5] * 20), "0.00 [0 of 20 clips differ: too few]"),
    ],
)
def test_too_few_clips_that_differ_have_no_bounds_and_a_reason(interval: Interval | None, text: str) -> None:
    assert str(interval) == text


@given(paired_seconds)
def test_a_difference_is_the_mean_over_pairs_and_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    baseline, ours = columns(pairs)
    if sum(a != b for a, b in pairs) >= intervals.MIN_DIFFERING:
        check_interval(intervals.difference(baseline, ours), (sum(ours) - sum(baseline)) / len(pairs))


def test_the_length_matched_speed_up_divides_each_sides_seconds_by_its_own_tokens() -> None:
    baseline, ours = [(10, 4.0), (30, 4.0)] * 3, [(5, 1.0), (20, 1.5)] * 3
    check_interval(intervals.length_matched_speedup(baseline, ours), (8 / 40) / (2.5 / 25))
    assert intervals.length_matched_speedup(baseline, baseline) == Interval(1, 1, 1)


def test_the_standard_error_of_the_bootstrap_is_that_of_the_delta_method() -> None:
    # for normal values, an interval over many clips is value +- 1.96 standard errors
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = intervals.difference(np.zeros(400), values)
    check_interval(interval, values.mean())
    assert interval is not None
    assert interval.high is not None
    assert interval.high - interval.value == pytest.approx(1.96 * values.std() / 20, rel=0.1)


CAPTIONS = [f"a calm voice number {i} speaks" for i in range(12)]
OTHERS = [f"a loud voice number {i} speaks" if i % 2 else caption for i, caption in enumerate(CAPTIONS)]
REFERENCES = [[caption] for caption in CAPTIONS]
bleu4 = partial(quality.bleu_of_counts, n=4)


def counts(captions: list[str]) -> NDArray[np.float64]:
    return quality.bleu_counts(captions, REFERENCES, "english", "none")


def test_a_corpus_difference_is_the_difference_of_the_corpus_scores() -> None:
    scores = [float(bleu4(counts(captions).sum(0))) for captions in (CAPTIONS, OTHERS)]
    interval = intervals.corpus_difference(counts(CAPTIONS), counts(OTHERS), bleu4, 3)
    check_interval(interval, scores[1] - scores[0])
    silent = counts(["word"] * 12)
    assert (
        str(intervals.corpus_difference(silent, counts(["other"] * 12), bleu4, 4))
        == "0.00 [0 of 12 clips differ: too few]"
    )
    assert str(intervals.corpus_difference(silent, counts(["other one"] * 12), bleu4, 4)) == "0.00 [both scores are 0]"


def test_the_permutation_test_tells_a_difference_from_none() -> None:
    assert intervals.permutation_p(counts(CAPTIONS), counts(OTHERS), bleu4) == pytest.approx(2 * 2**-6, abs=0.02)
    assert intervals.permutation_p(counts(CAPTIONS), counts(CAPTIONS), bleu4) == 1
    assert intervals.permutation_p(counts(CAPTIONS)[:0], counts(CAPTIONS)[:0], bleu4) is None


def column(values: list[float]) -> NDArray[np.float64]:
    return np.array(values)[:, None]


def mean(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return means[..., 0]


def test_the_gap_closed_lies_between_edge_and_cloud_and_in_its_interval() -> None:
    edge, cloud = column([1, 2, 3, 4, 5, 6]), column([2, 4, 5, 5, 9, 11])
    half = (edge + cloud) / 2
    check_interval(intervals.gap_interval(edge, cloud, half, mean), 0.5)
    check_interval(intervals.gap_interval(edge, cloud, half + column([1, -1, 1, -1, 1, -1]), mean), 0.5)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([0.0, 0, 0], Interval(0, None, None, "equals edge")), ([1.0, 2, 3], Interval(1, None, None, "equals cloud"))],
)
def test_scores_of_edge_or_cloud_on_every_clip_say_so(ours: list[float], expected: Interval) -> None:
    assert intervals.gap_interval(column([0, 0, 0]), column([1, 2, 3]), column(ours), mean) == expected


@pytest.mark.parametrize("cloud", [[0.0, 0], [-1.0, 0], []])
def test_there_is_no_gap_if_the_cloud_scores_no_higher(cloud: list[float]) -> None:
    edge = column([0.0] * len(cloud))
    assert intervals.gap_interval(edge, column(cloud), edge + 1, mean) is None


@pytest.mark.slow
def test_the_interval_of_the_gap_closed_covers_the_true_share() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        edge = generator.normal(0.5, 0.1, 40)
        cloud = edge + np.where(generator.random(40) < 0.8, generator.gamma(4, 0.05, 40), 0)
        ours = np.where(generator.random(40) < 0.75, cloud, edge)  # closes 0.75 of the gap
        interval = intervals.gap_interval(edge[:, None], cloud[:, None], ours[:, None], mean)
        assert interval is not None
        if interval.low is not None and interval.high is not None:
            covered.append(interval.low <= 0.75 <= interval.high)
    assert len(covered) > 150
    assert np.mean(covered) >= 0.93


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
