"""Audio files that are whole and audio files that were cut off, in every container that is read."""

from __future__ import annotations

import io
import struct
from functools import cache
from pathlib import Path

import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.data import containers
from edgecloud_sd.data.dataset import SAMPLE_RATE, BadClip, load_audio
from edgecloud_sd.pocket.clips import make_clip

# Container, codec, and the loss of samples that the codec allows
FORMATS = [
    *[
        ("WAV", codec, 0.06)
        for codec in ("PCM_16", "PCM_U8", "PCM_24", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")
    ],
    *[("WAV", codec, 0.06) for codec in ("G721_32", "NMS_ADPCM_16")],
    *[
        ("WAVEX", "PCM_16", 0),
        ("RF64", "PCM_16", 0),
        ("RF64", "ULAW", 0),
        ("W64", "PCM_24", 0),
        ("W64", "GSM610", 0.06),
    ],
    *[("AIFF", "PCM_16", 0), ("AIFF", "FLOAT", 0), ("AIFF", "IMA_ADPCM", 0.01), ("AIFF", "GSM610", 0.06)],
    *[("AU", "PCM_16", 0), ("AU", "G723_24", 0.01), ("CAF", "PCM_16", 0), ("CAF", "ALAC_16", 0), ("SVX", "PCM_16", 0)],
    *[("NIST", "PCM_16", 0), ("NIST", "ULAW", 0), ("FLAC", "PCM_16", 0), ("FLAC", "PCM_24", 0)],
    *[("OGG", "VORBIS", 0), ("OGG", "OPUS", 0), ("MP3", "MPEG_LAYER_III", 0.1)],
]
NAMES = [f"{container}-{codec}" for container, codec, _ in FORMATS]


@cache
def speech(container: str, codec: str, **options: object) -> bytes:
    """Return synthesised speech of about a second in a container."""
    file = io.BytesIO()
    samples = make_clip("train", 3).samples
    soundfile.write(file, samples, SAMPLE_RATE, codec, format=container, **options)
    return file.getvalue()


def load(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> int:
    """Return the samples of a file with this content."""
    path = tmp_path_factory.getbasetemp() / "clip"
    path.write_bytes(content)
    return len(load_audio(path))


@pytest.mark.slow
@pytest.mark.parametrize(("container", "codec", "loss"), FORMATS, ids=NAMES)
def test_whole_speech_is_read_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, container: str, codec: str, loss: float
) -> None:
    expected = len(make_clip("train", 3).samples)
    assert load(tmp_path_factory, speech(container, codec)) == pytest.approx(expected, rel=loss, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize(("container", "codec", "loss"), FORMATS, ids=NAMES)
@settings(max_examples=6)
@given(data=st.data())
def test_speech_that_was_cut_off_anywhere_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, container: str, codec: str, loss: float
) -> None:
    content = speech(container, codec)
    kept = data.draw(st.sampled_from([len(content) // 2, len(content) - 40]) | st.integers(0, len(content) - 2))
    with pytest.raises(BadClip, match=r"clip: (cannot be read as audio|contains no audio)") as error:
        load(tmp_path_factory, content[:kept])
    assert "\n" not in str(error.value)


ID3 = b"ID3\x04\x00\x00\x00\x00\x00\x05hello"


@pytest.mark.parametrize("container", [name for name in containers.CHECKS if name != "FLAC"])
def test_a_tag_in_front_of_any_container_changes_no_answer(container: str) -> None:
    content = speech(container, codec_of(container))
    assert containers.find_cut(ID3 + content, container) is None
    assert containers.find_cut(ID3 + content[: len(content) // 2], container) == containers.CUT


def test_a_wav_with_a_tag_in_front_is_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert load(tmp_path_factory, ID3 + speech("WAV", "PCM_16")) == len(make_clip("train", 3).samples)
    assert containers.find_foreign_format(ID3 + b"\xff\xf1\x50\x80") == "AAC"


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_half_an_mp3_is_refused_with_every_rate_of_bits(
    tmp_path_factory: pytest.TempPathFactory, mode: str, part: float
) -> None:
    content = speech("MP3", "MPEG_LAYER_III", bitrate_mode=mode)
    load(tmp_path_factory, content)
    load(tmp_path_factory, ID3 + content + b"TAG" + bytes(125))
    with pytest.raises(BadClip, match=containers.CUT):
        load(tmp_path_factory, content[: int(part * len(content))])
    padding = bytes(1000) + b"\xff\xfb"  # its end looks like the beginning of a frame
    assert containers.find_cut(padding + content, "MP3") is None
    assert containers.find_cut(padding + content[: int(part * len(content))], "MP3") == containers.CUT


def test_an_mp3_without_a_tag_must_end_with_a_whole_frame(tmp_path_factory: pytest.TempPathFactory) -> None:
    content = speech("MP3", "MPEG_LAYER_III")
    ends = [containers._mp3_frame_length(content, 0)]
    while ends[-1] < len(content):
        ends.append(ends[-1] + containers._mp3_frame_length(content, ends[-1]))
    frames = content[ends[0] :]
    assert load(tmp_path_factory, frames) > load(tmp_path_factory, frames[: ends[9] - ends[0]]) > 0
    for missing in (1, 2, 20, ends[-1] - ends[-2] - 1):
        with pytest.raises(BadClip, match=containers.CUT):
            load(tmp_path_factory, frames[:-missing])


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body


PCM = bytes(range(201)) * 8 + b"\x00" * 2
FMT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, SAMPLE_RATE, 1, 8))


@pytest.mark.parametrize(
    ("size", "chunks"),
    [
        (None, FMT + chunk(b"data", PCM)),
        (8, FMT + chunk(b"data", PCM)),  # 8 too large, because the writer counted the first 8 bytes
        (1, FMT + chunk(b"data", PCM + b"\x00")),  # the size has a pad byte that is missing
        (0, FMT + chunk(b"LIST", b"abc\x00") + chunk(b"data", PCM)),
        (200, FMT + chunk(b"data", PCM) + chunk(b"LIST", b"abc", 200)),  # a later chunk was cut off, not the audio
        (0xFFFF_0000, FMT + chunk(b"data", PCM, 0xFFFF_FFFF)),  # written to a pipe
    ],
    ids=["exact", "8 too large", "no pad", "another chunk", "cut after the audio", "streamed"],
)
def test_a_wav_whose_audio_is_whole_is_read(
    tmp_path_factory: pytest.TempPathFactory, size: int | None, chunks: bytes
) -> None:
    total = (4 + len(chunks) + (size or 0)) & 0xFFFF_FFFF
    content = b"RIFF" + struct.pack("<I", total) + b"WAVE" + chunks
    assert load(tmp_path_factory, content) == pytest.approx(len(PCM), abs=1)


def test_a_flac_stream_without_a_length_comes_with_the_command_that_converts_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = bytearray(speech("FLAC", "PCM_16"))
    content[21] &= 0xF0  # the count of samples in STREAMINFO: 36 bits
    content[22:26] = bytes(4)
    with pytest.raises(BadClip, match=r"a FLAC stream without a length.*; convert it: ffmpeg"):
        load(tmp_path_factory, bytes(content))


@pytest.mark.parametrize(("size", "is_whole"), [(2**64 - 1, True), (len(PCM), True), (len(PCM) + 1, False)])
def test_an_rf64_file_has_its_size_in_the_first_chunk(size: int, is_whole: bool) -> None:
    content = b"RF64\xff\xff\xff\xffWAVE" + chunk(b"ds64", struct.pack("<QQQI", size, size, size, 0)) + FMT
    cut = containers.find_cut(content + chunk(b"data", PCM, 0xFFFF_FFFF), "RF64")
    assert (cut is None) is is_whole


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_file_that_ends_with_a_whole_page_before_its_last_is_refused(
    tmp_path_factory: pytest.TempPathFactory, codec: str
) -> None:
    content = speech("OGG", codec)
    with pytest.raises(BadClip, match=containers.CUT):
        load(tmp_path_factory, content[: content.rfind(b"OggS")])


def test_chained_ogg_streams_are_whole_if_each_has_its_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    content = speech("OGG", "VORBIS")
    assert containers.find_cut(content * 2, "OGG") is None
    assert containers.find_cut(content + content[:-30], "OGG") == containers.CUT


@given(st.binary(max_size=300), st.sampled_from([*containers.CHECKS]), st.data())
def test_any_bytes_are_checked_without_an_error(content: bytes, container: str, data: st.DataObject) -> None:
    whole = speech("WAV", "PCM_16") if container in ("WAV", "WAVEX", "RF64") else speech(container, codec_of(container))
    start = data.draw(st.integers(0, 200))
    containers.find_cut(content, container)
    containers.find_cut(whole[:start] + content + whole[start + len(content) :], container)


def codec_of(container: str) -> str:
    return next((codec for known, codec, _ in FORMATS if known == container), "PCM_16")


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a b.m4a", b"\x00\x00\x00\x20ftypM4A ", "MP4 or M4A"),
        ("x.webm", b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
        ("x.aac", b"\xff\xf1\x50\x80", "AAC"),
        ("x.wav", b"\xff\xf9\x50\x80", "AAC"),
        ("x.amr", b"#!AMR\n", "AMR"),
        ("x.m4a", b"nothing known", "Format not recognised."),
    ],
)
def test_a_format_that_is_not_read_comes_with_the_command_that_converts_it(
    tmp_path: Path, name: str, start: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(start + bytes(500))
    with pytest.raises(BadClip) as error:
        load_audio(path)
    source = f"'{path}'" if " " in name else str(path)
    target = "'a b.wav'" if " " in name else "x.wav"
    expected = f"({kind}); convert it: ffmpeg -i {source} -ar 16000 -ac 1 {target}"
    assert str(error.value) == f"{path}: cannot be read as audio {expected}"


@pytest.mark.parametrize("container", ["VOC", "IRCAM", "PAF", "AVR", "MAT5"])
def test_a_container_that_cannot_be_checked_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, container: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(speech(container, "PCM_16"))
    with pytest.raises(BadClip, match=r"x: cannot be read as audio \(.*\); convert it: ffmpeg -i .*/x -ar 16000"):
        load_audio(path)
