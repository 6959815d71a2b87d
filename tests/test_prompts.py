"""Prompts: the words, the chat format, the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.data import prompts
from edgecloud_sd.pipeline import Captioner


@settings(max_examples=25)
@given(length=st.integers(400, 24_000), seed=st.integers(0, 99))
def test_features_are_those_of_the_extractor_padded_to_its_full_length(
    captioner: Captioner, length: int, seed: int
) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)
    extractor = captioner.edge.extractor
    full = extractor(samples, sampling_rate=16_000, padding="max_length", max_length=32_000, return_attention_mask=True)
    kept = np.asarray(full["input_features"][0])[:, np.asarray(full["attention_mask"][0]).astype(bool)]
    torch.testing.assert_close(prompts.log_mel(samples, extractor), torch.tensor(kept), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [3, 4, 99, 100, 101, 200, 201, 333])
def test_there_is_a_placeholder_for_each_position_of_the_encoder(captioner: Captioner, frames: int) -> None:
    tower = captioner.edge.thinker.model.audio_tower
    with torch.inference_mode():
        heard = tower(torch.zeros(128, frames), feature_lens=torch.tensor([frames])).last_hidden_state
    assert len(heard) == prompts.audio_positions(frames)


@pytest.mark.parametrize("language", prompts.LANGUAGES)
@pytest.mark.parametrize("prompt_type", prompts.PROMPT_TYPES)
def test_a_prompt_asks_in_its_language_after_the_audio(captioner: Captioner, language: str, prompt_type: str) -> None:
    prompt = prompts.build_prompt(
        np.zeros(16_000, np.float32),
        captioner.edge.tokenizer,
        captioner.edge.extractor,
        language=language,
        prompt_type=prompt_type,
    )
    text = captioner.edge.tokenizer.decode(prompt.ids)
    assert f"<|audio_eos|>{prompts.TASKS[language][prompt_type]}<|im_end|>" in text
    assert text.count(prompts.AUDIO_TOKEN) == prompts.audio_positions(100)
    assert text.endswith("<|im_start|>assistant\n")


def test_what_is_said_stands_before_the_task() -> None:
    assert prompts.task_text("english", "concise", "hello").startswith("The speaker says: hello\nDescribe")
    assert "says" not in prompts.task_text("english", "concise")


def test_a_clip_too_short_or_too_long_is_named(captioner: Captioner) -> None:
    build = [captioner.edge.tokenizer, captioner.edge.extractor]
    with pytest.raises(ValueError, match="has 100 samples, too few"):
        prompts.build_prompt(np.zeros(100, np.float32), *build, language="english")
    with pytest.raises(ValueError, match=r"301\.0 s long and this model reads at most 300 s"):
        prompts.build_prompt(np.zeros(301 * 16_000, np.float32), *build, language="english")
