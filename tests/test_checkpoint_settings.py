"""Settings of a checkpoint give the output of transformers' `generate`, or are refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud import engine
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Prompt, Trace
from edgecloud_sd.models import checkpoint_settings, load, pairs
from edgecloud_sd.models.hf import HFModel
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.session import sync
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import LocalVerifier

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
EOS = frozenset({2})
PROMPT = Prompt((1, 306, 300, 343, 380, 17, 316))
CAPTION = (306, 300, 343, 380, 17, 316, 438, 330, 17, 445, 332, 17, 434, 322, 17, 463)  # ids that the pair likes
REFUSED = {
    *("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "penalty_alpha", "dola_layers"),
    *("constraints", "force_words_ids", "stop_strings", "max_time", "token_healing", "is_assistant"),
    *("forced_eos_token_id", "cache_implementation"),
}
EXAMPLES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1, "exponential_decay_length_penalty": [1, 1.5]},
    {"bad_words_ids": [[17], [343, 380], [2]], "begin_suppress_tokens": [17, 438, 300], "suppress_tokens": [316]},
    {"min_new_tokens": 12, "sequence_bias": [[[17, 316], -9.0], [[2], 9.0]], "encoder_repetition_penalty": 0.5},
    {"watermarking_config": {"bias": 6.0}, "encoder_no_repeat_ngram_size": 1, "renormalize_logits": True},
]


def configure(model: HFModel, values: dict[str, Any]) -> HFModel:
    """Return the model as if its checkpoint had these settings."""
    config = GenerationConfig(**values)
    return replace(model, settings=checkpoint_settings.read_settings(config, EOS, model.vocab_size))


def generate(model: HFModel, prompt: Prompt, values: dict[str, Any], max_new_tokens: int) -> list[int]:
    """Return the greedy output of transformers with these settings."""
    inputs = {"input_ids": torch.tensor([prompt.ids]), "attention_mask": torch.ones(1, len(prompt.ids)).long()}
    if prompt.features is not None:
        mask = torch.ones(1, prompt.features.shape[1]).long()
        inputs |= {"input_features": prompt.features[None], "feature_attention_mask": mask}
    config = GenerationConfig(**values, max_new_tokens=max_new_tokens, eos_token_id=sorted(EOS), pad_token_id=0)
    with torch.inference_mode():
        output: list[int] = model.thinker.generate(**inputs, generation_config=config)[0, len(prompt.ids) :].tolist()
    return output


def decode_tokens(edge: HFModel, cloud: HFModel, prompt: Prompt, strategy: Strategy, max_new_tokens: int) -> list[int]:
    events = decode(prompt, strategy, Stopping(EOS, max_new_tokens), edge, LocalVerifier(cloud, GREEDY))
    return list(Trace(tuple((0.0, event) for event in events)).tokens)


@lru_cache
def audio_prompt(pipeline: Pipeline) -> Prompt:
    return pipeline.prompt(Request(clips.make_clip("evaluation", 0).samples, "english"))


@pytest.mark.slow
@pytest.mark.parametrize("values", EXAMPLES, ids=lambda values: ",".join(values))
def test_a_setting_gives_the_output_of_generate(pipeline: Pipeline, values: dict[str, Any]) -> None:
    cloud = configure(pipeline.cloud_model, values)
    expected = generate(cloud, PROMPT, values, 5)
    for strategy in (Strategy("cloud"), Strategy("speculative", k=3)):
        assert decode_tokens(pipeline.edge, cloud, PROMPT, strategy, 5) == expected


token = st.sampled_from([*CAPTION, *EOS, 0, 5, 639])
tokens = st.lists(token, min_size=1, max_size=4)
settings_of_a_checkpoint = st.fixed_dictionaries(
    {},
    optional={
        "sequence_bias": st.lists(st.tuples(tokens, st.floats(-9, 9, width=16)).map(list), min_size=1, max_size=3),
        "encoder_repetition_penalty": st.floats(0.5, 2, width=16),
        "repetition_penalty": st.floats(0.5, 2, width=16),
        "no_repeat_ngram_size": st.integers(0, 3),
        "encoder_no_repeat_ngram_size": st.integers(0, 3),
        "bad_words_ids": st.lists(tokens, min_size=1, max_size=3),
        "min_length": st.integers(0, 90),
        "min_new_tokens": st.integers(0, 20),
        "forced_bos_token_id": st.just(7),  # never among the suppressed, which transformers refuses
        "remove_invalid_values": st.booleans(),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 9), st.floats(0.875, 1.5, width=16)).map(list),
        "suppress_tokens": tokens,
        "begin_suppress_tokens": tokens,
        "watermarking_config": st.builds(
            dict, bias=st.floats(0, 5), seeding_scheme=st.sampled_from(["lefthash", "selfhash"])
        ),
        "renormalize_logits": st.booleans(),
        "temperature": st.just(0.3),
        "top_k": st.just(3),
    },
)


@pytest.mark.slow
@given(data=st.data())
def test_any_settings_of_two_sides_give_the_outputs_of_generate(pipeline: Pipeline, data: st.DataObject) -> None:
    of_edge, of_cloud = data.draw(settings_of_a_checkpoint), data.draw(settings_of_a_checkpoint)
    prompt = data.draw(st.sampled_from([audio_prompt(pipeline), PROMPT]))
    length, k = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 8))
    edge, cloud = configure(pipeline.edge, of_edge), configure(pipeline.cloud_model, of_cloud)
    assert decode_tokens(edge, cloud, prompt, Strategy("edge"), length) == generate(edge, prompt, of_edge, length)
    expected = generate(cloud, prompt, of_cloud, length)
    for strategy in (Strategy("cloud"), Strategy("speculative", k=k)):
        assert decode_tokens(edge, cloud, prompt, strategy, length) == expected


@pytest.mark.slow
@settings(max_examples=8)
@given(values=settings_of_a_checkpoint, contexts=st.lists(st.lists(token, min_size=1, max_size=6), max_size=4))
def test_logits_after_a_roll_back_are_those_of_a_new_session(
    pipeline: Pipeline, values: dict[str, Any], contexts: list[list[int]]
) -> None:
    edge = configure(pipeline.edge, values)
    session = edge.open(PROMPT)
    for output in contexts:
        context = [PROMPT.last, *output]
        logits = sync(session, context, rows=len(output))
        for row, scores in enumerate(logits):
            fresh = edge.open(PROMPT).extend(context[: len(context) - len(output) + 1 + row])[-1]
            torch.testing.assert_close(scores, fresh, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the pocket edge that a test may change."""
    shutil.copytree(pairs.PAIRS["pocket"].edge, tmp_path / "edge")
    return tmp_path / "edge"


def write_settings(folder: Path, values: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")


def test_the_settings_of_a_folder_give_the_output_of_generate(folder: Path) -> None:
    write_settings(folder, {"eos_token_id": [2, 17], "suppress_tokens": [300], "do_sample": True, "top_p": 0.5})
    model = load.load_model(folder)
    assert model.eos == {2, 17}
    inputs = {"input_ids": torch.tensor([PROMPT.ids]), "attention_mask": torch.ones(1, len(PROMPT.ids)).long()}
    output = model.thinker.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    events = decode(PROMPT, Strategy("edge"), Stopping(model.eos, 8), model)
    expected = output[0, len(PROMPT.ids) :].tolist()
    assert [token for event in events for token in getattr(event, "tokens", ())] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_beams": 4},
            r"num_beams 4 changes the greedy output and cannot be applied here: remove it from gen.*\.json",
        ),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5 changes"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id 2 changes"),
        ({"stop_strings": ["."]}, r"stop_strings \['\.'\] changes"),
        ({"cache_implementation": "quantized"}, "cache_implementation quantized changes"),
        (
            {"repetition_penalty": -1.0},
            "repetition_penalty -1.0 of gen.* cannot be applied: .* strictly positive float",
        ),
        ({"no_repeat_ngram_size": "3"}, "no_repeat_ngram_size 3 of gen.* cannot be applied"),
        ({"min_new_tokens": 1.5}, "min_new_tokens 1.5 of gen.* cannot be applied"),
        ({"bad_words_ids": [[640]]}, r"bad_words_ids \[\[640\]\] of gen.* cannot be applied: .* 640"),
        ({"suppress_tokens": 17}, "suppress_tokens 17 cannot be used"),
        ({"suppress_tokens": ["a"]}, r"suppress_tokens \['a'\] of gen.* cannot be applied"),
        ({"eos_token_id": "2"}, "eos_token_id 2 must have ids"),
        ({"watermarking_config": {"ngram_len": 5}}, r"watermarking_config \{'ngram_len': 5\} cannot be used"),
        ([1], r"generation_config\.json: a list, which is no object of settings, cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_applied_is_refused_by_name(folder: Path, values: object, message: str) -> None:
    write_settings(folder, values)
    with pytest.raises(OSError, match=rf"cannot be loaded: .*{message}") as refusal:
        load.load_frontend(folder)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(OSError, match=r"generation_config\.json"):
        load.load_frontend(folder)


def test_a_link_to_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(folder / "absent")
    with pytest.raises(OSError, match=r"generation_config\.json"):
        load.load_frontend(folder)


def test_neutral_values_are_no_settings(folder: Path) -> None:
    neutral: dict[str, object] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
    ignored: dict[str, object] = {"max_length": 9, "chat_format": "chatml", "temperature": 0.1, "penalty_alpha": 0}
    write_settings(folder, neutral | ignored | {"eos_token_id": 2, "renormalize_logits": False})
    assert load.load_frontend(folder).settings == checkpoint_settings.NO_SETTINGS


def test_every_field_of_transformers_is_applied_unused_or_refused() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - checkpoint_settings.APPLIED.keys() - checkpoint_settings.UNUSED == REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("of_generation", "of_text", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 5, {7, 9}),
        ({"eos_token_id": 0}, 5, {0}),
        ({"eos_token_id": []}, 5, set()),
        ({"pad_token_id": 1}, [5, 6], {5, 6}),
        (None, 5, {5}),
        (None, [5, 6], {5, 6}),
        (None, None, set()),
    ],
)
def test_captions_end_at_the_ids_of_the_first_file_that_has_any_and_at_the_tokenizers(
    folder: Path, is_whole: bool, of_generation: object, of_text: object, expected: set[int]
) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["eos_token_id"] = of_text
    config = {"model_type": "qwen2_5_omni", "thinker_config": config} if is_whole else config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").unlink()
    if of_generation:
        write_settings(folder, of_generation)
    assert load.load_frontend(folder).eos == expected | {2}


@pytest.mark.parametrize("part", ["text_config", None])
def test_settings_of_an_old_config_apply_if_there_is_no_other_file(folder: Path, part: str | None) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config[part] if part else config)["repetition_penalty"] = 1.5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert not load.load_frontend(
        folder
    ).settings.values  # generate reads them in no file beside generation_config.json
    (folder / "generation_config.json").unlink()
    model = load.load_model(folder)
    assert model.settings.values["repetition_penalty"] == model.thinker.generation_config.repetition_penalty == 1.5


def test_the_engine_vllm_refuses_settings_by_name(folder: Path) -> None:
    write_settings(folder, {"repetition_penalty": 1.5, "eos_token_id": 2})
    with pytest.raises(ValueError, match=r"repetition_penalty of its generation_config\.json cannot be applied with"):
        engine.load_engine("vllm", str(folder), "cpu", "float32", {})
