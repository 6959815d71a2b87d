"""The commands of the published guide in bench/README.md: each is accepted as it is spelt there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench import cases
from edgecloud_sd import config

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (.+?) \| `(pytest .+)` \|$", (ROOT / "bench" / "README.md").read_text("utf-8"), re.M)
SAVING = {"--benchmark-save", "--benchmark-json"}
FLAGS = {"--benchmark-only", "--verbose"}  # they belong to pytest and its plugin


def read_command(command: str) -> tuple[dict[str, str | None], Path | None, list[str]]:
    """Return the options of a command by hyphenated name, the file of --config, and what is left over."""
    words = shlex.split(command.replace("$DATA", "pocket"))
    assert words.pop(0) == "pytest"
    values: dict[str, str | None] = {}
    left: list[str] = []
    known = {f"--{option.name}" for option in config.OPTIONS} | {"--config", *SAVING}
    while words:
        word = words.pop(0)
        name = word.replace("_", "-")
        if name in known:
            values[name.removeprefix("--")] = words.pop(0)
        elif word not in FLAGS:
            left.append(word)
    file = values.pop("config", None)
    values = {name: value for name, value in values.items() if f"--{name}" not in SAVING}
    return values, Path(ROOT, file) if file else None, left


def test_the_table_has_every_run_of_the_guide_and_no_name_twice() -> None:
    names = [name for name, _ in ROWS]
    assert len(names) >= 22
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "command"), ROWS, ids=[name for name, _ in ROWS])
def test_a_command_of_the_guide_is_accepted(name: str, command: str) -> None:
    values, file, left = read_command(command)
    assert left == []
    settings = config.resolve(values, file)
    assert (settings.caption_type, settings.language, settings.prompt_type) == ("audio_only", ("chinese",), "default")
    assert cases.cases(settings), name
    assert ("CPU-limited" in name or "three tests, in" in name) == (settings.max_cpu_cores == 2)


@pytest.mark.parametrize("option", [option.name for option in config.OPTIONS])
def test_every_option_may_be_spelt_with_underscores(option: str, pytestconfig: pytest.Config) -> None:
    spellings = {spelling for group in pytestconfig._parser._groups for o in group.options for spelling in o.names()}
    assert {f"--{option}", f"--{option.replace('-', '_')}"} <= spellings
