"""Acceptance rules: what the cloud keeps of a draft. Pure functions of the draft, the cloud's own logits and uniforms.

A rule looks at draft tokens from the left and stops at the first it rejects; the cloud's most likely token there is
the correction, or the bonus where nothing was rejected (Leviathan et al. 2023, algorithm 1, at temperature 0).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgecloud_sd import probs
from edgecloud_sd.events import Verdict

if TYPE_CHECKING:
    from torch import Tensor

RULE_NAMES = ("greedy", "rank", "rank(r)", "synthetic(p)")
RATE_PATTERN = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-[0-9]+)?"
MAX_SYNTHETIC_RATES = 10  # of rule synthetic
PUBLISHED_RANK = 20


class Rule(Protocol):
    """What a verifier judges a draft by. Hashable, and equal to one of the same text."""

    @property
    def text(self) -> str:
        """What `parse_rule` makes this rule of: letters, digits and what else may stand in a URL's query."""

    @property
    def label(self) -> str:
        """In the ids of cases, and so in the names of files."""

    @property
    def is_lossless(self) -> bool:
        """Whether all that it lets pass are the cloud's own tokens; a rule that is not strict is lossy."""

    def __call__(self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float]) -> Verdict:
        """The verdict on `draft`.

        `logits` [len(draft) + 1, vocab]: row i is for the place of draft[i], the last for what follows the draft.
        `uniforms` in [0, 1), one a draft token, are drawn when they are looked at.
        """


@dataclass(frozen=True)
class Rank:
    """Keep a draft token while it is among the cloud's `r` most likely. `Rank(1)` is the greedy rule."""

    r: int

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"rank must be at least 1, not {self.r}")

    @property
    def text(self) -> str:
        return "greedy" if self.is_lossless else f"rank({self.r})"

    @property
    def label(self) -> str:
        return "greedy" if self.is_lossless else f"rank{self.r}"

    @property
    def is_lossless(self) -> bool:
        return self.r == 1

    def __call__(self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float] = ()) -> Verdict:
        best = logits.argmax(dim=-1).tolist()
        accepted = 0
        for token, top in zip(draft, best, strict=False):
            if token != top and (self.is_lossless or probs.rank(logits[accepted], token) > self.r):
                break
            accepted += 1
        return Verdict(accepted, best[accepted])


GREEDY = Rank(1)


@dataclass(frozen=True)
class Synthetic:
    """Keep draft token i while its uniform is below `rates[i]`, whatever the cloud thinks of it: dry runs of hardware.

    With random weights nothing would be kept, and a loop's time depends on how much is. Each rate is that of tokens
    whose draft was kept so far; the last goes on beyond the list. A correction is another than the rejected token.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.rates) <= MAX_SYNTHETIC_RATES:
            raise ValueError(f"synthetic takes 1 to {MAX_SYNTHETIC_RATES} rates, not {len(self.rates)}")
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"a rate of synthetic must be 0 to 1, not {rate}")

    @property
    def text(self) -> str:
        return f"synthetic({self._joined('/')})"

    @property
    def label(self) -> str:
        return f"synthetic{self._joined('_')}"

    @property
    def is_lossless(self) -> bool:
        return False

    def __call__(self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float]) -> Verdict:
        best = logits.argmax(dim=-1).tolist()
        accepted = 0
        for token, uniform in zip(draft, uniforms, strict=False):
            if uniform >= self.rates[min(accepted, len(self.rates) - 1)]:
                others = logits[accepted].clone()
                others[token] = -math.inf
                return Verdict(accepted, int(others.argmax()))
            accepted += 1
        return Verdict(accepted, best[accepted])

    def _joined(self, between: str) -> str:
        return between.join(repr(float(rate)).removesuffix(".0") for rate in self.rates)


def uniform(seed: bytes, place: int) -> float:
    """In [0, 1): the same for the same seed and place, in whatever order they are asked for.

    Counter-based, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"): 53 bits of the BLAKE2b of
    the place, whose key is the seed (64 bytes at most).
    """
    digest = hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8, key=seed).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def parse_rule(rule: str, r: int = PUBLISHED_RANK) -> Rule:
    """`greedy`, `rank` (with `r`), `rank(7)`, `synthetic(0.78)`, or `synthetic(0.9/0.8/0.6)` by the place in the draft.

    ValueError, naming the known rules, for anything else.
    """
    if rule == "greedy":
        return GREEDY
    if rule == "rank":
        return Rank(r)
    if match := re.fullmatch(r"rank\(([0-9]+)\)", rule):
        return Rank(int(match[1]))
    if match := re.fullmatch(rf"synthetic\(({RATE_PATTERN}(?:/{RATE_PATTERN})*)\)", rule):
        return Synthetic(tuple(map(float, match[1].split("/"))))
    raise ValueError(f"unknown acceptance rule {rule!r}: choose one of {', '.join(RULE_NAMES)}")
