"""Pairs of different vocabulary sizes: no side meets an id that it has no row for, and lossless stays lossless."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgecloud_sd.events import Drafted, Trace
from edgecloud_sd.gate import entropy_gate
from edgecloud_sd.models.pairs import PAIRS, find_pair
from edgecloud_sd.pipeline import Pipeline, Request, count_shared_ids
from edgecloud_sd.pocket import clips
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import profile

TOKENS, WIDE = 640, 768
LIMIT = 20  # tokens
CLOUD = Strategy("cloud")
LOSSLESS = Strategy("speculative", k=4)
MACHINES = profile.load_profile("laptop-gpu")


def widen(source: str, folder: Path) -> str:
    """Return a copy of a checkpoint with more rows, each a little more likely than some row of a token."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = WIDE
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    copied = torch.randperm(TOKENS - 6, generator=torch.Generator().manual_seed(0))[: WIDE - TOKENS] + 6
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = torch.cat([weight, 1.1 * weight[copied]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def wide_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """Return the pocket pair with a wide edge, and with a wide cloud."""
    folder, pocket = tmp_path_factory.mktemp("wide"), PAIRS["pocket"]
    return {
        "edge": Pipeline(find_pair("pocket", widen(pocket.edge, folder / "edge"))),
        "cloud": Pipeline(find_pair("pocket", None, widen(pocket.cloud, folder / "cloud"))),
    }


def generate(model: object, pipeline: Pipeline, request: Request) -> tuple[int, ...]:
    """Return the greedy tokens of transformers' own `generate`."""
    prompt = pipeline.prompt(request)
    assert prompt.features is not None
    ids = torch.tensor([prompt.ids])
    output = model.thinker.generate(  # type: ignore[attr-defined]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=prompt.features[None],
        feature_attention_mask=torch.ones(1, prompt.features.shape[1], dtype=torch.long),
        do_sample=False,
        max_new_tokens=LIMIT,
    )
    return tuple(output[0, len(prompt.ids) :].tolist())


def drafted(trace: Trace) -> list[int]:
    return [token for _, event in trace.events if isinstance(event, Drafted) for token in event.draft.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["edge", "cloud"])
@pytest.mark.parametrize(
    ("strategy", "index"),
    [(replace(LOSSLESS, draft_ahead=6), 1), *((replace(LOSSLESS, k=k), 4) for k in (1, 4, None))],
)
def test_lossless_equals_the_cloud_and_the_edge_drafts_shared_ids_alone(
    wide_pipelines: dict[str, Pipeline], wide: str, strategy: Strategy, index: int
) -> None:
    pipeline, request = wide_pipelines[wide], Request(clips.make_clip("evaluation", index).samples)
    expected = pipeline.trace(request, CLOUD, LIMIT, profile=MACHINES).tokens
    trace = pipeline.trace(request, strategy, LIMIT, profile=MACHINES)
    assert trace.tokens == expected == generate(pipeline.cloud_model, pipeline, request)
    assert max(drafted(trace)) < TOKENS
    assert (max(expected) >= TOKENS) is (wide == "cloud")


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["edge", "cloud"])
def test_a_lossy_strategy_writes_ids_that_both_sides_or_the_cloud_alone_have(
    wide_pipelines: dict[str, Pipeline], wide: str
) -> None:
    pipeline, request = wide_pipelines[wide], Request(clips.make_clip("evaluation", 4).samples)
    trace = pipeline.trace(request, replace(LOSSLESS, gate=entropy_gate(0.5)), LIMIT)
    assert max(drafted(trace)) < TOKENS
    assert pipeline.text(trace.tokens)


def test_the_edge_alone_uses_all_its_ids(wide_pipelines: dict[str, Pipeline]) -> None:
    pipeline, request = wide_pipelines["edge"], Request(clips.make_clip("evaluation", 1).samples)
    tokens = pipeline.trace(request, Strategy("edge"), LIMIT).tokens
    assert tokens == generate(pipeline.edge, pipeline, request)
    assert max(tokens) >= TOKENS


def test_equal_sizes_are_not_masked(pipeline: Pipeline) -> None:
    assert [count_shared_ids(pipeline.edge, size) for size in (500, TOKENS, WIDE)] == [500, None, TOKENS]
