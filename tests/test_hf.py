"""Loading checkpoints: the published layout by the same code as the pocket pair, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgecloud_sd import pairs
from edgecloud_sd.captioner import Captioner
from edgecloud_sd.models import hf
from edgecloud_sd.records import Prompt


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The pocket edge laid out as Qwen/Qwen2.5-Omni-3B and -7B are: thinker, talker and vocoder in one checkpoint."""
    folder = tmp_path / "omni"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    omni = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(omni), encoding="utf-8")
    weights = {f"thinker.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    others = {"talker.codec_head.weight": torch.zeros(4, 4), "token2wav.some.weight": torch.zeros(2)}
    save_file(weights | others, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_whole_omni_checkpoint_gives_its_thinker(whole: Path, captioner: Captioner) -> None:
    loaded = hf.load(whole)
    expected = captioner.edge.thinker.state_dict()
    found = loaded.thinker.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.eos == captioner.edge.eos


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_number_formats_are_kept(dtype: str) -> None:
    assert hf.load(pairs.PAIRS["pocket"].edge, dtype=dtype).thinker.dtype == getattr(torch, dtype)


def test_an_unknown_number_format_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int3': choose one of float32, float16"):
        hf.load(pairs.PAIRS["pocket"].edge, dtype="int3")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be loaded"):
        hf.load(tmp_path)


def check(edge: hf.Frontend, cloud: hf.Frontend) -> None:
    pairs.check(edge.name, pairs.traits(edge), cloud.name, pairs.traits(cloud))


def test_sides_with_other_tokenizers_are_no_pair(captioner: Captioner) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {**captioner.edge.tokenizer.get_vocab(), "more": 9999}

    with pytest.raises(ValueError, match="have different tokenizers, so they are not a pair"):
        check(captioner.edge, replace(captioner.cloud, tokenizer=Other()))


def test_sides_that_end_captions_differently_are_no_pair(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="have different end-of-caption ids"):
        check(captioner.edge, replace(captioner.cloud, eos=captioner.cloud.eos | {0}))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name and "lm_head" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"cannot be loaded: it lacks \d+ weights"):
        hf.load(folder)


def test_a_cut_off_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="cannot be loaded"):
        hf.load(folder)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(OSError, match="it is a qwen2, not one of qwen2_5_omni"):
        hf.load(tmp_path)


def test_logits_that_are_not_finite_raise(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    session = captioner.edge.open(Prompt((300, 301)))
    monkeypatch.setattr(captioner.edge.thinker.lm_head, "forward", lambda hidden: hidden * torch.nan)
    with pytest.raises(FloatingPointError, match=r"not finite in torch\.float32"):
        session.extend([301])


def test_the_two_published_names_are_the_published_pair() -> None:
    named = pairs.find("pocket", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B")
    assert named == pairs.find("qwen2.5-omni")


def test_an_unknown_pair_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown pair 'big': choose one of pocket, qwen2\.5-omni"):
        pairs.find("big")
