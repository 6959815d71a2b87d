"""Shadow verification: what the cloud would have said of the tokens it was not asked about. Never on the clock."""

from __future__ import annotations

from edgecloud_sd.acceptance import Rank
from edgecloud_sd.metrics import Hindsight
from edgecloud_sd.records import Committed, Drafted, Prompt, Trace, Verified
from edgecloud_sd.session import Model


def look_back(trace: Trace, prompt: Prompt, cloud: Model, rule: Rank) -> Hindsight:
    """Judge each local token of a caption by the rule, after what was really committed before it.

    One opening and one forward pass over the caption, and none where every round was escalated.
    """
    rows = None
    if any(isinstance(event, Committed) and event.origin == "local" for _, event in trace.events):
        rows = cloud.open(prompt).extend([prompt.last, *trace.tokens])  # row i is for the place of token i
    missed = committed = 0
    drafts: list[tuple[float | None, bool, bool]] = []
    score: float | None = None
    for _, event in trace.events:
        if isinstance(event, Drafted):
            score = max(event.draft.scores, default=None)
        elif isinstance(event, Verified):
            drafts.append((score, True, event.verdict.accepted < len(event.draft.tokens)))
        elif isinstance(event, Committed):
            if event.origin == "local":
                assert rows is not None
                kept = [
                    rule((token,), rows[at : at + 2]).accepted for at, token in enumerate(event.tokens, start=committed)
                ]
                missed += kept.count(0)
                drafts.append((score, False, 0 in kept))
            committed += len(event.tokens)
    return Hindsight(missed, tuple(drafts))
