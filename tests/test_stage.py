"""The stage: the same events whatever the clock, and under a profile every moment by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd import gate, metrics
from edgecloud_sd import link as links
from edgecloud_sd.clock import stamp
from edgecloud_sd.decoder import Decoding, decode
from edgecloud_sd.ledger import ledger
from edgecloud_sd.link import Link
from edgecloud_sd.profile import Costs, Profile
from edgecloud_sd.records import (
    Committed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Prepared,
    Prompt,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.stage import Stage
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerifier
from tests.strategies import UNSURE, Case, Scripted, any_link, cases, play, profiles

PROMPT = Prompt((5, 6), torch.zeros(2, 3))  # 8 bytes of ids, 12 of features
PROFILE = Profile(
    "scripted",
    edge=Costs(prefill=2.0, forward=((1, 0.5), (2, 0.75))),
    cloud=Costs(prefill=3.0, forward=((1, 1.0), (5, 2.0))),
    features=0.125,
    gate=0.0625,
    queue=0.25,
)
LINK = Link("scripted", rtt=0.5, up=512, down=1024)
# Rounds of two: the first sure and so local, the second rejected at its second token, the third accepted whole with a
# bonus, the fourth cut to one token by the limit.
EDGE = Scripted(wrong=frozenset({3}), unsure=frozenset({3, 4}))
CLOUD = Scripted()
ALL = Stopping(frozenset(), 8)


def caption(how: Decoding, stage: Stage) -> Trace:
    return play(PROMPT, EDGE, CLOUD, how, stage)


def speculative(stage: Stage) -> Trace:
    return caption(Decoding("speculative", ALL, 2, UNSURE), stage)


def test_every_moment_of_a_speculative_caption_by_hand() -> None:
    local, rejected = Draft((0, 0), (0.0, 0.0)), Draft((0, 1), (0.0, 1.0))
    whole, last = Draft((0, 0), (1.0, 0.0)), Draft((0,), (0.0,))
    assert speculative(Stage(PROFILE, LINK)).events == (
        (0.125, Prepared(2)),
        (2.125, Opened("edge")),
        (5.9375, Opened("cloud")),  # up 0.25 + 20 bytes at 64 a second, queue 0.25, prefill 3
        (7.0625, Drafted(local)),  # two steps of 0.5, two statistics of 0.0625
        (7.0625, Committed((0, 0), "local")),
        (8.1875, Drafted(rejected)),
        (8.1875, Escalated(rejected, 3)),  # the last prompt token and two local ones
        (11.375, Verified(rejected, Verdict(1, 0))),  # up 0.25 + 24 bytes, queue, a pass over 5, down 0.25 + 8 bytes
        (11.375, Committed((0,), "accepted")),
        (11.375, Committed((0,), "correction")),
        (12.5, Drafted(whole)),
        (12.5, Escalated(whole, 1)),
        (15.0625, Verified(whole, Verdict(2, 0))),  # up 0.25 + 16 bytes, queue, a pass over 3, down 0.25 + 8 bytes
        (15.0625, Committed((0, 0), "accepted")),
        (15.0625, Committed((0,), "bonus")),
        (15.875, Drafted(last)),  # one pass over the last draft token and the bonus, one statistic
        (15.875, Committed((0,), "local")),
        (15.875, Finished("length")),
    )


def test_every_span_of_a_speculative_caption_by_hand() -> None:
    spans = speculative(Stage(PROFILE, LINK)).spans
    assert [span for span in spans if span.part not in ("gate", "rollback")] == [
        Span("uplink", 2.125, 2.6875, 20),
        Span("cloud_queue", 2.6875, 2.9375),
        Span("uplink", 8.1875, 8.8125, 24),
        Span("cloud_queue", 8.8125, 9.0625),
        Span("downlink", 11.0625, 11.375, 8),
        Span("uplink", 12.5, 13.0, 16),
        Span("cloud_queue", 13.0, 13.25),
        Span("downlink", 14.75, 15.0625, 8),
    ]
    gates = [span for span in spans if span.part == "gate"]
    assert gates[:2] == [Span("gate", 6.4375, 6.5), Span("gate", 7.0, 7.0625)]
    assert len(gates) == 7
    assert any(span.part == "rollback" for span in spans)  # in the cloud, of the rejected token


def test_the_ledger_of_a_speculative_caption_by_hand() -> None:
    kept = ledger(speculative(Stage(PROFILE, LINK)))
    assert kept.parts == {
        "features": 0.125,
        "edge_prefill": 2.0,
        "cloud_prefill": 3.0,
        "draft": 3 * 1.0 + 0.75,
        "gate": 7 * 0.0625,
        "uplink": 0.5625 + 0.625 + 0.5,
        "cloud_queue": 3 * 0.25,
        "verify": 2.0 + 1.5,
        "cloud_decode": 0.0,
        "downlink": 2 * 0.3125,
        "rollback": 0.0,
        "other": 0.0,
    }
    assert kept.discarded == 0.5  # one of two tokens that took a second


def test_every_moment_of_a_cloud_caption_by_hand() -> None:
    trace = caption(Decoding("cloud", replace(ALL, max_new_tokens=3)), Stage(PROFILE, LINK))
    assert trace.events == (
        (0.125, Prepared(2)),
        (3.9375, Opened("cloud")),
        (5.21875, Committed((0,), "cloud")),  # a step of 1, down 0.25 + 4 bytes: the latency, once
        (6.25, Committed((0,), "cloud")),
        (7.28125, Committed((0,), "cloud")),
        (7.28125, Finished("length")),
    )
    assert metrics.wire_bytes(trace) == (20, 12)


def test_every_moment_of_an_edge_caption_by_hand() -> None:
    trace = caption(Decoding("edge", replace(ALL, max_new_tokens=2)), Stage(PROFILE, LINK))
    assert [seconds for seconds, _ in trace.events] == [0.125, 2.125, 2.625, 2.625, 3.125, 3.125, 3.125]
    assert metrics.wire_bytes(trace) is None


def test_without_a_link_nothing_crosses_but_the_queue_is_waited_for() -> None:
    kept = ledger(speculative(Stage(PROFILE)))
    assert (kept.parts["uplink"], kept.parts["downlink"], kept.parts["cloud_queue"]) == (0, 0, 0.75)
    assert kept.seconds == 15.875 - 3 * 0.25 - (20 + 24 + 16) / 64 - 2 * (0.25 + 8 / 128)


def test_a_gate_that_reads_nothing_costs_nothing() -> None:
    trace = caption(Decoding("speculative", ALL, 2, gate.ALWAYS), Stage(PROFILE, LINK))
    assert ledger(trace).parts["gate"] == 0


def test_a_link_can_only_be_simulated_under_a_profile() -> None:
    with pytest.raises(ValueError, match="link 4g can only be simulated: it needs a profile"):
        Stage(link=links.find("4g"))


@settings(max_examples=25)  # four captions each
@given(cases(), profiles(), any_link, st.text(max_size=3))
def test_the_clock_changes_no_event_and_a_virtual_one_no_moment(
    case: Case, profile: Profile, link: Link, seed: str
) -> None:
    scene = case.scene
    bare = stamp(decode(scene.prompt, case.how, scene.edge, LocalVerifier(scene.cloud, case.rule)))
    real, virtual = case.play(Stage()), case.play(Stage(profile, link, seed))
    for trace in (real, virtual):
        assert [event for _, event in trace.events[1:]] == [event for _, event in bare.events]
    assert case.play(Stage(profile, link, seed)) == virtual
    moments = [seconds for seconds, _ in virtual.events]
    assert moments == sorted(moments)


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_another_seed_draws_another_jitter(mode: str) -> None:
    how = Decoding(mode, ALL, 2, gate.ALWAYS)
    traces = [caption(how, Stage(PROFILE, links.find("4g"), seed)) for seed in ("a", "b", "a")]
    assert traces[0] == traces[2]
    assert traces[0] != traces[1]
    assert traces[0].tokens == traces[1].tokens


def test_jitter_is_drawn_anew_for_every_message() -> None:
    spans = speculative(Stage(PROFILE, replace(LINK, jitter=0.125))).spans
    trips = [span.end - span.start - 8 * span.size / LINK.up for span in spans if span.part == "uplink"]
    assert len({round(trip, 9) for trip in trips}) == 3
    assert all(0.125 <= trip <= 0.375 for trip in trips)
