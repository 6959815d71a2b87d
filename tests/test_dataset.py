"""Audio files and manifests: the ones that load, and the error for each kind that does not."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecloud_sd.data import __main__, dataset
from edgecloud_sd.data.dataset import SAMPLE_RATE, BadClip, SkippedClip, load_audio, load_manifest
from edgecloud_sd.data.secap import import_secap
from edgecloud_sd.host.files import write_whole
from edgecloud_sd.pocket.clips import manifest_path

Samples = NDArray[np.float64]
SECONDS = 0.5
HERTZ = 440.0


def tone(rate: int, channels: int = 1, hertz: float = HERTZ, seconds: float = SECONDS) -> Samples:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave] * channels, axis=1)


def write_audio(
    path: Path,
    samples: Samples | None = None,
    rate: int = SAMPLE_RATE,
    subtype: str | None = None,
    format: str | None = None,
) -> Path:
    soundfile.write(path, tone(rate) if samples is None else samples, rate, subtype, format=format)
    return path


def cut_file(path: Path, part: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    return path


def loudest_frequency(samples: NDArray[np.float32]) -> float:
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax()) * SAMPLE_RATE / len(samples)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_of_any_rate_becomes_mono_at_16_khz(tmp_path: Path, rate: int, channels: int) -> None:
    samples = load_audio(write_audio(tmp_path / "a.wav", tone(rate, channels), rate))
    assert samples.dtype == np.float32
    assert samples.shape == pytest.approx((SECONDS * SAMPLE_RATE,), abs=1)
    assert loudest_frequency(samples) == pytest.approx(HERTZ, abs=4)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("a.wav", "WAV", "PCM_16"),
        ("a.wav", "WAV", "PCM_24"),
        ("a.wav", "WAV", "PCM_32"),
        ("a.wav", "WAV", "FLOAT"),
        ("a.wav", "WAV", "DOUBLE"),
        ("a.wav", "WAVEX", "PCM_16"),
        ("a.wav", "WAVEX", "FLOAT"),
        ("a.flac", "FLAC", "PCM_16"),
        ("a.flac", "FLAC", "PCM_24"),
        ("misnamed.wav", "FLAC", "PCM_16"),
        ("no_extension", "WAV", "PCM_16"),
    ],
)
def test_a_lossless_format_keeps_the_samples(tmp_path: Path, name: str, format: str, subtype: str) -> None:
    path = write_audio(tmp_path / name, format=format, subtype=subtype)
    np.testing.assert_allclose(load_audio(path), tone(SAMPLE_RATE)[:, 0], atol=1 / 32768)


def test_the_wavex_cases_write_wave_format_extensible(tmp_path: Path) -> None:
    header = write_audio(tmp_path / "a.wav", format="WAVEX").read_bytes()
    assert header[20:22] == b"\xfe\xff"


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("name", ["a.mp3", "a.ogg"])
def test_a_lossy_format_keeps_length_and_pitch(tmp_path: Path, name: str, rate: int) -> None:
    samples = load_audio(write_audio(tmp_path / name, tone(rate, channels=2), rate))
    assert len(samples) / SAMPLE_RATE == pytest.approx(SECONDS, abs=0.1)  # a codec pads by a frame or two
    assert loudest_frequency(samples) == pytest.approx(HERTZ, abs=4)


def test_16_bit_samples_are_divided_by_full_scale(tmp_path: Path) -> None:
    levels = np.array([-32768, -1, 0, 1, 32767], np.int16)
    soundfile.write(tmp_path / "a.wav", levels, SAMPLE_RATE)
    assert load_audio(tmp_path / "a.wav").tolist() == [level / 32768 for level in levels.tolist()]


def test_channels_are_averaged(tmp_path: Path) -> None:
    left_and_right = np.tile([0.75, 0.25], (1000, 1))
    samples = load_audio(write_audio(tmp_path / "a.wav", left_and_right, subtype="FLOAT"))
    assert np.unique(samples).tolist() == [0.5]


def test_resampling_removes_tones_above_the_new_band(tmp_path: Path) -> None:
    samples = load_audio(write_audio(tmp_path / "a.wav", tone(48_000, hertz=11_000), 48_000))
    assert np.abs(samples[1000:-1000]).max() < 0.01


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.wav", b""),
        ("text.wav", b"this is no audio\n" * 100),
        ("text.flac", b"this is no audio\n" * 100),
        ("text.mp3", b"this is no audio\n" * 100),
        ("cut.wav", b"RIFF\x24\x00\x00\x00WAVE"),
        ("headerless.raw", b"\x00" * 3200),
    ],
)
def test_a_file_that_is_not_audio_is_refused_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadClip) as error:
        load_audio(path)
    assert str(error.value).startswith(f"{path}: cannot be read as audio")


@pytest.mark.parametrize("name", ["nothing.wav", "n" * 300 + ".wav", "."])
def test_a_missing_audio_file_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadClip) as error:
        load_audio(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize(("samples", "rate"), [(0, 16_000), (0, 48_000), (1, 48_000)])
def test_audio_without_samples_is_refused(tmp_path: Path, samples: int, rate: int) -> None:
    path = write_audio(tmp_path / "a.wav", np.zeros((samples, 1)), rate)
    with pytest.raises(BadClip, match="contains no audio") as error:
        load_audio(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("bad", [(np.nan, np.nan), (np.inf, np.inf), (0.0, np.nan), (np.inf, -np.inf)], ids=str)
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, bad: tuple[float, float]) -> None:
    samples = tone(SAMPLE_RATE, channels=2)
    samples[100] = bad
    path = write_audio(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(BadClip, match="not finite") as error:
        load_audio(path)
    assert str(path) in str(error.value)


def test_a_header_that_promises_more_than_the_memory_is_refused(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.flac")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the count of samples in STREAMINFO: 36 bits, all set
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(BadClip) as error:
        load_audio(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.flac", "a.ogg"])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, name: str, part: float) -> None:
    path = cut_file(write_audio(tmp_path / name), part)
    with pytest.raises(BadClip) as error:
        load_audio(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("part", [0.5, 0.99])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_a_truncated_wav_file_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    path = cut_file(write_audio(tmp_path / "a.wav", format=kind), part)
    with pytest.raises(BadClip, match="shorter than its header says"):
        load_audio(path)


@pytest.mark.parametrize("size", [0, 0x7FFFF024, 0xFFFFFFFF])
def test_a_streamed_wav_file_without_a_length_is_read(tmp_path: Path, size: int) -> None:
    path = write_audio(tmp_path / "a.wav")
    content = bytearray(path.read_bytes())
    content[4:8] = size.to_bytes(4, "little")
    path.write_bytes(content)
    assert len(load_audio(path)) == SECONDS * SAMPLE_RATE


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "MP3"])
def test_a_truncated_file_never_gives_more_samples_than_it_has(tmp_path: Path, kind: str, part: float) -> None:
    path = cut_file(write_audio(tmp_path / "a.wav", format=kind), part)
    try:
        length = len(load_audio(path))
    except BadClip as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert 0 < length <= part * SECONDS * SAMPLE_RATE


def entry(**changes: Any) -> dict[str, Any]:
    """Return a good entry with changes; a field changed to ... is left out."""
    good = {
        "file_id": "one",
        "dataset": "made",
        "audio_path": "wav/a.wav",
        "caption": "他很高兴 happy",
        "transcription": "今天天气真好",
        "chinese_caption": "他很高兴",
        "english_caption": "He is happy",
        "chinese_transcription": "今天天气真好",
        "english_transcription": "What fine weather",
        "index": 7,
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one good clip, wav/a.wav, and a text file named wav/bad.wav."""
    (tmp_path / "wav").mkdir()
    write_audio(tmp_path / "wav" / "a.wav")
    (tmp_path / "wav" / "bad.wav").write_text("no audio")
    return tmp_path


def write_manifest(folder: Path, *entries: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


def test_an_entry_becomes_a_clip(folder: Path) -> None:
    [clip], skipped = load_manifest(write_manifest(folder, entry()), "chinese", "audio_only")
    assert (clip.file_id, clip.dataset, clip.language, clip.index) == ("one", "made", "chinese", 7)
    assert clip.references == ("他很高兴",)
    assert skipped == []


def test_optional_fields_may_be_missing(folder: Path) -> None:
    path = write_manifest(folder, {"file_id": "a", "audio_path": "wav/a.wav", "caption": "高兴"})
    [clip], _ = load_manifest(path, "chinese", "original")
    assert (clip.dataset, clip.index, clip.transcription) == ("", 0, None)


def test_audio_paths_are_relative_to_the_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(folder, entry())
    monkeypatch.chdir(folder / "wav")
    [clip], _ = load_manifest(Path("../manifest.json"), "chinese")
    assert clip.audio_path.resolve() == (folder / "wav" / "a.wav").resolve()


@pytest.mark.parametrize("place", ["manifest.json", "data/processed/made/manifest.json"])
def test_an_audio_path_may_begin_in_a_folder_above_the_manifest(folder: Path, place: str) -> None:
    manifest = folder / place
    manifest.parent.mkdir(parents=True, exist_ok=True)
    (folder / "wav" / "a.wav").rename(manifest.parent / "a.wav")
    name = str((manifest.parent / "a.wav").relative_to(folder))
    [clip], _ = load_manifest(write_manifest(manifest.parent, entry(audio_path=name)), "chinese")
    assert clip.audio_path == manifest.parent / "a.wav"


def test_an_audio_file_beside_the_manifest_comes_before_one_above(folder: Path) -> None:
    below = folder / "made"
    (below / "wav").mkdir(parents=True)
    write_audio(below / "wav" / "a.wav")
    [clip], _ = load_manifest(write_manifest(below, entry()), "chinese")
    assert clip.audio_path == below / "wav" / "a.wav"


def test_an_audio_file_in_no_folder_is_refused_with_the_folders(folder: Path) -> None:
    below = folder / "made"
    below.mkdir()
    with pytest.raises(BadClip) as error:
        load_manifest(write_manifest(below, entry(audio_path="wav/none.wav")), "chinese")
    expected = (
        f"{below / 'wav' / 'none.wav'}: no such audio file there, and no wav/none.wav in {folder}, {folder.parent}, "
    )
    assert str(error.value).startswith(expected)
    with pytest.raises(BadClip, match=r"none\.wav: no such audio file$"):
        load_manifest(write_manifest(below, entry(audio_path=f"{below}/none.wav")), "chinese")


def test_audio_may_have_an_absolute_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write_manifest(tmp_path_factory.mktemp("elsewhere"), entry(audio_path=str(folder / "wav" / "a.wav")))
    [clip], _ = load_manifest(elsewhere, "chinese")
    assert clip.audio_path == folder / "wav" / "a.wav"


@pytest.mark.parametrize(
    ("language", "caption_type", "reference", "transcription"),
    [
        ("chinese", "audio_only", "他很高兴", "今天天气真好"),
        ("english", "audio_only", "He is happy", "What fine weather"),
        ("chinese", "original", "他很高兴 happy", "今天天气真好"),
        ("english", "original", "他很高兴 happy", "What fine weather"),
    ],
)
def test_caption_type_chooses_the_reference_and_the_transcription_is_asked_for(
    folder: Path, language: str, caption_type: str, reference: str, transcription: str
) -> None:
    path = write_manifest(folder, entry())
    [clip], _ = load_manifest(path, language, caption_type)
    assert (clip.references, clip.transcription) == ((reference,), None)
    [clip], _ = load_manifest(path, language, caption_type, with_transcription=True)
    assert (clip.references, clip.transcription) == ((reference,), transcription)


@pytest.mark.parametrize("missing", [..., None, "", "  "])
def test_the_common_transcription_replaces_a_missing_one(folder: Path, missing: object) -> None:
    path = write_manifest(folder, entry(chinese_transcription=missing, transcription="原文"))
    [clip], _ = load_manifest(path, "chinese", with_transcription=True)
    assert clip.transcription == "原文"


def test_a_caption_may_be_a_list_of_references(folder: Path) -> None:
    path = write_manifest(folder, entry(chinese_caption=["他很高兴", "  他笑了 ", ""]))
    [clip], _ = load_manifest(path, "chinese", "audio_only")
    assert clip.references == ("他很高兴", "他笑了")


def test_clips_keep_their_order_and_limit_takes_the_first(folder: Path) -> None:
    path = write_manifest(folder, *(entry(file_id=name) for name in "zayb"))
    assert [clip.file_id for clip in load_manifest(path, "chinese")[0]] == list("zayb")
    assert [clip.file_id for clip in load_manifest(path, "chinese", limit=2)[0]] == list("za")


def test_entries_after_the_limit_are_not_read(folder: Path) -> None:
    path = write_manifest(folder, entry(), entry(file_id="two", audio_path="wav/bad.wav"))
    clips, skipped = load_manifest(path, "chinese", limit=1)
    assert (len(clips), skipped) == (1, [])


def test_limit_counts_usable_clips_only(folder: Path) -> None:
    bad = [entry(file_id=f"bad{i}", audio_path="wav/bad.wav") for i in range(2)]
    path = write_manifest(folder, *bad, *(entry(file_id=name) for name in "abc"))
    clips, skipped = load_manifest(path, "chinese", on_bad_clip="skip", limit=2)
    assert [clip.file_id for clip in clips] == ["a", "b"]
    assert [clip.file_id for clip in skipped] == ["bad0", "bad1"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not JSON"),
        (b"[{", "is not JSON"),
        (b'[{"file_id": "a",}]', "is not JSON"),
        (b"\xff\xfe[]", "is not JSON"),
        (b"{}", "must be a JSON list of clips, not dict"),
        (b'"clips"', "must be a JSON list of clips, not str"),
        (b"null", "must be a JSON list of clips, not NoneType"),
        (b"[]", "contains no usable clip"),
        pytest.param(b"[" * 100_000, "is not JSON", id="deep"),
        pytest.param(b"[%s]" % (b"1" * 5000), "is not JSON", id="digits"),  # more than int() takes
    ],
)
def test_a_file_that_is_not_a_list_of_clips_is_refused_even_with_skip(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese", on_bad_clip="skip")
    assert str(error.value).startswith(f"{path}: {complaint}")


@pytest.mark.parametrize("value", ["one", 1, None, ["one"]], ids=str)
def test_an_entry_that_is_not_an_object_is_refused(folder: Path, value: object) -> None:
    path = write_manifest(folder, entry(), value)
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value) == f"{path}, entry 1: must be an object, not {type(value).__name__}"


@pytest.mark.parametrize("field", ["file_id", "audio_path"])
@pytest.mark.parametrize("value", [..., None, "", " \t", 5, ["wav/a.wav"], {}], ids=str)
def test_a_required_field_that_is_not_a_text_is_refused(folder: Path, field: str, value: object) -> None:
    path = write_manifest(folder, entry(**{field: value}))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    shown = None if value is ... else value
    assert str(error.value) == f"{path}, entry 0, {field}: must be a text that is not empty, not {shown!r}"


@pytest.mark.parametrize("field", ["file_id", "audio_path"])
@pytest.mark.parametrize("value", ["a\nb", "a\x1b[31m", "a\0", "a\u2028b"], ids=ascii)
def test_a_name_with_control_characters_is_refused(folder: Path, field: str, value: str) -> None:
    path = write_manifest(folder, entry(**{field: value}))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    problem = "must be a text without line breaks and control characters"
    assert str(error.value) == f"{path}, entry 0, {field}: {problem}, not {value!r}"


@pytest.mark.parametrize("value", ["\ud800", "a\nb", ["a"], 3, ""], ids=ascii)
def test_a_skipped_clip_without_a_usable_id_has_its_place_for_a_name(folder: Path, value: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps([entry(file_id=value), entry(file_id="b")]), encoding="ascii")
    _, skipped = load_manifest(path, "chinese", on_bad_clip="skip")
    assert [clip.file_id for clip in skipped] == ["entry 0"]
    skipped[0].reason.encode()  # it can be written to a file


@pytest.mark.parametrize("with_transcription", [True, False])  # a check of the manifest agrees with every run
@pytest.mark.parametrize("field", ["dataset", "transcription", "chinese_transcription"])
def test_an_optional_field_of_the_wrong_type_is_refused(folder: Path, field: str, with_transcription: bool) -> None:
    path = write_manifest(folder, entry(chinese_transcription=None) | {field: 5})
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese", with_transcription=with_transcription)
    assert f"{path}, entry 0, {field}: " in str(error.value)
    assert "not 5" in str(error.value)


@pytest.mark.parametrize("value", ["7", 7.5, True, [7]], ids=str)
def test_an_index_that_is_not_a_whole_number_is_refused(folder: Path, value: object) -> None:
    path = write_manifest(folder, entry(index=value))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value) == f"{path}, one, index: must be a whole number, not {value!r}"


@pytest.mark.parametrize("value", [5, {"text": "高兴"}, ["高兴", 5], True], ids=str)
@pytest.mark.parametrize(("caption_type", "field"), [("audio_only", "chinese_caption"), ("original", "caption")])
def test_a_caption_of_the_wrong_type_is_refused(folder: Path, value: object, caption_type: str, field: str) -> None:
    path = write_manifest(folder, entry(**{field: value}))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese", caption_type)
    assert str(error.value) == f"{path}, one, {field}: must be a text or a list of texts, not {value!r}"


@pytest.mark.parametrize("value", [..., None])
def test_a_clip_without_a_caption_in_the_language_is_refused(folder: Path, value: object) -> None:
    path = write_manifest(folder, entry(english_caption=value))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "english", "audio_only")
    assert f"{path}, one, english_caption: is missing, so the clip has no english caption" in str(error.value)
    assert "--language" in str(error.value)


@pytest.mark.parametrize("value", ["", "  ", [], ["", " "]], ids=str)
def test_an_empty_caption_is_refused(folder: Path, value: object) -> None:
    path = write_manifest(folder, entry(chinese_caption=value))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese", "audio_only")
    assert f"{path}, one, chinese_caption: is empty" in str(error.value)


def test_a_manifest_may_have_one_clip_a_line(folder: Path) -> None:
    path = folder / "manifest.jsonl"
    lines = [json.dumps(entry(file_id=name, chinese_caption="高\u2028兴"), ensure_ascii=False) for name in "ab"]
    path.write_text("\r\n\r\n".join(lines) + "\n", encoding="utf-8-sig")
    assert manifest_path(folder, "chinese") == path
    clips, _ = load_manifest(path, "chinese", "audio_only")
    assert [(clip.file_id, clip.references) for clip in clips] == [("a", ("高\u2028兴",)), ("b", ("高\u2028兴",))]
    path.write_text(f"{json.dumps(entry())}\n\n{json.dumps(entry(index='x', file_id=''))}\n")
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value).startswith(f"{path}, line 3, file_id: ")


@pytest.mark.parametrize("field", ["file_id", "audio_path", "chinese_caption", "notes"])
def test_half_a_character_is_refused_when_the_manifest_is_loaded(folder: Path, field: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps([entry(file_id="zero"), entry(**{field: "高\ud800"})]), encoding="utf-8")
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value).startswith(f"{path}, entry 1, {field}: has U+D800, half of a character, at 1")
    clips, skipped = load_manifest(path, "chinese", on_bad_clip="skip")
    assert (len(clips), len(skipped)) == (1, 1)


def test_a_reference_without_visible_text_is_no_reference(folder: Path) -> None:
    [clip], _ = load_manifest(
        write_manifest(folder, entry(chinese_caption=["\u200b", "高兴", "\ufe0f"])), "chinese", "audio_only"
    )
    assert clip.references == ("高兴",)
    with pytest.raises(BadClip, match="chinese_caption: is empty"):
        load_manifest(write_manifest(folder, entry(chinese_caption="\u200b\x00")), "chinese", "audio_only")


def test_a_file_id_that_occurs_twice_is_refused(folder: Path) -> None:
    path = write_manifest(folder, entry(), entry(file_id="two"), entry())
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value) == f"{path}, entry 2, file_id: 'one' occurs twice"


@pytest.mark.parametrize("name", ["wav/bad.wav", "wav/none.wav", "wav", "n" * 300])
def test_an_entry_with_unreadable_audio_is_refused(folder: Path, name: str) -> None:
    path = write_manifest(folder, entry(audio_path=name))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert str(error.value).startswith(f"{folder / name}: ")


def test_a_clip_that_is_too_short_is_refused(folder: Path) -> None:
    path = write_manifest(folder, entry())
    shortest = round(dataset.MIN_CLIP_SECONDS * SAMPLE_RATE)
    write_audio(folder / "wav" / "a.wav", np.zeros((shortest, 1)))
    assert len(load_manifest(path, "chinese")[0]) == 1
    write_audio(folder / "wav" / "a.wav", np.zeros((shortest - 80, 1)))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese")
    assert f"{folder / 'wav' / 'a.wav'}: lasts 0.020 s" in str(error.value)
    assert "0.025 to 300 s" in str(error.value)


def test_a_clip_that_is_too_long_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_CLIP_SECONDS", 0.25)
    with pytest.raises(BadClip) as error:
        load_manifest(write_manifest(folder, entry()), "chinese")
    assert f"{folder / 'wav' / 'a.wav'}: lasts 0.500 s" in str(error.value)


def test_skip_lists_every_bad_clip_with_its_reason(folder: Path) -> None:
    path = write_manifest(
        folder,
        entry(file_id="unread", audio_path="wav/bad.wav"),
        "no object",
        entry(file_id=None),
        entry(file_id="good"),
        entry(file_id="good"),
        entry(file_id="mute", chinese_caption=None),
    )
    clips, skipped = load_manifest(path, "chinese", "audio_only", on_bad_clip="skip")
    assert [clip.file_id for clip in clips] == ["good"]
    assert [clip.file_id for clip in skipped] == ["unread", "entry 1", "entry 2", "good", "mute"]
    reasons = ["cannot be read", "must be an object", "file_id", "occurs twice", "the clip has no chinese caption"]
    assert [reason in clip.reason for reason, clip in zip(reasons, skipped, strict=True)] == [True] * 5
    assert SkippedClip("entry 1", f"{path}, entry 1: must be an object, not str") in skipped


def test_a_manifest_without_a_usable_clip_is_refused_even_with_skip(folder: Path) -> None:
    path = write_manifest(folder, entry(audio_path="wav/none.wav"), entry(file_id="two", audio_path="wav/bad.wav"))
    with pytest.raises(BadClip) as error:
        load_manifest(path, "chinese", on_bad_clip="skip")
    assert str(error.value).startswith(f"{path}: contains no usable clip; the first: {folder / 'wav' / 'none.wav'}: ")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(scalars, lambda some: st.lists(some) | st.dictionaries(st.text(), some), max_leaves=4)


@settings(max_examples=20)
@given(changes=st.dictionaries(st.sampled_from(sorted(entry())), anything), more=anything)
def test_a_manifest_of_any_json_is_read_or_refused_with_its_path(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object], more: object
) -> None:
    base = tmp_path_factory.getbasetemp() / "any"
    if not base.exists():
        (base / "wav").mkdir(parents=True)
        write_audio(base / "wav" / "a.wav", np.zeros((800, 1)))
    path = write_manifest(base, entry(**changes), more)
    try:
        clips, _ = load_manifest(path, "chinese", "original", limit=1)
    except BadClip as error:
        assert str(base) in str(error)  # noqa: PT017
    else:
        assert [clip.audio_path for clip in clips] == [base / "wav" / "a.wav"]


def test_the_path_of_a_manifest_file_is_the_file(folder: Path) -> None:
    path = write_manifest(folder, entry())
    assert manifest_path(str(path), "chinese") == path


def test_the_path_of_a_folder_is_its_manifest(folder: Path) -> None:
    path = write_manifest(folder, entry())
    assert manifest_path(folder, "english") == path


@pytest.mark.parametrize(("names", "expected"), [(["english", "chinese"], "english"), (["english", ""], "")], ids=str)
def test_a_folder_without_a_common_manifest_may_have_one_per_language(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    paths = {name: tmp_path / f"manifest{'_' if name else ''}{name}.json" for name in names}
    for path in paths.values():
        path.write_text("[]", encoding="utf-8")
    assert manifest_path(tmp_path, "english") == paths[expected]


def test_a_folder_without_a_manifest_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadClip) as error:
        manifest_path(tmp_path, "chinese")
    assert str(error.value) == f"{tmp_path}: contains no manifest.json or manifest.jsonl"


def test_a_folder_in_secaps_layout_gets_a_hint(secap: Path) -> None:
    with pytest.raises(BadClip) as error:
        manifest_path(secap, "chinese")
    assert str(error.value).startswith(f"{secap}: contains no manifest.json")
    assert "python -m edgecloud_sd.data secap" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "Pocket", "nowhere/manifest.json"])
def test_an_unknown_data_set_is_refused_with_the_alternatives(name: str) -> None:
    with pytest.raises(BadClip) as error:
        manifest_path(name, "chinese")
    assert str(error.value).startswith(f"{name}: no such manifest; ")
    assert "'pocket'" in str(error.value)


@pytest.mark.parametrize("language", ["chinese", "english"])
def test_pocket_names_the_evaluation_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str) -> None:
    monkeypatch.setattr("edgecloud_sd.pocket.clips.evaluation_set", lambda: tmp_path)
    assert manifest_path("pocket", language).parent == tmp_path
    assert language in manifest_path("pocket", language).name


@pytest.fixture
def secap(tmp_path: Path) -> Path:
    """Return a folder with two clips in SECap's published layout."""
    folder = tmp_path / "secap"
    (folder / "wav").mkdir(parents=True)
    captions = {"tx_02": "语气平静", "tx_01": "声音发抖，十分害怕"}
    (folder / "fid2captions.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    (folder / "text.txt").write_text("tx_01 别过来\n\ntx_02  今天 下雨\n", encoding="utf-8")
    for name in captions:
        write_audio(folder / "wav" / f"{name}.wav", rate=24_000)
    return folder


def test_secap_clips_become_entries_in_the_order_of_their_ids(secap: Path) -> None:
    assert import_secap(secap, secap / "manifest.json") == 2
    first, second = json.loads((secap / "manifest.json").read_text(encoding="utf-8"))
    assert first == {
        "file_id": "tx_01",
        "dataset": "secap",
        "audio_path": "wav/tx_01.wav",
        "caption": "声音发抖，十分害怕",
        "transcription": "别过来",
        "chinese_caption": "声音发抖，十分害怕",
        "english_caption": None,
        "chinese_transcription": "别过来",
        "english_transcription": None,
        "index": 0,
    }
    assert (second["file_id"], second["transcription"], second["index"]) == ("tx_02", "今天 下雨", 1)


def test_the_secap_manifest_can_be_loaded(secap: Path) -> None:
    import_secap(secap, secap / "manifest.json")
    clips, skipped = load_manifest(manifest_path(secap, "chinese"), "chinese", with_transcription=True)
    assert [(clip.file_id, clip.transcription) for clip in clips] == [("tx_01", "别过来"), ("tx_02", "今天 下雨")]
    assert skipped == []


@pytest.mark.parametrize(
    ("target", "is_absolute"),
    [
        ("../above.json", False),
        ("manifest.json", False),
        ("new/manifest.json", True),
        ("../beside/manifest.json", True),
    ],
)
def test_the_secap_manifest_may_be_in_any_folder(secap: Path, target: str, is_absolute: bool) -> None:
    import_secap(secap, secap / target)
    assert len(load_manifest(secap / target, "chinese")[0]) == 2
    written = json.loads((secap / target).read_text(encoding="utf-8"))
    assert [Path(entry["audio_path"]).is_absolute() for entry in written] == [is_absolute] * 2


def test_a_secap_clip_without_a_text_has_no_transcription(secap: Path) -> None:
    (secap / "text.txt").write_text("tx_01 别过来\n", encoding="utf-8")
    import_secap(secap, secap / "manifest.json")
    clips, _ = load_manifest(secap / "manifest.json", "chinese", with_transcription=True)
    assert [clip.transcription for clip in clips] == ["别过来", None]


@pytest.mark.parametrize("name", ["fid2captions.json", "text.txt"])
def test_a_missing_secap_file_is_named(secap: Path, name: str) -> None:
    (secap / name).unlink()
    with pytest.raises(BadClip) as error:
        import_secap(secap, secap / "manifest.json")
    assert str(error.value).startswith(f"{secap / name}: no such file")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "must map clip ids to captions, not be a list")],
)
def test_malformed_secap_captions_are_named(secap: Path, content: bytes, complaint: str) -> None:
    (secap / "fid2captions.json").write_bytes(content)
    with pytest.raises(BadClip) as error:
        import_secap(secap, secap / "manifest.json")
    assert str(error.value).startswith(f"{secap / 'fid2captions.json'}: {complaint}")


def test_secap_texts_keep_every_character_that_ends_no_line(secap: Path) -> None:
    lines = ["tx_01 别\u2028过\x85来\x0c了", "\ufefftx_02\t雨"]
    (secap / "text.txt").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    import_secap(secap, secap / "manifest.json")
    entries = json.loads((secap / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["transcription"] for entry in entries] == ["别\u2028过\x85来\x0c了", "雨"]


def test_a_secap_clip_with_two_texts_is_refused(secap: Path) -> None:
    (secap / "text.txt").write_text("tx_01 a\n\ntx_01 b\n", encoding="utf-8")
    with pytest.raises(BadClip, match=r"text\.txt, line 3: tx_01 has a line already; remove one$"):
        import_secap(secap, secap / "manifest.json")


def test_secap_texts_that_are_not_utf_8_are_named(secap: Path) -> None:
    (secap / "text.txt").write_bytes("tx_01 别过来\n".encode("gbk"))
    with pytest.raises(BadClip) as error:
        import_secap(secap, secap / "manifest.json")
    assert str(error.value).startswith(f"{secap / 'text.txt'}: ")


def test_a_secap_caption_without_audio_is_named_and_nothing_is_written(secap: Path) -> None:
    audio_file = secap / "wav" / "tx_02.wav"
    audio_file.unlink()
    with pytest.raises(BadClip) as error:
        import_secap(secap, secap / "manifest.json")
    assert "tx_02: has a caption" in str(error.value)
    assert str(audio_file) in str(error.value)
    assert not (secap / "manifest.json").exists()


def test_the_secap_command_writes_beside_the_audio(secap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["secap", str(secap)])
    assert capsys.readouterr().out == f"2 clips in {secap / 'manifest.json'}\n"
    assert (secap / "manifest.json").is_file()


def test_the_secap_command_writes_to_its_output_option(secap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = secap.parent / "written.json"
    __main__.main(["secap", str(secap), "--output", str(target)])
    assert str(target) in capsys.readouterr().out
    assert target.is_file()
    assert not (secap / "manifest.json").exists()


def test_the_check_command_lists_bad_clips_in_each_language(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = entry(file_id="two", audio_path="wav/bad.wav")
    with pytest.raises(SystemExit) as stop:
        __main__.main(
            ["check", "--caption_type", "audio_only", str(write_manifest(folder, entry(english_caption=None), bad))]
        )
    assert stop.value.code == 1
    chinese, reason, english = capsys.readouterr().out.splitlines()
    assert chinese == "chinese: 1 clips can be used, 1 cannot"
    assert reason.startswith(f"  two: {folder / 'wav' / 'bad.wav'}: cannot be read as audio")
    assert english.startswith(f"english: {folder / 'manifest.json'}: contains no usable clip")


def test_the_check_command_takes_a_folder_and_a_language(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(folder, entry(english_caption=None))
    __main__.main(["check", str(folder), "--language", "chinese", "--caption-type", "audio_only"])
    assert capsys.readouterr().out == "chinese: 1 clips can be used, 0 cannot\n"
    with pytest.raises(SystemExit, match="unknown language 'klingon': choose one of chinese, english"):
        __main__.main(["check", str(folder), "--language", "klingon"])


def test_the_check_command_takes_pocket(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgecloud_sd.pocket.clips.evaluation_set", lambda: folder)
    for language in ("chinese", "english"):
        write_manifest(folder, entry(**{f"{language}_caption": "他很高兴 happy"})).rename(
            folder / f"manifest_{language}.json"
        )
    __main__.main(["check", "pocket"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["chinese: 1 clips can be used, 0 cannot", "english: 1 clips can be used, 0 cannot"]


def test_the_check_command_succeeds_if_one_language_can_use_every_clip(folder: Path) -> None:
    __main__.main(["check", str(write_manifest(folder, entry(english_caption=None)))])


@pytest.mark.parametrize("caption", [5, None, "", " "])
def test_a_secap_caption_that_is_not_a_text_is_named(secap: Path, caption: object) -> None:
    (secap / "fid2captions.json").write_text(json.dumps({"tx_01": caption}))
    with pytest.raises(BadClip, match="tx_01: must have a text that is not empty"):
        import_secap(secap, secap / "manifest.json")


def test_secap_without_captions_is_refused(secap: Path) -> None:
    (secap / "fid2captions.json").write_text("{}")
    with pytest.raises(BadClip, match="contains no caption"):
        import_secap(secap, secap / "manifest.json")


def test_secap_texts_may_be_separated_by_a_tab(secap: Path) -> None:
    (secap / "text.txt").write_text("tx_01\t别过来 了\n", encoding="utf-8")
    import_secap(secap, secap / "manifest.json")
    entries = json.loads((secap / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["transcription"] for entry in entries] == ["别过来 了", None]


@pytest.mark.parametrize("command", ["secap", "check"])
def test_a_missing_path_ends_the_command_with_its_name(tmp_path: Path, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main([command, str(tmp_path / "nowhere")])
    assert str(stop.value).startswith("error: ")
    assert str(tmp_path / "nowhere") in str(stop.value)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["secap"], ["check"]], ids=str)
def test_an_incomplete_command_ends_with_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m edgecloud_sd.data" in capsys.readouterr().err


def test_a_file_is_written_in_utf_8_and_its_folder_is_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_whole(path, "情感\n")
    assert path.read_bytes() == "情感\n".encode()
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("a longer text than the new one")
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX can replace an open file")
def test_a_reader_of_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_written_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a.json", "text")
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
