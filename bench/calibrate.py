"""The profile of the machine at hand: the pair decodes a few clips, and their traces are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from edgecloud_sd import gate
from edgecloud_sd.forecast import model as oracle
from edgecloud_sd.pipeline import Captioner, Cell, Request
from edgecloud_sd.timing.clock import garbage_collector_frozen
from edgecloud_sd.timing.profile import Profile

DRAFTS = (1, 2, 4, 8)  # lengths whose verify passes are timed; the others are interpolated, longer ones continued


def measure(captioner: Captioner, requests: Sequence[Request], max_new_tokens: int = 64) -> Profile:
    """Seconds a call of this pair on this machine, by edge, cloud and speculative captions of at least one request.

    The cells take turns on each request, so that a busy moment of the machine does not fall on one of them alone.
    """
    # lazy: one side at a time, so that neither waits for the other's use of the processor
    cells = [Cell("edge"), Cell("cloud"), Cell("speculative", gate.entropy_gate(1e-9), k=2, open="lazy")]
    cells += [Cell("speculative", gate.ALWAYS, k=k, open="lazy") for k in DRAFTS]
    for cell in cells[:3]:  # the first calls allocate
        captioner.trace(requests[0], cell, max_new_tokens)
    with garbage_collector_frozen():
        traces = [
            captioner.trace(request, cell, max_new_tokens)
            for request in tqdm(requests, desc="measuring", unit="clip", disable=None, leave=False)
            for cell in cells
        ]
    seen = oracle.observed(traces, "measure")
    if seen is None:
        raise ValueError("nothing was decoded, so nothing was measured")
    together = captioner.edge.thinker.device == captioner.cloud.thinker.device
    return replace(
        seen,
        draft_at_cloud=seen.edge.step if together else None,
        source=f"measured on {len(requests)} clips with the pair {captioner.pair.name}",
    )
