"""Links: what crosses them, how long it takes, and how they are written."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import astuple, replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.link import Link
from tests.support.strategies import any_link

SLOW = Link("slow", rtt=0.5, up=1024, down=2048, jitter=0.125)
LAST = math.nextafter(1, 0)  # the largest that a draw may be
sizes = st.integers(0, 10**6)
small = st.integers(0, links.WINDOW * links.SEGMENT)
NONE_LOST = (LAST, LAST)
chances = st.floats(0, 1, exclude_max=True)
losses = st.one_of(st.just(0.0), st.floats(1e-9, 0.2), st.floats(0, 0.999))


def drawn(*chances: float) -> Callable[[], float]:
    """These, in order, and an error for one more."""
    return iter(chances).__next__


def packets(n: int) -> int:
    return n * links.SEGMENT


def test_a_trip_is_half_the_round_trip_and_the_bits_over_the_bandwidth() -> None:
    assert SLOW.up_seconds(64) == 0.25 + 0.5
    assert SLOW.down_seconds(64) == 0.25 + 0.25


def test_jitter_comes_and_goes_with_the_draw() -> None:
    trips = [SLOW.up_seconds(0, drawn(chance)) for chance in (0, 0.25, 0.5, 1)]
    assert trips == [0.125, 0.1875, 0.25, 0.375]


def test_a_trip_is_never_shorter_than_its_bytes() -> None:
    assert replace(SLOW, jitter=2).down_seconds(64, drawn(0)) == 0.25


@pytest.mark.parametrize("jitter", [0.125, 0.25, 0.5, 2])
def test_a_trip_without_draws_is_the_mean_over_the_jitter(jitter: float) -> None:
    link, n = replace(SLOW, jitter=jitter), 1000
    evenly = [link.up_seconds(64, drawn((i + 0.5) / n)) for i in range(n)]
    assert link.up_seconds(64) == pytest.approx(sum(evenly) / n, abs=1e-5)


@given(any_link, small, chances)
def test_jitter_stays_within_its_bounds(link: Link, size: int, chance: float) -> None:
    for seconds, bandwidth in ((link.up_seconds, link.up), (link.down_seconds, link.down)):
        late = seconds(size, drawn(chance)) - 8 * size / bandwidth
        assert max(link.rtt / 2 - link.jitter, 0) - 1e-12 <= late <= link.rtt / 2 + link.jitter + 1e-12


@given(any_link, losses, sizes, sizes, st.integers(0, 2**32), st.floats(0, 1))
def test_more_bytes_and_a_longer_round_trip_never_arrive_sooner(
    link: Link, loss: float, less: int, more: int, seed: int, longer: float
) -> None:
    here, there = replace(link, loss=loss), replace(link, loss=loss, rtt=link.rtt + longer)
    for way in (Link.up_seconds, Link.down_seconds):
        expected = [way(here, less), way(here, less + more), way(there, less + more)]
        same = [
            way(link, size, random.Random(seed).random)
            for link, size in ((here, less), (here, less + more), (there, less + more))
        ]
        for trips in (expected, same):
            assert trips[0] >= 0
            assert all(one <= next + 1e-9 for one, next in itertools.pairwise(trips))


@given(any_link, sizes, losses, losses)
def test_more_loss_is_never_quicker_in_the_mean(link: Link, size: int, one: float, other: float) -> None:
    less, more = sorted((one, other))
    for way in (Link.up_seconds, Link.down_seconds):
        assert way(replace(link, loss=less), size) <= way(replace(link, loss=more), size) + 1e-9


def test_many_packets_wait_for_acknowledgements_until_they_fill_the_round_trip() -> None:
    wire = Link("wire", rtt=0.5, up=8 * packets(40), down=math.inf)  # 20 packets a round trip upwards
    alone = wire.up_seconds(packets(10))
    assert alone == 0.25 + 10 / 40  # the first window
    behind_one = 0.5 - 9 / 40  # the first acknowledgement is back when the other 9 have left
    assert wire.up_seconds(packets(11)) == pytest.approx(0.25 + 11 / 40 + behind_one)
    behind_two = behind_one + 0.5 - 19 / 40
    assert wire.up_seconds(packets(31)) == pytest.approx(0.25 + 31 / 40 + behind_two)
    assert wire.up_seconds(packets(300)) == pytest.approx(0.25 + 300 / 40 + behind_two)  # 40 packets are enough
    assert [wire.down_seconds(packets(n)) for n in (10, 30, 70, 71)] == [0.25, 0.75, 1.25, 1.75]  # doubled each time


def test_a_flight_is_as_late_as_its_latest_packet() -> None:
    wire = Link("wire", rtt=0.5, up=math.inf, down=math.inf, jitter=0.125)
    assert wire.up_seconds(packets(30)) == 0.25 + 0.5 + 0.125


def test_losses_keep_the_window_small() -> None:
    wire = Link("wire", rtt=0.5, up=math.inf, down=math.inf, loss=0.75 / 4**2)  # 4 packets a round trip
    trips = [wire.up_seconds(packets(n), drawn(0.5, *NONE_LOST)) for n in (4, 5, 12, 13)]
    assert trips == [0.25, 0.75, 1.25, 1.75]
    worse = replace(wire, loss=0.9)
    assert [worse.up_seconds(packets(n), drawn(0.5, *NONE_LOST)) for n in (1, 2)] == [0.25, 0.75]  # one at a time


def test_a_lost_packet_comes_a_round_trip_later_and_a_lost_last_one_after_a_timeout() -> None:
    lossy = replace(SLOW, loss=0.01)
    for way in (lossy.up_seconds, lossy.down_seconds):
        alone, two = packets(1), packets(2)
        timeout = 0.5 + 0.2
        assert way(alone, drawn(0.5, 0, LAST)) == way(alone, drawn(0.5, *NONE_LOST))  # there is none but the last
        lost = way(two, drawn(0.5, 0.0099, LAST)) - way(two, drawn(0.5, *NONE_LOST))
        assert lost == pytest.approx(0.5)
        for times, seconds in ((1, timeout), (2, 3 * timeout), (3, 7 * timeout)):
            late = way(alone, drawn(0.5, LAST, *[0.0099] * times, LAST)) - way(alone, drawn(0.5, *NONE_LOST))
            assert late == pytest.approx(seconds)
    assert lossy.up_seconds(two, drawn(0.5, 0.0101, 0.0101)) == lossy.up_seconds(two, drawn(0.5, *NONE_LOST))


def test_tries_are_two_minutes_apart_at_most() -> None:
    lossy = replace(SLOW, loss=0.9)
    tenth, eleventh = (lossy.up_seconds(0, drawn(0.5, LAST, *[0.0] * times, LAST)) for times in (10, 11))
    assert eleventh - tenth == pytest.approx(120)


@pytest.mark.parametrize(("loss", "n"), [(0.01, 1), (0.01, 8), (0.2, 1), (0.2, 3), (0.6, 2)])
def test_the_mean_of_many_draws_is_the_time_without_draws(loss: float, n: int) -> None:
    lossy, draw = replace(SLOW, loss=loss), random.Random(0).random
    trips = [lossy.up_seconds(packets(n), draw) for _ in range(20_000)]
    error = statistics.stdev(trips) / math.sqrt(len(trips))
    assert lossy.up_seconds(packets(n)) == pytest.approx(statistics.fmean(trips), abs=3 * error)


def test_without_a_link_nothing_takes_time() -> None:
    assert links.NO_LINK.up_seconds(10**9) == links.NO_LINK.down_seconds(10**9) == 0


def test_links_go_by_their_names() -> None:
    assert list(links.LINKS) == ["none", "lan", "wifi", "5g", "4g", "sat"]
    assert all(links.find_link(name).name == name for name in links.LINKS)
    assert links.find_link("none") is links.NO_LINK


@pytest.mark.parametrize(
    ("name", "rtt", "up", "down", "jitter"),
    [
        ("none", 0, math.inf, math.inf, 0),
        ("lan", 1, 1000, 1000, 0.1),
        ("wifi", 10, 100, 200, 3),
        ("5g", 25, 50, 300, 5),
        ("4g", 60, 10, 40, 15),
        ("sat", 600, 3, 25, 30),
    ],
)
def test_the_presets_are_the_projects_scenarios(name: str, rtt: float, up: float, down: float, jitter: float) -> None:
    link = links.find_link(name)
    assert [1e3 * link.rtt, link.up / 1e6, link.down / 1e6, 1e3 * link.jitter] == pytest.approx([rtt, up, down, jitter])
    assert link.loss == 0


def test_an_unknown_link_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown link 'modem': choose one of none, lan, wifi, 5g, 4g, sat"):
        links.find_link("modem")


def test_a_text_is_a_preset_or_a_link_of_its_own() -> None:
    assert all(links.parse_link(name) is link for name, link in links.LINKS.items())
    custom = links.parse_link("rtt=40ms,up=5mbit,down=20mbit,jitter=5ms,loss=1%")
    assert custom == Link("rtt40ms-up5mbit-down20mbit-jitter5ms-loss1pct", 0.04, 5e6, 20e6, 0.005, 0.01)
    assert links.parse_link("rtt=60ms") == Link("rtt60ms", 0.06, math.inf, math.inf)
    assert links.parse_link("rtt=0s, loss=0%") == Link("rtt0ms", 0.0, math.inf, math.inf)
    assert links.parse_link("up=1.5gbit,rtt=250us") == Link("rtt0.25ms-up1500mbit", 0.00025, 1.5e9, math.inf)
    assert links.parse_link(links.CUSTOM_LINK_EXAMPLE) == custom


# Tests draw whole numbers of 1 us, 1 bit a second and 0.01 %; units, with how many places those are behind the point.
TIMES, RATES, SHARES = {"us": 0, "ms": 3, "s": 6}, {"kbit": 3, "mbit": 6, "gbit": 9}, {"%": 2}
UNITS = {"rtt": TIMES, "up": RATES, "down": RATES, "jitter": TIMES, "loss": SHARES}


@st.composite
def figures(draw: st.DrawFn) -> dict[str, int]:
    rest = {key: st.integers(1, 9999) for key in ("up", "down", "jitter", "loss")}
    return {"rtt": draw(st.integers(0, 9999)), **draw(st.fixed_dictionaries({}, optional=rest))}


def written_in_order(figures: dict[str, int], how: random.Random) -> str:
    def part(key: str, number: int) -> str:
        unit, places = how.choice(list(UNITS[key].items()))
        return f"{key}={Decimal(number).scaleb(-places):f}{unit}"

    return ",".join(part(key, number) for key, number in figures.items())


def written(figures: dict[str, int], how: random.Random) -> str:
    parts = written_in_order(figures, how).split(",")
    return ",".join(how.sample(parts, len(parts)))


@given(figures(), figures(), st.randoms())
def test_a_link_is_the_same_and_so_is_its_name_however_it_is_written(
    one: dict[str, int], other: dict[str, int], how: random.Random
) -> None:
    link = links.parse_link(written(one, how))
    assert link == links.parse_link(written(one, how))
    assert re.fullmatch(r"[A-Za-z0-9._-]+", link.name)
    assert link.name not in links.LINKS
    assert links.find_link(link.name) == link
    second = links.parse_link(written(other, how))
    assert (link.name == second.name) == (one == other) == (astuple(link)[1:] == astuple(second)[1:])


WRONG = ("-1", "+1", "nan", "inf", "1e3", "1.", ".5", "1_0", "1 ", "٣", "9999999999")
TIME, RATE, SHARE = "a number of us, ms or s", "a number of kbit, mbit or gbit above 0", "a number of % below 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modem", f"is not one of none, lan, wifi, 5g, 4g, sat, or a link like {links.CUSTOM_LINK_EXAMPLE}"),
        ("", f"is not one of none, lan, wifi, 5g, 4g, sat, or a link like {links.CUSTOM_LINK_EXAMPLE}"),
        ("up=5mbit", "gives no rtt, as rtt=40ms does"),
        ("rtt=40ms,up=5mbit,rtt=40ms", "gives rtt twice"),
        (
            "rtt=40ms,mtu=9",
            f"has 'mtu=9', which gives none of rtt, up, down, jitter, loss "
            f"(a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        (
            "rtt=40ms,lan",
            f"has 'lan', which gives none of rtt, up, down, jitter, loss (a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        (
            "rtt=40ms,",
            f"has '', which gives none of rtt, up, down, jitter, loss (a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        *(
            (f"rtt={amount}", f"has rtt={amount}, but rtt is {TIME}")
            for amount in ("", "ms", "40", "4m", "4mss", "4MS")
        ),
        *((f"rtt={amount}ms", f"has rtt={amount}ms, but rtt is {TIME}") for amount in WRONG),
        *((f"rtt=1s,jitter={amount}s", f"has jitter={amount}s, but jitter is {TIME}") for amount in WRONG),
        *((f"rtt=1s,up={amount}mbit", f"has up={amount}mbit, but up is {RATE}") for amount in ("0", "0.0", *WRONG)),
        *((f"rtt=1s,down={amount}kbit", f"has down={amount}kbit, but down is {RATE}") for amount in ("0", *WRONG)),
        *((f"rtt=1s,up={amount}", f"has up={amount}, but up is {RATE}") for amount in ("5", "5bit", "5mbps", "5ms")),
        *((f"rtt=1s,loss={amount}%", f"has loss={amount}%, but loss is {SHARE}") for amount in ("100", "101", *WRONG)),
        *((f"rtt=1s,loss={amount}", f"has loss={amount}, but loss is {SHARE}") for amount in ("1", "0.01", "1pct")),
    ],
)
def test_a_text_that_is_no_link_is_an_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        links.parse_link(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lan", ["lan"]),
        ("lan,4g", ["lan", "4g"]),
        ("lan,rtt=40ms,up=5mbit,rtt=60ms,4g", ["lan", "rtt=40ms,up=5mbit", "rtt=60ms", "4g"]),
        ("up=5mbit, rtt=40ms , loss=1%", ["up=5mbit,rtt=40ms,loss=1%"]),
        ("rtt=40ms,4g,up=5mbit", ["rtt=40ms", "4g", "up=5mbit"]),
        ("rtt=40ms,up=5mbit,up=6mbit", ["rtt=40ms,up=5mbit", "up=6mbit"]),
        ("lan,,4g,", ["lan", "", "4g", ""]),
    ],
)
def test_a_list_of_links_falls_apart_at_names_and_where_a_key_comes_again(text: str, parts: list[str]) -> None:
    assert links.split_links(text) == parts


@given(st.lists(st.one_of(st.sampled_from(list(links.LINKS)), figures()), min_size=1), st.randoms())
def test_a_list_in_which_links_begin_with_their_rtt_is_split_as_it_was_joined(
    drawn: list[str | dict[str, int]], how: random.Random
) -> None:
    texts = [each if isinstance(each, str) else written_in_order(each, how) for each in drawn]
    assert links.split_links(",".join(texts)) == texts


@given(figures(), st.randoms())
def test_one_link_is_never_split(drawn: dict[str, int], how: random.Random) -> None:
    text = written(drawn, how)
    assert links.split_links(text) == [text]
