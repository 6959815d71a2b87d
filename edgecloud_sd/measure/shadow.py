"""Shadow verification: the cloud's verdict on local tokens, asked for afterwards and off the clock."""

from __future__ import annotations

from edgecloud_sd import wire
from edgecloud_sd.events import Committed, Drafted, Prompt, Trace, Verified
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.verifier import Verifier


def shadow_verify(trace: Trace, prompt: Prompt, cloud: Verifier) -> Hindsight:
    """Verify each local token of a trace by the verifier's rule, after the tokens that were really committed.

    The cloud opens one prompt and verifies once more than it rejects. A trace without local tokens asks nothing.
    """
    rejected: frozenset[int] = frozenset()
    if any(isinstance(event, Committed) and event.origin == "local" for _, event in trace.events):
        rejected = rejected_places(trace.tokens, prompt, cloud)
    missed = committed = 0
    drafts: list[tuple[float | None, bool, bool]] = []
    score: float | None = None
    for _, event in trace.events:
        if isinstance(event, Drafted):
            score = max(event.draft.scores, default=None)
        elif isinstance(event, Verified):
            drafts.append((score, True, event.verdict.accepted < len(event.draft.tokens)))
        elif isinstance(event, Committed):
            places = range(committed, committed + len(event.tokens))
            if event.origin == "local":
                missed += len(rejected.intersection(places))
                drafts.append((score, False, not rejected.isdisjoint(places)))
            committed += len(event.tokens)
    return Hindsight(missed, tuple(drafts))


def rejected_places(tokens: tuple[int, ...], prompt: Prompt, cloud: Verifier) -> frozenset[int]:
    """Return the places of the tokens that the cloud rejects. Each call starts after the last rejected token."""
    context = [prompt.last, *tokens]
    places: list[int] = []
    at_cloud = start = 0
    verification = cloud.open(prompt)
    try:
        verification.wait()
        while start < len(tokens):
            draft = tokens[start : start + wire.MAX_DRAFT]
            verdict = verification.verify(at_cloud, context[at_cloud : start + 1], draft)
            at_cloud = start + 1 + verdict.accepted
            start += verdict.accepted
            if verdict.accepted < len(draft):
                places.append(start)
                start += 1
    finally:
        verification.close()
    return frozenset(places)
