"""The user's own texts of the task: the files that give them, and the files that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgecloud_sd import config
from edgecloud_sd.data import prompts
from edgecloud_sd.data.task_texts import read_task_texts
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("own.txt", "Say how it sounds.\r\n", {"chinese": "Say how it sounds.", "english": "Say how it sounds."}),
        ("own.md", "\ufeff一行\n二行\n", {"chinese": "一行\n二行", "english": "一行\n二行"}),
        ("own.json", '{"english": "Say it."}', {"english": "Say it."}),
        ("own.YAML", "chinese: 说\nenglish: |\n  Say\n  it.\n", {"chinese": "说", "english": "Say\nit."}),
        ("own.yml", "Say it.", {"chinese": "Say it.", "english": "Say it."}),
    ],
)
def test_a_prompt_file_has_one_text_or_one_for_each_language(
    tmp_path: Path, name: str, content: str, texts: dict[str, str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    tasks = read_task_texts(tmp_path / name)
    assert (tasks.name, dict(tasks.texts)) == (name, texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt: cannot be read (No such file"),
        (
            "own.txt",
            b"\xff\xfeS",
            "own.txt: is not text in UTF-8 (byte 0: the byte-order mark of UTF-16); save it as UTF-8",
        ),
        ("own.txt", b" \n\xe2\x80\x8b", "own.txt: the text for chinese must have visible text, and is"),
        ("own.json", b"{", "own.json: is not JSON ("),
        ("own.yaml", b"a: [", "own.yaml: is not YAML ("),
        ("own.json", b"[1]", "the text for chinese must have visible text, and is [1]"),
        ("own.json", b"{}", "--prompt-file: own.json has no text for chinese: it has none"),
        ("own.json", b'{"chinese": 5}', "the text for chinese must have visible text, and is 5"),
        ("own.json", b'{"chinese": "A\\ud800"}', "chinese: has U+D800, half of a character, at 1"),
        ("own.yaml", b"klingon: nuqneH", "own.yaml: unknown language 'klingon': choose from chinese, english"),
        ("own.yaml", b"english: Say it.", "--prompt-file: own.yaml has no text for chinese: it has english"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        config.ConfigError, match=f"^--prompt-file: .*{re.escape(message.removeprefix('--prompt-file: '))}"
    ) as error:
        config.resolve({"prompt-file": str(tmp_path / name)})
    assert "\n" not in str(error.value)


def test_a_prompt_file_beside_a_prompt_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Say it.")
    with pytest.raises(config.ConfigError, match=r"^--prompt-type: 'detailed' has no meaning with --prompt-file"):
        config.resolve({"prompt-file": str(tmp_path / "own.txt"), "prompt-type": "detailed"})


def test_the_text_follows_the_audio_and_the_transcription(pipeline: Pipeline) -> None:
    request = Request(clips.make_clip("evaluation", 0).samples, "english", transcription="aeiou", task="sounds sad")
    text = pipeline.edge.tokenizer.decode(pipeline.prompt(request).ids)
    assert text.index("<|audio_eos|>") < text.index("aeiou") < text.index("sounds sad") < text.index("assistant")
    assert prompts.TASKS["english"]["default"] not in text


def test_control_tokens_in_a_prompt_file_are_text(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("say <|im_end|> and <|AUDIO|>")
    samples = clips.make_clip("evaluation", 0).samples
    own, shipped = (
        pipeline.prompt(Request(samples, "english", task=task)).ids
        for task in (config.resolve({"prompt-file": str(tmp_path / "own.txt")}).own_task("english"), None)
    )
    for token in prompts.CONTROL_TOKENS:
        control = pipeline.edge.tokenizer.convert_tokens_to_ids(token)
        assert own.count(control) == shipped.count(control)
