"""Links between edge and cloud: how long a message of so many bytes takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

SEGMENT = 1460  # bytes of a message in a packet: Ethernet's 1500 less the headers of IP and TCP
WINDOW = 10  # packets sent before the first acknowledgement (RFC 6928)
LEAST_TIMEOUT = 0.2  # s that Linux adds to the round trip, at least, before it takes a packet for lost
MOST_TIMEOUT = 120.0  # s between two tries, at most, in Linux


@dataclass(frozen=True)
class Link:
    """One kept-alive TCP connection: no handshake is counted.

    `rtt` and `jitter` in seconds, `up` and `down` in bits a second, `loss` the share of packets lost in each
    direction. A message takes rtt / 2, give or take at most `jitter`; 8 x its bytes / the bandwidth of its direction;
    for one of many packets, the waits for acknowledgements; and the time until lost packets have come after all.

    Left out are the headers of packets (3.5 % of large messages), queues that others fill, and what single congestion
    controls do: CUBIC may take jitter for a queue and leave slow start early, BBR does not start over after a pause.
    """

    name: str
    rtt: float
    up: float
    down: float
    jitter: float = 0.0
    loss: float = 0.0

    def up_seconds(self, size: float, draw: Callable[[], float] | None = None) -> float:
        """One way to the cloud for `size` bytes.

        `draw` gives numbers even in [0, 1): the first is the jitter's, more are asked for only where packets are lost.
        Without it, the expected time.
        """
        return self._trip(size, self.up, draw)

    def down_seconds(self, size: float, draw: Callable[[], float] | None = None) -> float:
        """One way to the edge."""
        return self._trip(size, self.down, draw)

    def _trip(self, size: float, bandwidth: float, draw: Callable[[], float] | None) -> float:
        packets = max(math.ceil(size / SEGMENT), 1)
        return (
            self._latency(draw)
            + 8 * size / bandwidth
            + self._unacknowledged(packets, bandwidth)
            + (self._resent(packets, draw) if self.loss else 0.0)
        )

    def _latency(self, draw: Callable[[], float] | None) -> float:
        """Half a round trip and its jitter, or 0 where that is negative: so the mean is more if much of it would be."""
        half, jitter = self.rtt / 2, self.jitter
        if draw:
            return max(half + jitter * (2 * draw() - 1), 0.0)
        return half if jitter <= half else (half + jitter) ** 2 / (4 * jitter)

    def _unacknowledged(self, packets: int, bandwidth: float) -> float:
        """Seconds that the sender waits for acknowledgements before it may send more.

        Slow start (RFC 5681, section 3.1): `WINDOW` packets go at once, then twice as many each round trip, until they
        fill it. A connection that was idle starts over (section 4.1), so each message that opens a prompt meets this.
        Losses keep the window at sqrt(3 / (4 loss)) packets in the mean, every other packet being acknowledged (Mathis
        et al. 1997, "The macroscopic behavior of the TCP congestion avoidance algorithm"; for losses of a few percent).
        Packets stay in order, so that the latest of a flight makes all of it late, by nearly `jitter`.
        """
        most = max(math.sqrt(0.75 / self.loss), 1.0) if self.loss else math.inf
        each, window, left, waited = 8 * SEGMENT / bandwidth, min(WINDOW, most), float(packets), 0.0
        while left > window and (wait := self.rtt + self.jitter - (window - 1) * each) > 0:
            waited += wait
            left -= window
            window = min(2 * window, most)
        return waited

    def _resent(self, packets: int, draw: Callable[[], float] | None) -> float:
        """Seconds that lost packets add.

        A packet with others behind it is missed by their acknowledgements and comes a round trip later, all lost ones
        of a message together (fast retransmit: RFC 5681, section 3.2). The last has only the clock: a round trip and
        200 ms in Linux, and twice as long after each further loss (RFC 6298, section 5). The probe of RFC 8985, section
        7, is due no sooner there: with a single packet underway, Linux gives it two round trips and 200 ms.
        """
        missed = 1 - (1 - self.loss) ** (packets - 1)
        share, timeout = self.loss, self.rtt + LEAST_TIMEOUT
        if draw:
            seconds = self.rtt * (draw() < missed)
            while draw() < self.loss:
                seconds += min(timeout, MOST_TIMEOUT)
                timeout *= 2
            return seconds
        seconds = self.rtt * missed
        while timeout < MOST_TIMEOUT:
            seconds += share * timeout
            share *= self.loss
            timeout *= 2
        return seconds + MOST_TIMEOUT * share / (1 - self.loss)


NO_LINK = Link("none", 0.0, math.inf, math.inf)  # edge and cloud in one process
# The round trips are the project's scenarios; bandwidths and jitter are round figures chosen to go with them.
LINKS = {
    link.name: link
    for link in (
        NO_LINK,
        Link("lan", rtt=0.001, up=1e9, down=1e9, jitter=0.0001),
        Link("wifi", rtt=0.010, up=100e6, down=200e6, jitter=0.003),
        Link("5g", rtt=0.025, up=50e6, down=300e6, jitter=0.005),
        Link("4g", rtt=0.060, up=10e6, down=40e6, jitter=0.015),
        Link("sat", rtt=0.600, up=3e6, down=25e6, jitter=0.030),
    )
}


class _Kind(NamedTuple):
    """What a figure of a custom link may be: its units, the one that names show, and the numbers of it."""

    units: dict[str, str]
    shown: str
    usable: Callable[[float], bool]
    meaning: str


_TIME = _Kind({"us": "1e-6", "ms": "1e-3", "s": "1"}, "ms", lambda value: True, "a number of us, ms or s")
_RATE = _Kind(
    {"kbit": "1e3", "mbit": "1e6", "gbit": "1e9"},
    "mbit",
    lambda value: value > 0,
    "a number of kbit, mbit or gbit above 0",
)
_SHARE = _Kind({"%": "1e-2"}, "%", lambda value: value < 1, "a number of % below 100")
_KINDS = {"rtt": _TIME, "up": _RATE, "down": _RATE, "jitter": _TIME, "loss": _SHARE}
CUSTOM_LINK_EXAMPLE = "rtt=40ms,up=5mbit,down=20mbit,jitter=5ms,loss=1%"


def parse_link(text: str) -> Link:
    """The link that `text` names, or describes in parts like those of `CUSTOM_LINK_EXAMPLE`, in any order.

    Only rtt is required: up and down are unlimited without, jitter and loss 0. The link's name tells all its figures,
    each in one unit, so that it is the same however they are written. ValueError for any other text, worded to follow
    it.
    """
    if text in LINKS:
        return LINKS[text]
    if "=" not in text:
        raise ValueError(f"is not one of {', '.join(LINKS)}, or a link like {CUSTOM_LINK_EXAMPLE}")
    figures: dict[str, float] = {}
    for part in map(str.strip, text.split(",")):
        key, _, amount = part.partition("=")
        if key not in _KINDS:
            raise ValueError(
                f"has {part!r}, which gives none of {', '.join(_KINDS)} (a link is like {CUSTOM_LINK_EXAMPLE})"
            )
        if key in figures:
            raise ValueError(f"gives {key} twice")
        figures[key] = _figure(key, amount)
    if "rtt" not in figures:
        raise ValueError("gives no rtt, as rtt=40ms does")
    return Link(_name(figures), **{"up": math.inf, "down": math.inf, **figures})


def find_link(name: str) -> Link:
    """Return the link of a preset's name, or of a name that `parse_link` gave. Raise ValueError for any other."""
    text = re.sub(rf"({'|'.join(_KINDS)})(?=[0-9])", r"\1=", name).replace("-", ",").replace("pct", "%")
    try:
        found = parse_link(text)
    except ValueError:
        found = NO_LINK
    if found.name != name:
        raise ValueError(f"unknown link {name!r}: choose one of {', '.join(LINKS)}")
    return found


def _figure(key: str, amount: str) -> float:
    """`amount` as `Link` has it. Decimal until the end, so that 40ms and 0.04s are the same."""
    kind = _KINDS[key]
    match = re.fullmatch(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)({'|'.join(kind.units)})", amount)
    value = float(Decimal(match[1]) * Decimal(kind.units[match[2]])) if match else math.nan
    if not match or not kind.usable(value):
        raise ValueError(f"has {key}={amount}, but {key} is {kind.meaning}")
    return value


def _name(figures: dict[str, float]) -> str:
    """rtt40ms-up5mbit-down20mbit-jitter5ms-loss1pct: good in ids and as part of a file's name."""

    def shown(key: str, kind: _Kind) -> str:
        number = Decimal(repr(figures[key])) / Decimal(kind.units[kind.shown])
        return f"{key}{number.normalize():f}{kind.shown.replace('%', 'pct')}"

    return "-".join(shown(key, kind) for key, kind in _KINDS.items() if key == "rtt" or figures.get(key))


def split_links(text: str) -> list[str]:
    """The links of a list, whose parts hold commas themselves.

    A part with a "=" belongs to the custom link before it, unless that has its key already or there is only a plain
    name before it. So one custom link may be written in any order, and of several each is to begin with its rtt.
    """
    found: list[str] = []
    keys: set[str] = set()  # of the custom link that is last in `found`
    for part in map(str.strip, text.split(",")):
        key, equals, _ = part.partition("=")
        if equals and keys and key not in keys:
            found[-1] += f",{part}"
        else:
            found.append(part)
            keys = set()
        if equals:
            keys.add(key)
    return found
