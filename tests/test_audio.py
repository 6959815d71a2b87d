"""Audio in memory: scaled by its type, averaged over channels, resampled, or refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgecloud_sd.data.audio import as_samples

TONE = (0.5 * np.sin(np.arange(1600) / 9)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "tolerance"),
    [
        (TONE, 0),
        (TONE.astype(np.float64), 0),
        (TONE.astype(np.float16), 1e-3),
        (np.round(TONE * 2**15).astype(np.int16), 1e-4),
        (np.round(TONE * 2**15).astype(">i2"), 1e-4),
        (TONE.astype(">f4"), 1e-6),
        (np.round(TONE.astype(np.float64) * 2**31).astype(np.int32), 1e-6),
        (np.round(TONE * 128 + 128).astype(np.uint8), 1e-2),
        (np.stack([TONE, TONE], axis=1), 0),
        (TONE[:, None], 0),
    ],
)
def test_every_type_of_audio_gives_the_same_samples(array: NDArray[np.generic], tolerance: float) -> None:
    samples = as_samples(array)
    assert samples.dtype == np.float32
    assert samples == pytest.approx(TONE, abs=tolerance)


def test_channels_are_averaged() -> None:
    assert as_samples(np.stack([TONE, -TONE], axis=1)) == pytest.approx(0)


def test_a_list_of_numbers_is_audio() -> None:
    assert as_samples([0.0, 0.25]).tolist() == [0.0, 0.25]


def test_another_sampling_rate_is_resampled() -> None:
    assert len(as_samples(TONE, 8000)) == 2 * len(TONE)
    assert len(as_samples(TONE, 48_000)) == pytest.approx(len(TONE) / 3, abs=1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(0, np.float32), r"not empty, not of shape \(0,\)"),
        (np.float32(0), r"not empty, not of shape \(\)"),
        (np.zeros((2, 3, 4), np.float32), r"not of shape \(2, 3, 4\)"),
        (np.zeros((2, 1600), np.float32), r"shape \(2, 1600\) has more than 32 channels: transpose it"),
        (np.array([0.0, np.nan], np.float32), "not finite"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.array([0.0, 12_345.0]), r"reaches 12345: float samples must lie in \[-1, 1\]"),
        (np.zeros(4, np.int64), "type int64: give float samples, or PCM as int16, int32 or uint8"),
        (np.zeros(4, np.int8), "type int8"),
        (np.zeros(4, bool), "type bool"),
        (np.zeros(4, complex), "type complex128"),
        (np.array(["a"]), "type <U1"),
    ],
)
def test_anything_else_is_refused_with_its_reason(array: NDArray[np.generic], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_samples(array)


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.5, True, "16k"])
def test_a_bad_sampling_rate_is_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="sampling_rate must be a whole number of Hz above 0"):
        as_samples(TONE, rate)  # type: ignore[arg-type]
