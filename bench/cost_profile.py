"""The cost profile of this machine, measured: the pair decodes a few clips, and their traces show the costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from edgecloud_sd import gate
from edgecloud_sd.forecast.estimate import estimate_profile
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.stopping import MAX_NEW_TOKENS
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import garbage_collector_frozen
from edgecloud_sd.timing.profile import Profile

DRAFT_LENGTHS = (1, 2, 4, 8)  # timed; costs between them are interpolated, and longer drafts follow the last slope


def measure_profile(pipeline: Pipeline, requests: Sequence[Request], max_new_tokens: int = MAX_NEW_TOKENS) -> Profile:
    """Return the seconds per call of the pair on this machine, from at least one request. Both sides are local.

    The strategies take turns on each request, so that a slow moment of the machine does not fall on one of them.
    """
    # lazy prefill: the sides compute in turn, so neither waits for the other's use of the processor
    strategies = [
        Strategy("edge"),
        Strategy("cloud"),
        Strategy("speculative", gate.entropy_gate(1e-9), k=2, prefill="lazy"),
        *(Strategy("speculative", k=k, prefill="lazy") for k in DRAFT_LENGTHS),
    ]
    for strategy in strategies[:3]:  # first calls allocate memory
        pipeline.trace(requests[0], strategy, max_new_tokens)
    with garbage_collector_frozen():
        traces = [
            pipeline.trace(request, strategy, max_new_tokens)
            for request in tqdm(requests, desc="measuring", unit="clip", disable=None, leave=False)
            for strategy in strategies
        ]
    profile = estimate_profile(traces, "measure")
    if profile is None:
        raise ValueError("nothing was decoded, so nothing was measured")
    shares_device = pipeline.edge.thinker.device == pipeline.cloud_model.thinker.device
    return replace(
        profile,
        draft_at_cloud=profile.edge.step if shares_device else None,
        source=f"measured on {len(requests)} clips with the pair {pipeline.pair.name}",
    )
