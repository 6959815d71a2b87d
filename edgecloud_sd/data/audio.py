"""Audio in memory, checked and brought to the form that the feature extractor reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgecloud_sd.data.dataset import SAMPLE_RATE

MAX_AMPLITUDE = 8.0  # a float signal beyond this is integer PCM that was never scaled
MAX_CHANNELS = 32  # a second dimension beyond this is time, so the array is transposed


def as_samples(audio: ArrayLike, sampling_rate: int = SAMPLE_RATE) -> NDArray[np.float32]:
    """Return mono float32 samples in about [-1, 1] at 16 kHz.

    `audio` is [samples] or [samples, channels]; channels are averaged. Integer PCM is scaled by the range of its type:
    int16 by 32768, int32 by 2^31, and uint8 around 128. Raise ValueError for any other type or shape, an empty
    array, samples that are not finite, float samples far beyond [-1, 1], and a bad sampling rate.
    """
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int | np.integer) or sampling_rate < 1:
        raise ValueError(f"sampling_rate must be a whole number of Hz above 0, not {sampling_rate!r}")
    array = np.asarray(audio)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"audio must be [samples] or [samples, channels] and not empty, not of shape {array.shape}")
    if array.ndim == 2 and array.shape[1] > MAX_CHANNELS:
        raise ValueError(f"audio of shape {array.shape} has more than {MAX_CHANNELS} channels: transpose it")
    samples = _to_float(array)
    if not np.isfinite(samples).all():
        raise ValueError("audio holds samples that are not finite: remove nan and inf")
    loudest = float(np.abs(samples).max())
    if loudest > MAX_AMPLITUDE:
        raise ValueError(f"audio of type {array.dtype} reaches {loudest:g}: float samples must lie in [-1, 1]")
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    if sampling_rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, sampling_rate, SAMPLE_RATE)
        if not len(mono):
            raise ValueError(f"audio of {len(samples)} samples at {sampling_rate} Hz is empty at {SAMPLE_RATE} Hz")
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_samples(samples: Any) -> NDArray[np.float32]:
    """Return mono float samples as float32. Raise TypeError or ValueError for anything else."""
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f":
        kind = samples.dtype if isinstance(samples, np.ndarray) else type(samples).__name__
        raise TypeError(f"samples must be an array of floats, not {kind}: Request.of(samples) converts them")
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"samples must be mono and not empty, not of shape {samples.shape}: Request.of mixes channels")
    with np.errstate(over="ignore"):  # it gives inf, which is refused
        mono = samples.astype(np.float32, copy=False)
    if not np.isfinite(mono).all():
        raise ValueError("samples hold values that are not finite in float32: remove nan and inf")
    return mono


def _to_float(array: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Return the array as float, integers scaled to [-1, 1). Raise ValueError for a type that is no audio."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype in (np.int16, np.int32):
        scaled: NDArray[np.float64] = array.astype(np.float64) / 2.0 ** (8 * array.dtype.itemsize - 1)
        return scaled
    if array.dtype == np.uint8:
        return (array.astype(np.float64) - 128.0) / 128.0
    if array.dtype.kind == "f":
        return array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    raise ValueError(f"audio of type {array.dtype}: give float samples, or PCM as int16, int32 or uint8")
