"""The style of docstrings and comments, and unique public names. This test needs pytest alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # reads every file; `tox -e lint` runs it too
ROOT = Path(__file__).parents[1]
PACKAGE_FILES = sorted(file for folder in ("edgecloud_sd", "bench") for file in (ROOT / folder).rglob("*.py"))
FILES = [*PACKAGE_FILES, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "conftest.py"]
REFUSED_STARTS = {"what", "who", "whoever", "whether", "of", "that", "how", "by"}
MAX_WORDS = 30
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each comment; whole-line comments on successive lines are one."""
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(source).readline) if each.type == tokenize.COMMENT]

    def block(numbered: tuple[int, tokenize.TokenInfo]) -> tuple[bool, int]:
        index, token = numbered
        is_whole_line = token.line.lstrip().startswith("#")
        return is_whole_line, token.start[0] - index * is_whole_line

    for _, group in groupby(enumerate(tokens), block):
        members = [token for _, token in group]
        yield members[0].start[0], " ".join(token.string.lstrip("# ") for token in members)


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each sentence. A list item and the text after a colon at a line's end are sentences too."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\. ))|(?<=:)\n", text):
        yield from (words for part in re.split(r"(?<=[.!?])\s+", paragraph) if (words := part.split()))


def violations(source: str) -> list[str]:
    """Return "line: problem: sentence" for each sentence that starts badly or, in a docstring, is too long."""
    blocks = [*((*block, MAX_WORDS) for block in docstrings(source)), *((*block, None) for block in comments(source))]
    reports = []
    for line, text, limit in blocks:
        for words in sentences(text):
            if re.sub(r"[^a-z]", "", words[0].lower()) in REFUSED_STARTS:
                reports.append(f"{line}: begins with {words[0]}: {' '.join(words)}")
            if limit and len(words) > limit:
                reports.append(f"{line}: has {len(words)} words, {limit} at most: {' '.join(words)}")
    return reports


def public_names(source: str) -> Iterator[str]:
    """Yield the functions, classes and constants of a module, except hooks of pytest, `main` and private names."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, DOCUMENTED[1:]):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.extend(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return (name for name in names if name != "main" and not name.startswith(("_", "pytest_")))


def test_sentences_follow_the_style() -> None:
    reports = [f"{file.relative_to(ROOT)}:{report}" for file in FILES for report in violations(file.read_text("utf-8"))]
    assert not reports, "\n".join(reports)


def test_public_names_are_unique() -> None:
    modules = defaultdict(list)
    for file in PACKAGE_FILES:
        for name in public_names(file.read_text("utf-8")):
            modules[name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in modules.items() if len(files) > 1} == {}


def test_docstrings_and_joined_comments_are_checked() -> None:
    source = f'"""{"Word " * MAX_WORDS}long.\n\nThat is it."""\nx = 1  # Fine.\n# One reason\n# of two. By now bad.\n'
    reports = [report.split(":")[:2] for report in violations(source)]
    assert reports == [["1", " has 31 words, 30 at most"], ["1", " begins with That"], ["5", " begins with By"]]
