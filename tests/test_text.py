"""The text model as a function of its weights: transformers' own forward pass, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgecloud_sd.models import text
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.pipeline import Captioner

STEPS = [(0, 70), (70, 1), (71, 5), (73, 2), (75, 1), (76, 90), (80, 3)]  # (cached, and cut back to; fed)


def embeddings(thinker: Any, n: int, seed: int) -> Tensor:
    """Of random tokens: [n, hidden]."""
    found: Tensor = thinker.get_input_embeddings()(torch.randint(600, (n,), generator=torch.manual_seed(seed)))
    return found


@torch.inference_mode()
def by_transformers(thinker: Any, steps: Sequence[tuple[int, int]]) -> list[Tensor]:
    cache = DynamicCache(config=thinker.config.text_config)
    found = []
    for seed, (cached, n) in enumerate(steps):
        if cached < cache.get_seq_length():
            cache.crop(cached - cache.get_seq_length())
        output = thinker.model.language_model(
            inputs_embeds=embeddings(thinker, n, seed)[None],
            position_ids=torch.arange(cached, cached + n).expand(3, 1, n),
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.last_hidden_state[0])
    return found


@torch.inference_mode()
def by_ours(thinker: Any, steps: Sequence[tuple[int, int]]) -> list[Tensor]:
    model = TextModel(thinker)
    cache = model.cache(8)
    found = []
    for seed, (cached, n) in enumerate(steps):
        cache.length = cached
        found.append(model(embeddings(thinker, n, seed), cache))
        assert cache.length == cached + n
    return found


def assert_same_bits(thinker: Any, steps: Sequence[tuple[int, int]] = STEPS) -> None:
    for step, ours, theirs in zip(steps, by_ours(thinker, steps), by_transformers(thinker, steps), strict=True):
        assert torch.equal(ours, theirs), f"step {step}: up to {(ours - theirs).abs().max()} apart"


@pytest.fixture
def thinker(captioner: Captioner) -> Any:
    """One to change."""
    return copy.deepcopy(captioner.edge.thinker)


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_hidden_states_are_transformers_bit_for_bit(captioner: Captioner, side: str) -> None:
    assert_same_bits(getattr(captioner, side).thinker)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_in_every_number_format_and_by_either_attention(thinker: Any, dtype: str, attention: str) -> None:
    thinker = thinker.to(getattr(torch, dtype))
    thinker.set_attn_implementation(attention)
    assert_same_bits(thinker)


def test_by_transformers_own_attention_as_on_a_gpu(thinker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = text._attention
    monkeypatch.setattr(text, "_attention", lambda module, _: choose(module, torch.device("cuda")))
    assert_same_bits(thinker)


def test_positions_beyond_the_first_table(thinker: Any) -> None:
    assert_same_bits(thinker, [(0, 1020), (1020, 3), (1023, 1), (1024, 1), (1025, 1200)])


def test_filling_leaves_what_a_call_leaves(captioner: Captioner) -> None:
    thinker = captioner.cloud.thinker
    model = TextModel(thinker)
    found = []
    with torch.inference_mode():
        for run in (model.fill, model):
            cache = model.cache(1)
            run(embeddings(thinker, 20, 0), cache)
            found.append(model(embeddings(thinker, 2, 1), cache))
    assert torch.equal(*found)


class Other(nn.Module):
    """A linear map that has no weight of its own to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.halves = nn.ModuleList([linear])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.halves[0](x)
        return found


def test_any_module_may_stand_in_for_a_linear_one(thinker: Any) -> None:
    placed = []
    for layer in thinker.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    placed.append(Other(module))
                    setattr(parent, name, placed[-1])
    by_ours(thinker, STEPS[:2])
    assert len(placed) == 7 * len(thinker.model.language_model.layers)
    assert {each.calls for each in placed} == {2}
    assert_same_bits(thinker)


def test_hooks_of_a_linear_module_are_called(thinker: Any) -> None:
    layer = thinker.model.language_model.layers[0]
    seen = []
    layer.self_attn.q_proj.register_forward_hook(lambda *_: seen.append("after"))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    by_ours(thinker, [(0, 1)])
    assert seen == ["after", "before"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.rotary_emb, "rope_type", "dynamic"), "rotary embeddings 'dynamic'"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "activation 'gelu': only silu is known"),
        (
            lambda model: setattr(model.config, "layer_types", ["sliding_attention", "full_attention"]),
            "layers of full_attention, sliding_attention: only full_attention is known",
        ),
        (
            lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"),
            "attention 'flash_attention_2': only eager, sdpa are known",
        ),
    ],
)
def test_a_text_model_that_is_computed_otherwise_is_refused(thinker: Any, change: Any, message: str) -> None:
    changed = copy.deepcopy(thinker)
    change(changed.model.language_model)
    with pytest.raises(ValueError, match=message):
        TextModel(changed)
