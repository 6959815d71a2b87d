"""Model work in forward passes of bounded length, between which a server may serve another client.

A row is one position of a forward pass, or as many frames for the audio encoder as take its time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")

Steps = Generator[int, None, _T]  # yields the rows of each forward pass before it runs that pass; returns the result
RowLimit = Callable[[int], int]  # the most rows of a pass after a number of cached positions

MIN_ROWS, MAX_ROWS = 16, 64
SHORT_CONTEXT = 512  # positions
GPU_ROWS = 256


def no_limit(length: int) -> int:
    """Return a number of rows that no pass reaches: all work is one pass."""
    return sys.maxsize


def limit_rows(length: int) -> int:
    """Return the most rows of a pass that other clients may have to wait for.

    Attention makes a row slower as the context grows, so a pass after a long context has fewer rows. With the pocket
    cloud on one core of a Xeon, these passes take 10 to 20 ms, and a verification 6 to 15 ms.
    """
    return max(MIN_ROWS, min(MAX_ROWS, MAX_ROWS * SHORT_CONTEXT // max(length, 1)))


def limit_rows_on_gpu(length: int) -> int:
    """Return the most rows of a pass on a GPU that other clients may have to wait for.

    Not measured, but computed: an H100 reads the weights of a 7B model in the time of 256 rows.
    """
    return GPU_ROWS


def split_rows(begin: int, end: int, limit: RowLimit) -> Iterator[slice]:
    """Yield the parts of the positions `begin` to `end`, one for each pass."""
    while begin < end:
        part = slice(begin, min(begin + limit(begin), end))
        yield part
        begin = part.stop


@dataclass(frozen=True)
class Outcome(Generic[_T]):
    """The result of steps that have ended."""

    result: _T


def advance(steps: Steps[_T]) -> int | Outcome[_T]:
    """Run steps to the next pass and return its rows, or their outcome at the end."""
    try:
        return next(steps)
    except StopIteration as end:
        return Outcome(end.value)


def run_steps(steps: Steps[_T]) -> _T:
    """Run all steps and return their result."""
    while not isinstance(outcome := advance(steps), Outcome):
        pass
    return outcome.result
