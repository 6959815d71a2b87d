"""The coverage of the 95 % intervals, by simulation: the share of intervals that contain the true value.

`python -m bench.coverage` draws clips from synthetic populations with long tails and with few clips that differ.
`python -m bench.coverage BASE.json OURS.json` draws them from the clips of two results files, which are then the whole
population.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm import tqdm

from bench.comparison import clip_bleu_counts, corpus_bleu_difference, pair_clips
from edgecloud_sd.data.dataset import read_json
from edgecloud_sd.host.errors import errors_to_exit, to_one_line
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure import intervals, quality
from edgecloud_sd.measure.intervals import Interval

Clips = NDArray[np.float64]
POPULATION_SIZE = 200_000


@dataclass(frozen=True)
class Comparison:
    """A comparison to simulate: both sides of each clip of a population, the true value, and the interval to test."""

    name: str
    base: Clips
    ours: Clips
    true_value: float
    interval: Callable[[Clips, Clips], Interval | None]


@dataclass(frozen=True)
class Coverage:
    """The share of the intervals that contain the true value, and the share of the samples that have an interval."""

    covered: float
    with_interval: float


def _sums(name: str, base: Clips, ours: Clips) -> Comparison:
    return Comparison(f"sums of times{name}", base, ours, float(base.sum() / ours.sum()), intervals.speedup)


def _typical(name: str, base: Clips, ours: Clips) -> Comparison:
    value = float(np.exp((np.log(base) - np.log(ours)).mean()))
    return Comparison(f"typical clip{name}", base, ours, value, intervals.typical_speedup)


def _difference(name: str, base: Clips, ours: Clips) -> Comparison:
    return Comparison(name, base, ours, float((ours - base).mean()), intervals.difference)


def synthetic_comparisons(seed: int = 0, size: int = POPULATION_SIZE) -> list[Comparison]:
    """Return times with short to very long tails, and scores that differ on all to few clips."""
    generator = np.random.default_rng(seed)
    tails = {f"log-normal, sigma {sigma}": generator.lognormal(0, sigma, size) for sigma in (0.3, 0.8, 1.5)}
    tails |= {f"Pareto, alpha {alpha}": 1 + generator.pareto(alpha, size) for alpha in (3, 2, 1.5)}
    other = generator.gamma(4, 1, size)
    comparisons = [make(f", {name}", times, other) for make in (_sums, _typical) for name, times in tails.items()]
    for share in (1.0, 0.5, 0.2, 0.1):
        gains = np.where(generator.random(size) < share, generator.normal(0.1, 0.4, size), 0.0)
        comparisons.append(_difference(f"scores, {share:.0%} of the clips differ", np.zeros(size), gains))
    return comparisons


def recorded_comparisons(base: Path, ours: Path) -> list[Comparison]:
    """Return the times and scores of two results files over their common clips.

    Raise OSError or ValueError for files that cannot be used.
    """
    documents = [read_json(path) for path in (base, ours)]
    pairs = pair_clips(documents[0], documents[1])
    if not pairs:
        raise ValueError(f"{base.name} and {ours.name} have no clip in common: give two cells of one data set")
    sides = list(zip(*pairs, strict=True))
    times = [np.array([clip["total_time"] for clip in side]) for side in sides]
    counts = [clip_bleu_counts(document, side) for document, side in zip(documents, sides, strict=True)]
    bleu4 = partial(quality.bleu_of_counts, n=4)
    true_value = float(bleu4(counts[1].mean(0)) - bleu4(counts[0].mean(0)))
    scores = {
        name: [np.array([clip["scores"][metric] for clip in side], dtype=float) for side in sides]
        for name, metric in (("ROUGE-L of clips", "rouge_l"), ("BLEU-4 of clips", "bleu4"))
    }
    return [
        _sums("", times[0], times[1]),
        _typical("", times[0], times[1]),
        *(_difference(name, base_scores, our_scores) for name, (base_scores, our_scores) in scores.items()),
        Comparison("BLEU-4 of the corpus", counts[0], counts[1], true_value, partial(corpus_bleu_difference, n=4)),
    ]


def simulate(comparison: Comparison, n: int, repeats: int, seed: int = 0) -> Coverage:
    """Return the coverage of the intervals of `n` clips, drawn with replacement, over so many samples."""
    generator = np.random.default_rng(seed)
    hits = []
    for _ in range(repeats):
        chosen = generator.integers(0, len(comparison.base), n)
        interval = comparison.interval(comparison.base[chosen], comparison.ours[chosen])
        if interval and interval.low is not None and interval.high is not None:
            hits.append(interval.low <= comparison.true_value <= interval.high)
    return Coverage(float(np.mean(hits)) if hits else math.nan, len(hits) / repeats)


def render_coverage(comparisons: Sequence[Comparison], sizes: Sequence[int], repeats: int) -> str:
    """Return a table with a row per comparison and a column per number of clips."""
    rows = []
    for comparison in tqdm(comparisons, desc="simulating", unit="row", disable=None, leave=False):
        results = [simulate(comparison, n, repeats) for n in sizes]
        cells = [f"{100 * result.covered:.1f} % ({100 * result.with_interval:.0f} %)" for result in results]
        rows.append([comparison.name, *(cell.replace("nan %", "none") for cell in cells)])
    headings = ["covered (samples with an interval)", *(f"{n} clips" for n in sizes)]
    return tabulate(rows, headings, tablefmt="github")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the coverage table. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="none, or the results files of two cells")
    parser.add_argument("--clips", default="20,50,200", help="numbers of clips (default: 20,50,200)")
    parser.add_argument("--repeats", type=int, default=1000, help="samples per table cell (default: 1000)")
    options = parser.parse_args(hyphenate(arguments))
    if len(options.files) not in (0, 2):
        parser.error(f"takes no file or two results files, not {len(options.files)}")
    sizes = options.clips.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes) or options.repeats < 1:
        parser.error("--clips takes whole numbers above 0 with commas between them, and --repeats one of them")
    try:
        comparisons = recorded_comparisons(*options.files) if options.files else synthetic_comparisons()
    except (OSError, ValueError) as error:
        parser.error(f"the results files cannot be compared: {to_one_line(error)}")
    except (KeyError, TypeError, AttributeError) as error:
        advice = "python -m edgecloud_sd.measure.imported reads those of other software"
        parser.error(f"the files are no results files of this package ({to_one_line(error)} is missing); {advice}")
    with errors_to_exit():
        print(render_coverage(comparisons, [int(size) for size in sizes], options.repeats))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
