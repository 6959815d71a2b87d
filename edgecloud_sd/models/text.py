"""The text model of a Qwen2.5-Omni thinker, as a function of its weights.

The same operations in the same order as transformers' own forward pass, so that its hidden states are the same bit for
bit in float32, bfloat16 and float16 (`tests/test_text.py`), without what only costs: a step of a small model spends
most of its time in calls of modules, in tables of positions and masks computed again, and in caches that are copied to
grow by one position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecloud_sd.models.cache import Cache

Map = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
GROWING = ("dynamic", "longrope")  # kinds of rotary embeddings whose frequencies change with the length
ATTENTIONS = ("eager", "sdpa")  # those that take an additive mask


class _Layer(NamedTuple):
    """What a decoder layer is made of. Norms: their weights; `attend` takes [1, heads, n, head size] thrice, and a
    mask."""

    norm: Tensor
    query: Map
    key: Map
    value: Map
    attend: Attention
    output: Map
    norm_after: Tensor
    gate: Map
    up: Map
    down: Map


class TextModel:
    """Reads a thinker's weights where they are. ValueError for a text model that it does not compute.

    Any module may stand in for a linear one, quantised ones too.
    """

    def __init__(self, thinker: Any) -> None:
        model = thinker.model.language_model
        config = model.config
        self._rotary = model.rotary_emb
        if self._rotary.rope_type in GROWING:
            raise ValueError(f"rotary embeddings {self._rotary.rope_type!r}: their frequencies change with the length")
        if config.hidden_act != "silu":
            raise ValueError(f"activation {config.hidden_act!r}: only silu is known")
        if set(config.layer_types) != {"full_attention"}:
            raise ValueError(f"layers of {', '.join(sorted(set(config.layer_types)))}: only full_attention is known")
        if config._attn_implementation not in ATTENTIONS:
            known = ", ".join(ATTENTIONS)
            raise ValueError(f"attention {config._attn_implementation!r}: only {known} are known")
        self._weights = model.norm.weight  # their dtype and device are the model's
        self.device = self._weights.device
        self._eps = model.norm.variance_epsilon
        self._size = model.layers[0].self_attn.head_dim
        self._heads = config.num_attention_heads
        self._held = config.num_key_value_heads
        self._layers = [_layer(each, self.device) for each in model.layers]
        self._positions = self._table(1024)

    def cache(self, room: int) -> Cache:
        """An empty one, with room for so many positions before it has to grow."""
        shape = (2 * len(self._layers), 1, self._held, room, self._size)
        return Cache(torch.empty(shape, dtype=self._weights.dtype, device=self.device))

    def __call__(self, embeddings: Tensor, cache: Cache) -> Tensor:
        """Hidden states [n, hidden] of `embeddings` [n, hidden], which follow what is cached and are cached now."""
        return self._norm(self._run(embeddings, cache, whole=True), self._weights)

    def fill(self, embeddings: Tensor, cache: Cache) -> None:
        """As a call, but only for what it leaves in the cache: the last layer stops at its keys and values."""
        self._run(embeddings, cache, whole=False)

    def _run(self, hidden: Tensor, cache: Cache, whole: bool) -> Tensor:
        n = len(hidden)
        begin, end = cache.length, cache.length + n
        cos, sin = self._rotation(begin, end)
        mask = None  # a single row sees everything
        if n > 1:
            mask = torch.full((1, 1, n, end), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu_(begin + 1)
        new, seen = cache.more(n)
        heads, half = self._heads, self._size // 2
        for number, layer in enumerate(self._layers):
            keys, values = 2 * number, 2 * number + 1
            x = self._norm(hidden, layer.norm)
            # queries and keys are rotated together: x * cos + rotate_half(x) * sin, the sign of the halves in `sin`
            both = torch.cat((layer.query(x), layer.key(x)), -1).view(n, -1, self._size)
            both = (both * cos).add_(both.roll(half, -1).mul_(sin)).transpose(0, 1)[None]  # [1, heads of both, n, size]
            new[keys].copy_(both[:, heads:])
            new[values].copy_(layer.value(x).view(1, n, -1, self._size).transpose(1, 2))
            if not whole and number == len(self._layers) - 1:
                break
            attended = layer.attend(both[:, :heads], seen[keys], seen[values], mask)
            hidden = layer.output(attended.reshape(n, -1)).add_(hidden)
            x = self._norm(hidden, layer.norm_after)
            hidden = layer.down(F.silu(layer.gate(x), inplace=True).mul_(layer.up(x))).add_(hidden)
        cache.length = end
        return hidden

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm over the last dimension (Zhang and Sennrich 2019), in float32 or wider; the weights
        afterwards, in the dtype of `x`. transformers' rounds float64 to float32 here, this does not."""
        return F.rms_norm(x, weight.shape, eps=self._eps).mul_(weight)

    def _rotation(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of positions: [end - begin, 1, head size] each."""
        cos, sin = self._positions
        if end > len(cos):
            cos, sin = self._positions = self._table(max(end, 2 * len(cos)))
        return cos[begin:end], sin[begin:end]

    @torch.inference_mode()
    def _table(self, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self.device).expand(3, 1, length)  # of time, height and width
        cos, sin = self._rotary(self._weights, positions)
        sin[..., : self._size // 2].neg_()
        return cos[0][:, None], sin[0][:, None]


def _layer(layer: Any, device: torch.device) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        _map(attention.q_proj),
        _map(attention.k_proj),
        _map(attention.v_proj),
        _attention(attention, device),
        _map(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _map(mlp.gate_proj),
        _map(mlp.up_proj),
        _map(mlp.down_proj),
    )


def _map(module: nn.Module) -> Map:
    """The module, or what it computes where it is a plain linear one: calling it would cost as much again."""
    if type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def _attention(module: Any, device: torch.device) -> Attention:
    """[1, n, heads, head size] of queries, keys, values and an additive mask, by the model's own attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import eager_attention_forward

    scaling: float = module.scaling
    name = module.config._attn_implementation
    if name == "sdpa" and device.type == "cpu":  # as transformers' calls it, but for copies of shared heads

        def fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
            found = F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling, enable_gqa=True)
            return found.transpose(1, 2)

        return fused
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = function(module, query, keys, values, mask, scaling=scaling)[0]
        return found

    return attend
