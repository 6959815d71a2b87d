"""Weights in 8 and 4 bits: what they are, that any shape works, and that a model is never there twice."""

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
from edgecloud_sd.models.quantized import GROUP, MIN_ROWS_TO_UNPACK, HalfEmbedding, HalfLinear, Int4Linear, Int8Linear
from edgecloud_sd.pipeline import Captioner

pytestmark = pytest.mark.slow  # all of it takes long beside the rest

SHAPES = [(640, 96), (96, 256), (48, 96), (1008, 2048), (16, 32)]  # of weights that both kernels take
ODD = [(30, 50), (7, 100), (1, 1), (70, 64), (5, 2048)]  # and of weights that int4's, or both, do not


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def linear(n: int, k: int) -> nn.Linear:
    made = nn.Linear(k, n)
    with torch.no_grad():
        made.weight.mul_(torch.linspace(0.1, 10, n)[:, None])  # rows of different scales
        made.bias.normal_()
    return made.requires_grad_(False)


def unpacked(scales: Tensor, q: Tensor) -> Tensor:
    """What int4's whole numbers stand for: [N, K]."""
    scale, zero = (scales[..., each].T.repeat_interleave(GROUP, 1).float() for each in (0, 1))
    return (q - 8) * scale + zero


@pytest.mark.parametrize(("n", "k"), SHAPES + ODD)
def test_int8_is_as_near_as_half_a_step(n: int, k: int) -> None:
    weight = linear(n, k).weight
    before = weight.clone()
    q, scale = quantized.int8(weight)
    assert (weight - q * scale.float()[:, None]).abs().le(0.51 * scale.float()[:, None]).float().mean() > 0.99
    # the largest of a row may lie beyond 127 steps, as a step is rounded to bfloat16
    assert (weight - q * scale.float()[:, None]).abs().le(1.01 * scale.float()[:, None]).all()
    assert torch.equal(weight, before)


def test_int4_is_as_near_as_half_a_step_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    packing = torch.ops.aten._convert_weight_to_int4pack_for_cpu

    def noted(q: Tensor, tiles: int) -> Tensor:
        seen.append(q)
        packed: Tensor = packing(q, tiles)
        return packed

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", noted)
    weight = linear(64, 256).weight
    _, scales = quantized.int4(weight)
    (q,) = seen
    assert q.min() == 0
    assert q.max() == 15
    steps = scales[..., 0].T.repeat_interleave(GROUP, 1).float()
    assert (weight - unpacked(scales, q)).abs().le(0.6 * steps).all()


def test_rows_and_groups_of_zeros_stay_zeros() -> None:
    nothing = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(nothing.weight)
    for made in (Int8Linear(nothing), Int4Linear(nothing)):
        assert torch.equal(made(torch.randn(3, 64)), torch.zeros(3, 32))
    assert quantized.int8(nothing.weight)[1].all()  # nothing was divided by 0
    assert quantized.int4(nothing.weight)[1][..., 0].all()


@pytest.mark.parametrize("rows", [1, 2, 5, MIN_ROWS_TO_UNPACK - 1, MIN_ROWS_TO_UNPACK, 70])
@pytest.mark.parametrize(("n", "k"), SHAPES + ODD)
def test_int8_computes_with_its_weights_for_few_rows_and_many(n: int, k: int, rows: int) -> None:
    plain = linear(n, k)
    x = torch.randn(rows, k)
    made = Int8Linear(plain)
    expected = x @ (made.weight * made.scale.float()[:, None]).T + plain.bias
    assert made(x).dtype == torch.float32
    # relative to what is added up: activations and sums of the kernel have bfloat16's 8 bits
    bound = 2**-6 * (x.abs() @ (made.weight * made.scale.float()[:, None]).abs().T + plain.bias.abs())
    assert (made(x) - expected).abs().le(bound).all()
    if rows >= MIN_ROWS_TO_UNPACK or k % 16:
        assert torch.allclose(made(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 70])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_computes_what_the_plain_layer_does_but_for_its_rounding(n: int, k: int, rows: int) -> None:
    plain = linear(n, k)
    x = torch.randn(rows, k)
    steps = Int4Linear(plain).scales[..., 0].T.repeat_interleave(GROUP, 1).float()
    bound = x.abs() @ (0.6 * steps).T + 2**-6 * (x.abs() @ plain.weight.abs().T + plain.bias.abs())
    assert (Int4Linear(plain)(x) - plain(x)).abs().le(bound).all()


def test_a_large_weight_is_rounded_in_blocks_as_it_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear(320, 64)
    whole8, whole4 = Int8Linear(plain), Int4Linear(plain)
    monkeypatch.setattr(quantized, "BLOCK", 2048)
    assert len(list(quantized.blocks(320, 64, 4 * 2048))) == 3
    assert torch.equal(Int8Linear(plain).weight, whole8.weight)
    assert torch.equal(Int4Linear(plain).weight, whole4.weight)
    assert torch.equal(Int4Linear(plain).scales, whole4.scales)


def test_leading_dimensions_are_kept() -> None:
    plain = linear(48, 64)
    x = torch.randn(2, 3, 64)
    for made in (Int8Linear(plain), Int4Linear(plain), HalfLinear(plain)):
        assert made(x).shape == (2, 3, 48)
        assert torch.allclose(made(x)[1, 2:], made(x[1, 2:]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_what_is_stored_in_half_precision_loses_nothing(stored: torch.dtype) -> None:
    plain, table = linear(48, 64).to(stored), nn.Embedding(10, 8, dtype=stored)
    x = torch.randn(5, 64)
    assert torch.allclose(HalfLinear(plain)(x), plain.float()(x), atol=1e-5)
    ids = torch.tensor([3, 9, 3])
    assert torch.equal(HalfEmbedding(table)(ids), table(ids).float())


def logits(model: hf.HFModel) -> Tensor:
    return model.open(Prompt((5, 300, 301, 302))).extend([303, 304])


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.2), ("int4", 1.0)])
def test_a_checkpoint_in_fewer_bits_says_nearly_the_same(dtype: str, most: float, captioner: Captioner) -> None:
    model = load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype)
    near, exact = logits(model), logits(captioner.edge)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).square().mean().sqrt() < most * exact.std()
    kinds = {type(each) for each in model.thinker.modules()}
    assert not kinds & {nn.Linear, nn.Embedding}
    assert (Int4Linear in kinds) == (dtype == "int4")
    audio = {type(each) for each in model.thinker.model.audio_tower.modules()}
    assert not audio & {Int8Linear, Int4Linear}


@pytest.mark.parametrize("dtype", devices.QUANTISED_DTYPES)
@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_checkpoint_takes_what_memory_says_that_it_needs(dtype: str, side: str) -> None:
    checkpoint = getattr(pairs.PAIRS["pocket"], side)
    thinker = load.load_model(checkpoint, dtype=dtype).thinker
    need = memory.checkpoint_need(checkpoint, dtype)
    assert need is not None
    assert need.loaded == held(thinker)
    assert need.loaded < 0.4 * memory.BYTES["float32"] * need.parameters


def held(thinker: nn.Module) -> int:
    scales = [each for name, each in thinker.named_buffers() if "scale" in name]
    return sum(each.numel() * each.itemsize for each in (*thinker.parameters(), *scales))


def test_tied_embeddings_are_rounded_for_the_head_and_looked_up_as_they_are() -> None:
    model = load.load_model(pairs.PAIRS["pocket"].edge)
    model.thinker.lm_head.weight = model.thinker.get_input_embeddings().weight
    table = model.thinker.lm_head.weight.detach().clone()
    quantized.quantise(model.thinker, "int8")
    assert isinstance(model.thinker.get_input_embeddings(), HalfEmbedding)
    assert torch.equal(model.thinker.get_input_embeddings().weight, table.bfloat16())
    assert torch.equal(model.thinker.lm_head.weight, quantized.int8(table)[0])
    shapes = {"lm_head.weight": (640, 96), "model.embed_tokens.weight": (640, 96), "model.norm.weight": (96,)}
    tied = {name: shape for name, shape in shapes.items() if "lm_head" not in name}
    for dtype in devices.QUANTISED_DTYPES:
        assert memory.loaded_bytes(tied, dtype) == memory.loaded_bytes(shapes, dtype)


@pytest.mark.slow
def test_no_more_than_one_layer_is_there_twice() -> None:
    thinker = load.load_model(pairs.PAIRS["pocket"].edge).thinker
    done: list[weakref.ref[Tensor]] = []
    most = 0

    def fill(module: nn.Module) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(each() is not None for each in done))
        if isinstance(module, nn.Linear):
            done.append(weakref.ref(module.weight))

    quantized.quantise(thinker, "int8", fill)
    assert len(done) > 10
    assert most <= 1


@pytest.mark.parametrize("dtype", devices.QUANTISED_DTYPES)
def test_the_cloud_has_other_formats(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"--cloud-dtype: '{dtype}' is for the edge alone .--edge-dtype.: choose one"):
        resolve({"cloud-dtype": dtype})
    with pytest.raises(
        SystemExit, match=f"--dtype: '{dtype}' is for the edge alone .--edge-dtype.: choose one of auto"
    ):
        main(["serve", "--dtype", dtype])
    assert resolve({"edge-dtype": dtype}).edge_dtype == dtype


def test_a_gpu_has_other_formats() -> None:
    with pytest.raises(ValueError, match="'int8' is for an edge on the CPU, not on 'cuda': choose one of float32"):
        quantized.check_quantised_device("int8", "cuda")


@pytest.mark.parametrize(
    ("dtype", "owner", "kernel"),
    [("int8", torch, "_weight_int8pack_mm"), ("int4", torch.ops.aten, "_weight_int4pack_mm_for_cpu")],
)
def test_a_machine_without_the_kernel_says_what_to_take(
    dtype: str, owner: object, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not implemented for this CPU\nand much more")

    monkeypatch.setattr(owner, kernel, missing)
    message = rf"'{dtype}' has no kernel here \(not implemented for this CPU\): choose one of float32, float16"
    with pytest.raises(ValueError, match=message):
        load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype)


@pytest.mark.parametrize(("n", "k", "taken"), [(16, 32, True), (48, 96, True), (24, 32, False), (16, 48, False)])
def test_the_int4_kernel_takes_these_shapes_and_int8_the_others(n: int, k: int, taken: bool) -> None:
    assert quantized.takes_int4(n, k) == taken
    thinker: Any = nn.Module()
    thinker.model = nn.Module()
    thinker.model.audio_tower = nn.Module()
    thinker.lm_head = nn.Linear(k, n)
    quantized.quantise(thinker, "int4")
    assert type(thinker.lm_head) is (quantized.Int4Linear if taken else quantized.Int8Linear)
    assert thinker.lm_head(torch.ones(1, k)).isfinite().all()
