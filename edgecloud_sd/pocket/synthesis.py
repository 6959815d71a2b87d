"""Synthetic emotional speech from a seed: a harmonic source through vowel formants, shaped by six attributes.

This is source-filter synthesis after G. Fant, Acoustic Theory of Speech Production (1960). The formants are rounded
values of an adult speaker. The speech has no intelligible words, only the acoustics that determine a caption.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd.data.dataset import SAMPLE_RATE
from edgecloud_sd.pocket.voices import Attributes

VOWELS = {  # the first three formants in Hz, by the letter in the transcription
    "a": (800, 1200, 2500),
    "e": (500, 1900, 2500),
    "i": (300, 2300, 3000),
    "o": (500, 900, 2400),
    "u": (320, 800, 2300),
}
BANDWIDTHS = (80.0, 110.0, 160.0)  # Hz

# One value per class, in the order of voices.WORDS. The classes are far apart, compared with the random spread within
# each, so that a small model can tell them apart.
PITCH_HZ = (100.0, 175.0, 290.0)
RANGE_SEMITONES = (0.2, 2.5, 7.0)
SYLLABLES_PER_S = (2.6, 5.0, 9.0)
LOUDNESS_RMS = (0.006, 0.03, 0.15)
TREMOR_DEPTH = (0.0, 1.0)
NOISE_SHARE = (0.55, 0.02, 0.08)
TILT_EXPONENT = (1.9, 1.2, 0.45)  # harmonic n has amplitude n ** -tilt
TREMOR_HZ = 12.0
TABLE_SIZE = 4096  # samples of one period in the lookup table
MAX_HARMONIC_HZ = 7600  # below the Nyquist frequency of 8 kHz


def synthesise(attributes: Attributes, rng: np.random.Generator) -> tuple[NDArray[np.float32], str]:
    """Return one clip of 1.0 to 1.4 s and its vowels as a transcription.

    The samples are mono float32 in [-1, 1) at `SAMPLE_RATE`.
    """
    n = 400 * int(rng.integers(40, 57))  # a multiple of 400 samples keeps the Fourier transforms fast
    t = np.arange(n) / SAMPLE_RATE
    jitter = rng.uniform(0.94, 1.06, size=3)
    tremor = TREMOR_DEPTH[attributes.tremor] * np.sin(2 * np.pi * TREMOR_HZ * t + rng.uniform(0, 2 * np.pi))

    contour = np.sin(2 * np.pi * rng.uniform(1.2, 1.8) * t + rng.uniform(0, 2 * np.pi)) - 0.3 * t
    semitones = RANGE_SEMITONES[attributes.range] * contour
    f0 = PITCH_HZ[attributes.pitch] * jitter[0] * 2 ** (semitones / 12) * (1 + 0.05 * tremor)
    source = _harmonic_source(f0, TILT_EXPONENT[attributes.voice])
    share = NOISE_SHARE[attributes.voice]
    source = (1 - share) * source / np.std(source) + share * rng.standard_normal(n)

    period = 1 / (SYLLABLES_PER_S[attributes.rate] * jitter[1])
    phase = (t + rng.uniform(0, period)) / period
    index = phase.astype(int)
    letters = rng.choice(list(VOWELS), size=index[-1] + 1)
    envelope = 0.02 + np.clip(np.sin(np.pi * (phase - index)), 0, None) ** 1.5
    envelope *= 1 + 0.5 * tremor

    spectrum = np.fft.rfft(source)
    voiced = np.zeros(n)
    for letter in np.unique(letters):
        mask = letters[index] == letter
        voiced[mask] = np.fft.irfft(spectrum * _formant_response(n, VOWELS[letter]), n)[mask]
    speech = voiced * envelope
    speech *= LOUDNESS_RMS[attributes.loudness] * jitter[2] / np.sqrt(np.mean(speech**2))
    speech += 2e-4 * rng.standard_normal(n)  # background noise of a room
    pcm = np.round(np.clip(speech, -0.999, 0.999) * 32767)  # the resolution of a 16-bit wav file
    return (pcm / 32768).astype(np.float32), "".join(letters)


def _harmonic_source(f0: NDArray[np.float64], tilt: float) -> NDArray[np.float64]:
    """Return a harmonic tone with the fundamental `f0` [n] in Hz, from a table of one band-limited period."""
    harmonics = np.arange(1, max(2, int(MAX_HARMONIC_HZ / f0.max())))
    spectrum = np.zeros(TABLE_SIZE // 2 + 1, dtype=complex)
    spectrum[harmonics] = harmonics**-tilt * np.exp(-0.5j * np.pi)
    table = np.fft.irfft(spectrum, TABLE_SIZE)
    cycles = np.cumsum(f0) / SAMPLE_RATE
    tone: NDArray[np.float64] = table[((cycles % 1) * TABLE_SIZE).astype(int)]
    return tone


def _formant_response(n: int, formants: tuple[int, ...]) -> NDArray[np.complex128]:
    """Return the response [n // 2 + 1] of second-order resonators in series, each with a gain of 1 at 0 Hz."""
    s = 2j * np.pi * np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    response = np.ones(len(s), dtype=complex)
    for centre, bandwidth in zip(formants, BANDWIDTHS, strict=True):
        pole = -np.pi * bandwidth + 2j * np.pi * centre
        response *= abs(pole) ** 2 / ((s - pole) * (s - np.conj(pole)))
    return response
