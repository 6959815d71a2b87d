"""Loading checkpoints: the published layout, the checkpoints that are refused, and the shared prefix."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgecloud_sd.events import Prompt
from edgecloud_sd.models import hf, load, pairs, traits
from edgecloud_sd.models.cache import Cache
from edgecloud_sd.models.frontend import Frontend
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Return the pocket edge in the layout of Qwen2.5-Omni-3B: thinker, talker and vocoder in one checkpoint."""
    folder = tmp_path / "omni"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    omni = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(omni), encoding="utf-8")
    weights = {f"thinker.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    others = {"talker.codec_head.weight": torch.zeros(4, 4), "token2wav.some.weight": torch.zeros(2)}
    save_file(weights | others, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_whole_omni_checkpoint_loads_as_its_thinker(whole: Path, pipeline: Pipeline) -> None:
    loaded = load.load_model(whole)
    expected = pipeline.edge.thinker.state_dict()
    weights = loaded.thinker.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert loaded.eos == pipeline.edge.eos


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_loads_in_the_requested_dtype(dtype: str) -> None:
    assert load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype).thinker.dtype == getattr(torch, dtype)


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int3': choose one of float32, float16"):
        load.load_model(pairs.PAIRS["pocket"].edge, dtype="int3")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be loaded"):
        load.load_model(tmp_path)


def check_sides(edge: Frontend, cloud: Frontend) -> None:
    traits.check_pair(edge.name, traits.frontend_traits(edge), cloud.name, traits.frontend_traits(cloud))


def test_sides_with_different_end_of_caption_ids_are_not_a_pair(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="have different end-of-caption ids"):
        check_sides(pipeline.edge, replace(pipeline.cloud_model, eos=pipeline.cloud_model.eos | {0}))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    weights = load_file(folder / "model.safetensors")
    incomplete = {name: weight for name, weight in weights.items() if "layers.1." not in name and "lm_head" not in name}
    save_file(incomplete, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"cannot be loaded: it lacks \d+ weights"):
        load.load_model(folder)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="cannot be loaded"):
        load.load_model(folder)


def test_a_checkpoint_of_another_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(OSError, match="model_type is 'qwen2', and must be one of qwen2_5_omni"):
        load.load_model(tmp_path)


def test_logits_that_are_not_finite_raise_an_error(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pipeline.edge.open(Prompt((300, 301)))
    monkeypatch.setattr(pipeline.edge.thinker.lm_head, "forward", lambda hidden: hidden * torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in float32: its weights or the audio are at fault"):
        session.extend([301])


def test_the_two_published_checkpoints_give_the_published_pair() -> None:
    pair = pairs.find_pair("pocket", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B")
    assert pair == pairs.find_pair("qwen2.5-omni")


def test_an_unknown_pair_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown pair 'big': choose one of pocket, qwen2\.5-omni"):
        pairs.find_pair("big")


@pytest.fixture
def fresh(pipeline: Pipeline) -> hf.HFModel:
    """Return the cloud with the same weights and without computed prefixes."""
    return replace(pipeline.cloud_model)


@pytest.fixture
def prefill_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of positions of each prefill, prefixes included."""
    lengths: list[int] = []
    fill_cache = TextModel.fill_cache

    def counted(text: TextModel, embeddings: torch.Tensor, cache: Cache) -> None:
        lengths.append(len(embeddings))
        fill_cache(text, embeddings, cache)

    monkeypatch.setattr(TextModel, "fill_cache", counted)
    return lengths


def build_prompts(pipeline: Pipeline, *languages: str) -> list[Prompt]:
    return [
        pipeline.prompt(Request(clips.make_clip("evaluation", index).samples, language), "cloud")
        for index, language in enumerate(languages)
    ]


def test_a_prefix_is_the_ids_before_the_audio(pipeline: Pipeline) -> None:
    model, audio = pipeline.cloud_model, pipeline.cloud_model.audio_token
    (prompt,) = build_prompts(pipeline, "english")
    before = model.shared_prefix(prompt)
    assert len(before) > 2
    assert prompt.ids[: len(before) + 1] == (*before, audio)
    assert audio not in before
    assert model.shared_prefix(Prompt((5, 6, audio, 7))) == (5, 6)
    for ids in [
        (5, audio, 6, 7),
        (audio, 5, 6),
        (5, 6, 7),
    ]:  # a prefix of one id, an empty one, and a prompt without audio
        assert model.shared_prefix(Prompt(ids)) == ()
    assert len(model.shared_prefix(Prompt((5,) * hf.MAX_PREFIX_LENGTH + (audio, 7)))) == hf.MAX_PREFIX_LENGTH
    assert model.shared_prefix(Prompt((5,) * (hf.MAX_PREFIX_LENGTH + 1) + (audio, 7))) == ()


def test_a_prefix_is_computed_once_and_the_rest_of_the_prompt_for_each_clip(
    pipeline: Pipeline, fresh: hf.HFModel, prefill_lengths: list[int]
) -> None:
    prompts = build_prompts(pipeline, "chinese", "chinese", "english")
    shared = {fresh.shared_prefix(prompt) for prompt in prompts}
    assert len(shared) == 1  # the task follows the audio
    for prompt in prompts:
        fresh.open(prompt)
    n = len(shared.pop())
    assert prefill_lengths == [n, *(len(prompt.ids) - 1 - n for prompt in prompts)]


@pytest.mark.slow
def test_a_shared_prefix_changes_no_token(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for is_shared in (True, False):
        model = replace(pipeline.cloud_model)
        if not is_shared:
            monkeypatch.setattr(hf.HFModel, "shared_prefix", lambda *_: ())
        for prompt in build_prompts(pipeline, "chinese", "english"):
            session, context, rows = model.open(prompt), [prompt.last], []
            for _ in range(20):
                rows.append(session.extend(context[-1:])[0])
                context.append(int(rows[-1].argmax()))
            outputs.append((context, torch.stack(rows)))
    for (context, logits), (expected_context, expected) in zip(outputs[:2], outputs[2:], strict=True):
        assert context == expected_context
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_session_does_not_write_into_the_prefix_of_the_next(pipeline: Pipeline, fresh: hf.HFModel) -> None:
    first, second = build_prompts(pipeline, "chinese", "english")
    expected = fresh.open(first).extend([first.last, 300, 301])
    between = fresh.open(second)
    between.extend([second.last, 302])
    between.truncate(0)
    between.extend([303])
    assert torch.equal(fresh.open(first).extend([first.last, 300, 301]), expected)


@pytest.mark.slow
def test_sessions_opened_by_several_threads_share_one_prefix(
    pipeline: Pipeline, fresh: hf.HFModel, prefill_lengths: list[int]
) -> None:
    prompts = build_prompts(pipeline, "chinese", "english", "chinese", "english")
    expected = [pipeline.cloud_model.open(prompt).extend([prompt.last]) for prompt in prompts]
    prefill_lengths.clear()
    assert fresh.text  # built before the threads start, so that they share it
    with ThreadPoolExecutor(8) as threads:
        sessions = list(threads.map(fresh.open, prompts * 4))
    n = len(fresh.shared_prefix(prompts[0]))
    assert prefill_lengths.count(n) == 1
    for number, session in enumerate(sessions):
        assert torch.equal(session.extend([prompts[number % 4].last]), expected[number % 4])


def test_the_least_recently_used_prefix_is_dropped(
    pipeline: Pipeline, fresh: hf.HFModel, prefill_lengths: list[int]
) -> None:
    (prompt,) = build_prompts(pipeline, "chinese")
    others = [replace(prompt, ids=(300 + number, *prompt.ids)) for number in range(hf.MAX_PREFIXES)]
    for opened in (prompt, prompt, *others):
        fresh.open(opened)
    n = len(fresh.shared_prefix(prompt))
    assert prefill_lengths.count(n) == 1
    fresh.open(others[-1])
    assert prefill_lengths.count(n + 1) == hf.MAX_PREFIXES
    fresh.open(prompt)
    assert prefill_lengths.count(n) == 2
