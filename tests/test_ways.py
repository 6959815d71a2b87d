"""The ways that the picture compares."""

from __future__ import annotations

from collections import defaultdict

from bench.ways import list_ways
from edgecloud_sd.acceptance import Rank
from edgecloud_sd.gate import entropy_gate
from edgecloud_sd.strategy import REVISE_LOSSLESS, Strategy


def test_the_ways_of_a_line_differ_and_those_that_a_reader_looks_for_are_marked() -> None:
    own = Strategy(k=9)
    ways = list_ways([own])
    lines = defaultdict(list)
    for way in ways:
        lines[way.line].append(way)
    for members in lines.values():
        assert len({way.label for way in members}) == len(members)
        assert len({(way.strategy, way.make_gate) for way in members}) == len(members)
    marks = {way.mark: way.strategy for way in ways if way.mark}
    assert marks["published"] == Strategy(gate=entropy_gate(1.5), rule=Rank(20), k=3)
    assert marks["lossless, k 4"] == Strategy(k=4)
    assert marks["revise-lossless"] == REVISE_LOSSLESS
    assert set(marks) == {"edge", "cloud", "published", "lossless, k 4", "revise", "revise-lossless"}
    assert ways[-1].strategy == own
