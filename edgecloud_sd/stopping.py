"""When a caption ends. The one place that truncates what would be committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stopping:
    """At the first of the `eos` ids (kept, as the last token) or after `max_new_tokens`."""

    eos: frozenset[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def room(self, committed: int) -> int:
        """How many tokens may still be committed after `committed`, before the length limit."""
        return self.max_new_tokens - committed

    def cut(self, tokens: Sequence[int], committed: int) -> tuple[int, ...]:
        """What of `tokens` may follow the `committed` tokens so far: nothing after EOS, nothing beyond the limit."""
        kept = tuple(tokens[: max(self.room(committed), 0)])
        for position, token in enumerate(kept):
            if token in self.eos:
                return kept[: position + 1]
        return kept

    def reason(self, output: Sequence[int]) -> Literal["eos", "length"] | None:
        """Why the output is finished, or None while it is not."""
        if output and output[-1] in self.eos:
            return "eos"
        return "length" if len(output) >= self.max_new_tokens else None
