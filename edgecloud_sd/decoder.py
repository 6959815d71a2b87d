"""The decode loop: edge-only, cloud-only and speculative, as a generator of events.

The loop holds no clock, no logger and no measurement. `timing.clock.stamp` times the events from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from edgecloud_sd.drafter import Drafter, LookupDrafter
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Confirmed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Origin,
    Prompt,
    Retracted,
    Verdict,
    Verified,
)
from edgecloud_sd.gate import NEVER, Gate
from edgecloud_sd.lookup import Lookup
from edgecloud_sd.prefill import Background
from edgecloud_sd.session import Model
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import CloudFault, Verification, Verifier
from edgecloud_sd.wire import MAX_DRAFT

_T = TypeVar("_T")
DraftOn = Callable[[Callable[[], bool]], tuple[tuple[int, ...], int]]  # `Drafter.draft_ahead` until a call is true


@dataclass(frozen=True)
class Runtime:
    """The parts of a run that are no part of the strategy.

    `choose_k` gives the length of the next draft if the strategy has none. `background` starts a verification
    beside which the edge drafts ahead; None makes the edge wait. `finish_alone` lets the edge finish after a fault of
    the cloud. `shared_ids` is the smaller of two vocabulary sizes, or None if they are equal. The edge drafts no id
    from there on, unless it is an opinion of the target. It reads any such id as the last one that both have. `lookup`
    is for drafters lookup and model+lookup.
    """

    choose_k: Callable[[], int] | None = None
    background: Background[Verdict] | None = None
    finish_alone: bool = False
    shared_ids: int | None = None
    lookup: Lookup | None = None


DEFAULT_RUNTIME = Runtime()


def decode(
    prompt: Prompt,
    strategy: Strategy,
    stopping: Stopping,
    edge: Model | None = None,
    cloud: Verifier | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Iterator[Event]:
    """Decode one prompt. Modes edge and speculative need `edge`, modes cloud and speculative need `cloud`.

    Drafter lookup needs no `edge`.
    """
    if not strategy.needs_edge:
        runtime = replace(runtime, finish_alone=False)  # there is no model at the edge that could
    if strategy.mode == "cloud":
        return _generate(prompt, stopping, _require(cloud, "cloud"))
    if strategy.mode == "edge":
        alone = Strategy("speculative", NEVER, k=1, drafter=strategy.drafter)  # one local token per round
        return _speculate(prompt, alone, stopping, edge, None, runtime)
    verifier = _require(cloud, "cloud") if strategy.asks_cloud else None
    return _speculate(prompt, strategy, stopping, edge, verifier, runtime)


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


@dataclass
class _State:
    """The state of a generation between two rounds."""

    context: list[int]  # the last prompt token, then every token of the output
    final: int = 1  # context tokens that no verdict can take back
    at_cloud: int = 0  # context tokens that the cloud holds: none before its first verdict
    scores: tuple[float, ...] = ()  # the gate's scores of the tokens since the last verdict
    opinions: tuple[int, ...] | None = None  # `rest` of the last verdict if it has a correction, else None


def _speculate(
    prompt: Prompt, strategy: Strategy, stopping: Stopping, edge: Model | None, cloud: Verifier | None, runtime: Runtime
) -> Iterator[Event]:
    """Draft at the edge; verify at the cloud what the gate escalates. One iteration is one round."""
    state = _State([prompt.last])
    verification = cloud.open(prompt) if cloud else None
    gate, looks_back = (strategy.gate, strategy.look_back) if cloud else (NEVER, False)
    try:
        drafter = _open_drafter(prompt, strategy, stopping, edge, runtime)
        if isinstance(drafter, Drafter):
            yield Opened("edge")
        while stopping.reason(state.context[1:]) is None:
            drafted, is_end = _next_draft(drafter, gate, state, strategy, stopping, runtime)
            yield drafted
            tokens = drafted.draft.tokens
            if verification is None or not gate(Draft(tokens, state.scores), is_end):
                yield from _commit_local(state, tokens, is_end or not looks_back)
                continue
            limit = min(len(tokens) + strategy.draft_ahead, stopping.room(len(state.context) - 1))
            if gate.stops_before_token:
                yield from _commit_local(state, tokens, not looks_back)
                tokens = ()
            scores = state.scores if looks_back else drafted.draft.scores
            draft = Draft((*state.context[state.final :], *tokens), scores, drafted.draft.doubted)
            draft_on = partial(drafter.draft_ahead, len(drafted.draft.tokens), limit)
            verdict = yield from _escalate(verification, draft, state, draft_on, runtime)
            if verdict:
                yield from _apply(verdict, draft, state, stopping)
            else:  # the edge finishes alone
                gate, looks_back = NEVER, False
                yield from _commit_local(state, tokens)
        yield _finish(stopping, state.context[1:])
    finally:
        if verification:
            verification.close()


def _open_drafter(
    prompt: Prompt, strategy: Strategy, stopping: Stopping, edge: Model | None, runtime: Runtime
) -> Drafter | LookupDrafter:
    lookup = None if strategy.drafter == "model" else _require(runtime.lookup, "lookup")
    if lookup and not strategy.needs_edge:
        return LookupDrafter(lookup)
    session = _require(edge, "edge").open(prompt)
    return Drafter(session, stopping.eos, strategy, runtime.shared_ids, lookup)


def _next_draft(
    drafter: Drafter | LookupDrafter,
    gate: Gate,
    state: _State,
    strategy: Strategy,
    stopping: Stopping,
    runtime: Runtime,
) -> tuple[Drafted, bool]:
    """Draft up to k tokens after the context. Return True with them if the caption or the next request is full.

    Tokens drafted ahead may make the draft of a lossless strategy longer than k: the output does not depend on k.
    """
    reused = drafter.follow(state.context, state.opinions)
    k = strategy.k if strategy.k is not None else _require(runtime.choose_k, "choose_k")()
    length = max(k, min(reused, strategy.draft_ahead)) if strategy.is_lossless else k
    room = stopping.room(len(state.context) - 1)
    fits = MAX_DRAFT - len(state.context) + state.final  # tokens that still fit into a request with look-back
    draft = drafter.draft(min(length, room, fits), room, gate, state.scores)
    state.scores += draft.scores
    is_end = stopping.reason([*state.context[1:], *draft.tokens]) is not None or len(draft.tokens) == fits
    return Drafted(draft, drafter.count_ahead(len(draft.tokens)), drafter.take_passes()), is_end


def _escalate(
    verification: Verification,
    draft: Draft,
    state: _State,
    draft_on: DraftOn,
    runtime: Runtime,
) -> Generator[Event, None, Verdict | None]:
    """Send the draft with the context tokens that the cloud lacks. Return its verdict, or None if the cloud failed."""
    sent = state.context[state.at_cloud : state.final]
    yield Escalated(draft, len(sent))
    try:
        if not state.at_cloud:
            verification.wait()
            yield Opened("cloud")
        verify = partial(verification.verify, state.at_cloud, sent, draft.tokens)
        verdict = (yield from _draft_ahead(verify, runtime.background, draft_on)) if runtime.background else verify()
    except CloudFault as fault:
        if not runtime.finish_alone:
            raise
        yield Degraded(str(fault))
        return None
    yield Verified(draft, verdict)
    return verdict


def _draft_ahead(
    verify: Callable[[], Verdict],
    background: Background[Verdict],
    draft_on: DraftOn,
) -> Generator[Event, None, Verdict]:
    """Verify in the background. Until the verdict comes, draft on after the draft."""
    pending = background(verify)
    try:
        yield Ahead(*draft_on(pending.done))
    except BaseException:
        with suppress(Exception):
            pending.result()  # without the wait the call would still run during the next generation
        raise
    return pending.result()


def _commit_local(state: _State, tokens: tuple[int, ...], is_final: bool = True) -> Iterator[Committed]:
    """Commit tokens without a verdict."""
    state.context += tokens
    if is_final:
        state.final = len(state.context)
    if tokens:
        yield Committed(tokens, "local", is_final)


def _apply(verdict: Verdict, draft: Draft, state: _State, stopping: Stopping) -> Iterator[Event]:
    """Confirm or take back the tokens that are not final. Then commit the accepted new tokens, and the cloud's own.

    Nothing follows EOS or exceeds the length limit.
    """
    not_final = len(state.context) - state.final
    confirmed = min(verdict.accepted, not_final)
    state.at_cloud = state.final + verdict.accepted
    del state.context[state.final + confirmed :]
    if confirmed:
        yield Confirmed(confirmed)
    if confirmed < not_final:
        yield Retracted(not_final - confirmed)
    parts: list[tuple[tuple[int, ...], Origin]] = [
        (draft.tokens[not_final : verdict.accepted], "accepted"),
        ((verdict.token,), "bonus" if verdict.accepted == len(draft.tokens) else "correction"),
    ]
    for tokens, origin in parts:
        if stopping.reason(state.context[1:]) is None and (cut := stopping.cut(tokens, len(state.context) - 1)):
            state.context += cut
            yield Committed(cut, origin)
    state.final = len(state.context)
    state.scores, state.opinions = (), verdict.rest if verdict.accepted < len(draft.tokens) else None


def _finish(stopping: Stopping, output: list[int]) -> Finished:
    reason = stopping.reason(output)
    if reason is None:
        raise RuntimeError("the cloud stopped before EOS and before the length limit")
    return Finished(reason)


def _require(value: _T | None, name: str) -> _T:
    if value is None:
        raise ValueError(f"this strategy needs the {name}, and none was given")
    return value
