"""The text model of a Qwen2.5-Omni thinker, as a function of its weights.

`TextModel` does the same operations in the same order as the forward pass of transformers. Its hidden states are equal
bit for bit in float32, bfloat16 and float16 (tests/test_text.py). It leaves out the overhead that dominates a step of a
small model: module calls, repeated computation of position tables and masks, and copies of the cache at each position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecloud_sd.models.cache import Cache

TensorMap = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")  # their frequencies change with the sequence length
SUPPORTED_ATTENTIONS = ("eager", "sdpa")  # these accept an additive mask
INITIAL_POSITIONS = 1024  # length of the first rotary table: longer than a prompt and its caption


class _Layer(NamedTuple):
    """The weights and functions of one decoder layer."""

    norm: Tensor
    query: TensorMap
    key: TensorMap
    value: TensorMap
    attend: Attention
    output: TensorMap
    norm_after: Tensor
    gate: TensorMap
    up: TensorMap
    down: TensorMap


class TextModel:
    """The decoder layers and the final norm of a thinker, without copies of its weights.

    Any module may replace a linear one, for example a quantised one. The constructor raises ValueError for a text model
    of another architecture.
    """

    def __init__(self, thinker: Any) -> None:
        model = thinker.model.language_model
        _check_architecture(model)
        self._rotary = model.rotary_emb
        self._weights = model.norm.weight  # the whole model has its dtype and device
        self.device = self._weights.device
        self._eps = model.norm.variance_epsilon
        self._head_size = model.layers[0].self_attn.head_dim
        self._query_heads = model.config.num_attention_heads
        self._kv_heads = model.config.num_key_value_heads
        self._layers = [_read_layer(layer, self.device) for layer in model.layers]
        self._positions = self._compute_rotary_table(INITIAL_POSITIONS)

    def new_cache(self, capacity: int) -> Cache:
        """Return an empty cache that takes `capacity` positions before it has to grow."""
        shape = (2 * len(self._layers), 1, self._kv_heads, capacity, self._head_size)
        return Cache(torch.empty(shape, dtype=self._weights.dtype, device=self.device))

    def __call__(self, embeddings: Tensor, cache: Cache) -> Tensor:
        """Return the hidden states [n, hidden] of `embeddings` [n, hidden], which follow the cached positions.

        Add their keys and values to the cache.
        """
        return self._norm(self._run_layers(embeddings, cache), self._weights)

    def fill_cache(self, embeddings: Tensor, cache: Cache) -> None:
        """Add the keys and values of `embeddings` [n, hidden] to the cache, without computing their hidden states."""
        self._run_layers(embeddings, cache, is_cache_only=True)

    def _run_layers(self, hidden: Tensor, cache: Cache, is_cache_only: bool = False) -> Tensor:
        n = len(hidden)
        begin, end = cache.length, cache.length + n
        cos, sin = self._rotation(begin, end)
        mask = None  # a single row attends to every position
        if n > 1:
            mask = torch.full((1, 1, n, end), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu_(begin + 1)
        new, cached = cache.views(n)
        heads, half = self._query_heads, self._head_size // 2
        for number, layer in enumerate(self._layers):
            keys, values = 2 * number, 2 * number + 1
            x = self._norm(hidden, layer.norm)
            # rotate queries and keys together: x * cos + rotate_half(x) * sin, with the sign of the halves in `sin`
            both = torch.cat((layer.query(x), layer.key(x)), -1).view(n, -1, self._head_size)
            both = (both * cos).add_(both.roll(half, -1).mul_(sin)).transpose(0, 1)[None]  # [1, heads, n, head size]
            new[keys].copy_(both[:, heads:])
            new[values].copy_(layer.value(x).view(1, n, -1, self._head_size).transpose(1, 2))
            if is_cache_only and number == len(self._layers) - 1:
                break
            attended = layer.attend(both[:, :heads], cached[keys], cached[values], mask)
            hidden = layer.output(attended.reshape(n, -1)).add_(hidden)
            x = self._norm(hidden, layer.norm_after)
            hidden = layer.down(F.silu(layer.gate(x), inplace=True).mul_(layer.up(x))).add_(hidden)
        cache.length = end
        return hidden

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the root mean square norm over the last dimension (Zhang and Sennrich 2019), times `weight`.

        The norm is computed in float32 or wider, and the weights apply afterwards in the dtype of `x`. transformers
        rounds float64 to float32 here; this function does not.
        """
        return F.rms_norm(x, weight.shape, eps=self._eps).mul_(weight)

    def _rotation(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and the signed sines of positions, each [end - begin, 1, head size]."""
        cos, sin = self._positions
        if end > len(cos):
            cos, sin = self._positions = self._compute_rotary_table(max(end, 2 * len(cos)))
        return cos[begin:end], sin[begin:end]

    @torch.inference_mode()
    def _compute_rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self.device).expand(3, 1, length)  # time, height and width
        cos, sin = self._rotary(self._weights, positions)
        sin[..., : self._head_size // 2].neg_()
        return cos[0][:, None], sin[0][:, None]


def _check_architecture(model: Any) -> None:
    """Raise ValueError with the field and its value if `TextModel` does not compute this language model."""
    config = model.config
    if model.rotary_emb.rope_type in LENGTH_DEPENDENT_ROPE_TYPES:
        raise ValueError(
            f"rope_type {model.rotary_emb.rope_type!r} is not supported: its frequencies change with the length"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported: use a model with silu")
    if set(config.layer_types) != {"full_attention"}:
        kinds = ", ".join(sorted(set(config.layer_types)))
        raise ValueError(f"layer_types {kinds} are not supported: use a model with full_attention alone")
    if config._attn_implementation not in SUPPORTED_ATTENTIONS:
        known = ", ".join(SUPPORTED_ATTENTIONS)
        raise ValueError(f"attention {config._attn_implementation!r} is not supported: choose one of {known}")


def _read_layer(layer: Any, device: torch.device) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        _as_function(attention.q_proj),
        _as_function(attention.k_proj),
        _as_function(attention.v_proj),
        _choose_attention(attention, device),
        _as_function(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _as_function(mlp.gate_proj),
        _as_function(mlp.up_proj),
        _as_function(mlp.down_proj),
    )


def _as_function(module: nn.Module) -> TensorMap:
    """Return a plain function for a plain linear module, because a module call costs as much again; else the module."""
    if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def _choose_attention(module: Any, device: torch.device) -> Attention:
    """Return the model's own attention: queries, keys, values and an additive mask to [1, n, heads, head size]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import eager_attention_forward

    scaling: float = module.scaling
    name = module.config._attn_implementation
    if name == "sdpa" and device.type == "cpu":  # the same call as in transformers, without its copies of shared heads

        def attend_fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
            output = F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling, enable_gqa=True)
            return output.transpose(1, 2)

        return attend_fused
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = function(module, query, keys, values, mask, scaling=scaling)[0]
        return output

    return attend
