"""The decode loop: edge-only, cloud-only and speculative, as a generator of events.

The loop holds no clock, no logger and no measurement. `timing.clock.stamp` times the events from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from edgecloud_sd.drafter import Drafter
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Degraded,
    Draft,
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
from edgecloud_sd.gate import NEVER
from edgecloud_sd.prefill import Background
from edgecloud_sd.session import Model
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import CloudFault, Verification, Verifier

_T = TypeVar("_T")


@dataclass(frozen=True)
class Runtime:
    """The parts of a run that are no part of the strategy.

    `choose_k` gives the length of the next draft if the strategy has none. `background` starts a verification
    beside which the edge drafts ahead; None makes the edge wait. `finish_alone` lets the edge finish after a fault of
    the cloud. `shared_ids` is the smaller of two vocabulary sizes, or None if they are equal. The edge drafts ids below
    it alone, and reads a larger id of the cloud as the last of them.
    """

    choose_k: Callable[[], int] | None = None
    background: Background[Verdict] | None = None
    finish_alone: bool = False
    shared_ids: int | None = None


DEFAULT_RUNTIME = Runtime()


def decode(
    prompt: Prompt,
    strategy: Strategy,
    stopping: Stopping,
    edge: Model | None = None,
    cloud: Verifier | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Iterator[Event]:
    """Decode one prompt. Modes edge and speculative need `edge`, modes cloud and speculative need `cloud`."""
    if strategy.mode == "cloud":
        return _generate(prompt, stopping, _require(cloud, "cloud"))
    if strategy.mode == "edge":
        alone = Strategy("speculative", NEVER, k=1)  # one local token per round
        return _speculate(prompt, alone, stopping, _require(edge, "edge"), None, runtime)
    verifier = _require(cloud, "cloud") if strategy.asks_cloud else None
    return _speculate(prompt, strategy, stopping, _require(edge, "edge"), verifier, runtime)


def _generate(prompt: Prompt, stopping: Stopping, cloud: Verifier) -> Iterator[Event]:
    """Let the cloud generate alone, token by token."""
    output: list[int] = []
    verification = cloud.open(prompt)
    try:
        verification.wait()
        yield Opened("cloud")
        for token in verification.generate(stopping):
            output.append(token)
            yield Committed((token,), "cloud")
        yield _finish(stopping, output)
    finally:
        verification.close()


def _speculate(
    prompt: Prompt, strategy: Strategy, stopping: Stopping, edge: Model, cloud: Verifier | None, runtime: Runtime
) -> Iterator[Event]:
    """Draft at the edge; verify at the cloud the drafts that the gate escalates. One iteration is one round."""
    context = [prompt.last]  # the last prompt token, then every committed token
    at_cloud = 0  # context tokens that the cloud holds: none before its first verdict
    verification = cloud.open(prompt) if cloud else None
    escalates = strategy.gate if cloud else NEVER
    try:
        drafter = Drafter(edge.open(prompt), stopping.eos, strategy.gate.score, strategy.draft_stop, runtime.shared_ids)
        yield Opened("edge")
        while stopping.reason(context[1:]) is None:
            drafted = _next_draft(drafter, context, strategy, stopping, runtime)
            yield drafted
            verdict = None
            if verification and escalates(drafted.draft):
                limit = min(len(drafted.draft.tokens) + strategy.draft_ahead, stopping.room(len(context) - 1))
                verdict = yield from _escalate(verification, drafter, drafted.draft, context, at_cloud, limit, runtime)
                at_cloud = len(context) + verdict.accepted if verdict else at_cloud
                escalates = escalates if verdict else NEVER  # after a fault the edge finishes alone
            for committed in _outcome(drafted.draft, verdict, context, stopping):
                context.extend(committed.tokens)
                yield committed
        yield _finish(stopping, context[1:])
    finally:
        if verification:
            verification.close()


def _next_draft(
    drafter: Drafter, context: list[int], strategy: Strategy, stopping: Stopping, runtime: Runtime
) -> Drafted:
    """Draft up to k tokens after the context.

    Tokens drafted ahead may make the draft of a lossless strategy longer than k: the output does not depend on k.
    """
    reused = drafter.follow(context)
    k = strategy.k if strategy.k is not None else _require(runtime.choose_k, "choose_k")()
    length = max(k, reused) if strategy.is_lossless else k
    draft = drafter.draft(min(length, stopping.room(len(context) - 1)))
    return Drafted(draft, min(reused, len(draft.tokens)))


def _escalate(
    verification: Verification,
    drafter: Drafter,
    draft: Draft,
    context: list[int],
    at_cloud: int,
    limit: int,
    runtime: Runtime,
) -> Generator[Event, None, Verdict | None]:
    """Send the draft with the context tokens that the cloud lacks. Return its verdict, or None if the cloud failed."""
    yield Escalated(draft, len(context) - at_cloud)
    try:
        if not at_cloud:
            verification.wait()
            yield Opened("cloud")
        verify = partial(verification.verify, at_cloud, context[at_cloud:], draft.tokens)
        if runtime.background:
            verdict = yield from _draft_ahead(verify, runtime.background, drafter, len(draft.tokens), limit)
        else:
            verdict = verify()
    except CloudFault as fault:
        if not runtime.finish_alone:
            raise
        yield Degraded(str(fault))
        return None
    yield Verified(draft, verdict)
    return verdict


def _draft_ahead(
    verify: Callable[[], Verdict], background: Background[Verdict], drafter: Drafter, drafted: int, limit: int
) -> Generator[Event, None, Verdict]:
    """Verify in the background. Until the verdict comes, draft on, up to `limit` tokens after the context.

    The first `drafted` of these tokens are the draft itself.
    """
    pending = background(verify)
    try:
        new = drafter.draft_ahead(limit, pending.done)
        yield Ahead(drafter.tokens[drafted:], new)
    except BaseException:
        with suppress(Exception):
            pending.result()  # without the wait the call would still run during the next generation
        raise
    return pending.result()


def _outcome(draft: Draft, verdict: Verdict | None, context: list[int], stopping: Stopping) -> Iterator[Committed]:
    """Yield the tokens that the round commits: local ones without a verdict, else the accepted and the cloud's own.

    The caller extends `context` by each before it asks for the next. Nothing follows EOS or exceeds the length limit.
    """
    parts: list[tuple[tuple[int, ...], Origin]] = [(draft.tokens, "local")]
    if verdict:
        is_whole = verdict.accepted == len(draft.tokens)
        parts = [
            (draft.tokens[: verdict.accepted], "accepted"),
            ((verdict.token,), "bonus" if is_whole else "correction"),
        ]
    for tokens, origin in parts:
        if stopping.reason(context[1:]) is None and (cut := stopping.cut(tokens, len(context) - 1)):
            yield Committed(cut, origin)


def _finish(stopping: Stopping, output: list[int]) -> Finished:
    reason = stopping.reason(output)
    if reason is None:
        raise RuntimeError("the cloud stopped before EOS and before the length limit")
    return Finished(reason)


def _require(value: _T | None, name: str) -> _T:
    if value is None:
        raise ValueError(f"this strategy needs the {name}, and none was given")
    return value
