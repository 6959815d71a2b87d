"""Comparisons of two ways to decode over the same clips: ratios and differences with 95 % intervals.

The interval is a studentised bootstrap (Efron and Tibshirani 1993, section 12.5) over whole clips, so that both values
of a clip stay paired. Both bounds take the wider tail: the plain one covered too little in `bench.coverage`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_DIFFERING = 5  # fewer clips that differ have no interval: resamples of them hardly vary
RESAMPLES = 2000
COVERAGE = 0.95

Values = NDArray[np.float64]
Numbers = Sequence[float] | Values
Statistic = Callable[[Values], Values]  # means of columns [..., columns] to values [...]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval. The bounds are None if there is none, and `reason` says why."""

    value: float
    low: float | None
    high: float | None
    reason: str = ""

    def __str__(self) -> str:
        return self.shown(".2f")

    def shown(self, form: str) -> str:
        """Return the value and its bounds, each in the format `form`: `1.23 [1.00, 2.00]`."""
        bounds = self.reason if self.low is None or self.high is None else f"{self.low:{form}}, {self.high:{form}}"
        return f"{self.value:{form}} [{bounds}]"

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the value."""
        low, high = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return Interval(function(self.value), low, high, self.reason)


def bootstrap(columns: Values, statistic: Statistic, differing: int, seed: int = 0) -> Interval | None:
    """Return a statistic of the means of `columns` [clips, columns] with its interval, or None if it is undefined.

    `differing` is the number of clips whose two sides differ; fewer than `MIN_DIFFERING` give no bounds. The standard
    error of each resample is that of the delta method. Resamples with an undefined statistic are left out.
    """
    n = len(columns)
    if not n:
        return None
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value, error = (float(part[0]) for part in _value_and_error(columns, np.ones((1, n)), statistic))
        if not np.isfinite(value):
            return None
        if differing < MIN_DIFFERING:
            few = f"{n} clip{'s' * (n > 1)}" if differing == n else f"{differing} of {n} clips differ"
            return Interval(value, None, None, f"{few}: too few")
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
        values, errors = _value_and_error(columns, counts, statistic)
        distances = np.abs(np.quantile(_finite((values - value) / errors), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]))
    width = float(distances.max()) * error if error > 0 else 0.0
    return Interval(value, value - width, value + width)


def _finite(values: Values) -> Values:
    """Return the finite values, or one 0 if there are none: all clips then have the same ratio."""
    finite = values[np.isfinite(values)]
    return finite if len(finite) else np.zeros(1)


def _value_and_error(columns: Values, counts: Values, statistic: Statistic) -> tuple[Values, Values]:
    """Return the statistic and its standard error for each row of `counts` [resamples, clips]."""
    n, width = columns.shape
    means = counts @ columns / n
    steps = 1e-6 * np.maximum(np.abs(columns).mean(0), 1e-300)
    gradient = np.stack(
        [(statistic(means + step) - statistic(means - step)) / (2 * step.sum()) for step in np.eye(width) * steps], -1
    )
    influence = columns @ gradient.T - (means * gradient).sum(-1)  # [clips, resamples]
    variance = (counts.T * influence**2).sum(0) / n
    rounding = 1e-9 * np.sqrt(((columns**2).mean(0) * gradient**2).sum(-1))  # a spread of 0 is not exactly 0
    errors = np.sqrt(variance)
    return statistic(means), np.where(errors > rounding, errors, 0.0) / np.sqrt(max(n - 1, 1))


def speedup(baseline: Numbers, ours: Numbers) -> Interval | None:
    """Return sum of baseline seconds / sum of our seconds over the same clips, or None without clips.

    A value above 1 means that `ours` is faster. A rare clip that takes many times as long as the others can carry the
    sums. The interval cannot know of such clips if these clips include none: see `typical_speedup`.
    """
    columns = np.stack(_paired(baseline, ours), -1)
    return _exp(bootstrap(columns, lambda means: np.log(means[..., 0]) - np.log(means[..., 1]), len(columns)))


def typical_speedup(baseline: Numbers, ours: Numbers) -> Interval | None:
    """Return the geometric mean over clips of baseline seconds / our seconds, or None without clips.

    A rare long clip counts like any other, so the interval also holds for times with a long tail.
    """
    base_seconds, our_seconds = _paired(baseline, ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(base_seconds) - np.log(our_seconds)
    return _exp(bootstrap(logs[:, None], lambda means: means[..., 0], len(logs)))


def length_matched_speedup(baseline: Sequence[tuple[int, float]], ours: Sequence[tuple[int, float]]) -> Interval | None:
    """Return baseline seconds per token / our seconds per token, or None without clips.

    Each side is (sum of seconds) / (sum of tokens) over its clips. A clip is the pair (tokens, seconds) that
    `metrics.after_first_chunk` returns.
    """
    base, own = (values.reshape(-1, 2) for values in _paired(baseline, ours))
    columns = np.hstack([base, own])

    def log_ratio(means: Values) -> Values:
        base_tokens, base_seconds, own_tokens, own_seconds = np.moveaxis(np.log(means), -1, 0)
        ratio: Values = base_seconds - base_tokens - own_seconds + own_tokens
        return ratio

    return _exp(bootstrap(columns, log_ratio, len(columns)))


def difference(baseline: Numbers, ours: Numbers) -> Interval | None:
    """Return the mean of ours - baseline over the same clips, or None without clips."""
    base, own = _paired(baseline, ours)
    return bootstrap((own - base)[:, None], lambda means: means[..., 0], int(np.count_nonzero(own != base)))


def corpus_difference(baseline: Values, ours: Values, score: Statistic, rarest: int) -> Interval | None:
    """Return score(ours) - score(baseline), or None without clips.

    `score` takes means of counts [..., counts]. `baseline` and `ours` hold the counts of each clip [clips, counts].
    Clips differ if their counts in column `rarest` differ, because a score depends most on its rarest count.
    """
    base, own = _paired(baseline, ours)
    width = base.shape[-1]
    differing = int((base != own)[:, rarest].sum())
    interval = bootstrap(
        np.hstack([base, own]), lambda means: score(means[..., width:]) - score(means[..., :width]), differing
    )
    if interval and interval.low is not None and not (score(base.mean(0)) or score(own.mean(0))):
        return Interval(0.0, None, None, "both scores are 0")
    return interval


def gap_interval(edge: Values, cloud: Values, ours: Values, score: Statistic) -> Interval | None:
    """Return (score(ours) - score(edge)) / (score(cloud) - score(edge)) over the same clips.

    Return None unless the cloud scores higher than the edge. `score` takes means of columns, and each side holds the
    columns of its clips [clips, columns], as in `corpus_difference`. Clips differ if any two sides do.
    """
    base, best, own = sides = [np.asarray(side, dtype=float) for side in (edge, cloud, ours)]
    if not len(own) or not score(best.mean(0)) > score(base.mean(0)):
        return None
    for name, value, side in (("edge", 0.0, base), ("cloud", 1.0, best)):
        if np.array_equal(own, side):
            return Interval(value, None, None, f"equals {name}")
    width = own.shape[-1]

    def share(means: Values) -> Values:
        low, high, value = (score(means[..., place : place + width]) for place in (0, width, 2 * width))
        closed: Values = (value - low) / (high - low)
        return closed

    differing = min(int((a != b).any(-1).sum()) for a, b in itertools.combinations(sides, 2))
    return bootstrap(np.hstack(sides), share, differing)


def permutation_p(baseline: Values, ours: Values, score: Statistic, seed: int = 0) -> float | None:
    """Return the two-sided p of "the two sides are alike", for corpus scores, or None without clips.

    The sides of each clip are swapped at random (Noreen 1989, approximate randomisation). The arguments are those of
    `corpus_difference`. The test needs no shape of the differences, and a small p says that the scores really differ.
    """
    base, own = _paired(baseline, ours)
    if not len(base):
        return None
    swapped = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, len(base)))
    moved = swapped @ (own - base) / len(base)
    observed = abs(score(own.mean(0)) - score(base.mean(0)))
    permuted = np.abs(score(own.mean(0) - moved) - score(base.mean(0) + moved))
    return float((1 + (permuted >= observed - 1e-12).sum()) / (RESAMPLES + 1))


def _exp(interval: Interval | None) -> Interval | None:
    return interval and interval.mapped(lambda value: float(np.exp(value)))


def _paired(baseline: Sequence[object] | Values, ours: Sequence[object] | Values) -> tuple[Values, Values]:
    if len(baseline) != len(ours):
        raise ValueError(f"{len(baseline)} clips cannot be paired with {len(ours)}: give both sides the same clips")
    return np.asarray(baseline, dtype=float), np.asarray(ours, dtype=float)
