"""The decode loop: edge-only, cloud-only and speculative, as one generator of events.

It holds no clock, no logger and no measurement: whoever iterates it may time the events (`clock.stamp`) or print them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from edgecloud_sd import gate as gates
from edgecloud_sd.drafter import Drafter
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Degraded,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Origin,
    Prompt,
    Verdict,
    Verified,
)
from edgecloud_sd.prefill import Begin
from edgecloud_sd.session import Model
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import CloudFault, Verifier

MODES = ("edge", "cloud", "speculative")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Decoding:
    """How to decode. Edge mode is drafting one token at a time under a gate that never escalates."""

    mode: str
    stopping: Stopping
    k: int | Callable[[], int] = 1  # or asked for before each draft
    gate: gates.Gate = gates.NEVER
    alone: bool = False  # whether the edge finishes a caption that the cloud fails
    stop: gates.DraftStop | None = None  # what ends a draft early
    begin: Begin[Verdict] | None = None  # of a call that the edge drafts ahead beside; None: it waits
    ahead: int = 0  # tokens that it drafts then, at most
    is_lossless: bool = (
        False  # whether the output is the same however drafts are cut: all that was drafted ahead may be one
    )

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")


def check_mode(mode: str) -> None:
    """ValueError, naming the known ones, for any other mode."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")


def decode(prompt: Prompt, how: Decoding, edge: Model | None = None, cloud: Verifier | None = None) -> Iterator[Event]:
    """Decode one prompt. `edge` is needed for the modes edge and speculative, `cloud` for cloud and speculative."""
    if how.mode == "cloud":
        return _cloud(prompt, how, _needed(cloud, "cloud"))
    speculative = how.mode == "speculative" and how.gate.escalates
    return _rounds(prompt, how, _needed(edge, "edge"), _needed(cloud, "cloud") if speculative else None)


def _cloud(prompt: Prompt, how: Decoding, cloud: Verifier) -> Iterator[Event]:
    output: list[int] = []
    verification = cloud.open(prompt)
    try:
        verification.wait()
        yield Opened("cloud")
        for token in verification.generate(how.stopping):
            output.append(token)
            yield Committed((token,), "cloud")
        yield _finished(how, output)
    finally:
        verification.close()


def _rounds(prompt: Prompt, how: Decoding, edge: Model, cloud: Verifier | None) -> Iterator[Event]:
    context = [prompt.last]  # then everything committed
    known = 0  # how much of the context the cloud holds: none until it has answered once
    verification = cloud.open(prompt) if cloud else None
    escalates = how.gate if verification else gates.NEVER
    try:
        drafter = Drafter(edge.open(prompt), how.stopping.eos, how.gate.score, how.stop)
        yield Opened("edge")
        while how.stopping.reason(context[1:]) is None:
            ahead = drafter.follow(context)
            room = how.stopping.room(len(context) - 1)
            k = how.k if isinstance(how.k, int) else how.k()
            drafted = drafter.draft(min(max(k, ahead) if how.is_lossless else k, room))
            yield Drafted(drafted, min(ahead, len(drafted.tokens)))
            parts: list[tuple[tuple[int, ...], Origin]] = [(drafted.tokens, "local")]
            if verification and escalates(drafted):
                yield Escalated(drafted, len(context) - known)
                try:
                    if not known:
                        verification.wait()
                        yield Opened("cloud")
                    ask = partial(verification.verify, known, context[known:], drafted.tokens)
                    if how.begin:
                        n = len(drafted.tokens)
                        verdict = yield from _ahead(ask, how.begin, drafter, n, min(n + how.ahead, room))
                    else:
                        verdict = ask()
                except CloudFault as fault:
                    if not how.alone:
                        raise
                    yield Degraded(str(fault))
                    escalates = gates.NEVER
                else:
                    yield Verified(drafted, verdict)
                    known = len(context) + verdict.accepted
                    whole = verdict.accepted == len(drafted.tokens)
                    parts = [
                        (drafted.tokens[: verdict.accepted], "accepted"),
                        ((verdict.token,), "bonus" if whole else "correction"),
                    ]
            for tokens, origin in parts:
                # nothing follows EOS, and a bonus may be one token too many
                if how.stopping.reason(context[1:]) is None and (kept := how.stopping.cut(tokens, len(context) - 1)):
                    context.extend(kept)
                    yield Committed(kept, origin)
        yield _finished(how, context[1:])
    finally:
        if verification:
            verification.close()


def _ahead(
    ask: Callable[[], Verdict], begin: Begin[Verdict], drafter: Drafter, drafted: int, n: int
) -> Generator[Event, None, Verdict]:
    """The verdict. Until it is there the edge drafts on, up to `n` tokens with the `drafted` ones."""
    pending = begin(ask)
    try:
        made = drafter.ahead(n, pending.done)
        yield Ahead(drafter.tokens[drafted:], made)
    except BaseException:
        with suppress(Exception):
            pending.result()  # it must not run on into whatever comes next
        raise
    return pending.result()


def _finished(how: Decoding, output: list[int]) -> Finished:
    reason = how.stopping.reason(output)
    if reason is None:
        raise RuntimeError("the cloud stopped before EOS and before the length limit")
    return Finished(reason)


def _needed(part: _T | None, side: str) -> _T:
    if part is None:
        raise ValueError(f"this mode needs the {side} model, and none was given")
    return part
