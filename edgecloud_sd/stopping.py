"""The end of a generation, and what fits before it. Only this module truncates tokens before they are committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgecloud_sd.fields import check_type, whole_number

MAX_NEW_TOKENS = 64  # the default limit of a caption's length


@dataclass(frozen=True)
class Stopping:
    """The end at the first of the `eos` ids, which stays as the last token, or after `max_new_tokens`.

    Raise TypeError or ValueError for ids that are no whole numbers from 0, and for less than one new token.
    """

    eos: frozenset[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_type("eos", self.eos, Iterable, "give a set of token ids")
        object.__setattr__(self, "eos", frozenset(whole_number("eos", token, 0) for token in self.eos))
        object.__setattr__(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, 1))

    def room(self, committed: int) -> int:
        """Return how many tokens the length limit allows after `committed` tokens."""
        return self.max_new_tokens - committed

    def cut(self, tokens: Sequence[int], committed: int) -> tuple[int, ...]:
        """Return the part of `tokens` that may follow `committed` tokens: nothing after EOS or beyond the limit."""
        allowed = tuple(tokens[: max(self.room(committed), 0)])
        for position, token in enumerate(allowed):
            if token in self.eos:
                return allowed[: position + 1]
        return allowed

    def reason(self, output: Sequence[int]) -> Literal["eos", "length"] | None:
        """Return why the output is finished, or None if it is not."""
        if output and output[-1] in self.eos:
            return "eos"
        return "length" if len(output) >= self.max_new_tokens else None


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens that a prompt and its output may have together, on one side."""

    tokens: int
    name: str  # as a message names it: "the maximum length of ..."
    remedy: str = ""  # a way to raise it, if there is one


def check_length(prompt_tokens: int, new_tokens: int, limits: Iterable[LengthLimit]) -> None:
    """Raise ValueError unless a prompt and that many tokens after it fit within every limit.

    Every mode and both sides count alike: no pass feeds a token beyond the limit of the output (`Stopping.room`).
    """
    lowest = min(limits, key=lambda limit: limit.tokens, default=None)
    if lowest is None or prompt_tokens + new_tokens <= lowest.tokens:
        return
    room = lowest.tokens - prompt_tokens
    advice = f"ask for at most {room} new tokens (--max-new-tokens)" if room > 0 else "give a shorter prompt or clip"
    raise ValueError(
        f"a prompt of {prompt_tokens} tokens and {new_tokens} new tokens exceed {lowest.name}, {lowest.tokens} tokens: "
        + ", or ".join(filter(None, (advice, lowest.remedy)))
    )
