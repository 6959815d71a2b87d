"""Text that users write: files in UTF-8, and lines, JSON and YAML read as their writer meant them."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

BYTE_ORDER_MARKS = {  # none is valid UTF-8; UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols by category, without any ink


class BadText(ValueError):
    """A text that cannot be read. The message names the file, the place and the fault."""


def has_visible_text(text: str) -> bool:
    """Return whether a letter, digit, punctuation mark or symbol is in `text`.

    Spaces, control and format characters, combining marks and variation selectors are not visible alone.
    """
    return any(unicodedata.category(character)[0] in "LNPS" and character not in BLANK_LETTERS for character in text)


def read_utf8(path: Path, kind: str = "text") -> str:
    """Return the text of a file without its byte-order mark. Raise BadText unless it is UTF-8, and OSError."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marked = (
            f"the byte-order mark of {name}" for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)
        )
        problem = f"is not {kind} in UTF-8 (byte {error.start}: {next(marked, error.reason)}); save it as UTF-8"
        raise BadText(f"{path}: {problem}") from None


def split_lines(text: str) -> list[str]:
    """Return the lines of a text. Only CR and LF end a line: U+2028, U+0085 and form feeds are text."""
    return re.split("\r\n|\r|\n", text)


def parse_json(text: str, place: str) -> Any:
    """Return the value of a JSON text. Raise BadText, beginning with `place`, for bad JSON and for a repeated key."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique:
                owner = f" in the object of {unique['file_id']!r}" if "file_id" in unique else ""
                raise BadText(f"{place}: names the key {key!r} twice{owner}; remove one")
            unique[key] = value
        return unique

    try:
        return json.loads(text, object_pairs_hook=to_dict)
    except BadText:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with too many digits
        raise BadText(f"{place}: is not JSON ({error})") from error


def parse_json_lines(text: str, place: str) -> list[tuple[int, Any]]:
    """Return number and value of each line of JSON Lines that is not blank. Raise BadText as `parse_json` does."""
    lines = enumerate(split_lines(text), 1)
    return [(number, parse_json(line, f"{place}, line {number}")) for number, line in lines if line.strip()]


def check_characters(value: Any, place: str) -> None:
    """Raise BadText, beginning with the place inside `value`, for half of a surrogate pair in its keys and texts."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, place)
            check_characters(item, f"{place}, {key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_characters(item, f"{place}, entry {number}")
    elif isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
        error = f"{place}: has U+{ord(half[0]):04X}, half of a character, at {half.start()}; write the whole character"
        raise BadText(error.encode("utf-8", "backslashreplace").decode())


def parse_yaml(text: str, place: str, is_typed: bool = False) -> Any:
    """Return the value of a YAML text, with each scalar as the text that is written, or None for null.

    So `010`, `1:30`, `0x10`, `yes` and dates are texts, as on a command line, and `.inf` is `inf`. With `is_typed`,
    decimal numbers, true and false become values. Raise BadText, beginning with `place`, for bad YAML, a tag, and a key
    that a map names twice.
    """
    import yaml

    try:
        value = yaml.load(text, _yaml_loader(is_typed))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number with too many digits
        raise BadText(f"{place}: is not YAML ({_explain_yaml(error)})") from None
    check_characters(value, place)
    return value


def _explain_yaml(error: Exception) -> str:
    """Return the problem and its place without the text around it, which may be a part of a password."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    reason = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    return f"{reason}, in line {mark.line + 1}, column {mark.column + 1}"


@cache
def _yaml_loader(is_typed: bool) -> Any:
    import yaml

    def refuse_tag(_: Any, node: Any) -> None:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1} has the tag {node.tag!r}; leave tags out")

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    line = node.value[number][0].start_mark.line + 1
                    raise yaml.YAMLError(f"line {line} names the key {key!r} twice; remove one")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    loader: Any = Loader

    def add(tag: str, pattern: str, first: str, read: Callable[[str], Any]) -> None:
        loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first) or [""])
        loader.add_constructor(tag, lambda _, node: read(node.value))

    # tags with NUL, which no YAML file can hold, so that a writer cannot name them
    plain = "tag:yaml.org,2002:"
    loader.add_constructor(None, refuse_tag)
    loader.add_constructor(f"{plain}str", loader.construct_scalar)
    loader.add_constructor(f"{plain}seq", lambda self, node: self.construct_sequence(node, deep=True))
    loader.add_constructor(f"{plain}map", lambda self, node: self.construct_mapping(node, deep=True))
    add(f"{plain}null", "~|null|Null|NULL", "~nN", lambda word: None)
    add(f"{plain}null", "", "", lambda word: None)
    number = float if is_typed else str
    add("\0limit", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.", lambda word: number(word.replace(".", "").lower()))
    if is_typed:
        add("\0bool", "true|True|false|False", "tTfF", lambda word: word.lower() == "true")
        add("\0int", "[-+]?[0-9]+", "-+0123456789", int)
        add("\0float", r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789", float)
    return loader
