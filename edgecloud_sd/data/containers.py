"""Checks that an audio file was not cut off: it has all the bytes that it promises.

libsndfile reads a file that was cut off without an error. Each container gives its length in its own way.

- wav, RF64, W64, AIFF, CAF and SVX: the size of the audio chunk.
- AU, NIST, and MP3 with a Xing or VBRI tag: a field of the header.
- Ogg: a mark on the last page of each stream.
- MP3 without a tag: no length, but its last frame must be whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

CUT = "the file is shorter than its header says"
STREAMED_SIZE = 0x7FFFF000  # a writer to a pipe, which does not know the length, writes this size or a larger one
BITRATES = {  # kbit/s by (MPEG version 1, layer), then by the index in the header, from 1 on
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = (44_100, 48_000, 32_000)  # Hz of MPEG 1; MPEG 2 has the half, and MPEG 2.5 the quarter
FOREIGN = {  # formats that libsndfile does not read, by the bytes at their beginning
    "MP4 or M4A": re.compile(rb"....ftyp", re.DOTALL),
    "WebM or Matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "AAC": re.compile(rb"\xff[\xf0\xf1\xf8\xf9]|ADIF"),
    "WMA": re.compile(rb"\x30\x26\xb2\x75"),
    "AMR": re.compile(rb"#!AMR"),
    "FLV": re.compile(rb"FLV\x01"),
    "WavPack": re.compile(rb"wvpk"),
    "Monkey's Audio": re.compile(rb"MAC "),
}
FOREIGN_SUFFIXES = (".m4a", ".mp4", ".mov", ".3gp", ".aac", ".webm", ".mkv", ".wma", ".amr", ".ape", ".wv")


class Bytes(Protocol):
    """The bytes of a file, in memory or mapped."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...
    def find(self, part: bytes, start: int, end: int, /) -> int:
        """Return the first place of a part, or -1."""


def find_cut(content: Bytes, container: str) -> str | None:
    """Return why a file is not whole, or None if it is. `container` is libsndfile's name of a format in `CHECKS`.

    libsndfile skips an ID3 tag in front of every container, so the checks do not see it.
    """
    start = _skip_id3(content)
    return CUT if CHECKS[container](content[start:] if start else content) else None


def find_foreign_format(content: Bytes) -> str | None:
    """Return the name of a format that libsndfile does not read, or None."""
    start = _skip_id3(content)
    return next((name for name, pattern in FOREIGN.items() if pattern.match(content[start : start + 16])), None)


def _number(content: Bytes, start: int, size: int = 4, is_big: bool = False) -> int:
    return int.from_bytes(content[start : start + size], "big" if is_big else "little")


def _is_chunk_cut(content: Bytes, chunks: Iterator[tuple[bytes, int, int]], wanted: bytes) -> bool:
    """Return whether the chunk `wanted` is cut off or missing. Each chunk has a name, a start and a size."""
    for name, start, size in chunks:
        if name == wanted:
            return start + size > len(content)
    return True


def _riff_chunks(content: Bytes, is_big: bool) -> Iterator[tuple[bytes, int, int]]:
    """Yield the chunks of RIFF and IFF files. The sizes of RF64 are in its first chunk."""
    start, long_size = 12, None
    while start + 8 <= len(content):
        name, size = content[start : start + 4], _number(content, start + 4, is_big=is_big)
        if name == b"ds64":
            long_size = _number(content, start + 16, 8)
        if name == b"data" and size == 0xFFFFFFFF and long_size is not None:
            size = 0 if long_size == 2**64 - 1 else long_size
        elif name in (b"data", b"SSND", b"BODY") and size >= STREAMED_SIZE:
            size = 0
        yield name, start + 8, size
        start += 8 + size + size % 2


def _is_riff_cut(content: Bytes) -> bool:
    return _is_chunk_cut(content, _riff_chunks(content, content[:4] == b"RIFX"), b"data")


def _is_aiff_cut(content: Bytes) -> bool:
    return _is_chunk_cut(content, _riff_chunks(content, True), b"SSND")


def _is_svx_cut(content: Bytes) -> bool:
    return _is_chunk_cut(content, _riff_chunks(content, True), b"BODY")


def _is_w64_cut(content: Bytes) -> bool:
    def chunks() -> Iterator[tuple[bytes, int, int]]:
        start = 40
        while start + 24 <= len(content):
            size = max(_number(content, start + 16, 8), 24)  # the whole chunk
            yield content[start : start + 4], start + 24, size - 24
            start += size + -size % 8

    return _is_chunk_cut(content, chunks(), b"data")


def _is_caf_cut(content: Bytes) -> bool:
    def chunks() -> Iterator[tuple[bytes, int, int]]:
        start = 8
        while start + 12 <= len(content):
            size = _number(content, start + 4, 8, is_big=True)
            yield content[start : start + 4], start + 12, 0 if size == 2**64 - 1 else size  # -1 is not known
            start += 12 + size

    return _is_chunk_cut(content, chunks(), b"data")


def _is_au_cut(content: Bytes) -> bool:
    is_big = content[:4] == b".snd"
    header, size = _number(content, 4, is_big=is_big), _number(content, 8, is_big=is_big)
    return size < STREAMED_SIZE and header + size > len(content)


def _is_nist_cut(content: Bytes) -> bool:
    header = re.match(rb"NIST_1A\s+(\d+)", content[:32])
    fields = dict(re.findall(rb"^(\w+) -i (\d+)", content[:1024], re.MULTILINE))
    width, channels = (int(fields.get(name, 1)) for name in (b"sample_n_bytes", b"channel_count"))
    size = int(fields.get(b"sample_count", 0)) * width * channels
    return header is not None and int(header[1]) + size > len(content)


def _is_ogg_cut(content: Bytes) -> bool:
    """Return whether a page is cut off, or some stream has no page that ends it."""
    has_ended: dict[bytes, bool] = {}
    start = 0
    while content[start : start + 4] == b"OggS":
        segments = content[start + 27 : start + 27 + _number(content, start + 26, 1)]
        end = start + 27 + _number(content, start + 26, 1) + sum(segments)
        if end > len(content):
            return True
        serial = content[start + 14 : start + 18]
        has_ended[serial] = bool(_number(content, start + 5, 1) & 4)
        start = content.find(b"OggS", end, len(content))
        if start < 0:
            break
    return not all(has_ended.values())


def _is_mp3_cut(content: Bytes) -> bool:
    """Return whether the last frame is cut off, or frames or bytes of the Xing or VBRI tag are missing."""
    start = _find_mp3_frame(content, 0)
    end = len(content) - (128 if content[-128:-125] == b"TAG" else 0)
    first, frames = start, 0
    while start < end and (length := _mp3_frame_length(content, start)):
        if start + length > end:
            return True
        start, frames = start + length, frames + 1
    if content[start : start + 1] == b"\xff" and 0 < end - start < 4:  # the beginning of a header
        return True
    promised_frames, promised_bytes = _mp3_promise(content, first)
    # encoders differ in what they count; both must be missing
    return frames - 1 < promised_frames and end - first < promised_bytes


def _skip_id3(content: Bytes) -> int:
    start = 0
    while content[start : start + 3] == b"ID3":
        size = 0
        for byte in content[start + 6 : start + 10]:
            size = size * 128 + byte
        start += 10 + size + (10 if _number(content, start + 5, 1) & 16 else 0)
    return start


def _find_mp3_frame(content: Bytes, start: int) -> int:
    """Return the place of the first frame that another one follows, because padding may come before it."""
    place = start
    while place >= 0:
        length = _mp3_frame_length(content, place)
        if length and (_mp3_frame_length(content, place + length) or place + length >= len(content)):
            return place
        place = content.find(b"\xff", place + 1, len(content))
    return start


def _mp3_frame_length(content: Bytes, start: int) -> int:
    """Return the bytes of the frame that begins at `start`, or 0 if none begins there or its header does not say."""
    header = _number(content, start, is_big=True)
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    bitrate, rate = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0
    is_first = version == 3
    hertz = MP3_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = BITRATES[is_first, layer][bitrate - 1] * 1000
    padding = header >> 9 & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4
    return (144 if is_first or layer == 2 else 72) * bits // hertz + padding


def _mp3_promise(content: Bytes, first: int) -> tuple[float, float]:
    """Return the frames and the bytes that the tag in the first frame promises, 0 without a tag."""
    place = max(content.find(name, first, first + 48) for name in (b"Xing", b"Info"))
    if place >= 0:
        flags = _number(content, place + 4, is_big=True)
        frames = _number(content, place + 8, is_big=True) if flags & 1 else 0
        after = place + (12 if flags & 1 else 8)
        return frames, _number(content, after, is_big=True) if flags & 2 else float("inf")
    if content[first + 36 : first + 40] == b"VBRI":
        return _number(content, first + 50, is_big=True), _number(content, first + 46, is_big=True)
    return 0, 0


CHECKS: Mapping[str, Callable[[Bytes], bool]] = {
    "WAV": _is_riff_cut,
    "WAVEX": _is_riff_cut,
    "RF64": _is_riff_cut,
    "W64": _is_w64_cut,
    "AIFF": _is_aiff_cut,
    "SVX": _is_svx_cut,
    "CAF": _is_caf_cut,
    "AU": _is_au_cut,
    "NIST": _is_nist_cut,
    "OGG": _is_ogg_cut,
    "MP3": _is_mp3_cut,
    "FLAC": lambda content: False,  # its decoder compares the samples with the header
}
