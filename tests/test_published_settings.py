"""Settings files of the published project: what they set here, and what is named because it means nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecloud_sd import config
from edgecloud_sd.data.published_settings import PUBLISHED_SETTINGS, translate_settings

PUBLISHED = """\
models:
  edge: {name: some/edge, device: "cuda", dtype: "float32"}
  cloud: {name: some/cloud, device: "cuda:1", dtype: "float16"}
audio: {sample_rate: 16000, feature_type: "mel", normalize: true}
decoding: {max_tokens: 100, temperature: 0.7, draft_length: 32}
uncertainty: {entropy_threshold: 2.0, margin_threshold: 0.1}
training: {learning_rate: 1e-5}
memory:
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "published.yaml").write_text(PUBLISHED)
    return tmp_path / "published.yaml"


def test_the_settings_that_mean_something_here_are_read(file: Path) -> None:
    settings = config.resolve({"mode": "edge"}, file)
    assert (settings.edge_model, settings.edge_device, settings.edge_dtype) == ("some/edge", "cuda", "float32")
    assert (settings.cloud_model, settings.cloud_device, settings.cloud_dtype) == ("some/cloud", "cuda:1", "float16")
    assert (settings.max_new_tokens, settings.k, settings.entropy_threshold) == (100, (32,), (2.0,))


def test_the_others_are_named_in_one_line_with_their_reasons(file: Path) -> None:
    assert config.note_unused_settings(file) == (
        f"{file}: these settings have no meaning here: audio.sample_rate, audio.feature_type, audio.normalize (the "
        "checkpoint has its own feature extractor); decoding.temperature (decoding is greedy); "
        "uncertainty.margin_threshold (the gate reads the entropy); training.learning_rate (nothing is trained); "
        "memory (--max-memory-gb limits memory)"
    )


def test_the_command_line_overrides_the_file_and_its_pair_replaces_the_file_s_models(file: Path) -> None:
    settings = config.resolve({"pair": "pocket", "k": "3", "edge-device": "cpu"}, file)
    assert (settings.run_pair.name, settings.k, settings.edge_device, settings.edge_model) == (
        *("pocket", (3,), "cpu", None),
    )
    assert config.resolve({"pair": "pocket", "edge-model": "mine"}, file).edge_model == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {edge: {nam: x}}", "unknown option models.edge.nam; known are"),
        ("models: 5", "unknown option models; known are"),
        ("decoding: {draft_length: -1}", "--k: '-1' is not auto or a whole number of at least 1"),
        ("k: 3\ndecoding: {draft_length: 3}", "names an option twice, in two spellings: k"),
        ("modles: {edge: {name: x}}", "unknown option modles; known are"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        config.resolve({}, file)
    assert str(error.value).startswith(f"{file}: {message}")


def test_every_meaning_is_an_option_or_a_reason_and_no_option_is_called_like_a_group() -> None:
    options = {f"--{option.name}" for option in config.OPTIONS}
    meant = {meaning for meaning in PUBLISHED_SETTINGS.values() if " " not in meaning}
    assert meant <= options
    assert options.isdisjoint(f"--{key.split('.')[0]}" for key in PUBLISHED_SETTINGS)
    assert translate_settings({}).note == ""
