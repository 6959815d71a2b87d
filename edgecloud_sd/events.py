"""The frozen records that pass between modules: prompts, drafts, verdicts, events and traces.

The *context* of a generation is the last prompt token followed by every committed token. Prefill holds that token
back, so every step is "feed the new tokens, read the last rows".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["edge", "cloud"]
Origin = Literal["local", "accepted", "correction", "bonus", "cloud"]


@dataclass(frozen=True)
class Prompt:
    """The input of both models.

    `ids` has one audio placeholder for each position that the audio encoder emits. `features` is the log-mel
    spectrogram [mel bins, frames] in float32, or None for a prompt of text alone.
    """

    ids: tuple[int, ...]
    features: Tensor | None = None

    @property
    def last(self) -> int:
        """The token that prefill holds back: the first token of every context."""
        return self.ids[-1]


@dataclass(frozen=True)
class Draft:
    """Up to k tokens from the edge. `scores` has the gate's score of each token, or is empty without such a score.

    If gate token ended the draft, `doubted` is the edge's own token after it, and `scores` has one more: its score.
    """

    tokens: tuple[int, ...]
    scores: tuple[float, ...] = ()
    doubted: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The target's answer to a draft: the number of accepted tokens, and its own token for the place after them.

    The target's token is a correction after a rejected token, and the bonus after a draft that was accepted whole.
    `rest` has the target's opinion on each draft token after the rejected one, or is empty if it was not asked for. An
    opinion is the draft token if the rule would accept it after the draft as sent, else the target's most likely token.
    """

    accepted: int
    token: int
    rest: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """The features are computed and the prompt is built."""

    prompt_tokens: int


@dataclass(frozen=True)
class Opened:
    """One side has encoded the audio and prefilled the prompt."""

    side: Side


@dataclass(frozen=True)
class Drafted:
    """The edge has a draft. It drafted `ahead` of its tokens in earlier rounds, during their verifications.

    `passes` has the number of tokens fed in each forward pass of the edge since the draft before, without those
    that drafted ahead.
    """

    draft: Draft
    ahead: int = 0
    passes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Escalated:
    """The gate asks the cloud about `draft`, with `sent` committed tokens that the cloud does not have yet.

    With look-back, the draft begins with the tokens that are not final. Under gate token it has no others, and
    keeps the scores that the gate has read.
    """

    draft: Draft
    sent: int


@dataclass(frozen=True)
class Ahead:
    """The edge has drafted on during a verification, as if the whole draft were accepted.

    `tokens` follow the draft: a guess of the bonus, then draft tokens. The last `made` of them are new; earlier rounds
    drafted the others. If one token before them turns out wrong, all of them are discarded.
    """

    tokens: tuple[int, ...]
    made: int

    @property
    def guess(self) -> int | None:
        """The guess of the bonus, or None if the edge has not drafted one."""
        return self.tokens[0] if self.tokens else None


@dataclass(frozen=True)
class Verified:
    """The cloud has answered."""

    draft: Draft
    verdict: Verdict

    @property
    def is_accepted_whole(self) -> bool:
        """True if the cloud accepted every draft token."""
        return self.verdict.accepted == len(self.draft.tokens)

    @property
    def changes_text(self) -> bool:
        """True if the cloud rejects a draft token, or writes another token than the one that the edge doubts."""
        return not self.is_accepted_whole or self.draft.doubted not in (None, self.verdict.token)

    def right(self, guess: int | None) -> bool:
        """Return True if the cloud accepted the whole draft and its bonus is the `guess`."""
        return guess is not None and self.is_accepted_whole and self.verdict.token == guess


@dataclass(frozen=True)
class Committed:
    """Tokens are shown as output. They have one origin, and there is at least one.

    With look-back a later verdict can confirm or take back local tokens, so they are not final before it. A final token
    makes all tokens before it final.
    """

    tokens: tuple[int, ...]
    origin: Origin
    is_final: bool = True


@dataclass(frozen=True)
class Confirmed:
    """The cloud accepts the first `count` of the local tokens that were not final. They are final from now on."""

    count: int


@dataclass(frozen=True)
class Retracted:
    """The last `count` local tokens that were not final are taken back. None is left that is not final."""

    count: int


@dataclass(frozen=True)
class Degraded:
    """The cloud failed, and the edge finishes alone."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """The generation is at its end. All tokens are final."""

    reason: Literal["eos", "length"]


Event = (
    Prepared | Opened | Drafted | Escalated | Ahead | Verified | Committed | Confirmed | Retracted | Degraded | Finished
)


class Output:
    """The tokens that the events so far leave as output, with the origin of each. The first `final` of them stay."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.origins: list[Origin] = []
        self.final = 0

    def see(self, event: Event) -> None:
        """Follow one more event."""
        if isinstance(event, Committed):
            self.tokens += event.tokens
            self.origins += [event.origin] * len(event.tokens)
        elif isinstance(event, Confirmed):
            self.origins[self.final : self.final + event.count] = ["accepted"] * event.count
            self.final += event.count
        elif isinstance(event, Retracted):
            del self.tokens[len(self.tokens) - event.count :], self.origins[len(self.origins) - event.count :]
        if isinstance(event, Finished) or (isinstance(event, Committed) and event.is_final):
            self.final = len(self.tokens)

    @classmethod
    def after(cls, events: Iterable[Event]) -> Output:
        """Return the output after all the events."""
        output = cls()
        for event in events:
            output.see(event)
        return output


# Parts of spans that mark a moment: a failure opened the breaker of the cloud, or a caption met it open
BREAKER_MARKS = BREAKER_OPENED, BREAKER_OPEN = "breaker_opened", "breaker_open"


@dataclass(frozen=True)
class Span:
    """Time that belongs to one part of the latency breakdown, recorded where the work is done.

    `start` and `end` are seconds since the request. `size` is the payload in bytes of a message. `hidden` are the
    seconds of a verification that passed before `start`, while the edge drafted ahead.
    """

    part: str
    start: float
    end: float
    size: int = 0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """All its seconds, the hidden ones included."""
        return self.end - self.start + self.hidden


@dataclass(frozen=True)
class Trace:
    """The events of one generation, each with the seconds since the request at which it was seen from outside.

    `spans` are sorted by their ends, and do not overlap.
    """

    events: tuple[tuple[float, Event], ...]
    spans: tuple[Span, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the output, in order."""
        return tuple(self.output.tokens)

    @property
    def output(self) -> Output:
        """The output with the origin of each token."""
        return Output.after(event for _, event in self.events)

    @property
    def seconds(self) -> float:
        """Seconds from the request to the last event."""
        return self.events[-1][0]
