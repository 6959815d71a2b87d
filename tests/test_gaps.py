"""The figures of ways to decode the same clips."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.gaps import compare_ways
from bench.held_out import HeldOutClip
from bench.ways import CLOUD, EDGE, ParetoWay
from edgecloud_sd.events import Committed, Prompt, Trace
from edgecloud_sd.measure.normalisation import DEFAULT_NORMALISATION
from edgecloud_sd.strategy import Strategy

WORDS = ["", "a", "dog", "cat", "runs", "sits", "slowly"]
OURS = ParetoWay("ours", "k 4", Strategy(k=4))


def trace(tokens: list[int], seconds: float) -> Trace:
    return Trace(((seconds, Committed(tuple(tokens), "local")),))


def say(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def test_each_way_has_its_share_of_the_gap_and_a_reason_for_what_it_lacks() -> None:
    references = [[1, 2, 4, 6], [1, 3, 5, 6]] * 3
    clips = [HeldOutClip(f"{i}", "english", Prompt((1,)), (say(tuple(ids)),)) for i, ids in enumerate(references)]
    edge = [[1, 3, 5, 5], [1, 2, 4, 4]] * 3
    traces = {
        EDGE: [trace(ids, 1.0) for ids in edge],
        CLOUD: [trace(ids, 4.0) for ids in references],
        OURS: [trace(ids, 2.0) for ids in references[:3] + edge[3:]],
    }
    points = {point.way: point for point in compare_ways(clips, traces, say, DEFAULT_NORMALISATION)}
    closed, speedup = points[OURS].gaps["bleu1"].closed, points[OURS].speedup
    assert closed is not None
    assert closed.value == pytest.approx(0.5)
    assert speedup is not None
    assert speedup.value == pytest.approx(2)
    for name in ("bleu4", "cider"):
        assert points[CLOUD].gaps[name].closed is not None
    assert points[OURS].gaps["attributes"].reason == "no reference names all attributes of a pocket clip"
    swapped = {**traces, EDGE: traces[CLOUD], CLOUD: traces[EDGE]}
    none = compare_ways(clips, swapped, say, DEFAULT_NORMALISATION)[0].gaps["bleu1"]
    assert (none.closed, none.reason) == (None, "BLEU-1: the cloud scores no higher than the edge")
