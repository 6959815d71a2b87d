"""The text model equals the forward pass of transformers, bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgecloud_sd.models import text
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.pipeline import Pipeline

STEPS = [
    (0, 70),
    (70, 1),
    (71, 5),
    (73, 2),
    (75, 1),
    (76, 90),
    (80, 3),
]  # (cached positions to roll back to, positions to feed)


def embeddings(thinker: Any, n: int, seed: int) -> Tensor:
    """Return the embeddings [n, hidden] of random tokens."""
    rows: Tensor = thinker.get_input_embeddings()(torch.randint(600, (n,), generator=torch.manual_seed(seed)))
    return rows


@torch.inference_mode()
def run_transformers(thinker: Any, steps: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the hidden states of each step by transformers."""
    text_model = thinker.model.language_model
    parameters = inspect.signature(text_model.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"  # the name before 5.24
    cache = DynamicCache(config=thinker.config.text_config)
    states = []
    for seed, (cached, n) in enumerate(steps):
        if cached < cache.get_seq_length():
            cache.crop(cached - cache.get_seq_length())
        output = text_model(
            inputs_embeds=embeddings(thinker, n, seed)[None],
            position_ids=torch.arange(cached, cached + n).expand(3, 1, n),
            use_cache=True,
            **{cache_name: cache},
        )
        states.append(output.last_hidden_state[0])
    return states


@torch.inference_mode()
def run_text_model(thinker: Any, steps: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the hidden states of each step by `TextModel`."""
    model = TextModel(thinker)
    cache = model.new_cache(8)
    states = []
    for seed, (cached, n) in enumerate(steps):
        cache.length = cached
        states.append(model(embeddings(thinker, n, seed), cache))
        assert cache.length == cached + n
    return states


def assert_same_bits(thinker: Any, steps: Sequence[tuple[int, int]] = STEPS) -> None:
    for step, ours, theirs in zip(steps, run_text_model(thinker, steps), run_transformers(thinker, steps), strict=True):
        assert torch.equal(ours, theirs), f"step {step}: up to {(ours - theirs).abs().max()} apart"


@pytest.fixture
def thinker(pipeline: Pipeline) -> Any:
    """Return a copy that a test may change."""
    return copy.deepcopy(pipeline.edge.thinker)


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_hidden_states_are_transformers_bit_for_bit(pipeline: Pipeline, side: str) -> None:
    assert_same_bits((pipeline.edge if side == "edge" else pipeline.cloud_model).thinker)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hidden_states_are_equal_in_every_dtype_and_with_either_attention(
    thinker: Any, dtype: str, attention: str
) -> None:
    thinker = thinker.to(getattr(torch, dtype))
    thinker.set_attn_implementation(attention)
    assert_same_bits(thinker)


def test_hidden_states_are_equal_with_the_attention_function_of_a_gpu(
    thinker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = text._choose_attention
    monkeypatch.setattr(text, "_choose_attention", lambda module, _: choose(module, torch.device("cuda")))
    assert_same_bits(thinker)


def test_hidden_states_are_equal_beyond_the_first_rotary_table(thinker: Any) -> None:
    assert_same_bits(thinker, [(0, 1020), (1020, 3), (1023, 1), (1024, 1), (1025, 1200)])


def test_filling_the_cache_leaves_the_same_cache_as_a_call(pipeline: Pipeline) -> None:
    thinker = pipeline.cloud_model.thinker
    model = TextModel(thinker)
    states = []
    with torch.inference_mode():
        for run in (model.fill_cache, model):
            cache = model.new_cache(1)
            run(embeddings(thinker, 20, 0), cache)
            states.append(model(embeddings(thinker, 2, 1), cache))
    assert torch.equal(*states)


class Wrapper(nn.Module):
    """A linear map without a weight of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = nn.ModuleList([linear])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.inner[0](x)
        return output


def test_any_module_may_replace_a_linear_one(thinker: Any) -> None:
    wrappers = []
    for layer in thinker.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    wrappers.append(Wrapper(module))
                    setattr(parent, name, wrappers[-1])
    run_text_model(thinker, STEPS[:2])
    assert len(wrappers) == 7 * len(thinker.model.language_model.layers)
    assert {wrapper.calls for wrapper in wrappers} == {2}
    assert_same_bits(thinker)


def test_hooks_of_a_linear_module_are_called(thinker: Any) -> None:
    layer = thinker.model.language_model.layers[0]
    calls = []
    layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append("after"))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append("before"))
    run_text_model(thinker, [(0, 1)])
    assert calls == ["after", "before"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model.rotary_emb, "rope_type", "dynamic"),
            "rope_type 'dynamic' is not supported: its frequencies change",
        ),
        (
            lambda model: setattr(model.config, "hidden_act", "gelu"),
            "hidden_act 'gelu' is not supported: use a model with silu",
        ),
        (
            lambda model: setattr(model.config, "layer_types", ["sliding_attention", "full_attention"]),
            "layer_types full_attention, sliding_attention are not supported: use a model with full_attention alone",
        ),
        (
            lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"),
            "attention 'flash_attention_2' is not supported: choose one of eager, sdpa",
        ),
    ],
)
def test_a_text_model_of_another_architecture_is_refused(thinker: Any, change: Any, message: str) -> None:
    changed = copy.deepcopy(thinker)
    change(changed.model.language_model)
    with pytest.raises(ValueError, match=message):
        TextModel(changed)
