"""Shadow verification: the cloud's verdict on local tokens, asked for afterwards and off the clock."""

from __future__ import annotations

from edgecloud_sd import wire
from edgecloud_sd.events import Committed, Drafted, Output, Prompt, Trace, Verified
from edgecloud_sd.gate import Gate
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.verifier import Verifier


def shadow_verify(trace: Trace, prompt: Prompt, cloud: Verifier, gate: Gate) -> Hindsight:
    """Verify each local token of a trace by the verifier's rule, after the tokens that were really committed.

    The cloud opens one prompt and verifies once more than it rejects. A trace without local tokens asks nothing.
    """
    local = {place for place, origin in enumerate(trace.output.origins) if origin == "local"}
    missed = local & rejected_places(trace.tokens, prompt, cloud) if local else set()
    output = Output()
    drafts: list[tuple[float | None, bool, bool]] = []
    scores: tuple[float, ...] = ()  # those of the tokens that are not final, then those of the draft
    for _, event in trace.events:
        start = output.final
        output.see(event)
        if isinstance(event, Drafted):
            scores = scores[: len(output.tokens) - start] + event.draft.scores
        elif isinstance(event, Verified):
            drafts.append((gate.draft_score(event.draft.scores), True, event.changes_text))
        elif isinstance(event, Committed) and event.origin == "local" and event.is_final:
            places = range(start, output.final)
            drafts.append((gate.draft_score(scores[: len(places)]), False, not missed.isdisjoint(places)))
            scores = ()
    return Hindsight(len(missed), tuple(drafts))


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
