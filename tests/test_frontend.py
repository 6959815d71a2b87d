"""Damaged files of a checkpoint: each ends in one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgecloud_sd.models.load import load_model
from edgecloud_sd.models.pairs import PAIRS

OBJECT = "it must be a JSON object"
FIELDS = "it has not the expected fields"
UTF8 = "'utf-8' codec can't decode byte"
TOKENIZER, OPTIONS, EXTRACTOR = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
GENERATION, WEIGHTS, INDEX = "generation_config.json", "model.safetensors", "model.safetensors.index.json"


def header(fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGES: list[tuple[str, str | bytes | None, str]] = [
    *((file, "[]", OBJECT) for file in (TOKENIZER, OPTIONS, EXTRACTOR, "config.json")),
    *((file, '{"a": ', "Expecting value") for file in (TOKENIZER, OPTIONS, EXTRACTOR, "config.json")),
    *((file, b"{\xff}", UTF8) for file in (TOKENIZER, OPTIONS, EXTRACTOR, "config.json")),
    (GENERATION, "[]", "a list, which is no object of settings"),
    (GENERATION, '{"a": ', "is not a valid JSON file"),
    (GENERATION, b"{\xff}", "is not a valid JSON file"),
    (TOKENIZER, "{}", FIELDS),
    (TOKENIZER, '{"added_tokens": []}', "Model missing"),
    (TOKENIZER, None, "Couldn't instantiate the backend tokenizer"),
    (OPTIONS, '{"eos_token": 5}', "eos_token has to be either str or AddedToken"),
    ("config.json", "{}", "Unrecognized model"),
    ("config.json", '{"model_type": "qwen2_5_omni_thinker", "text_config": 5}', "text_config"),
    (
        "config.json",
        '{"model_type": "qwen2_5_omni_thinker", "audio_token_index": 9}',
        "audio_token_id of config.json is 9",
    ),
    (GENERATION, '{"eos_token_id": "x"}', "eos_token_id x must have ids of the vocabulary only"),
    (EXTRACTOR, '{"feature_size": "x"}', "feature_size must be a whole number above 0, not 'x'"),
    (GENERATION, '{"eos_token_id": [2, 640]}', "eos_token_id [2, 640] must have ids of the vocabulary only, 0 to 639"),
    (GENERATION, '{"eos_token_id": true}', "eos_token_id True must have ids"),
    (EXTRACTOR, '{"dither": "x"}', "dither must be a number, not 'x'"),
    (EXTRACTOR, '{"padding_value": NaN}', "padding_value must be a number, not nan"),
    (EXTRACTOR, '{"hop_length": 0}', "hop_length must be a whole number above 0, not 0"),
    (
        EXTRACTOR,
        '{"sampling_rate": 8000, "feature_size": 20}',
        "sampling_rate must be 16000, as of every clip, not 8000",
    ),
    (EXTRACTOR, "{}", "feature_size of preprocessor_config.json is 80, and num_mel_bins of config.json is 128"),
    (WEIGHTS, b"", "is not a safetensors file"),
    (WEIGHTS, bytes(100), "is not a safetensors file"),
    (WEIGHTS, header([]), "its header cannot be read"),
    (WEIGHTS, header({"w": {"dtype": "F16", "shape": [1]}}), "its header cannot be read"),
    (WEIGHTS, header({"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}), "bytes, and its header says"),
    (INDEX, "{}", "has no weight_map from tensors to files"),
    (INDEX, '{"weight_map": 5}', "has no weight_map from tensors to files"),
    (INDEX, '{"weight_map": {"w": "absent.safetensors"}}', "absent.safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "content", "reason"), DAMAGES)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, file: str, content: str | bytes | None, reason: str
) -> None:
    folder = Path(shutil.copytree(PAIRS["pocket"].edge, tmp_path / "edge"))
    if file == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OSError, match="cannot be loaded") as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert file in message
    assert reason in message


def test_weights_of_torch_that_cannot_be_read_are_refused_without_its_unsafe_advice(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PAIRS["pocket"].edge, tmp_path / "edge"))
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(OSError, match="cannot be loaded: its weights are no file of torch: copy or download it again"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        (None, {"text_config": {}}, "output_dim 96 of the audio tower must equal hidden_size 3584"),
        ("text_config", {"vocab_size": 641}, "vocab_size 641 and hidden_size 96 of config.json are not the shape"),
        ("text_config", {"intermediate_size": 99}, "weight has the shape"),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ("text_config", {"max_position_embeddings": -5}, "max_position_embeddings must be at least 1, not -5"),
        ("text_config", {"rope_parameters": {"rope_theta": 1e4}}, "mrope_section [16, 24, 24] of rope_parameters must"),
        ("audio_config", {"n_window": 0}, "n_window must be at least 1, not 0"),
        ("audio_config", {"max_source_positions": 10}, "max_source_positions 10 must be at least n_window 100"),
    ],
)
def test_dimensions_that_the_weights_or_the_model_cannot_have_are_named(
    tmp_path: Path, part: str | None, fields: dict[str, object], reason: str
) -> None:
    folder = Path(shutil.copytree(PAIRS["pocket"].edge, tmp_path / "edge"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config[part] if part else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot be loaded: .*config\.json") as caught:
        load_model(folder)
    assert reason in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_weights_have_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PAIRS["pocket"].edge, tmp_path / "edge"))
    tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 640, "content": "<|more|>"})
    (folder / TOKENIZER).write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(OSError, match=r"vocab_size of config\.json is 640, and tokenizer\.json has 641 ids"):
        load_model(folder)
