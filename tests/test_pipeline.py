"""From settings and cells to a caption: every option reaches what it is for, and what is no cell is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgecloud_sd import config, gate
from edgecloud_sd.events import Ahead, Drafted, Trace
from edgecloud_sd.pipeline import Captioner, Cell, Request, cells
from edgecloud_sd.pocket import clips
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile

ALWAYS = Cell("speculative", gate.ALWAYS, k=8)
OVER_4G = replace(ALWAYS, link=links.find_link("4g"))
MACHINES = profile.load_profile("laptop-gpu")


@pytest.fixture(scope="module")
def asked() -> Request:
    return Request(clips.make_clip("evaluation", 4).samples, "chinese")  # of which the edge is unsure


def fresh(captioner: Captioner) -> Captioner:
    """One of the same models that has learnt nothing."""
    made = Captioner()
    made.__dict__.update(edge=captioner.edge, cloud=captioner.cloud)
    return made


def drafts(trace: Trace) -> list[int]:
    return [len(event.draft.tokens) for _, event in trace.events if isinstance(event, Drafted)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "both"}, "unknown mode 'both': choose one of edge, cloud, speculative"),
        ({"mode": "speculative", "k": 0}, "k must be at least 1, or None to have it found, not 0"),
        ({"mode": "speculative", "open": "lzay"}, "open must be one of eager, lazy, not 'lzay'"),
        ({"mode": "speculative", "ahead": -1}, "ahead must be 0 or more tokens, not -1"),
        (
            {
                "mode": "speculative",
                "gate": gate.ALWAYS,
                "stop": gate.parse_draft_stop("entropy", gate.entropy_gate(1.5)),
            },
            "stop stopH1.5 reads the gate's score, and gate always has none",
        ),
    ],
)
def test_what_is_no_way_to_decode_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**fields)


def test_drafts_end_where_the_option_says(captioner: Captioner, asked: Request) -> None:
    unsure = gate.parse_draft_stop("entropy=0.5", gate.ALWAYS)
    whole, cut = (captioner.trace(asked, replace(ALWAYS, stop=stop), 64, MACHINES) for stop in (None, unsure))
    assert cut.tokens == whole.tokens
    assert len(drafts(cut)) > len(drafts(whole))


def test_the_edge_drafts_ahead_where_it_is_told_to(captioner: Captioner, asked: Request) -> None:
    waits, ahead = (captioner.trace(asked, replace(OVER_4G, ahead=n), 64, MACHINES) for n in (0, 5))
    assert not any(isinstance(event, Ahead) for _, event in waits.events)
    made = [event.made for _, event in ahead.events if isinstance(event, Ahead)]
    assert 0 < max(made) <= 5
    assert ahead.tokens == waits.tokens


def test_what_finds_the_length_of_drafts_knows_the_cell_and_stays(captioner: Captioner, asked: Request) -> None:
    learning = fresh(captioner)
    lossy = Cell("speculative", gate.entropy_gate(1.5), k=None, open="lazy", ahead=7)
    for cell in (lossy, replace(ALWAYS, k=None)):
        learning.trace(asked, cell, 64, MACHINES)
        pace = learning._pace(cell, "chinese", MACHINES)
        assert (pace.ahead, pace.is_lossless, pace.eager) == (cell.ahead, cell.is_lossless, cell.open == "eager")
        assert pace.step.n + pace.beside.n > 0
    assert len(learning._paces) == 2


def test_a_caption_that_is_remembered_teaches_what_it_taught_before(captioner: Captioner, asked: Request) -> None:
    cell = replace(OVER_4G, k=None)
    first, second = fresh(captioner), fresh(captioner)
    trace = first.trace(asked, cell, 64, MACHINES, "one")
    second.remember(trace, cell, "chinese", MACHINES)
    again = [each.trace(asked, cell, 64, MACHINES, "two") for each in (first, second)]
    assert again[0] == again[1]
    assert drafts(again[0]) != drafts(trace)


def test_where_nothing_is_sent_nothing_else_makes_another_cell() -> None:
    settings = config.resolve(
        {
            "mode": "edge,speculative", "gate": "never,always", "k": "3,auto", "draft-ahead": "0,4",
            "open": "eager,lazy", "draft-stop": "none,margin=0.3", "link": "none,4g", "rule": "greedy,rank",
        }
    )  # fmt: skip
    found = cells(settings)
    assert [each.gate.label for each in found if each.mode == "speculative"].count("never") == 1
    assert len(found) == 2 + 2**6
