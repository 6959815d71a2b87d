"""Links between edge and cloud: the seconds that a message takes, by its size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

SEGMENT = 1460  # payload bytes per packet: Ethernet's 1500 minus the IP and TCP headers
INITIAL_WINDOW = 10  # packets sent before the first acknowledgement (RFC 6928)
MIN_TIMEOUT_MARGIN = 0.2  # s: Linux retransmits after the round trip and at least this
MAX_TIMEOUT = 120.0  # s between two retransmissions in Linux, at most


@dataclass(frozen=True)
class Link:
    """A kept-alive TCP connection, so that no handshake is counted.

    `rtt` and `jitter` are seconds, `up` and `down` bits per second. `loss` is the share of packets lost in each
    direction. The one-way time of a message is the sum of four parts.

    - Latency: rtt / 2, plus or minus at most `jitter`.
    - Transmission: 8 bytes / bandwidth.
    - Acknowledgements: the sender waits for them if a message has many packets.
    - Retransmission of lost packets.

    The model leaves out packet headers (3.5 % of large messages), other traffic, and details of congestion control:
    CUBIC may mistake jitter for a queue and leave slow start early, and BBR does not restart after a pause.
    """

    name: str
    rtt: float
    up: float
    down: float
    jitter: float = 0.0
    loss: float = 0.0

    def up_seconds(self, size: float, draw: Callable[[], float] | None = None) -> float:
        """Return the one-way seconds of `size` bytes to the cloud, or their expected value without `draw`.

        `draw` returns uniform numbers in [0, 1). The first is for the jitter. A link with loss draws more.
        """
        return self._one_way_seconds(size, self.up, draw)

    def down_seconds(self, size: float, draw: Callable[[], float] | None = None) -> float:
        """Return the one-way seconds of `size` bytes to the edge, as `up_seconds` does to the cloud."""
        return self._one_way_seconds(size, self.down, draw)

    def _one_way_seconds(self, size: float, bandwidth: float, draw: Callable[[], float] | None) -> float:
        packets = max(math.ceil(size / SEGMENT), 1)
        return (
            self._latency(draw)
            + 8 * size / bandwidth
            + self._acknowledgement_wait(packets, bandwidth)
            + (self._retransmission(packets, draw) if self.loss else 0.0)
        )

    def _latency(self, draw: Callable[[], float] | None) -> float:
        """Return rtt / 2 plus a jitter that is uniform in [-jitter, jitter], or 0 if that is negative.

        The cut at 0 raises the mean if `jitter` exceeds rtt / 2.
        """
        half, jitter = self.rtt / 2, self.jitter
        if draw:
            return max(half + jitter * (2 * draw() - 1), 0.0)
        return half if jitter <= half else (half + jitter) ** 2 / (4 * jitter)

    def _acknowledgement_wait(self, packets: int, bandwidth: float) -> float:
        """Return the seconds that the sender waits for acknowledgements before it may send more.

        Slow start (RFC 5681, section 3.1): the sender sends `INITIAL_WINDOW` packets at once. The window doubles each
        round trip until it fills the round trip. An idle connection starts again (section 4.1), so each prompt
        meets slow start. Losses limit the mean window to sqrt(3 / (4 loss)) packets, if every second packet is
        acknowledged and losses are a few percent (Mathis et al. 1997, "The macroscopic behavior of the TCP congestion
        avoidance algorithm"). TCP delivers packets in order, so the slowest packet of a window delays all of it by
        almost `jitter`.
        """
        max_window = max(math.sqrt(0.75 / self.loss), 1.0) if self.loss else math.inf
        packet_seconds = 8 * SEGMENT / bandwidth
        window, left, total = min(INITIAL_WINDOW, max_window), float(packets), 0.0
        while left > window and (wait := self.rtt + self.jitter - (window - 1) * packet_seconds) > 0:
            total += wait
            left -= window
            window = min(2 * window, max_window)
        return total

    def _retransmission(self, packets: int, draw: Callable[[], float] | None) -> float:
        """Return the seconds that lost packets add.

        If packets follow a lost one, their acknowledgements reveal the loss. All such packets of a message arrive one
        round trip later, together (fast retransmit: RFC 5681, section 3.2). The loss of the last packet shows only by
        a timeout: a round trip and 200 ms in Linux. Each further loss doubles the timeout (RFC 6298, section 5). The
        loss probe of RFC 8985 (section 7) is no faster for one packet: Linux sends it after two round trips and 200 ms.
        """
        any_before_last = 1 - (1 - self.loss) ** (packets - 1)  # probability of a loss before the last packet
        timeout = self.rtt + MIN_TIMEOUT_MARGIN
        if draw:
            seconds = self.rtt * (draw() < any_before_last)
            while draw() < self.loss:
                seconds += min(timeout, MAX_TIMEOUT)
                timeout *= 2
            return seconds
        seconds, chance = self.rtt * any_before_last, self.loss
        while timeout < MAX_TIMEOUT:
            seconds += chance * timeout
            chance *= self.loss
            timeout *= 2
        return seconds + MAX_TIMEOUT * chance / (1 - self.loss)  # the geometric series of all later timeouts


NO_LINK = Link("none", 0.0, math.inf, math.inf)  # edge and cloud in one process
# The project defines the round trips. Bandwidths and jitter are round numbers that fit them.
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


class _Quantity(NamedTuple):
    """The accepted texts of one field of a custom link: units, the unit in link names, and valid values."""

    factors: dict[str, str]  # unit -> its size in the unit of `Link`, as text that Decimal reads exactly
    name_unit: str
    is_valid: Callable[[float], bool]
    description: str


_TIME = _Quantity({"us": "1e-6", "ms": "1e-3", "s": "1"}, "ms", lambda value: True, "a number of us, ms or s")
_RATE = _Quantity(
    {"kbit": "1e3", "mbit": "1e6", "gbit": "1e9"},
    "mbit",
    lambda value: value > 0,
    "a number of kbit, mbit or gbit above 0",
)
_SHARE = _Quantity({"%": "1e-2"}, "%", lambda value: value < 1, "a number of % below 100")
_QUANTITIES = {"rtt": _TIME, "up": _RATE, "down": _RATE, "jitter": _TIME, "loss": _SHARE}
CUSTOM_LINK_EXAMPLE = "rtt=40ms,up=5mbit,down=20mbit,jitter=5ms,loss=1%"


def parse_link(text: str) -> Link:
    """Return the preset with this name, or the link of fields as in `CUSTOM_LINK_EXAMPLE`, in any order.

    Only rtt is required. The defaults are unlimited `up` and `down`, and no jitter and loss. The name of a custom link
    lists its fields in fixed units, so equal links have equal names. Raise ValueError for any other text, with a
    message that continues after that text.
    """
    if text in LINKS:
        return LINKS[text]
    if "=" not in text:
        raise ValueError(f"is not one of {', '.join(LINKS)}, or a link like {CUSTOM_LINK_EXAMPLE}")
    values: dict[str, float] = {}
    for part in map(str.strip, text.split(",")):
        key, _, amount = part.partition("=")
        if key not in _QUANTITIES:
            raise ValueError(
                f"has {part!r}, which sets none of {', '.join(_QUANTITIES)} (a link is like {CUSTOM_LINK_EXAMPLE})"
            )
        if key in values:
            raise ValueError(f"has {key} twice: give it once")
        values[key] = _parse_quantity(key, amount)
    if "rtt" not in values:
        raise ValueError("has no rtt: add one, like rtt=40ms")
    return Link(_link_name(values), **{"up": math.inf, "down": math.inf, **values})


def find_link(name: str) -> Link:
    """Return the preset or the custom link with this name. Raise ValueError if `parse_link` gives no link that name."""
    text = re.sub(rf"({'|'.join(_QUANTITIES)})(?=[0-9])", r"\1=", name).replace("-", ",").replace("pct", "%")
    try:
        link = parse_link(text)
    except ValueError:
        link = NO_LINK
    if link.name != name:
        raise ValueError(f"unknown link {name!r}: choose one of {', '.join(LINKS)}")
    return link


def _parse_quantity(key: str, amount: str) -> float:
    """Return `amount` in the unit of `Link`. Decimal arithmetic makes 40ms and 0.04s equal."""
    quantity = _QUANTITIES[key]
    match = re.fullmatch(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)({'|'.join(quantity.factors)})", amount)
    value = float(Decimal(match[1]) * Decimal(quantity.factors[match[2]])) if match else math.nan
    if not match or not quantity.is_valid(value):
        raise ValueError(f"has {key}={amount}, but {key} must be {quantity.description}")
    return value


def _link_name(values: dict[str, float]) -> str:
    """Return a name like rtt40ms-up5mbit-down20mbit-jitter5ms-loss1pct, for case ids and file names."""

    def field_text(key: str, quantity: _Quantity) -> str:
        number = Decimal(repr(values[key])) / Decimal(quantity.factors[quantity.name_unit])
        return f"{key}{number.normalize():f}{quantity.name_unit.replace('%', 'pct')}"

    return "-".join(
        field_text(key, quantity) for key, quantity in _QUANTITIES.items() if key == "rtt" or values.get(key)
    )


def split_links(text: str) -> list[str]:
    """Return the links of a comma-separated list, in which custom links contain commas themselves.

    A part with "=" belongs to the custom link before it, unless that link has its key already or a preset precedes it.
    So one custom link may have any order, and in a list of several each must begin with its rtt.
    """
    links: list[str] = []
    keys: set[str] = set()  # those of the last link, if it is custom
    for part in map(str.strip, text.split(",")):
        key, equals, _ = part.partition("=")
        if equals and keys and key not in keys:
            links[-1] += f",{part}"
        else:
            links.append(part)
            keys = set()
        if equals:
            keys.add(key)
    return links
