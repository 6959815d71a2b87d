"""Links between edge and cloud: how long a message takes, and how large it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgecloud_sd.records import Prompt

ID_BYTES = 4  # a token id, and each integer of a verdict
FEATURE_BYTES = 2  # a value of the log-mel spectrogram, in half precision


@dataclass(frozen=True)
class Link:
    """A connection that stands already: no handshake is counted.

    `rtt` and `jitter` in seconds, `up` and `down` in bits a second. A message takes rtt / 2, give or take at most
    `jitter`, and 8 x its bytes / the bandwidth of its direction.
    """

    name: str
    rtt: float
    up: float
    down: float
    jitter: float = 0.0

    def up_seconds(self, size: int, chance: float = 0.5) -> float:
        """One way to the cloud for `size` bytes; `chance` in [0, 1] draws the jitter, 0.5 is none."""
        return self._trip(size, self.up, chance)

    def down_seconds(self, size: int, chance: float = 0.5) -> float:
        """One way to the edge."""
        return self._trip(size, self.down, chance)

    def _trip(self, size: int, bandwidth: float, chance: float) -> float:
        return max(self.rtt / 2 + self.jitter * (2 * chance - 1), 0.0) + 8 * size / bandwidth


NONE = Link("none", 0.0, math.inf, math.inf)  # edge and cloud in one process
# The round trips are the project's scenarios; bandwidths and jitter are round figures chosen to go with them.
LINKS = {
    link.name: link
    for link in (
        NONE,
        Link("lan", rtt=0.001, up=1e9, down=1e9, jitter=0.0001),
        Link("wifi", rtt=0.010, up=100e6, down=200e6, jitter=0.003),
        Link("5g", rtt=0.025, up=50e6, down=300e6, jitter=0.005),
        Link("4g", rtt=0.060, up=10e6, down=40e6, jitter=0.015),
        Link("sat", rtt=0.600, up=3e6, down=25e6, jitter=0.030),
    )
}


def find(name: str) -> Link:
    """A link by name. ValueError, naming the known ones, for any other."""
    if name not in LINKS:
        raise ValueError(f"unknown link {name!r}: choose one of {', '.join(LINKS)}")
    return LINKS[name]


def open_bytes(prompt: Prompt) -> int:
    """Payload that opens a prompt at the cloud: its ids, and its features in half precision."""
    return ID_BYTES * len(prompt.ids) + (FEATURE_BYTES * prompt.features.numel() if prompt.features is not None else 0)


def verify_bytes(fed: float) -> float:
    """Payload of a request to verify: the base, and `fed` ids (committed tokens not yet sent, then the draft)."""
    return ID_BYTES * (1 + fed)


VERDICT_BYTES = 2 * ID_BYTES  # how many are accepted, and the cloud's own token
TOKEN_BYTES = ID_BYTES  # one token of a stream
