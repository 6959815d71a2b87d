"""The audit: verify a share of the captions afterwards, and say if too many are not the cloud's own.

The clips are drawn by their ids alone. A drawn caption that a lossless rule verified to its end is the cloud's own and
costs nothing. Any other is verified off the clock. So the drawn captions are a fair sample of all, and the number of
wrong ones is binomial if the clips are independent.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

AUDIT_LEVEL = 0.05  # the share of the runs at exactly the promised rate that are accused, at most


@dataclass(frozen=True)
class AuditCount:
    """The drawn captions of a run, those of them that the cloud had to verify afterwards, and the wrong ones.

    `promised` is the largest share of wrong captions that the run promised, or None without a promise.
    """

    drawn: int
    verified: int
    wrong: int
    promised: float | None

    @property
    def rate(self) -> float | None:
        """The share of the drawn captions that differ from the cloud's own, or None if none was drawn."""
        return self.wrong / self.drawn if self.drawn else None

    @property
    def p(self) -> float | None:
        """The chance of as many wrong captions or more at the promised rate, or None without a promise or a draw."""
        return None if self.promised is None or not self.drawn else binomial_tail(self.drawn, self.wrong, self.promised)

    @property
    def is_broken(self) -> bool | None:
        """True if the promise is refuted at `AUDIT_LEVEL`, or None where `p` is None."""
        return None if self.p is None else self.p <= AUDIT_LEVEL

    def sentence(self) -> str:
        """Return one line on what the audit saw."""
        if not self.drawn:
            return "no caption was drawn: raise --audit or caption more clips"
        seen = (
            f"{self.wrong} of {self.drawn} drawn captions differ from the cloud's own ({self.wrong / self.drawn:.3f})"
        )
        if self.p is None:
            return f"{seen}; no rate was promised"
        if self.is_broken:
            return f"{seen}; the promised rate is {self.promised:g} at most (p = {self.p:.2g}): calibrate again"
        return f"{seen}; this does not refute the promised rate of {self.promised:g} at most (p = {self.p:.2g})"


def is_drawn(file_id: str, share: float) -> bool:
    """Return True for about `share` of all clips, the same ones in every run."""
    digest = hashlib.blake2b(file_id.encode(), digest_size=8, person=b"audit").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def binomial_tail(n: int, least: int, p: float) -> float:
    """Return the chance that `least` or more of `n` independent trials succeed, each with chance p in (0, 1)."""

    def log_chance(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return ways + k * math.log(p) + (n - k) * math.log1p(-p)

    return min(math.fsum(math.exp(log_chance(k)) for k in range(least, n + 1)), 1.0)
