"""The KV cache of one session: one buffer that grows in steps and rolls back without copying."""

from __future__ import annotations

from torch import Tensor

GROWTH = 256  # positions added when a buffer is full: more than one caption needs, so that it rarely grows twice


class Cache:
    """Keys and values of the first `length` positions of a buffer.

    The buffer has the shape [2 x layers, 1, heads, capacity, head size], with the keys and the values of each layer in
    turn. To roll back, set `length` to a smaller number: later writes replace the positions behind it.
    """

    def __init__(self, buffer: Tensor, length: int = 0) -> None:
        self._buffer = buffer
        self.length = length

    def views(self, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return views of the next `n` positions, for writing, and of all positions up to their end, for reading.

        Each tuple has the keys and the values of each layer in turn: [1, heads, n, head size] and
        [1, heads, length + n, head size]. The caller raises `length` after the write.
        """
        end = self.length + n
        capacity = self._buffer.shape[-2]
        if end > capacity:
            self._buffer = self._reallocate(max(end, capacity + GROWTH))
        return self._buffer.narrow(-2, self.length, n).unbind(), self._buffer.narrow(-2, 0, end).unbind()

    def copy(self, capacity: int) -> Cache:
        """Return an independent cache with the same positions.

        Raise ValueError if they exceed `capacity`.
        """
        if capacity < self.length:
            raise ValueError(f"a cache of {self.length} positions does not fit into a capacity of {capacity}")
        return Cache(self._reallocate(capacity), self.length)

    def _reallocate(self, capacity: int) -> Tensor:
        buffer = self._buffer.new_empty((*self._buffer.shape[:-2], capacity, self._buffer.shape[-1]))
        buffer[..., : self.length, :] = self._buffer[..., : self.length, :]
        return buffer
