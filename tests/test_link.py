"""Links: what crosses them, and how long it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import link as links
from edgecloud_sd.link import Link
from edgecloud_sd.records import Prompt
from tests.strategies import any_link

SLOW = Link("slow", rtt=0.5, up=1024, down=2048, jitter=0.125)
sizes = st.integers(0, 10**7)
chances = st.floats(0, 1)


def test_a_trip_is_half_the_round_trip_and_the_bits_over_the_bandwidth() -> None:
    assert SLOW.up_seconds(64) == 0.25 + 0.5
    assert SLOW.down_seconds(64) == 0.25 + 0.25


def test_jitter_comes_and_goes_with_the_chance() -> None:
    assert [SLOW.up_seconds(0, chance) for chance in (0, 0.25, 0.5, 1)] == [0.125, 0.1875, 0.25, 0.375]


def test_a_trip_is_never_shorter_than_its_bytes() -> None:
    assert replace(SLOW, jitter=2).down_seconds(64, 0) == 0.25


@given(any_link, sizes, chances)
def test_jitter_stays_within_its_bounds(link: Link, size: int, chance: float) -> None:
    for seconds, bandwidth in ((link.up_seconds, link.up), (link.down_seconds, link.down)):
        sent = 8 * size / bandwidth
        assert max(link.rtt / 2 - link.jitter, 0) - 1e-12 <= seconds(size, chance) - sent
        assert seconds(size, chance) - sent <= link.rtt / 2 + link.jitter + 1e-12


@given(any_link, sizes, sizes, chances, st.floats(0, 1))
def test_more_bytes_and_a_longer_round_trip_never_arrive_sooner(
    link: Link, less: int, more: int, chance: float, longer: float
) -> None:
    farther = replace(link, rtt=link.rtt + longer)
    for here, there in ((link.up_seconds, farther.up_seconds), (link.down_seconds, farther.down_seconds)):
        assert 0 <= here(less, chance) <= here(less + more, chance) <= there(less + more, chance)


def test_without_a_link_nothing_takes_time() -> None:
    assert links.NONE.up_seconds(10**9) == links.NONE.down_seconds(10**9) == 0


def test_what_crosses_a_link_is_counted_in_bytes() -> None:
    assert links.open_bytes(Prompt((1, 2, 3))) == 12
    assert links.open_bytes(Prompt((1, 2, 3), torch.zeros(80, 10))) == 12 + 2 * 800
    assert links.verify_bytes(5) == 4 + 20  # the base, and five ids
    assert (links.VERDICT_BYTES, links.TOKEN_BYTES) == (8, 4)


def test_links_go_by_their_names() -> None:
    assert list(links.LINKS) == ["none", "lan", "wifi", "5g", "4g", "sat"]
    assert all(links.find(name).name == name for name in links.LINKS)
    assert links.find("none") is links.NONE


@pytest.mark.parametrize(
    ("name", "milliseconds"), [("none", 0), ("lan", 1), ("wifi", 10), ("5g", 25), ("4g", 60), ("sat", 600)]
)
def test_the_round_trips_are_the_projects_scenarios(name: str, milliseconds: float) -> None:
    assert math.isclose(1e3 * links.find(name).rtt, milliseconds)


def test_an_unknown_link_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown link 'modem': choose one of none, lan, wifi, 5g, 4g, sat"):
        links.find("modem")
