"""Rules that fail a run whose metrics got worse."""

from __future__ import annotations

from typing import Any

import pytest

from bench.regression import find_regressions, parse_fail_rule
from edgecloud_sd.measure.summary import METRICS


def document(figures: dict[str, float | None], clips: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    records = [{"file_id": name, "total_time": 1.0 + i, "scores": {}} for i, name in enumerate(clips)]
    return {"metrics": {"figures": figures, "reasons": {"meteor": "no Java"}}, "detailed_results": records}


@pytest.mark.parametrize(
    ("rule", "before", "after", "is_broken"),
    [
        ("otps:-5", 20.0, 15.0, False),
        ("otps:-5", 20.0, 14.9, True),
        ("otps:-5", 20.0, 99.0, False),
        ("otps:-10%", 20.0, 18.0, False),
        ("otps:-10%", 20.0, 17.9, True),
        ("ttft:+10%", 1.0, 1.1, False),
        ("ttft:+10%", 1.0, 1.2, True),
        ("ttft:+0", 1.0, 1.0, False),
        ("ttft:+0", 1.0, 1.1, True),
        ("ttft:+0%", 1.0, 0.9, False),
        ("otps:-0%", 20.0, 19.0, True),
        ("otps:-0", 20.0, 21.0, False),
        ("cpu_percent:-5", 50.0, 40.0, True),  # neither direction is better, so a rule may limit both
        ("cpu_percent:+5", 50.0, 60.0, True),
    ],
)
def test_a_rule_is_broken_beyond_its_limit(rule: str, before: float, after: float, is_broken: bool) -> None:
    metric = rule.partition(":")[0]
    cells = [{"cell": document({metric: value})} for value in (before, after)]
    lines = list(find_regressions(cells[0], cells[1], [parse_fail_rule(rule)]))
    assert bool(lines) == is_broken
    change = f"cell: {metric} {before:.4g} -> {after:.4g} {METRICS[metric].unit}"
    assert all(line.startswith(f"{change} breaks {rule}") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed:-1", "'speed' is no metric"),
        ("bleu4", "the limit '' is not like"),
        ("bleu4:0.02", "the limit '0.02' is not like"),
        ("bleu4:-nan", "the limit '-nan' is not like"),
        ("bleu4:+0.02", "higher is better for bleu4, so its limit begins with -"),
        ("total:-10%", "lower is better for total, so its limit begins with +"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse_fail_rule(text)


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ({}, "cell: is not in the later run, so no rule could be checked"),
        (
            {"cell": document({"meteor": None})},
            "cell: meteor was 0.5 and is not measured now (no Java); rule meteor:-1",
        ),
        ({"cell": document({"meteor": 0.5}, ("a",))}, "cell: 1 clips are in one run only, so no rule could be checked"),
        ({"cell": document({"meteor": 0.5}), "new": document({"meteor": 0.1})}, ""),
    ],
)
def test_what_cannot_be_checked_fails_too(after: dict[str, Any], line: str) -> None:
    before = {"cell": document({"meteor": 0.5})}
    assert list(find_regressions(before, after, [parse_fail_rule("meteor:-1")])) == ([line] if line else [])
