"""The cache of one stream against a plain list of positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgecloud_sd.models.cache import GROWTH, Cache

SHAPE = (4, 1, 2, 3)  # keys and values of two layers, one stream, two heads, three numbers


def empty(room: int) -> Cache:
    layers, one, heads, size = SHAPE
    return Cache(torch.full((layers, one, heads, room, size), torch.nan))


def add(cache: Cache, numbers: list[float]) -> list[list[float]]:
    """Writes a number all over each next position; what is then seen of each of the layers' keys and values."""
    new, seen = cache.more(len(numbers))
    for each in new:
        each.copy_(torch.tensor(numbers)[:, None].expand(1, 2, -1, 3))
    cache.length += len(numbers)
    assert len(new) == len(seen) == SHAPE[0]
    assert all(each.shape == (1, 2, cache.length, 3) for each in seen)
    return [alone(each) for each in seen]


def alone(positions: Tensor) -> list[float]:
    """The one number that each position is full of."""
    found: list[float] = positions[0, 0, :, 0].tolist()
    assert (positions == positions[:, :1, :, :1]).all()
    return found


@given(
    st.integers(0, 5),
    st.lists(st.one_of(st.integers(1, 7).map(lambda n: ("add", n)), st.floats(0, 1).map(lambda x: ("cut", x)))),
)
def test_what_is_seen_is_what_was_written_and_not_cut_off(room: int, steps: list[tuple[str, float]]) -> None:
    cache = empty(room)
    expected: list[float] = []
    for number, (what, amount) in enumerate(steps):
        if what == "cut":
            del expected[int(amount * len(expected)) :]
            cache.length = len(expected)
        else:
            new = [100.0 * number + i for i in range(int(amount))]
            expected += new
            assert add(cache, new) == [expected] * SHAPE[0]


def test_a_position_costs_no_copy_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copied = Cache._copied

    def counted(cache: Cache, room: int) -> Tensor:
        copies.append(room)
        return copied(cache, room)

    monkeypatch.setattr(Cache, "_copied", counted)
    cache = empty(4)
    for number in range(100):
        add(cache, [float(number)])
    assert copies == [4 + GROWTH]
    for number in range(GROWTH):
        add(cache, [float(number)])
    assert copies == [4 + GROWTH, 4 + 2 * GROWTH]


def test_a_copy_has_the_same_and_goes_its_own_way() -> None:
    first = empty(2)
    add(first, [1.0, 2.0, 3.0])
    second = first.copy(3)
    assert add(first, [4.0])[0] == [1.0, 2.0, 3.0, 4.0]
    first.length = 0
    add(first, [9.0])
    assert add(second, [5.0])[0] == [1.0, 2.0, 3.0, 5.0]


def test_a_copy_needs_room_for_what_is_there() -> None:
    cache = empty(2)
    add(cache, [1.0, 2.0])
    with pytest.raises(ValueError, match="2 positions do not fit into room for 1"):
        cache.copy(1)
