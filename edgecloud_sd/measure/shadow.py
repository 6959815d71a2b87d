"""Shadow verification: what the cloud would have said of the tokens it was not asked about. Never on the clock."""

from __future__ import annotations

from edgecloud_sd.events import Committed, Drafted, Prompt, Trace, Verified
from edgecloud_sd.measure.metrics import Hindsight
from edgecloud_sd.verifier import Verifier


def shadow_verify(trace: Trace, prompt: Prompt, cloud: Verifier) -> Hindsight:
    """Judge each local token of a caption by the verifier's rule, after what was really committed before it.

    One opening and one call more than there are rejections, and none where every round was escalated.
    """
    rejected: frozenset[int] = frozenset()
    if any(isinstance(event, Committed) and event.origin == "local" for _, event in trace.events):
        rejected = _rejected(trace.tokens, prompt, cloud)
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


def _rejected(tokens: tuple[int, ...], prompt: Prompt, cloud: Verifier) -> frozenset[int]:
    """Places of the caption whose token the cloud would not keep. Each call judges from behind the last of them on."""
    context = [prompt.last, *tokens]
    places: list[int] = []
    known = 0
    verification = cloud.open(prompt)
    try:
        verification.wait()
        while (at := places[-1] + 1 if places else 0) < len(tokens):
            verdict = verification.verify(known, context[known : at + 1], tokens[at:])
            known = at + 1 + verdict.accepted
            if known > len(tokens):
                break
            places.append(known - 1)
    finally:
        verification.close()
    return frozenset(places)
