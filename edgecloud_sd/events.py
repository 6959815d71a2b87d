"""The frozen records that pass between rooms. No logic beyond counting what a record already holds.

Words (design, section 1): a *draft* is proposed by the edge; a *verdict* is the cloud's answer to it; the *context* is
the last prompt token followed by everything committed, so that "feed what is new, read the last rows" needs no special
case for the first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["edge", "cloud"]
Origin = Literal["local", "accepted", "correction", "bonus", "cloud"]


@dataclass(frozen=True)
class Prompt:
    """What both sides are opened on.

    `ids` holds one audio placeholder for each position that the audio encoder emits; `features` is the log-mel
    spectrogram [mel bins, frames] in float32, or None for a prompt of text alone.
    """

    ids: tuple[int, ...]
    features: Tensor | None = None

    @property
    def last(self) -> int:
        """The token held back from prefill: the first of every context."""
        return self.ids[-1]


@dataclass(frozen=True)
class Draft:
    """Up to k tokens from the edge, with the gate's statistic for each, or none where the gate reads none."""

    tokens: tuple[int, ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How many draft tokens the cloud keeps, and its own token for the position after them.

    That token is a correction where a draft token was rejected, the bonus where all were accepted.
    """

    accepted: int
    token: int


@dataclass(frozen=True)
class Prepared:
    """Features computed from the samples, and the prompt built."""

    prompt_tokens: int


@dataclass(frozen=True)
class Opened:
    """One side has encoded the audio and prefilled the prompt."""

    side: Side


@dataclass(frozen=True)
class Drafted:
    """`ahead` of the draft's tokens had been drafted before their round began, and were kept."""

    draft: Draft
    ahead: int = 0


@dataclass(frozen=True)
class Escalated:
    """The gate has sent the draft to the cloud, with `sent` committed tokens that the cloud had not seen."""

    draft: Draft
    sent: int


@dataclass(frozen=True)
class Ahead:
    """While a verdict was on its way the edge has drafted on, as if all were accepted.

    `tokens` is all that follows the draft now: a guess of the bonus, then draft tokens. The last `made` of them are
    new; those before were drafted during the rounds before. One wrong guess, and all of it is thrown away.
    """

    tokens: tuple[int, ...]
    made: int

    @property
    def guess(self) -> int | None:
        """Of the bonus; None before one is made."""
        return self.tokens[0] if self.tokens else None


@dataclass(frozen=True)
class Verified:
    draft: Draft
    verdict: Verdict

    def right(self, guess: int | None) -> bool:
        """Whether the cloud has kept the whole draft and then said what the edge had guessed."""
        return self.verdict == Verdict(len(self.draft.tokens), guess) if guess is not None else False


@dataclass(frozen=True)
class Committed:
    """Tokens that are output now, all of one origin. Never empty."""

    tokens: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True)
class Degraded:
    """The cloud could not be had: the edge finishes the caption alone."""

    reason: str


@dataclass(frozen=True)
class Finished:
    reason: Literal["eos", "length"]


Event = Prepared | Opened | Drafted | Escalated | Ahead | Verified | Committed | Degraded | Finished


@dataclass(frozen=True)
class Span:
    """Time inside an interval between two events that belongs to a part of the latency breakdown of its own.

    `start` and `end` are seconds since the request; `size` is the payload in bytes, for what crosses a link. `hidden`,
    of a verdict's round trip, are the seconds of it that passed before `start`, while the edge drafted ahead.
    """

    part: str
    start: float
    end: float
    size: int = 0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """All that it took, hidden or not."""
        return self.end - self.start + self.hidden


@dataclass(frozen=True)
class Trace:
    """One caption's events with the seconds since its request at which each was seen from outside.

    `spans` are in the order of their ends, and do not overlap.
    """

    events: tuple[tuple[float, Event], ...]
    spans: tuple[Span, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every committed id, in order."""
        return tuple(token for _, event in self.events if isinstance(event, Committed) for token in event.tokens)

    @property
    def seconds(self) -> float:
        """Request to last event."""
        return self.events[-1][0]
