"""Proposals from the prompt's text and from earlier captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.lookup import MAX_NGRAM, START, CaptionHistory, Lookup, Match, NgramIndex

EOS = 9
texts = st.lists(st.integers(0, 3), max_size=8)


def history_of(captions: Sequence[Sequence[int]], capacity: int = 1000) -> CaptionHistory:
    history = CaptionHistory(capacity)
    for caption in captions:
        history.add(caption)
    return history


@pytest.mark.parametrize(
    ("captions", "prompt", "output", "expected"),
    [
        ([], [], [], ()),
        ([[1, 2, EOS]], [], [], (1, 2, EOS)),  # nothing follows EOS
        ([[1, 2, EOS], [1, 3, EOS], [1, 3, EOS]], [], [1], (3, EOS)),  # the most frequent
        ([[1, 3, EOS], [1, 2, EOS]], [], [1], (2, EOS)),  # the latest of equals
        ([[1, 2, 3, EOS], [4, 2, 5, EOS], [4, 2, 5, EOS]], [], [1, 2], (3, EOS)),  # the longest suffix
        ([[1, 2, EOS]], [], [7], ()),
        ([[1, 2, EOS]], [7, 1, 4], [7], (1, 4)),  # the prompt, with more tokens that match
        ([[1, 2, EOS]], [1, 4], [1], (2, EOS)),  # the history, with as many tokens that match
        ([], [5, 8, 6], [5], ()),  # 8 is a control token
        ([[1, 2, 3, 4, 5, 6]], [], [1], (2, 3, 4, 5)),  # the length
        ([[2, 1, 3]], [0, 5], [], (2, 1, 3)),  # the last prompt token is no word of a caption
    ],
)
def test_a_proposal_is_what_followed_the_longest_suffix(
    captions: list[list[int]], prompt: list[int], output: list[int], expected: tuple[int, ...]
) -> None:
    lookup = Lookup(history_of(captions), prompt, {EOS}, {8})
    assert lookup.propose([0, *output], 4) == expected


@given(st.lists(texts, max_size=6), texts)
def test_a_match_is_the_most_frequent_then_latest_follower_of_the_longest_suffix(
    captions: list[list[int]], context: list[int]
) -> None:
    match = NgramIndex(captions).match(context)
    for length in range(min(MAX_NGRAM, len(context)), 0, -1):
        followers = [
            caption[i] for caption in captions for i in range(length, len(caption))
            if caption[i - length : i] == context[-length:]
        ]  # fmt: skip
        if followers:
            counts = Counter(followers)
            best = max(reversed(followers), key=lambda token: counts[token])
            assert match == Match(length, best)
            return
    assert match is None


@given(st.lists(texts, max_size=9), st.integers(0, 20))
def test_a_full_history_equals_one_of_its_latest_captions(captions: list[list[int]], capacity: int) -> None:
    history = history_of(captions, capacity)
    kept = list(captions)
    while sum(map(len, kept)) > capacity:
        del kept[0]
    fresh = history_of(kept)
    for context in ([START], *([START, *caption[:n]] for caption in captions for n in range(len(caption)))):
        assert history.match(context) == fresh.match(context)
    history.clear()
    assert history.match([START]) is None


def test_captions_of_many_threads_stay_whole() -> None:
    history = CaptionHistory(capacity=40)
    captions = [[n, 10 + n, 20 + n, EOS] for n in range(10)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(history.add, captions * 30))
    assert sum(history.match([n]) == (1, 10 + n) for n in range(10)) <= 10
    for n in range(10):
        assert history.match([n]) in (None, (1, 10 + n))
