"""The identity of a target model, which both sides compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.models.frontend import Traits


@dataclass(frozen=True)
class Identity:
    """A target model, without a path. The edge compares it with its own side, and results record it."""

    name: str
    engine: str
    dtype: str
    device: str
    vocab_size: int
    max_length: int  # tokens of prompt and output together
    max_rank: int  # the largest r of rule rank(r)
    traits: Traits
    weights: str = ""  # digest of the checkpoint's weights; `DUMMY` if they are random, empty without files
    synthetic: bool = True  # the engine has rule synthetic(p)

    @property
    def fingerprint(self) -> str:
        """Return a digest that is the same in every process with this model in this number format."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def refusal(self, rule: Rule) -> str:
        """Return why this engine does not have a rule, or an empty text if it does."""
        if isinstance(rule, Rank):
            fits = rule.r <= self.max_rank
            return "" if fits else f"rule {rule.text}: the cloud's engine has rank(r) up to r = {self.max_rank}"
        return "" if self.synthetic else f"rule {rule.text}: the cloud's engine has only greedy and rank(r)"
