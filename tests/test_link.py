"""Links: the time of a message, and the text form."""

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
LAST = math.nextafter(1, 0)  # the largest draw
sizes = st.integers(0, 10**6)
small = st.integers(0, links.INITIAL_WINDOW * links.SEGMENT)
NONE_LOST = (LAST, LAST)
chances = st.floats(0, 1, exclude_max=True)
losses = st.one_of(st.just(0.0), st.floats(1e-9, 0.2), st.floats(0, 0.999))


def drawn(*chances: float) -> Callable[[], float]:
    """Return a function that gives these draws in order, and fails after the last."""
    return iter(chances).__next__


def packets(n: int) -> int:
    """Return the bytes of `n` full packets."""
    return n * links.SEGMENT


def test_one_way_takes_half_the_round_trip_and_the_bits_over_the_bandwidth() -> None:
    assert SLOW.up_seconds(64) == 0.25 + 0.5
    assert SLOW.down_seconds(64) == 0.25 + 0.25


def test_the_first_draw_sets_the_jitter() -> None:
    times = [SLOW.up_seconds(0, drawn(chance)) for chance in (0, 0.25, 0.5, 1)]
    assert times == [0.125, 0.1875, 0.25, 0.375]


def test_jitter_never_makes_the_latency_negative() -> None:
    assert replace(SLOW, jitter=2).down_seconds(64, drawn(0)) == 0.25


@pytest.mark.parametrize("jitter", [0.125, 0.25, 0.5, 2])
def test_without_draws_the_time_is_the_mean_over_the_jitter(jitter: float) -> None:
    link, n = replace(SLOW, jitter=jitter), 1000
    times = [link.up_seconds(64, drawn((i + 0.5) / n)) for i in range(n)]
    assert link.up_seconds(64) == pytest.approx(sum(times) / n, abs=1e-5)


@given(any_link, small, chances)
def test_jitter_stays_within_its_bounds(link: Link, size: int, chance: float) -> None:
    for one_way, bandwidth in ((link.up_seconds, link.up), (link.down_seconds, link.down)):
        latency = one_way(size, drawn(chance)) - 8 * size / bandwidth
        assert max(link.rtt / 2 - link.jitter, 0) - 1e-12 <= latency <= link.rtt / 2 + link.jitter + 1e-12


@given(any_link, losses, sizes, sizes, st.integers(0, 2**32), st.floats(0, 1))
def test_more_bytes_or_a_longer_round_trip_never_take_less_time(
    link: Link, loss: float, size: int, extra: int, seed: int, extra_rtt: float
) -> None:
    near, far = replace(link, loss=loss), replace(link, loss=loss, rtt=link.rtt + extra_rtt)
    messages = ((near, size), (near, size + extra), (far, size + extra))
    for one_way in (Link.up_seconds, Link.down_seconds):
        means = [one_way(link, size) for link, size in messages]
        draws = [one_way(link, size, random.Random(seed).random) for link, size in messages]
        for times in (means, draws):
            assert times[0] >= 0
            assert all(before <= after + 1e-9 for before, after in itertools.pairwise(times))


@given(any_link, sizes, losses, losses)
def test_more_loss_never_takes_less_time_in_the_mean(link: Link, size: int, loss: float, other_loss: float) -> None:
    low, high = sorted((loss, other_loss))
    for one_way in (Link.up_seconds, Link.down_seconds):
        assert one_way(replace(link, loss=low), size) <= one_way(replace(link, loss=high), size) + 1e-9


def test_the_sender_waits_for_acknowledgements_until_the_window_fills_the_round_trip() -> None:
    wire = Link("wire", rtt=0.5, up=8 * packets(40), down=math.inf)  # 20 packets per round trip to the cloud
    assert wire.up_seconds(packets(10)) == 0.25 + 10 / 40  # the first window
    first_wait = 0.5 - 9 / 40  # from the last of the 10 packets to the first acknowledgement
    assert wire.up_seconds(packets(11)) == pytest.approx(0.25 + 11 / 40 + first_wait)
    both_waits = first_wait + 0.5 - 19 / 40
    assert wire.up_seconds(packets(31)) == pytest.approx(0.25 + 31 / 40 + both_waits)
    # a window of 40 packets fills the round trip
    assert wire.up_seconds(packets(300)) == pytest.approx(0.25 + 300 / 40 + both_waits)
    # each window is twice the one before
    assert [wire.down_seconds(packets(n)) for n in (10, 30, 70, 71)] == [0.25, 0.75, 1.25, 1.75]


def test_a_window_is_as_late_as_its_latest_packet() -> None:
    wire = Link("wire", rtt=0.5, up=math.inf, down=math.inf, jitter=0.125)
    assert wire.up_seconds(packets(30)) == 0.25 + 0.5 + 0.125


def test_losses_limit_the_window() -> None:
    wire = Link("wire", rtt=0.5, up=math.inf, down=math.inf, loss=0.75 / 4**2)  # 4 packets per round trip
    times = [wire.up_seconds(packets(n), drawn(0.5, *NONE_LOST)) for n in (4, 5, 12, 13)]
    assert times == [0.25, 0.75, 1.25, 1.75]
    worse = replace(wire, loss=0.9)
    assert [worse.up_seconds(packets(n), drawn(0.5, *NONE_LOST)) for n in (1, 2)] == [
        0.25,
        0.75,
    ]  # one packet per round trip


def test_a_lost_packet_costs_a_round_trip_and_a_lost_last_packet_a_timeout() -> None:
    lossy = replace(SLOW, loss=0.01)
    one, two = packets(1), packets(2)
    for one_way in (lossy.up_seconds, lossy.down_seconds):
        timeout = 0.5 + 0.2
        assert one_way(one, drawn(0.5, 0, LAST)) == one_way(one, drawn(0.5, *NONE_LOST))  # no packet before the last
        extra = one_way(two, drawn(0.5, 0.0099, LAST)) - one_way(two, drawn(0.5, *NONE_LOST))
        assert extra == pytest.approx(0.5)
        for losses, seconds in ((1, timeout), (2, 3 * timeout), (3, 7 * timeout)):
            lost = one_way(one, drawn(0.5, LAST, *[0.0099] * losses, LAST))
            assert lost - one_way(one, drawn(0.5, *NONE_LOST)) == pytest.approx(seconds)
    assert lossy.up_seconds(two, drawn(0.5, 0.0101, 0.0101)) == lossy.up_seconds(two, drawn(0.5, *NONE_LOST))


def test_retransmissions_are_at_most_two_minutes_apart() -> None:
    lossy = replace(SLOW, loss=0.9)
    tenth, eleventh = (lossy.up_seconds(0, drawn(0.5, LAST, *[0.0] * losses, LAST)) for losses in (10, 11))
    assert eleventh - tenth == pytest.approx(120)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "n"), [(0.01, 1), (0.01, 8), (0.2, 1), (0.2, 3), (0.6, 2)])
def test_without_draws_the_time_is_the_mean_over_many_draws(loss: float, n: int) -> None:
    lossy, draw = replace(SLOW, loss=loss), random.Random(0).random
    times = [lossy.up_seconds(packets(n), draw) for _ in range(20_000)]
    error = statistics.stdev(times) / math.sqrt(len(times))
    assert lossy.up_seconds(packets(n)) == pytest.approx(statistics.fmean(times), abs=3 * error)


def test_no_link_takes_no_time() -> None:
    assert links.NO_LINK.up_seconds(10**9) == links.NO_LINK.down_seconds(10**9) == 0


def test_each_preset_is_found_by_its_name() -> None:
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
def test_the_presets_have_the_figures_of_the_scenarios(
    name: str, rtt: float, up: float, down: float, jitter: float
) -> None:
    link = links.find_link(name)
    assert [1e3 * link.rtt, link.up / 1e6, link.down / 1e6, 1e3 * link.jitter] == pytest.approx([rtt, up, down, jitter])
    assert link.loss == 0


def test_an_unknown_link_is_refused_with_the_presets() -> None:
    with pytest.raises(ValueError, match="unknown link 'modem': choose one of none, lan, wifi, 5g, 4g, sat"):
        links.find_link("modem")


def test_a_text_gives_a_preset_or_a_custom_link() -> None:
    assert all(links.parse_link(name) is link for name, link in links.LINKS.items())
    custom = links.parse_link("rtt=40ms,up=5mbit,down=20mbit,jitter=5ms,loss=1%")
    assert custom == Link("rtt40ms-up5mbit-down20mbit-jitter5ms-loss1pct", 0.04, 5e6, 20e6, 0.005, 0.01)
    assert links.parse_link("rtt=60ms") == Link("rtt60ms", 0.06, math.inf, math.inf)
    assert links.parse_link("rtt=0s, loss=0%") == Link("rtt0ms", 0.0, math.inf, math.inf)
    assert links.parse_link("up=1.5gbit,rtt=250us") == Link("rtt0.25ms-up1500mbit", 0.00025, 1.5e9, math.inf)
    assert links.parse_link(links.CUSTOM_LINK_EXAMPLE) == custom


# The tests draw whole numbers of 1 us, 1 bit per second and 0.01 %. Each unit has its decimal places relative to those.
TIMES, RATES, SHARES = {"us": 0, "ms": 3, "s": 6}, {"kbit": 3, "mbit": 6, "gbit": 9}, {"%": 2}
UNITS = {"rtt": TIMES, "up": RATES, "down": RATES, "jitter": TIMES, "loss": SHARES}


@st.composite
def figures(draw: st.DrawFn) -> dict[str, int]:
    rest = {key: st.integers(1, 9999) for key in ("up", "down", "jitter", "loss")}
    return {"rtt": draw(st.integers(0, 9999)), **draw(st.fixed_dictionaries({}, optional=rest))}


def ordered_text(figures: dict[str, int], source: random.Random) -> str:
    """Return the text of a custom link, in random units."""

    def part(key: str, number: int) -> str:
        unit, places = source.choice(list(UNITS[key].items()))
        return f"{key}={Decimal(number).scaleb(-places):f}{unit}"

    return ",".join(part(key, number) for key, number in figures.items())


def shuffled_text(figures: dict[str, int], source: random.Random) -> str:
    """Return the text of a custom link, in random units and in random order."""
    parts = ordered_text(figures, source).split(",")
    return ",".join(source.sample(parts, len(parts)))


@given(figures(), figures(), st.randoms())
def test_the_units_and_the_order_of_a_text_do_not_change_the_link_or_its_name(
    one: dict[str, int], other: dict[str, int], source: random.Random
) -> None:
    link = links.parse_link(shuffled_text(one, source))
    assert link == links.parse_link(shuffled_text(one, source))
    assert re.fullmatch(r"[A-Za-z0-9._-]+", link.name)
    assert link.name not in links.LINKS
    assert links.find_link(link.name) == link
    second = links.parse_link(shuffled_text(other, source))
    assert (link.name == second.name) == (one == other) == (astuple(link)[1:] == astuple(second)[1:])


WRONG = ("-1", "+1", "nan", "inf", "1e3", "1.", ".5", "1_0", "1 ", "٣", "9999999999")
TIME, RATE, SHARE = "a number of us, ms or s", "a number of kbit, mbit or gbit above 0", "a number of % below 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modem", f"is not one of none, lan, wifi, 5g, 4g, sat, or a link like {links.CUSTOM_LINK_EXAMPLE}"),
        ("", f"is not one of none, lan, wifi, 5g, 4g, sat, or a link like {links.CUSTOM_LINK_EXAMPLE}"),
        ("up=5mbit", "has no rtt: add one, like rtt=40ms"),
        ("rtt=40ms,up=5mbit,rtt=40ms", "has rtt twice: give it once"),
        (
            "rtt=40ms,mtu=9",
            f"has 'mtu=9', which sets none of rtt, up, down, jitter, loss (a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        (
            "rtt=40ms,lan",
            f"has 'lan', which sets none of rtt, up, down, jitter, loss (a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        (
            "rtt=40ms,",
            f"has '', which sets none of rtt, up, down, jitter, loss (a link is like {links.CUSTOM_LINK_EXAMPLE})",
        ),
        *(
            (f"rtt={amount}", f"has rtt={amount}, but rtt must be {TIME}")
            for amount in ("", "ms", "40", "4m", "4mss", "4MS")
        ),
        *((f"rtt={amount}ms", f"has rtt={amount}ms, but rtt must be {TIME}") for amount in WRONG),
        *((f"rtt=1s,jitter={amount}s", f"has jitter={amount}s, but jitter must be {TIME}") for amount in WRONG),
        *(
            (f"rtt=1s,up={amount}mbit", f"has up={amount}mbit, but up must be {RATE}")
            for amount in ("0", "0.0", *WRONG)
        ),
        *((f"rtt=1s,down={amount}kbit", f"has down={amount}kbit, but down must be {RATE}") for amount in ("0", *WRONG)),
        *(
            (f"rtt=1s,up={amount}", f"has up={amount}, but up must be {RATE}")
            for amount in ("5", "5bit", "5mbps", "5ms")
        ),
        *(
            (f"rtt=1s,loss={amount}%", f"has loss={amount}%, but loss must be {SHARE}")
            for amount in ("100", "101", *WRONG)
        ),
        *(
            (f"rtt=1s,loss={amount}", f"has loss={amount}, but loss must be {SHARE}")
            for amount in ("1", "0.01", "1pct")
        ),
    ],
)
def test_a_text_that_is_no_link_is_refused_with_the_reason(text: str, message: str) -> None:
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
def test_a_list_of_links_is_split_at_presets_and_at_repeated_keys(text: str, parts: list[str]) -> None:
    assert links.split_links(text) == parts


@given(st.lists(st.one_of(st.sampled_from(list(links.LINKS)), figures()), min_size=1), st.randoms())
def test_joined_links_that_begin_with_their_rtt_are_split_again(
    drawn: list[str | dict[str, int]], source: random.Random
) -> None:
    texts = [link if isinstance(link, str) else ordered_text(link, source) for link in drawn]
    assert links.split_links(",".join(texts)) == texts


@given(figures(), st.randoms())
def test_one_link_is_never_split(drawn: dict[str, int], source: random.Random) -> None:
    text = shuffled_text(drawn, source)
    assert links.split_links(text) == [text]
