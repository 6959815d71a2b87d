"""Acceptance rules decide which draft tokens the cloud accepts. They are pure functions.

A rule reads the draft from the left, up to the first token that it rejects. The target's most likely token at that
place is the correction. If no token is rejected, the most likely token after the draft is the bonus
(Leviathan et al. 2023, algorithm 1, at temperature 0). The places after a correction get an opinion each, because the
same forward pass has computed their logits.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from edgecloud_sd import probs
from edgecloud_sd.events import Verdict
from edgecloud_sd.fields import check_type, real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

RULE_NAMES = ("greedy", "rank", "rank(r)", "synthetic(p)")
RATE_PATTERN = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-[0-9]+)?"
MAX_SYNTHETIC_RATES = 10
PUBLISHED_RANK = 20


class Rule(Protocol):
    """An acceptance rule. It is hashable, and equal to every rule of the same text."""

    @property
    def text(self) -> str:
        """The text that `parse_rule` reads as this rule. It needs no escaping in the query of a URL."""

    @property
    def label(self) -> str:
        """The rule's part of a case id, and so of a file name."""

    @property
    def is_lossless(self) -> bool:
        """True if the rule accepts the target's own tokens only. Any other rule is lossy."""

    def __call__(
        self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float], wants_rest: bool = True
    ) -> Verdict:
        """Return the verdict on `draft`, which may be empty, with the rest if it is wanted.

        `logits` is [len(draft) + 1, vocab_size]: row i is for the place of draft[i], the last row for the bonus.
        `uniforms` gives one number in [0, 1) for each draft token, and is read only if the rule needs it.
        """


@dataclass(frozen=True)
class Rank:
    """The rule that accepts a draft token if it is among the target's `r` most likely. `Rank(1)` is rule greedy."""

    r: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", whole_number("rank", self.r, 1))

    @property
    def text(self) -> str:
        """The text that `parse_rule` reads as this rule."""
        return "greedy" if self.is_lossless else f"rank({self.r})"

    @property
    def label(self) -> str:
        """The rule's part of a case id."""
        return "greedy" if self.is_lossless else f"rank{self.r}"

    @property
    def is_lossless(self) -> bool:
        """True for rank 1."""
        return self.r == 1

    def __call__(
        self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float] = (), wants_rest: bool = True
    ) -> Verdict:
        """Return the verdict on `draft`."""
        best = logits.argmax(dim=-1).tolist()
        accepts = (
            token == top or (not self.is_lossless and probs.rank(row, token) <= self.r)
            for token, top, row in zip(draft, best, logits, strict=False)
        )
        return build_verdict(draft, accepts, best, wants_rest)


GREEDY = Rank(1)


@dataclass(frozen=True)
class Synthetic:
    """The rule that accepts draft token i if its uniform is below `rates[i]`, whatever the target's logits say.

    The rule serves dry runs of hardware. Random weights would reject every token, but a loop's time depends on how
    many are accepted. Each rate is conditional on the acceptance of all tokens before. The last rate goes on beyond
    the list. A correction always differs from the rejected token.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        check_type("the rates of synthetic", self.rates, (tuple, list), "give a tuple, as in Synthetic((0.78,))")
        # adding 0 turns -0.0 into 0.0, which parse_rule can read
        rates = tuple(real_number("a rate of synthetic", rate, " from 0 to 1") + 0.0 for rate in self.rates)
        object.__setattr__(self, "rates", rates)
        if not 1 <= len(self.rates) <= MAX_SYNTHETIC_RATES:
            raise ValueError(f"synthetic takes 1 to {MAX_SYNTHETIC_RATES} rates, not {len(self.rates)}")
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"a rate of synthetic must be 0 to 1, not {rate}")

    @property
    def text(self) -> str:
        """The text that `parse_rule` reads as this rule."""
        return f"synthetic({self._join_rates('/')})"

    @property
    def label(self) -> str:
        """The rule's part of a case id."""
        return f"synthetic{self._join_rates('_')}"

    @property
    def is_lossless(self) -> bool:
        """Always False."""
        return False

    def __call__(
        self, draft: Sequence[int], logits: Tensor, uniforms: Iterable[float], wants_rest: bool = True
    ) -> Verdict:
        """Return the verdict on `draft`."""
        best = logits.argmax(dim=-1).tolist()
        rates = [*self.rates, *self.rates[-1:] * len(draft)]
        accepts = (number < rate for _, number, rate in zip(draft, uniforms, rates, strict=False))
        verdict = build_verdict(draft, accepts, best, wants_rest)
        if verdict.accepted == len(draft):
            return verdict
        others = logits[verdict.accepted].clone()
        others[draft[verdict.accepted]] = -math.inf
        return replace(verdict, token=int(others.argmax()))

    def _join_rates(self, separator: str) -> str:
        return separator.join(repr(float(rate)).removesuffix(".0") for rate in self.rates)


def build_verdict(
    draft: Sequence[int], accepts: Iterable[bool], best: Sequence[int], wants_rest: bool = True
) -> Verdict:
    """Return the verdict on `draft`. `accepts` says for each of its tokens if the rule accepts it.

    Without a rest, `accepts` is read up to the first False. `best` has the target's most likely token at each place of
    the draft, and at the place after it.
    """
    answers = iter(accepts)
    accepted = sum(1 for _ in itertools.takewhile(bool, answers))
    later = zip(draft[accepted + 1 :], answers, best[accepted + 1 :], strict=False) if wants_rest else ()
    return Verdict(accepted, best[accepted], tuple(token if is_accepted else top for token, is_accepted, top in later))


def uniform(seed: bytes, place: int) -> float:
    """Return a number in [0, 1) that depends on the seed (at most 64 bytes) and the place alone.

    The generator is counter-based, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"). It takes
    53 bits of the BLAKE2b digest of the place, with the seed as key.
    """
    digest = hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8, key=seed).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def parse_rule(rule: str, r: int = PUBLISHED_RANK) -> Rule:
    """Return the rule that a text names: `greedy`, `rank` (with `r`), `rank(7)` or `synthetic(0.78)`.

    `synthetic(0.9/0.8/0.6)` gives one rate for each place in the draft. Raise ValueError for an unknown rule.
    """
    check_type("rule", rule, str, f"give one of {', '.join(RULE_NAMES)}")
    if rule == "greedy":
        return GREEDY
    if rule == "rank":
        return Rank(r)
    if match := re.fullmatch(r"rank\(([0-9]+)\)", rule):
        return Rank(int(match[1]))
    if match := re.fullmatch(rf"synthetic\(({RATE_PATTERN}(?:/{RATE_PATTERN})*)\)", rule):
        return Synthetic(tuple(map(float, match[1].split("/"))))
    raise ValueError(f"unknown acceptance rule {rule!r}: choose one of {', '.join(RULE_NAMES)}")
