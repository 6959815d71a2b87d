"""The audit: a fair draw, and an exact test of the promised rate."""

from __future__ import annotations

import math

import pytest

from edgecloud_sd.measure.audit import AUDIT_LEVEL, AuditCount, binomial_tail, is_drawn


def test_the_draw_is_fair_stable_and_grows_with_the_share() -> None:
    ids = [f"clip{number}" for number in range(2000)]
    drawn = {share: {file_id for file_id in ids if is_drawn(file_id, share)} for share in (0.0, 0.05, 0.5, 1.0)}
    assert drawn[0.0] < drawn[0.05] < drawn[0.5] < drawn[1.0] == set(ids)
    assert len(drawn[0.05]) == pytest.approx(100, abs=30)
    assert len(drawn[0.5]) == pytest.approx(1000, abs=70)


@pytest.mark.parametrize(("n", "least", "p"), [(20, 5, 0.1), (7, 0, 0.3), (7, 7, 0.3), (300, 40, 0.1)])
def test_the_tail_is_that_of_the_binomial_distribution(n: int, least: int, p: float) -> None:
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))
    assert binomial_tail(n, least, p) == pytest.approx(exact, rel=1e-9)
    assert binomial_tail(5000, 600, 0.1) < AUDIT_LEVEL < binomial_tail(5000, 500, 0.1)


@pytest.mark.parametrize("n", [1, 5, 20, 100])
def test_a_run_that_keeps_its_promise_is_rarely_accused(n: int) -> None:
    accusing = [wrong for wrong in range(n + 1) if AuditCount(n, n, wrong, 0.1).is_broken]
    assert (binomial_tail(n, accusing[0], 0.1) if accusing else 0) <= AUDIT_LEVEL


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (AuditCount(0, 0, 0, 0.1), "no caption was drawn"),
        (AuditCount(20, 9, 8, 0.1), "calibrate again"),
        (AuditCount(20, 9, 2, 0.1), "does not refute the promised rate of 0.1"),
        (AuditCount(20, 9, 2, None), "no rate was promised"),
    ],
)
def test_an_audit_says_what_it_saw(counts: AuditCount, sentence: str) -> None:
    assert sentence in counts.sentence()
