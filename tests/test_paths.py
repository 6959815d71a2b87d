"""Texts for others are without the folders of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecloud_sd.host.paths import hide_folders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/u/data/manifest.json", "manifest.json"),
        ("/home/my name/model", "model"),
        (
            "/home/u/a.wav: no such file there, and no a.wav in /home/u, /home",
            "a.wav: no such file there, and no a.wav in u, home",
        ),
        ("key file '/home/u/keys': cannot be read", "key file 'keys': cannot be read"),
        ("option=/home/u/x, file:///home/u/y; 见/home/情/z。", "option=x, file://y; 见z。"),
        (r"C:\Users\me\a.wav: no such file", "a.wav: no such file"),
        ("accepted / verified (tokens/s, 1/2), and/or", "accepted / verified (tokens/s, 1/2), and/or"),
        (
            "http://127.0.0.1:8000/v1/models and Qwen/Qwen2.5-Omni-3B",
            "http://127.0.0.1:8000/v1/models and Qwen/Qwen2.5-Omni-3B",
        ),
        ("wav/a.wav in ../data and ./b/c or ~/d/e", "wav/a.wav in ../data and ./b/c or ~/d/e"),
        ("</b> is no folder", "</b> is no folder"),
        ("/proc/self/status has no VmHWM", "/proc/self/status has no VmHWM"),
        ("a\0/b/c\0/d", "a\0d"),
        (f"/{'b' * 5000}/c: no such file", "c: no such file"),
    ],
)
def test_an_absolute_path_becomes_its_last_part(text: str, shown: str) -> None:
    assert hide_folders({"reasons": [text, 1, None]}) == {"reasons": [shown, 1, None]}
    assert hide_folders(shown) == shown


def test_a_folder_with_blanks_is_known_because_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "my own, clips"
    folder.mkdir()
    assert hide_folders(f"skipped: {folder}/a b.wav: is empty") == "skipped: a b.wav: is empty"


@pytest.mark.parametrize("field", ["file_id", "generated_text", "reference_captions", "prompt_text"])
def test_the_words_of_users_and_models_stay(field: str) -> None:
    assert hide_folders({field: "/he/ speaks, /a/b"}) == {field: "/he/ speaks, /a/b"}
