"""A table of attacks: their names, their measurement, and how the table is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench import tables
from bench.load import compute_percentile

Cell = str | float | None  # None could not be measured, and is shown as a dash


@dataclass(frozen=True)
class AttackTable:
    """One table. `attacks` has the text of each row by the name that `--only` takes.

    `measure` yields the cells of each attack that it is given by name, in order, without the text of the row.
    """

    title: str
    attacks: Mapping[str, str]
    headings: tuple[str, ...]
    measure: Callable[[Sequence[str]], Iterator[Sequence[Cell]]]
    note: str


def render_attack_table(section: AttackTable, rows: Mapping[str, Sequence[Cell]]) -> str:
    """Return the title, the table of the measured attacks, and the note."""
    texts = [[section.attacks[name], *map(format_cell, cells)] for name, cells in rows.items()]
    return "\n".join(
        [f"## {section.title}", "", tables.grid(texts, ["attack", *section.headings]), "", section.note, ""]
    )


def format_cell(cell: Cell) -> str:
    """Return a text as it is, a number in three digits or as a whole one, and a dash for None."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if cell >= 100 or cell == round(cell) else f"{cell:.{1 if cell >= 10 else 2}f}"


@dataclass(frozen=True)
class Latencies:
    """The seconds of the answered requests of a polite client, and the number of those without an answer."""

    seconds: tuple[float, ...] = ()
    unanswered: int = 0

    def percentile(self, percent: float) -> float | None:
        """Return a percentile in ms, or None if nothing was answered."""
        return 1e3 * compute_percentile(self.seconds, percent) if self.seconds else None

    @property
    def share(self) -> float:
        """The answered share of all requests; 0 without any."""
        return len(self.seconds) / max(1, len(self.seconds) + self.unanswered)


def divide(value: float | None, base: float | None) -> float | None:
    """Return the ratio of two measurements, or None if one is missing or the base is 0."""
    return None if value is None or not base or math.isnan(value) else value / base
