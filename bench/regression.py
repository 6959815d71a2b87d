"""Rules that make a run fail if a metric got worse than in an earlier run: `--fail-if "bleu4:-0.02"`.

A rule is a metric and a limit on its change. `bleu4:-0.02` fails if BLEU-4 falls by more than 0.02, and `total:+10%` if
a caption takes over 10 % longer. The report and a live run of the suite share the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from bench import comparison
from bench.comparison import Document
from bench.payoff import compare_cells
from edgecloud_sd.measure.quality import QUALITY_METRICS
from edgecloud_sd.measure.summary import METRICS

RULE_HELP = (
    "fail if a metric of a cell gets worse by more than a limit: bleu4:-0.02 (a fall by 0.02) or total:+10%% (a rise "
    "by 10 %%); may be given several times"
)
FAIL_RULES = pytest.StashKey[list["FailRule"]]()
_LIMIT = re.compile(r"([+-])(\d+(?:\.\d*)?|\.\d+)(%?)")


@dataclass(frozen=True)
class FailRule:
    """A limit on the change of a metric, in its unit or as a share of its earlier value."""

    text: str
    metric: str
    limit: float  # with its sign: below 0, a fall is limited
    is_relative: bool

    def is_broken(self, before: float, after: float) -> bool:
        """Return True if the change from `before` to `after` goes beyond the limit."""
        change = after - before
        allowed = abs(self.limit) * (abs(before) if self.is_relative else 1.0)
        return change * math.copysign(1, self.limit) > allowed * (1 + 1e-9)  # a limit of 0 has a sign too


def parse_fail_rule(text: str) -> FailRule:
    """Return the rule of `metric:limit`. Raise ValueError for an unknown metric, or a limit in the better direction."""
    name, _, limit = text.strip().partition(":")
    match = _LIMIT.fullmatch(limit)
    if name not in METRICS:
        raise ValueError(f"{text!r}: {name!r} is no metric; bench/METRICS.md lists them")
    if not match:
        raise ValueError(
            f"{text!r}: the limit {limit!r} is not like -0.02 or +10%; write METRIC:LIMIT, as in bleu4:-0.02"
        )
    sign, number, percent = match.groups()
    worse = {"higher": "-", "lower": "+"}.get(METRICS[name].better or "", sign)
    if sign != worse:
        better = METRICS[name].better
        raise ValueError(f"{text!r}: {better} is better for {name}, so its limit begins with {worse}")
    value = float(number) / 100 if percent else float(number)
    return FailRule(text.strip(), name, -value if sign == "-" else value, bool(percent))


def find_regressions(
    before: Mapping[str, Document | None], after: Mapping[str, Document], rules: Sequence[FailRule]
) -> Iterator[str]:
    """Yield a line for each broken rule, and for each cell or metric of `before` that cannot be compared.

    The cells are results by case id. Both sides must have the same clips, because a metric is one of a whole cell.
    """
    for case, base in before.items():
        ours = after.get(case)
        if base is None or ours is None:
            yield f"{case}: is not in the {'earlier' if base is None else 'later'} run, so no rule could be checked"
            continue
        clips = [set(comparison.clips_by_id(document)) for document in (base, ours)]
        if clips[0] != clips[1]:
            yield f"{case}: {len(clips[0] ^ clips[1])} clips are in one run only, so no rule could be checked"
            continue
        for rule in rules:
            yield from _check_rule(case, base, ours, rule)


def _check_rule(case: str, base: Document, ours: Document, rule: FailRule) -> Iterator[str]:
    values = [comparison.metric_value(document, rule.metric) for document in (base, ours)]
    if values[0] is None:
        return  # the earlier run makes no promise
    if values[1] is None:
        reason = ours["metrics"]["reasons"].get(rule.metric, "no reason is given")
        yield f"{case}: {rule.metric} was {values[0]:.4g} and is not measured now ({reason}); rule {rule.text}"
    elif rule.is_broken(values[0], values[1]):
        unit = "" if " to " in METRICS[rule.metric].unit else f" {METRICS[rule.metric].unit}"
        change = f"{values[0]:.4g} -> {values[1]:.4g}{unit}"
        yield f"{case}: {rule.metric} {change} breaks {rule.text}{_interval(base, ours, rule.metric)}"


def _interval(base: Document, ours: Document, metric: str) -> str:
    """Return the 95 % interval of the change, for quality and whole captions."""
    if metric in QUALITY_METRICS:
        row = compare_cells("earlier run", base, ours, metric)
        test = "" if row.p is None else f", p {row.p:.2g}"
        return "" if row.difference is None else f"; change over clips {row.difference.shown('+.4f')}{test}"
    if metric == "total":
        return f"; now {comparison.caption_speedup(base, ours)} times as fast"
    return ""
