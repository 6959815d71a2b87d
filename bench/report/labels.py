"""Where labels stand beside the markers of a picture, so that none covers another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

# Where a label may stand beside its marker, best first
DIRECTIONS = (
    (1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1),
    (1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5),
)  # fmt: skip
DISTANCES = (2, 8, 16, 26, 38, 52, 68, 86, 106, 128)  # points


class Box(NamedTuple):
    """A rectangle by its corners, in points."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def meets(self, other: Box) -> bool:
        """Whether they have more than an edge in common."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def within(self, other: Box) -> bool:
        sides = self.left >= other.left and self.right <= other.right
        return sides and self.bottom >= other.bottom and self.top <= other.top


def place(markers: Sequence[Box], sizes: Sequence[tuple[float, float]], area: Box) -> list[Box]:
    """Where the labels of these sizes stand: inside `area`, over no marker and no other label, near their own markers.

    Where it can be avoided, the line from a marker to its label crosses no label that is there already.
    """
    placed: list[Box] = []
    for marker, size in zip(markers, sizes, strict=True):

        def faults(box: Box, marker: Box = marker) -> tuple[bool, int, int]:
            covers = sum(box.meets(other) for other in (*markers, *placed))
            crosses = sum(dot.meets(other) for dot in _line(marker, box) for other in placed)
            return not box.within(area), covers, crosses

        beside = [_beside(marker, size, *at) for at in itertools.product(DISTANCES, DIRECTIONS)]
        faultless = (box for box in beside if not any(faults(box)))
        placed.append(next(faultless, None) or min(beside, key=faults))
    return placed


def _beside(marker: Box, size: tuple[float, float], distance: float, direction: tuple[float, float]) -> Box:
    (x, y), (width, height), (dx, dy) = marker.centre, size, direction
    x += dx * ((marker.right - marker.left + width) / 2 + distance)
    y += dy * ((marker.top - marker.bottom + height) / 2 + distance)
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _line(marker: Box, label: Box, steps: int = 8) -> list[Box]:
    """The line from one centre to the other, in dots."""
    (x, y), (to_x, to_y) = marker.centre, label.centre
    dots = [(x + (to_x - x) * i / steps, y + (to_y - y) * i / steps) for i in range(1, steps)]
    return [Box(a - 1, b - 1, a + 1, b + 1) for a, b in dots]
