"""Stopping: EOS and the length limit."""

from __future__ import annotations

import pytest

from edgecloud_sd.stopping import Stopping


def test_tokens_are_cut_after_eos_and_at_the_length_limit() -> None:
    stopping = Stopping(frozenset({9}), 5)
    assert stopping.cut([1, 9, 2], 0) == (1, 9)
    assert stopping.cut([1, 2, 3], 3) == (1, 2)
    assert stopping.cut([1], 5) == ()
    assert stopping.cut([1, 2, 9], 3) == (1, 2)


@pytest.mark.parametrize(
    ("output", "reason"), [([], None), ([1], None), ([1, 9], "eos"), ([1, 2, 3], "length"), ([1, 2, 9], "eos")]
)
def test_the_reason_to_stop_is_eos_before_length(output: list[int], reason: str | None) -> None:
    assert Stopping(frozenset({9}), 3).reason(output) == reason


def test_a_length_limit_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        Stopping(frozenset(), 0)
