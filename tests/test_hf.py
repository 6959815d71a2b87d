"""Loading checkpoints: the published layout by the same code as the pocket pair, and what is refused."""

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
from edgecloud_sd.models import frontend, hf, load, pairs
from edgecloud_sd.models.cache import Cache
from edgecloud_sd.models.text import TextModel
from edgecloud_sd.pipeline import Captioner, Request
from edgecloud_sd.pocket import clips


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
    loaded = load.load_model(whole)
    expected = captioner.edge.thinker.state_dict()
    found = loaded.thinker.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.eos == captioner.edge.eos


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_number_formats_are_kept(dtype: str) -> None:
    assert load.load_model(pairs.PAIRS["pocket"].edge, dtype=dtype).thinker.dtype == getattr(torch, dtype)


def test_an_unknown_number_format_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int3': choose one of float32, float16"):
        load.load_model(pairs.PAIRS["pocket"].edge, dtype="int3")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be loaded"):
        load.load_model(tmp_path)


def check(edge: frontend.Frontend, cloud: frontend.Frontend) -> None:
    frontend.check_pair(edge.name, frontend.frontend_traits(edge), cloud.name, frontend.frontend_traits(cloud))


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
        load.load_model(folder)


def test_a_cut_off_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(pairs.PAIRS["pocket"].edge, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="cannot be loaded"):
        load.load_model(folder)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(OSError, match="it is a qwen2, not one of qwen2_5_omni"):
        load.load_model(tmp_path)


def test_logits_that_are_not_finite_raise(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    session = captioner.edge.open(Prompt((300, 301)))
    monkeypatch.setattr(captioner.edge.thinker.lm_head, "forward", lambda hidden: hidden * torch.nan)
    with pytest.raises(FloatingPointError, match=r"not finite in torch\.float32"):
        session.extend([301])


def test_the_two_published_names_are_the_published_pair() -> None:
    named = pairs.find_pair("pocket", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B")
    assert named == pairs.find_pair("qwen2.5-omni")


def test_an_unknown_pair_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown pair 'big': choose one of pocket, qwen2\.5-omni"):
        pairs.find_pair("big")


@pytest.fixture
def fresh(captioner: Captioner) -> hf.HFModel:
    """The cloud on the same weights, without the prefixes that it has computed."""
    return replace(captioner.cloud)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each prefill computes, of prefixes too."""
    lengths: list[int] = []
    fill = TextModel.fill

    def counted(text: TextModel, embeddings: torch.Tensor, cache: Cache) -> None:
        lengths.append(len(embeddings))
        fill(text, embeddings, cache)

    monkeypatch.setattr(TextModel, "fill", counted)
    return lengths


def prompts_of(captioner: Captioner, *languages: str) -> list[Prompt]:
    return [
        captioner.prompt(Request(clips.make_clip("evaluation", index).samples, language), "cloud")
        for index, language in enumerate(languages)
    ]


def test_a_prefix_is_what_stands_before_the_audio(captioner: Captioner) -> None:
    model, audio = captioner.cloud, captioner.cloud.audio_token
    (prompt,) = prompts_of(captioner, "english")
    before = model.prefix(prompt)
    assert len(before) > 2
    assert prompt.ids[: len(before) + 1] == (*before, audio)
    assert audio not in before
    assert model.prefix(Prompt((5, 6, audio, 7))) == (5, 6)
    for ids in [(5, audio, 6, 7), (audio, 5, 6), (5, 6, 7)]:  # one position, none, and nothing that must differ
        assert model.prefix(Prompt(ids)) == ()
    assert len(model.prefix(Prompt((5,) * hf.MAX_PREFIX_LENGTH + (audio, 7)))) == hf.MAX_PREFIX_LENGTH
    assert (
        model.prefix(Prompt((5,) * (hf.MAX_PREFIX_LENGTH + 1) + (audio, 7))) == ()
    )  # nobody may have it held for good


def test_a_prefix_is_computed_once_and_the_rest_for_every_clip(
    captioner: Captioner, fresh: hf.HFModel, fed: list[int]
) -> None:
    asked = prompts_of(captioner, "chinese", "chinese", "english")
    shared = {fresh.prefix(prompt) for prompt in asked}
    assert len(shared) == 1  # the task follows the audio
    for prompt in asked:
        fresh.open(prompt)
    n = len(shared.pop())
    assert fed == [n, *(len(prompt.ids) - 1 - n for prompt in asked)]


def test_a_shared_prefix_changes_nothing(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for shared in (True, False):
        model = replace(captioner.cloud)
        if not shared:
            monkeypatch.setattr(hf.HFModel, "prefix", lambda *_: ())
        for prompt in prompts_of(captioner, "chinese", "english"):
            session, context, rows = model.open(prompt), [prompt.last], []
            for _ in range(20):
                rows.append(session.extend(context[-1:])[0])
                context.append(int(rows[-1].argmax()))
            found.append((context, torch.stack(rows)))
    for (context, logits), (own, expected) in zip(found[:2], found[2:], strict=True):
        assert context == own
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_a_session_writes_is_not_in_the_prefix_of_the_next(captioner: Captioner, fresh: hf.HFModel) -> None:
    first, second = prompts_of(captioner, "chinese", "english")
    expected = fresh.open(first).extend([first.last, 300, 301])
    between = fresh.open(second)
    between.extend([second.last, 302])
    between.truncate(0)
    between.extend([303])
    assert torch.equal(fresh.open(first).extend([first.last, 300, 301]), expected)


def test_sessions_opened_at_once_share_one_prefix(captioner: Captioner, fresh: hf.HFModel, fed: list[int]) -> None:
    prompts = prompts_of(captioner, "chinese", "english", "chinese", "english")
    expected = [captioner.cloud.open(prompt).extend([prompt.last]) for prompt in prompts]
    fed.clear()
    assert fresh.text  # or each thread might make its own
    with ThreadPoolExecutor(8) as threads:
        sessions = list(threads.map(fresh.open, prompts * 4))
    n = len(fresh.prefix(prompts[0]))
    assert fed.count(n) == 1
    for number, session in enumerate(sessions):
        assert torch.equal(session.extend([prompts[number % 4].last]), expected[number % 4])


def test_only_the_last_few_prefixes_are_kept(captioner: Captioner, fresh: hf.HFModel, fed: list[int]) -> None:
    (prompt,) = prompts_of(captioner, "chinese")
    others = [replace(prompt, ids=(300 + number, *prompt.ids)) for number in range(hf.MAX_PREFIXES)]
    for each in (prompt, prompt, *others):
        fresh.open(each)
    n = len(fresh.prefix(prompt))
    assert fed.count(n) == 1
    fresh.open(others[-1])
    assert fed.count(n + 1) == hf.MAX_PREFIXES
    fresh.open(prompt)
    assert fed.count(n) == 2
