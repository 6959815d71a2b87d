"""The cache of one session, compared with a plain list of positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgecloud_sd.models.cache import GROWTH, Cache

SHAPE = (4, 1, 2, 3)  # keys and values of two layers, one session, two heads, head size 3


def empty(capacity: int) -> Cache:
    layers, one, heads, size = SHAPE
    return Cache(torch.full((layers, one, heads, capacity, size), torch.nan))


def add(cache: Cache, numbers: list[float]) -> list[list[float]]:
    """Write a number all over each next position and return the numbers in the keys and values of each layer."""
    new, cached = cache.views(len(numbers))
    for view in new:
        view.copy_(torch.tensor(numbers)[:, None].expand(1, 2, -1, 3))
    cache.length += len(numbers)
    assert len(new) == len(cached) == SHAPE[0]
    assert all(view.shape == (1, 2, cache.length, 3) for view in cached)
    return [read_numbers(view) for view in cached]


def read_numbers(positions: Tensor) -> list[float]:
    """Return the one number that fills each position."""
    numbers: list[float] = positions[0, 0, :, 0].tolist()
    assert (positions == positions[:, :1, :, :1]).all()
    return numbers


@given(
    st.integers(0, 5),
    st.lists(st.one_of(st.integers(1, 7).map(lambda n: ("add", n)), st.floats(0, 1).map(lambda x: ("cut", x)))),
)
def test_the_views_show_what_was_written_and_not_rolled_back(capacity: int, steps: list[tuple[str, float]]) -> None:
    cache = empty(capacity)
    expected: list[float] = []
    for number, (action, amount) in enumerate(steps):
        if action == "cut":
            del expected[int(amount * len(expected)) :]
            cache.length = len(expected)
        else:
            new = [100.0 * number + i for i in range(int(amount))]
            expected += new
            assert add(cache, new) == [expected] * SHAPE[0]


def test_adding_positions_copies_the_buffer_only_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    reallocate = Cache._reallocate

    def counted(cache: Cache, capacity: int) -> Tensor:
        copies.append(capacity)
        return reallocate(cache, capacity)

    monkeypatch.setattr(Cache, "_reallocate", counted)
    cache = empty(4)
    for number in range(100):
        add(cache, [float(number)])
    assert copies == [4 + GROWTH]
    for number in range(GROWTH):
        add(cache, [float(number)])
    assert copies == [4 + GROWTH, 4 + 2 * GROWTH]


def test_a_copy_has_the_same_positions_and_is_independent() -> None:
    first = empty(2)
    add(first, [1.0, 2.0, 3.0])
    second = first.copy(3)
    assert add(first, [4.0])[0] == [1.0, 2.0, 3.0, 4.0]
    first.length = 0
    add(first, [9.0])
    assert add(second, [5.0])[0] == [1.0, 2.0, 3.0, 5.0]


def test_a_copy_with_too_little_capacity_is_refused() -> None:
    cache = empty(2)
    add(cache, [1.0, 2.0])
    with pytest.raises(ValueError, match="a cache of 2 positions does not fit into a capacity of 1"):
        cache.copy(1)
