"""Doubts about audio that can be read: it is silent, its channels cancel, or it is out of range."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SILENCE = 1e-4  # a range from the lowest to the highest sample of 3 steps of 16-bit PCM
CANCELLED_ENERGY = 0.05  # share of the channels' mean energy that the mix keeps; 0.5 for channels that differ freely
FULL_SCALE = 0.999
CLIPPED_SHARE = 1e-3  # share of samples at full scale

Samples = NDArray[np.float64]


def find_doubts(channels: Samples, mono: Samples) -> tuple[str, ...]:
    """Return what is doubtful about samples [frames, channels] and their mix [frames], one text per doubt."""
    peak = float(np.abs(channels).max())
    clipped = float((np.abs(channels) >= FULL_SCALE).mean())
    spread = channels - channels.mean(axis=0)
    is_silent = float(np.ptp(channels, axis=0).max()) <= SILENCE
    is_cancelled = float(np.var(mono)) < CANCELLED_ENERGY * float(np.square(spread).mean())
    doubts = {
        "is silent: no caption can be right": is_silent,
        "has channels that cancel each other in the mix (inverted phase): give one of them": is_cancelled
        and not is_silent,
        f"reaches {peak:g}, beyond [-1, 1]: scale it to this range": peak > 1,
        f"is clipped: {clipped:.1%} of its samples are at full scale": peak <= 1 and clipped >= CLIPPED_SHARE,
    }
    return tuple(doubt for doubt, is_true in doubts.items() if is_true)
