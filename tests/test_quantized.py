"""Weights in 8 and 4 bits: their accuracy, every shape, and the memory of a load."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgecloud_sd.cloud.__main__ import main
from edgecloud_sd.config import ConfigError, resolve
from edgecloud_sd.events import Prompt
from edgecloud_sd.models import devices, hf, load, memory, pairs, quantized
from edgecloud_sd.models.quantized import (
    GROUP_SIZE,
    MIN_ROWS_TO_UNPACK,
    HalfEmbedding,
    HalfLinear,
    Int4Linear,
    Int8Linear,
)
from edgecloud_sd.pipeline import Pipeline

pytestmark = pytest.mark.slow  # these tests take several seconds

SHAPES = [(640, 96), (96, 256), (48, 96), (1008, 2048), (16, 32)]  # weights that both kernels accept
ODD = [(30, 50), (7, 100), (1, 1), (70, 64), (5, 2048)]  # weights that the int4 kernel, or neither, accepts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def build_linear(n: int, k: int) -> nn.Linear:
    layer = nn.Linear(k, n)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 10, n)[:, None])  # rows of different scales
        layer.bias.normal_()
    return layer.requires_grad_(False)


def unpack_int4(scales: Tensor, q: Tensor) -> Tensor:
    """Return the weights [N, K] that the int4 numbers `q` represent."""
    scale, zero = (scales[..., part].T.repeat_interleave(GROUP_SIZE, 1).float() for part in (0, 1))
    return (q - 8) * scale + zero


@pytest.mark.parametrize(("n", "k"), SHAPES + ODD)
def test_int8_weights_are_within_half_a_step(n: int, k: int) -> None:
    weight = build_linear(n, k).weight
    before = weight.clone()
    q, scale = quantized.quantise_int8(weight)
    assert (weight - q * scale.float()[:, None]).abs().le(0.51 * scale.float()[:, None]).float().mean() > 0.99
    # the largest of a row may exceed 127 steps, because a step is rounded to bfloat16
    assert (weight - q * scale.float()[:, None]).abs().le(1.01 * scale.float()[:, None]).all()
    assert torch.equal(weight, before)


def test_int4_weights_are_within_half_a_step_of_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_numbers: list[Tensor] = []
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu

    def record(q: Tensor, tiles: int) -> Tensor:
        packed_numbers.append(q)
        packed: Tensor = pack(q, tiles)
        return packed

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", record)
    weight = build_linear(64, 256).weight
    _, scales = quantized.quantise_int4(weight)
    (q,) = packed_numbers
    assert q.min() == 0
    assert q.max() == 15
    steps = scales[..., 0].T.repeat_interleave(GROUP_SIZE, 1).float()
    assert (weight - unpack_int4(scales, q)).abs().le(0.6 * steps).all()


def test_rows_and_groups_of_zeros_stay_zero() -> None:
    zeros = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(zeros.weight)
    for layer in (Int8Linear(zeros), Int4Linear(zeros)):
        assert torch.equal(layer(torch.randn(3, 64)), torch.zeros(3, 32))
    assert quantized.quantise_int8(zeros.weight)[1].all()  # no scale is 0
    assert quantized.quantise_int4(zeros.weight)[1][..., 0].all()


@pytest.mark.parametrize("rows", [1, 2, 5, MIN_ROWS_TO_UNPACK - 1, MIN_ROWS_TO_UNPACK, 70])
@pytest.mark.parametrize(("n", "k"), SHAPES + ODD)
def test_an_int8_layer_computes_with_its_rounded_weights_for_any_number_of_rows(n: int, k: int, rows: int) -> None:
    plain = build_linear(n, k)
    x = torch.randn(rows, k)
    layer = Int8Linear(plain)
    expected = x @ (layer.weight * layer.scale.float()[:, None]).T + plain.bias
    assert layer(x).dtype == torch.float32
    # relative to the terms of the sum: activations and sums of the kernel have the 8 bits of bfloat16
    bound = 2**-6 * (x.abs() @ (layer.weight * layer.scale.float()[:, None]).abs().T + plain.bias.abs())
    assert (layer(x) - expected).abs().le(bound).all()
    if rows >= MIN_ROWS_TO_UNPACK or k % 16:
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 70])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_an_int4_layer_equals_the_plain_one_within_its_rounding(n: int, k: int, rows: int) -> None:
    plain = build_linear(n, k)
    x = torch.randn(rows, k)
    steps = Int4Linear(plain).scales[..., 0].T.repeat_interleave(GROUP_SIZE, 1).float()
    bound = x.abs() @ (0.6 * steps).T + 2**-6 * (x.abs() @ plain.weight.abs().T + plain.bias.abs())
    assert (Int4Linear(plain)(x) - plain(x)).abs().le(bound).all()


def test_quantising_in_blocks_gives_the_weights_of_quantising_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build_linear(320, 64)
    whole8, whole4 = Int8Linear(plain), Int4Linear(plain)
    monkeypatch.setattr(quantized, "BLOCK_ELEMENTS", 2048)
    assert len(list(quantized.row_blocks(320, 64, 4 * 2048))) == 3
    assert torch.equal(Int8Linear(plain).weight, whole8.weight)
    assert torch.equal(Int4Linear(plain).weight, whole4.weight)
    assert torch.equal(Int4Linear(plain).scales, whole4.scales)


def test_leading_dimensions_are_preserved() -> None:
    plain = build_linear(48, 64)
    x = torch.randn(2, 3, 64)
    for layer in (Int8Linear(plain), Int4Linear(plain), HalfLinear(plain)):
        assert layer(x).shape == (2, 3, 48)
        assert torch.allclose(layer(x)[1, 2:], layer(x[1, 2:]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_lose_nothing(stored: torch.dtype) -> None:
    plain, table = build_linear(48, 64).to(stored), nn.Embedding(10, 8, dtype=stored)
    x = torch.randn(5, 64)
    assert torch.allclose(HalfLinear(plain)(x), plain.float()(x), atol=1e-5)
    ids = torch.tensor([3, 9, 3])
    assert torch.equal(HalfEmbedding(table)(ids), table(ids).float())


def compute_logits(model: hf.HFModel) -> Tensor:
    return model.open(Prompt((5, 300, 301, 302))).extend([303, 304])


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.2), ("int4", 1.0)])
def test_a_quantised_checkpoint_gives_nearly_the_same_logits(dtype: str, most: float, pipeline: Pipeline) -> None:
    model = load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype)
    near, exact = compute_logits(model), compute_logits(pipeline.edge)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).square().mean().sqrt() < most * exact.std()
    kinds = {type(module) for module in model.thinker.modules()}
    assert not kinds & {nn.Linear, nn.Embedding}
    assert (Int4Linear in kinds) == (dtype == "int4")
    audio_kinds = {type(module) for module in model.thinker.model.audio_tower.modules()}
    assert not audio_kinds & {Int8Linear, Int4Linear}


@pytest.mark.parametrize("dtype", devices.QUANTISED_DTYPES)
@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_quantised_checkpoint_takes_the_memory_that_was_predicted(dtype: str, side: str) -> None:
    checkpoint = getattr(pairs.PAIRS["pocket"], side)
    thinker = load.load_model(checkpoint, dtype=dtype).thinker
    need = memory.read_checkpoint_need(checkpoint, dtype)
    assert need is not None
    assert need.loaded == count_bytes(thinker)
    assert need.loaded < 0.4 * memory.BYTES_PER_PARAMETER["float32"] * need.parameters


def count_bytes(thinker: nn.Module) -> int:
    scales = [buffer for name, buffer in thinker.named_buffers() if "scale" in name]
    return sum(tensor.numel() * tensor.itemsize for tensor in (*thinker.parameters(), *scales))


def test_tied_embeddings_are_quantised_for_the_head_and_stay_in_half_precision_for_the_lookup() -> None:
    model = load.load_model(pairs.PAIRS["pocket"].edge)
    model.thinker.lm_head.weight = model.thinker.get_input_embeddings().weight
    table = model.thinker.lm_head.weight.detach().clone()
    quantized.quantise(model.thinker, "int8")
    assert isinstance(model.thinker.get_input_embeddings(), HalfEmbedding)
    assert torch.equal(model.thinker.get_input_embeddings().weight, table.bfloat16())
    assert torch.equal(model.thinker.lm_head.weight, quantized.quantise_int8(table)[0])
    shapes = {"lm_head.weight": (640, 96), "model.embed_tokens.weight": (640, 96), "model.norm.weight": (96,)}
    tied = {name: shape for name, shape in shapes.items() if "lm_head" not in name}
    for dtype in devices.QUANTISED_DTYPES:
        assert memory.count_loaded_bytes(tied, dtype) == memory.count_loaded_bytes(shapes, dtype)


def test_at_most_one_layer_exists_twice_during_quantisation() -> None:
    thinker = load.load_model(pairs.PAIRS["pocket"].edge).thinker
    converted: list[weakref.ref[Tensor]] = []
    most = 0

    def initialise(module: nn.Module) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in converted))
        if isinstance(module, nn.Linear):
            converted.append(weakref.ref(module.weight))

    quantized.quantise(thinker, "int8", initialise)
    assert len(converted) > 10
    assert most <= 1


@pytest.mark.parametrize("dtype", devices.QUANTISED_DTYPES)
def test_quantised_dtypes_are_refused_for_the_cloud(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"--cloud-dtype: '{dtype}' is for the edge alone .--edge-dtype.: choose one"):
        resolve({"cloud-dtype": dtype})
    with pytest.raises(
        SystemExit, match=f"--dtype: '{dtype}' is for the edge alone .--edge-dtype.: choose one of auto"
    ):
        main(["serve", "--dtype", dtype])
    assert resolve({"edge-dtype": dtype}).edge_dtype == dtype


def test_quantised_dtypes_are_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="'int8' is for an edge on the CPU, not on 'cuda': choose one of float32"):
        quantized.check_quantised_device("int8", "cuda")


@pytest.mark.parametrize(
    ("dtype", "owner", "kernel"),
    [("int8", torch, "_weight_int8pack_mm"), ("int4", torch.ops.aten, "_weight_int4pack_mm_for_cpu")],
)
def test_a_machine_without_the_kernel_is_told_the_alternatives(
    dtype: str, owner: object, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not implemented for this CPU\nand much more")

    monkeypatch.setattr(owner, kernel, missing)
    message = (
        rf"'{dtype}' has no kernel on this machine \(not implemented for this CPU\): choose one of float32, float16"
    )
    with pytest.raises(ValueError, match=message):
        load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype)


@pytest.mark.parametrize(("n", "k", "is_int4"), [(16, 32, True), (48, 96, True), (24, 32, False), (16, 48, False)])
def test_shapes_that_the_int4_kernel_refuses_become_int8(n: int, k: int, is_int4: bool) -> None:
    assert quantized.fits_int4_kernel(n, k) == is_int4
    thinker: Any = nn.Module()
    thinker.model = nn.Module()
    thinker.model.audio_tower = nn.Module()
    thinker.lm_head = nn.Linear(k, n)
    quantized.quantise(thinker, "int4")
    assert type(thinker.lm_head) is (quantized.Int4Linear if is_int4 else quantized.Int8Linear)
    assert thinker.lm_head(torch.ones(1, k)).isfinite().all()
