"""Audio that can be read, and that is probably not what its user means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from edgecloud_sd.data import __main__
from edgecloud_sd.data.dataset import SAMPLE_RATE, BadClip, read_audio
from edgecloud_sd.pocket.clips import make_clip

SPEECH = make_clip("train", 3).samples.astype(np.float64)
LOUD = SPEECH / np.abs(SPEECH).max()


def stereo(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([left, right], axis=1)


DOUBTFUL = {
    "zeros": (np.zeros(8000), "is silent"),
    "a constant": (np.full(8000, 0.25), "is silent"),
    "a bit of dither": (np.tile([0, 1 / 32768], 4000), "is silent"),
    "inverted": (stereo(SPEECH, -SPEECH), "has channels that cancel each other"),
    "nearly inverted": (stereo(SPEECH, -0.9 * SPEECH), "has channels that cancel each other"),
    "inverted with an offset": (stereo(SPEECH + 0.1, 0.1 - SPEECH), "has channels that cancel each other"),
    "too large": (LOUD * 2.5, "reaches 2.5, beyond [-1, 1]"),
    "PCM that was not scaled": (LOUD * 32767, "reaches 32767, beyond [-1, 1]"),
    "clipped": (np.clip(LOUD * 4, -1, 1), "is clipped"),
}
GOOD = {
    "speech": SPEECH,
    "loud speech": LOUD * 0.99,
    "quiet speech": LOUD / 1000,
    "one channel": stereo(SPEECH, 0 * SPEECH),
    "two channels": stereo(SPEECH, SPEECH[::-1]),
}


def write(path: Path, samples: NDArray[np.float64], rate: int = SAMPLE_RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype)
    return path


@pytest.mark.parametrize("name", DOUBTFUL)
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_a_doubt_names_the_file(tmp_path: Path, name: str, rate: int) -> None:
    samples, doubt = DOUBTFUL[name]
    path = write(tmp_path / "a.wav", samples, rate)
    [text] = read_audio(path).doubts
    assert text.startswith(f"{path}: {doubt}")


@pytest.mark.parametrize("name", GOOD)
def test_usual_audio_raises_no_doubt(tmp_path: Path, name: str) -> None:
    assert read_audio(write(tmp_path / "a.wav", GOOD[name])).doubts == ()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 48_000])
@pytest.mark.parametrize("peak", [2e38, 3e38, 1e300])
def test_samples_on_which_arithmetic_is_not_finite_are_refused(
    tmp_path: Path, channels: int, rate: int, peak: float
) -> None:
    samples = np.tile(LOUD[:, None] * peak, (1, channels))
    path = write(tmp_path / "a.wav", samples, rate, "DOUBLE" if peak > 1e39 else "FLOAT")
    with pytest.raises(BadClip, match="not finite"):
        read_audio(path)


def test_the_check_command_shows_a_doubt_with_its_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.wav", DOUBTFUL["inverted"][0])
    entry = {"file_id": "one", "audio_path": "a.wav", "caption": "高兴"}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    __main__.main(["check", str(tmp_path), "--language", "chinese"])
    count, warning = capsys.readouterr().out.splitlines()
    assert count == "chinese: 1 clips can be used, 0 cannot"
    assert warning.startswith(f"  one: warning: {path}: has channels that cancel")
