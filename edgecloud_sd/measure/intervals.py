"""Comparisons of two ways to decode over the same clips: ratios and differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOWER, UPPER = 0.025, 0.975  # quantiles that bound a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval. The bounds are None for a single clip, which has no spread."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.shown(".2f")

    def shown(self, form: str) -> str:
        """Return the value and its bounds, each in the format `form`: `1.23 [1.00, 2.00]`."""
        bounds = "one clip" if self.low is None or self.high is None else f"{self.low:{form}}, {self.high:{form}}"
        return f"{self.value:{form}} [{bounds}]"


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]], n: int, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Return a statistic of `n` clips with its percentile bootstrap interval, or None if it is undefined.

    The method is that of Efron and Tibshirani (1993, section 13.3). `statistic` takes clip indices [..., n] and returns
    values [...]. Whole clips are drawn with replacement, so the two times of one clip stay paired. Resamples with an
    undefined statistic are left out.
    """
    if not n:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.arange(n)))
        resampled = statistic(np.random.default_rng(seed).integers(0, n, (resamples, n)))
    if not np.isfinite(value):
        return None
    if n == 1:
        return Interval(value, None, None)
    low, high = np.quantile(resampled[np.isfinite(resampled)], (LOWER, UPPER))
    return Interval(value, float(low), float(high))


def speedup(baseline: Sequence[float], ours: Sequence[float]) -> Interval | None:
    """Return sum of baseline seconds / sum of our seconds over the same clips, or None without clips.

    A value above 1 means that `ours` is faster.
    """
    base_seconds, our_seconds = _paired(baseline, ours)
    return bootstrap(lambda at: base_seconds[at].sum(-1) / our_seconds[at].sum(-1), len(base_seconds))


def length_matched_speedup(baseline: Sequence[tuple[int, float]], ours: Sequence[tuple[int, float]]) -> Interval | None:
    """Return baseline seconds per token / our seconds per token, or None without clips.

    Each side is (sum of seconds) / (sum of tokens) over its clips. A clip is the pair (tokens, seconds) that
    `metrics.after_first_chunk` returns.
    """
    base, own = (values.reshape(-1, 2) for values in _paired(baseline, ours))

    def seconds_per_token(clips: NDArray[np.float64], at: NDArray[np.intp]) -> NDArray[np.float64]:
        ratio: NDArray[np.float64] = clips[at, 1].sum(-1) / clips[at, 0].sum(-1)
        return ratio

    return bootstrap(lambda at: seconds_per_token(base, at) / seconds_per_token(own, at), len(base))


def difference(baseline: Sequence[float], ours: Sequence[float]) -> Interval | None:
    """Return the mean of ours - baseline over the same clips, or None without clips."""
    base, own = _paired(baseline, ours)
    return bootstrap(lambda at: (own[at] - base[at]).mean(-1), len(base))


def _paired(baseline: Sequence[object], ours: Sequence[object]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(baseline) != len(ours):
        raise ValueError(f"{len(baseline)} clips cannot be paired with {len(ours)}: give both sides the same clips")
    return np.asarray(baseline, dtype=float), np.asarray(ours, dtype=float)
