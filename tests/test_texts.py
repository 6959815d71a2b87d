"""Text that users write: encodings, lines, JSON and YAML."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.cloud.keys import read_keys
from edgecloud_sd.config import resolve
from edgecloud_sd.data.dataset import read_json
from edgecloud_sd.data.texts import (
    BadText,
    check_characters,
    has_visible_text,
    parse_json,
    parse_json_lines,
    parse_yaml,
    read_utf8,
    split_lines,
)
from edgecloud_sd.timing.profile import load_profile

PROFILE = "edge: {prefill: 010, forward: {1: 1e-3}}\ncloud: {prefill: 1, forward: {1: .5, 016: 0.5}}\nsource: 不\n"


@pytest.mark.parametrize(
    "text", ["", " \t\u3000\x85", "\u200b\ufeff\u2060", "\ufe0f\u0301", "\x00\x1b", "\u3164\u2800"]
)
def test_invisible_text_has_no_visible_text(text: str) -> None:
    assert not has_visible_text(text)
    assert all(has_visible_text(text + letter) for letter in "a1。情$☺")


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))), st.data())
def test_lines_end_at_carriage_returns_and_line_feeds_alone(lines: list[str], data: st.DataObject) -> None:
    lines = ["a", *lines]
    ends = [data.draw(st.sampled_from(["\r\n", "\n"])) for _ in lines[1:]]
    text = "a" + "".join(end + line for end, line in zip(ends, lines[1:], strict=True))
    assert split_lines(text) == lines
    assert split_lines("a\rb\u2028c\x85d\x0ce\x1cf") == ["a", "b\u2028c\x85d\x0ce\x1cf"]


def test_a_byte_order_mark_is_no_text_in_any_file_of_a_user(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        return tmp_path / name

    assert read_json(write("a.json", '{"情": 1}')) == {"情": 1}
    assert read_keys(write("keys", "0123456789abcdef\r\n")) == ("0123456789abcdef",)
    assert resolve({}, write("config.yaml", "k: 5")).k == (5,)
    assert load_profile(str(write("costs.yaml", PROFILE))).source == "不"


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("utf-16-le", "the byte-order mark of UTF-16"),
        ("utf-16-be", "the byte-order mark of UTF-16"),
        ("utf-32-le", "the byte-order mark of UTF-32"),
        ("utf-32-be", "the byte-order mark of UTF-32"),
        ("gb18030", ".*"),
    ],
)
def test_another_encoding_is_refused_with_the_file_and_advice(tmp_path: Path, encoding: str, reason: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\ufeff别过来", encoding=encoding)
    with pytest.raises(BadText, match=rf"text\.txt: is not text in UTF-8 \(byte \d: {reason}\); save it as UTF-8$"):
        read_utf8(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 1}', "names the key 'a' twice; remove one"),
        ('[{"file_id": "x", "b": {"c": 1, "c": 2}}]', "names the key 'c' twice"),
        ('{"file_id": "x", "c": 1, "c": 2}', "names the key 'c' twice in the object of 'x'"),
        ('{"a": 1,}', "is not JSON"),
    ],
)
def test_bad_json_is_refused_with_the_place(text: str, problem: str) -> None:
    with pytest.raises(BadText, match=f"^here: {problem}"):
        parse_json(text, "here")
    with pytest.raises(BadText, match=f"^here, line 3: {problem}"):
        parse_json_lines(f"{{}}\n\n{text}", "here")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (["a", {"b": "c\ud800"}], "here, entry 1, b: has U\\+D800, half of a character, at 1"),
        ({"a\udfff": 1}, "here: has U\\+DFFF, half of a character, at 1"),
        ({"\udc80": "\udc80"}, "here: has U\\+DC80"),
    ],
)
def test_half_a_character_is_refused_with_its_place(value: object, place: str) -> None:
    with pytest.raises(BadText, match=f"^{place}") as error:
        check_characters(value, "here")
    str(error.value).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda some: st.lists(some) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), some),
    max_leaves=5,
)


@given(json_values)
def test_good_json_is_read_as_json_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value), "here") == value
    assert parse_json_lines(json.dumps(value, ensure_ascii=False), "here") == [(1, value)]
    check_characters(value, "here")


SCALARS = ("010", "1:30", "0x10", "0o7", "1e3", "yes", "no", "on", "true", "2024-01-01", "1_000", "0b1", "-.5", "<<")


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_scalar_of_yaml_is_the_text_that_is_written(scalar: str) -> None:
    text = f"a: {scalar}\nb: [{scalar}, '{scalar}']\n{scalar}:\n"
    assert parse_yaml(text, "here") == {"a": scalar, "b": [scalar] * 2, scalar: None}


@given(st.dictionaries(st.text(min_size=1), st.lists(st.text())))
def test_quoted_text_survives_yaml(value: dict[str, list[str]]) -> None:
    dumped = yaml.safe_dump(value, default_style='"', allow_unicode=False)
    if any(0xD800 <= ord(character) <= 0xDFFF for text in chain(value, *value.values()) for character in text):
        with pytest.raises(BadText, match="half of a character"):
            parse_yaml(dumped, "here")
    else:
        assert parse_yaml(dumped, "here") == parse_yaml(dumped, "here", is_typed=True) == value


def test_typed_yaml_has_decimal_numbers_and_booleans_alone() -> None:
    numbers = parse_yaml("[010, 1e3, -.5, +2, 3., true, False, .inf, null, ~, 1:30, 0x10, yes, '5', 1_0]", "here", True)
    texts = ["1:30", "0x10", "yes", "5", "1_0"]
    assert numbers == [10, 1000.0, -0.5, 2, 3.0, True, False, float("inf"), None, None, *texts]
    assert [type(number) for number in numbers[:5]] == [int, float, float, int, float]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "is not YAML (line 4 names the key 'c' twice"),
        ("a: !!int 010", "is not YAML (line 1 has the tag 'tag:yaml.org,2002:int'; leave tags out"),
        ("a: !bool maybe", "is not YAML"),
        ("a: &x [*x]", "is not YAML"),
        ("? [1]\n: 2", "is not YAML"),
        ("[" * 500, "is not YAML"),
        (f"a: {'1' * 5000}", "is not YAML"),
        ('a: ["\\ud800"]', ", a, entry 0: has U+D800"),
    ],
    ids=lambda text: text[:12],
)
def test_bad_yaml_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(BadText) as error:
        parse_yaml(text, "here", is_typed=True)
    assert str(error.value).startswith("here" + problem if problem[0] == "," else f"here: {problem}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "text"), [("k", "010"), ("output-name", "1e3"), ("shadow", "no"), ("link", "5g")])
def test_an_option_reads_the_same_in_a_file_and_on_the_command_line(tmp_path: Path, option: str, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{option}: {text}")
    assert resolve({}, file) == resolve({option: text})


def test_numbers_of_a_profile_are_decimal(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE, encoding="utf-8")
    loaded = load_profile(str(path))
    assert (loaded.edge.prefill, loaded.edge.step, loaded.cloud.forward) == (10, 0.001, ((1, 0.5), (16, 0.5)))
