"""The keys and values of one stream, in one buffer that grows when it is full and is cut back in no time."""

from __future__ import annotations

from torch import Tensor

GROWTH = 256  # positions by which a buffer grows: a session holds hardly more than it is said to


class Cache:
    """Keys and values of `length` positions. To cut it back, set `length`: what lies behind is written over later.

    `buffer` is [2 x layers, 1, heads, room, head size], keys and values in turn, of which `length` positions are read.
    """

    def __init__(self, buffer: Tensor, length: int = 0) -> None:
        self._buffer = buffer
        self.length = length

    def more(self, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Where the next `n` positions are to be written, and all that is there up to their end: views, keys and values
        in turn, [1, heads, n, head size] and [1, heads, length + n, head size]. `length` stays as it is.
        """
        end = self.length + n
        room = self._buffer.shape[-2]
        if end > room:
            self._buffer = self._copied(max(end, room + GROWTH))
        return self._buffer.narrow(-2, self.length, n).unbind(), self._buffer.narrow(-2, 0, end).unbind()

    def copy(self, room: int) -> Cache:
        """One of its own with the same positions, and room for so many. ValueError if they are more."""
        if room < self.length:
            raise ValueError(f"{self.length} positions do not fit into room for {room}")
        return Cache(self._copied(room), self.length)

    def _copied(self, room: int) -> Tensor:
        larger = self._buffer.new_empty((*self._buffer.shape[:-2], room, self._buffer.shape[-1]))
        larger[..., : self.length, :] = self._buffer[..., : self.length, :]
        return larger
