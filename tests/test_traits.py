"""A pair: one changed property of the tokenizer or of the audio features is refused by name, harmless changes pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgecloud_sd.models.frontend import read_frontend
from edgecloud_sd.models.load import load_frontend
from edgecloud_sd.models.pairs import DUMMY, PAIRS, find_pair
from edgecloud_sd.models.traits import Traits, check_pair, frontend_traits
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips

Fields = dict[str, Any]
TEMPLATE = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def edge() -> Traits:
    return frontend_traits(read_frontend(PAIRS["pocket"].edge))


def change(folder: Path, file: str, edit: Callable[[Fields], object]) -> Traits:
    """Return the traits of the pocket edge after an edit of one of its files."""
    copy = Path(shutil.copytree(PAIRS["pocket"].edge, folder / "edge", ignore=lambda *_: ["model.safetensors"]))
    content = json.loads((copy / file).read_text(encoding="utf-8"))
    edit(content)
    (copy / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return frontend_traits(read_frontend(copy))


def swap_ids(content: Fields) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_token(content: Fields) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 640, "content": "<tool>", "special": False})


def set_(*path: str | int, value: object) -> Callable[[Fields], None]:
    """Return an edit that sets one value, at a path of keys."""

    def edit(content: Fields) -> None:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


PREFIX_SPACE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
TOKENIZER, OPTIONS, AUDIO = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
CHANGES = {
    "tokenizers (vocabulary)": (TOKENIZER, swap_ids),
    "tokenizers (merges)": (TOKENIZER, lambda content: content["model"]["merges"].__delitem__(slice(-120, None))),
    "tokenizers (tokenizer_model)": (TOKENIZER, set_("model", "ignore_merges", value=True)),
    "tokenizers (normalizer)": (TOKENIZER, set_("normalizer", value={"type": "NFC"})),
    "tokenizers (pre_tokenizer)": (TOKENIZER, set_("pre_tokenizer", value=PREFIX_SPACE)),
    "tokenizers (post_processor)": (TOKENIZER, set_("post_processor", value=PREFIX_SPACE)),
    "tokenizers (decoder)": (TOKENIZER, set_("decoder", value={"type": "Fuse"})),
    "tokenizers (added_tokens)": (TOKENIZER, set_("added_tokens", 3, "rstrip", value=True)),
    "tokenizers (special_tokens)": (OPTIONS, set_("pad_token", value="<|im_start|>")),
    r"end-of-caption ids \(eos \[0, 2\] and \[2\]\)": ("generation_config.json", set_("eos_token_id", value=[2, 0])),
    r"audio tokens \(audio_bos 6 and 4\)": ("config.json", set_("audio_start_token_id", value=6)),
    r"audio tokens \(audio_eos 6 and 5\)": ("config.json", set_("audio_end_token_id", value=6)),
    r"audio features \(mel_bins 80 and 128, mel_filters\)": (AUDIO, set_("feature_size", value=80)),
    r"audio features \(hop_length 200 and 160\)": (AUDIO, set_("hop_length", value=200)),
    r"audio features \(mel_filters, n_fft 512 and 400\)": (AUDIO, set_("n_fft", value=512)),
    r"audio features \(max_samples 480000 and 4800000\)": (AUDIO, set_("chunk_length", value=30)),
    r"audio features \(padding_value 1.0 and 0.0\)": (AUDIO, set_("padding_value", value=1)),
    r"audio features \(dither 0.1 and 0.0\)": (AUDIO, set_("dither", value=0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", CHANGES)
def test_one_changed_property_is_refused_by_name(tmp_path: Path, edge: Traits, difference: str) -> None:
    other = change(tmp_path, *CHANGES[difference])
    name = difference if "\\" in difference else difference.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^one and two have different {name}, so they are not a pair: choose "):
        check_pair("one", other, "two", edge)


def test_every_trait_takes_part(edge: Traits) -> None:
    for field in fields(Traits):
        value = getattr(edge, field.name)
        changed: Fields = {field.name: (*value, 9) if isinstance(value, tuple) else f"{value}9"}
        other = replace(edge, **changed)
        refusing = edge if field.name != "chat_format" else replace(edge, chat_format="8")
        with pytest.raises(ValueError, match=field.name):
            check_pair("one", other, "two", refusing)


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (TOKENIZER, lambda content: content.update(reversed(list(content.items())))),
        (TOKENIZER, lambda content: content["model"].update(vocab=dict(reversed(content["model"]["vocab"].items())))),
        (TOKENIZER, lambda content: content["model"].update(merges=[" ".join(m) for m in content["model"]["merges"]])),
        (
            TOKENIZER,
            set_("truncation", value={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}),
        ),
        (OPTIONS, set_("padding_side", value="left")),
        (OPTIONS, set_("model_max_length", value=32768)),
        (OPTIONS, set_("chat_template", value=TEMPLATE)),
        (AUDIO, set_("processor_class", value="Qwen2_5OmniProcessor")),
    ],
)
def test_a_harmless_change_leaves_a_pair(
    tmp_path: Path, edge: Traits, file: str, edit: Callable[[Fields], None]
) -> None:
    check_pair("one", change(tmp_path, file, edit), "two", edge)


@pytest.mark.parametrize(("other", "is_pair"), [(TEMPLATE + "{# note #}", True), (TEMPLATE.replace("\n", ": "), False)])
def test_chat_templates_are_compared_by_what_they_write(tmp_path: Path, other: str, is_pair: bool) -> None:
    one, two = (
        change(tmp_path / str(number), OPTIONS, set_("chat_template", value=text))
        for number, text in enumerate((TEMPLATE, other))
    )
    if is_pair:
        check_pair("one", one, "two", two)
        return
    with pytest.raises(ValueError, match=r"tokenizers \(chat_format\)"):
        check_pair("one", one, "two", two)


def test_an_added_token_is_refused(tmp_path: Path, edge: Traits) -> None:
    with pytest.raises(ValueError, match=r"tokenizers \(added_tokens\)"):
        check_pair("one", change(tmp_path, TOKENIZER, add_token), "two", edge)


def test_the_published_pair_with_dummy_weights_is_a_pair() -> None:
    edge, cloud = (
        frontend_traits(load_frontend(name, DUMMY)) for name in ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B")
    )
    check_pair("3B", edge, "7B", cloud)


def test_every_mode_uses_the_ids_of_one_front_end(pipeline: Pipeline) -> None:
    request = Request(clips.make_clip("evaluation", 0).samples, transcription="aeiou <|im_end|>")
    alone = Pipeline(pipeline.pair, pipeline.cloud)
    prompts = [
        pipeline.prompt(request, "speculative"),
        pipeline.prompt(request, "edge"),
        alone.prompt(request, "cloud"),
    ]
    assert len({prompt.ids for prompt in prompts}) == 1
    assert "edge" not in vars(alone)  # its weights are not loaded


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_a_tokenizer_without_some_merges_is_refused_in_every_mode_with_a_cloud(
    pipeline: Pipeline, tmp_path: Path, mode: str
) -> None:
    change(tmp_path, *CHANGES["tokenizers (merges)"])
    shutil.copy(Path(PAIRS["pocket"].edge, "model.safetensors"), tmp_path / "edge")
    with pytest.raises(ValueError, match=r"different tokenizers \(merges\)"):
        Pipeline(find_pair("pocket", str(tmp_path / "edge")), pipeline.cloud).prepare(mode)


def test_the_traits_of_a_server_are_compared_too(pipeline: Pipeline) -> None:
    identity = pipeline.cloud.identity
    served = replace(identity, traits=replace(identity.traits, decoder="another"))
    sent = json.loads(json.dumps(asdict(served)))
    assert sent["traits"].keys() == Traits.__dataclass_fields__.keys()
    connection: Any = SimpleNamespace(identity=served)
    with pytest.raises(ValueError, match=r"different tokenizers \(decoder\), so they are not a pair"):
        pipeline.with_cloud(connection).prepare("cloud")
