"""Models with random weights: their dimensions, dtypes, reproducibility, labels and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgecloud_sd.cloud import engine
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.config import resolve
from edgecloud_sd.events import Prompt
from edgecloud_sd.host import limits
from edgecloud_sd.measure import quality
from edgecloud_sd.models import dummy, hf, load, memory, pairs, traits
from edgecloud_sd.models.devices import DTYPES, QUANTISED_DTYPES
from edgecloud_sd.models.pairs import DUMMY, PAIRS
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.strategy import Strategy

pytestmark = pytest.mark.slow  # these tests take several seconds

PUBLISHED = PAIRS["qwen2.5-omni"]


def write_config(folder: Path, **text: Any) -> Path:
    """Write a config.json like the published one, with a smaller text model and audio tower; return the folder."""
    config = json.loads((dummy.DIMENSIONS_FOLDER / "Qwen2.5-Omni-3B.json").read_text(encoding="utf-8"))
    config["text_config"] |= {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, **text,
    }  # fmt: skip
    text = config["text_config"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2 if isinstance(text["hidden_size"], int) else 8
    text["rope_parameters"]["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config["audio_config"] |= {
        "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
        "output_dim": config["text_config"]["hidden_size"],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_config(tmp_path / "small")


def decode_greedily(model: hf.HFModel, count: int = 12) -> tuple[list[int], torch.Tensor]:
    """Return the ids of a greedy caption and their logits."""
    session = model.open(Prompt((5, 300, 301, 302)))
    rows = [session.extend([303])]
    for _ in range(count - 1):
        rows.append(session.extend([int(rows[-1].argmax())]))
    logits = torch.cat(rows)
    return logits.argmax(1).tolist(), logits


@pytest.mark.parametrize(
    ("model", "parameters", "rows"), [(PUBLISHED.edge, 4.03e9, 151_936), (PUBLISHED.cloud, 8.26e9, 152_064)]
)
def test_the_published_dimensions_give_the_published_sizes(model: str, parameters: float, rows: int) -> None:
    config = dummy.load_dummy_config(model)
    assert config.text_config.vocab_size == rows
    assert dummy.estimate_memory_need(dummy._build_empty_thinker(config), "float32").parameters == pytest.approx(
        parameters, rel=2e-3
    )


def test_the_published_edge_needs_about_a_third_of_the_memory_in_int8() -> None:
    thinker = dummy._build_empty_thinker(dummy.load_dummy_config(PUBLISHED.edge))
    assert (
        dummy.estimate_memory_need(thinker, "int8").loaded
        < 0.35 * dummy.estimate_memory_need(thinker, "float32").loaded
    )
    assert dummy.estimate_memory_need(thinker, "float32").loading < 24e9


@pytest.mark.parametrize("dtype", DTYPES + QUANTISED_DTYPES)
def test_a_config_alone_makes_a_model_with_finite_logits_and_varied_ids(dtype: str, folder: Path) -> None:
    model = load.load_model(folder, dtype=dtype, weights=DUMMY)
    ids, logits = decode_greedily(model)
    assert len(set(ids)) > 3
    assert logits.isfinite().all()
    assert 0.5 < logits.float().std() < 2.5
    need = dummy.estimate_memory_need(dummy._build_empty_thinker(dummy.load_dummy_config(folder)), dtype)
    scales = [buffer for name, buffer in model.thinker.named_buffers() if "scale" in name]
    assert need.loaded == sum(tensor.numel() * tensor.itemsize for tensor in (*model.thinker.parameters(), *scales))
    assert not any(tensor.is_meta for tensor in (*model.thinker.parameters(), *model.thinker.buffers()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_deep_model_keeps_the_scale_of_its_logits(dtype: str, tmp_path: Path) -> None:
    model = load.load_model(write_config(tmp_path / "deep", num_hidden_layers=64), dtype=dtype, weights=DUMMY)
    ids, logits = decode_greedily(model)
    assert len(set(ids)) > 3
    assert 0.5 < logits.float().std() < 2.5


def test_weights_are_equal_in_every_run_and_dtype_and_differ_between_tensors(folder: Path) -> None:
    one, same, half = (
        load.load_model(folder, dtype=dtype, weights=DUMMY) for dtype in ("float32", "float32", "bfloat16")
    )
    for name, value in one.thinker.state_dict().items():
        assert torch.equal(value, same.thinker.state_dict()[name])
        assert torch.equal(value, half.thinker.state_dict()[name].float())
    tensors = [value.flatten()[:50] for value in one.thinker.state_dict().values() if value.dim() == 2]
    assert not any(len(a) == len(b) and torch.equal(a, b) for a, b in pairwise(tensors))


def test_position_tables_equal_those_of_a_model_built_by_transformers(folder: Path) -> None:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = dummy.load_dummy_config(folder)
    config.vision_config.depth, config.vision_config.hidden_size = (
        1,
        64,
    )  # a vision tower of the published size takes a minute
    usual = Qwen2_5OmniThinkerForConditionalGeneration(config).model
    dummy_model = load.load_model(folder, weights=DUMMY).thinker.model
    for part in ("audio_tower", "language_model"):
        expected = dict(getattr(usual, part).named_buffers())
        buffers = dict(getattr(dummy_model, part).named_buffers())
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffers[name], expected[name]) for name in expected)


def test_tied_embeddings_are_one_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    thinker = load.load_model(folder, weights=DUMMY).thinker
    assert thinker.lm_head.weight is thinker.get_input_embeddings().weight
    quantised = load.load_model(folder, dtype="int8", weights=DUMMY).thinker
    head, table = quantised.lm_head, quantised.get_input_embeddings().weight.float()
    assert torch.allclose(head.weight * head.scale.float()[:, None], table, atol=float(head.scale.max()))


def test_every_id_decodes_and_the_published_sides_are_a_pair() -> None:
    edge, cloud = (load.load_frontend(checkpoint, DUMMY) for checkpoint in (PUBLISHED.edge, PUBLISHED.cloud))
    traits.check_pair(edge.name, traits.frontend_traits(edge), cloud.name, traits.frontend_traits(cloud))
    tokens = len(edge.tokenizer.tokenizer)
    wrapped = [300, 151_935 % tokens]
    assert edge.tokenizer.decode([7 * tokens + 300, 151_935]) == edge.tokenizer.tokenizer.decode(wrapped)
    assert edge.name == f"{PUBLISHED.edge}-dummy"


def test_features_have_the_mel_bins_of_the_audio_tower(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["audio_config"]["num_mel_bins"] = 80
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pipeline = Pipeline(pairs.find_pair("pocket", str(folder), str(folder), DUMMY))
    prompt = pipeline.prompt(Request(np.zeros(16_000, dtype=np.float32)), "edge")
    assert prompt.features is not None
    assert prompt.features.shape[0] == 80
    pipeline.edge.open(prompt)


def test_a_pair_of_configs_decodes_losslessly_and_has_dummy_in_its_name(tmp_path: Path) -> None:
    small, large = (
        write_config(tmp_path / "small"),
        write_config(tmp_path / "large", num_hidden_layers=4, vocab_size=1008),
    )
    pair = pairs.find_pair("pocket", str(small), str(large), DUMMY)
    assert pair.name == "small+large-dummy"
    pipeline = Pipeline(pair, edge_dtype="int8")
    request = Request(np.random.default_rng(1).normal(0, 0.1, 16_000).astype(np.float32))
    expected = pipeline.trace(request, Strategy("cloud"), 40).tokens
    assert pipeline.trace(request, Strategy("speculative", k=3), 40).tokens == expected


def test_padding_rows_are_zero_and_their_ids_are_never_emitted(folder: Path) -> None:
    model = load.load_model(folder, weights=DUMMY)
    assert not model.thinker.lm_head.weight[-10:].any()
    assert model.thinker.lm_head.weight[:-10].any(1).all()
    _, logits = decode_greedily(model, 40)
    assert logits.argmax(1).max() < 990


def test_the_pair_name_ends_in_dummy_for_dummy_weights() -> None:
    settings = resolve({"pair": "qwen2.5-omni", "weights": DUMMY})
    pair = settings.run_pair
    assert pair.name == "qwen2.5-omni-dummy"
    assert pairs.find_pair("qwen2.5-omni") == PUBLISHED


def test_vllm_refuses_dummy_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match="--weights: dummy works only with --engine transformers"):
        engine.load_engine("vllm", str(folder), "cpu", "float32", {}, DUMMY)


def test_quality_scores_of_dummy_weights_are_null_with_a_reason() -> None:
    scores = quality.score(["他很高兴"], [["他很高兴"]], "chinese", meaningless="weights are random")
    assert scores.corpus == dict.fromkeys(quality.QUALITY_METRICS)
    assert scores.per_clip == dict.fromkeys(quality.QUALITY_METRICS, (None,))
    assert scores.reasons == dict.fromkeys(quality.QUALITY_METRICS, "weights are random")


def test_a_checkpoint_without_usable_dimensions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dimensions of 'Qwen/Other': give a folder with a config\.json"):
        load.load_model("Qwen/Other", weights=DUMMY)
    with pytest.raises(OSError, match="cannot be loaded"):
        load.load_model(tmp_path, weights=DUMMY)
    with pytest.raises(ValueError, match="vocab_size 100 is less than the 640 tokens: raise it"):
        load.load_model(write_config(tmp_path / "short", vocab_size=100), weights=DUMMY)


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        memory,
        "find_memory_budgets",
        lambda *_: iter([memory.MemoryBudget(200_000, "0 GB are free", "loaded", "buy more")]),
    )
    with pytest.raises(ValueError, match=r"small-dummy' needs 0\.001 GB in float32, and 0 GB are free: buy more$"):
        load.load_model(folder, weights=DUMMY)


@pytest.mark.parametrize(
    ("text", "audio", "message"),
    [
        (
            {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 3},
            {},
            r"num_hidden_layers. \(5\) must be equal",
        ),
        ({"num_attention_heads": 5}, {}, "hidden_size 64 must be a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, {}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"intermediate_size": -1}, {}, "intermediate_size must be at least 1, not -1"),
        ({"hidden_size": "wide"}, {}, "hidden_size"),
        ({}, {"output_dim": 32}, "output_dim 32 of the audio tower must equal hidden_size 64"),
        ({}, {"encoder_attention_heads": 3}, "d_model 32 must be a multiple of encoder_attention_heads 3"),
    ],
)
def test_inconsistent_sizes_give_an_error_of_one_line(
    folder: Path, text: dict[str, Any], audio: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= text
    config["audio_config"] |= audio
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(OSError, match=message) as refused:
        load.load_model(folder, weights=DUMMY)
    assert len(str(refused.value).splitlines()) == 1


def test_only_vocabulary_tables_end_in_padding(tmp_path: Path) -> None:
    thinker = load.load_model(write_config(tmp_path / "square", vocab_size=704, hidden_size=704), weights=DUMMY).thinker
    ends = {
        name: value[dummy.unpadded_size(704) :] for name, value in thinker.state_dict().items() if len(value) == 704
    }
    padded = {name for name, value in ends.items() if not name.endswith("bias") and not value.any()}
    assert padded == {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert len(ends) > 10


def test_dummy_weights_must_fit_in_the_memory_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "read_limits", lambda: SimpleNamespace(memory_bytes=1, monitored_bytes=None))
    with pytest.raises(ValueError, match="small-dummy' needs"):
        load.load_model(folder, weights=DUMMY)


PEAK = r"""
import re, sys
from pathlib import Path
from edgecloud_sd.models.load import load_model
from edgecloud_sd.models.pairs import PAIRS
def peak():  # getrusage would return the peak of the parent process
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
load_model(PAIRS["pocket"].edge, dtype=sys.argv[2], weights="dummy")
before = peak()
load_model(sys.argv[1], dtype=sys.argv[2], weights="dummy")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_load_never_holds_two_copies_of_a_model(dtype: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "wide", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)
    need = dummy.estimate_memory_need(dummy._build_empty_thinker(dummy.load_dummy_config(folder)), dtype)
    done = subprocess.run([sys.executable, "-c", PEAK, folder, dtype], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 1024 * int(done.stdout) < 1.3 * need.loading + 50e6
    assert need.loaded > 150e6


def test_vocabulary_sizes_may_differ_by_the_padding_alone() -> None:
    dummy.check_vocab_sizes(151_936, 152_064)
    dummy.check_vocab_sizes(152_064, 151_936)
    assert (dummy.unpadded_size(1000), dummy.unpadded_size(50)) == (990, 49)
    for edge, cloud in ((5000, 700), (700, 5000)):
        with pytest.raises(ValueError, match=f"vocab_size {edge} of the edge and {cloud} of the cloud"):
            dummy.check_vocab_sizes(edge, cloud)


def test_a_pair_with_different_vocabulary_sizes_is_refused_at_load(tmp_path: Path) -> None:
    edge, cloud = write_config(tmp_path / "edge", vocab_size=5000), write_config(tmp_path / "cloud", vocab_size=1000)
    pipeline = Pipeline(pairs.find_pair("pocket", str(edge), str(cloud), DUMMY))
    with pytest.raises(ValueError, match="vocab_size 5000 of the edge and 1000"):
        pipeline.prepare("speculative")


@pytest.mark.parametrize(("edge", "cloud"), [(DUMMY, pairs.REAL), (pairs.REAL, DUMMY)])
def test_an_edge_and_a_server_must_both_have_dummy_weights_or_neither(edge: str, cloud: str) -> None:
    served = LocalCloud(PAIRS["pocket"].cloud, weights=cloud)
    connection: Any = SimpleNamespace(identity=served.identity)
    pipeline = Pipeline(pairs.find_pair("pocket", weights=edge), cloud=connection)
    with pytest.raises(ValueError, match="do not both have dummy weights: --weights"):
        pipeline.prepare("speculative")
