"""Acceptance rules: what the cloud keeps of a draft. Pure functions of the draft and the cloud's own logits.

A rule looks at draft tokens from the left and stops at the first it rejects; the cloud's most likely token there is
the correction, or the bonus where nothing was rejected (Leviathan et al. 2023, algorithm 1, at temperature 0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecloud_sd import probs
from edgecloud_sd.records import Verdict

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("greedy", "rank")
PUBLISHED_RANK = 20


@dataclass(frozen=True)
class Rank:
    """Keep a draft token while it is among the cloud's `r` most likely. `Rank(1)` is the greedy rule."""

    r: int

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"rank must be at least 1, not {self.r}")

    @property
    def label(self) -> str:
        return "greedy" if self.r == 1 else f"rank{self.r}"

    def __call__(self, draft: Sequence[int], logits: Tensor) -> Verdict:
        """`logits` [len(draft) + 1, vocab]: row i is for the place of draft[i], the last for what follows the draft."""
        best = logits.argmax(dim=-1).tolist()
        accepted = 0
        for token, top, row in zip(draft, best, logits, strict=False):
            if token != top and (self.r == 1 or probs.rank(row, token) > self.r):
                break
            accepted += 1
        return Verdict(accepted, best[accepted])


GREEDY = Rank(1)


def parse(rule: str, r: int = PUBLISHED_RANK) -> Rank:
    """`greedy`, `rank` (with `r`) or `rank(7)`. ValueError, naming the known rules, for anything else."""
    if rule == "greedy":
        return GREEDY
    if rule == "rank":
        return Rank(r)
    if match := re.fullmatch(r"rank\((\d+)\)", rule):
        return Rank(int(match[1]))
    raise ValueError(f"unknown acceptance rule {rule!r}: choose greedy, rank or rank(r)")
