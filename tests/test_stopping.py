"""Stopping: EOS and the length limit."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest

from edgecloud_sd.stopping import LengthLimit, Stopping, check_length


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


MODEL = LengthLimit(80, "the maximum length of the edge's model tiny")
SERVER = LengthLimit(77, "the limit --max-tokens of the cloud's server", "start that server with a higher one")


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (67, 10, None),
        (
            67,
            11,
            "a prompt of 67 tokens and 11 new tokens exceed the limit --max-tokens of the cloud's server, 77 tokens: "
            "ask for at most 10 new tokens (--max-new-tokens), or start that server with a higher one",
        ),
        (77, 1, "77 tokens: give a shorter prompt or clip, or start that server with a higher one"),
    ],
)
def test_a_prompt_that_leaves_too_little_room_is_refused_with_the_lowest_limit(
    prompt: int, new: int, message: str | None
) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$") if message else nullcontext():
        check_length(prompt, new, (MODEL, SERVER))


def test_a_limit_without_a_remedy_offers_none() -> None:
    with pytest.raises(ValueError, match=r"model tiny, 80 tokens: ask for at most 1 new tokens \(--max-new-tokens\)$"):
        check_length(79, 2, (MODEL,))
