"""Start-up: help texts, collection and the public package import nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgecloud_sd

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "schemathesis", "fastapi", "uvicorn")
# Run modules as `python -m` does, and report the exit code and the heavy modules in memory after each.
RUN_MODULES = """
import json, runpy, sys
heavy, commands = map(json.loads, sys.argv[1:])
for command in commands:
    sys.argv[:] = command.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print(json.dumps([command, ended.code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
"""
LIST_IMPORTS = "import sys; before = set(sys.modules); import {}; print(*set(sys.modules) - before)"
HELP = (
    "edgecloud_sd --help",
    "edgecloud_sd caption --help",
    "edgecloud_sd.cloud --help",
    "edgecloud_sd.cloud serve --help",
    "edgecloud_sd.data --help",
    "edgecloud_sd.pocket --help",
    "bench.report --help",
)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "commands",
    [
        HELP,
        pytest.param(("pytest --help",), marks=pytest.mark.slow),
        pytest.param(("pytest --collect-only -q -p no:cacheprovider bench",), marks=pytest.mark.slow),
        pytest.param(("pytest --collect-only -q -p no:cacheprovider --benchmark-only",), marks=pytest.mark.slow),
    ],
    ids=["help", "pytest", "bench", "benchmarks"],
)
def test_help_and_collection_import_nothing_heavy(commands: tuple[str, ...]) -> None:
    completed = run_python("-c", RUN_MODULES, json.dumps(HEAVY), json.dumps(commands))
    reports = [json.loads(line) for line in completed.stderr.splitlines() if line.startswith("[")]
    assert reports == [[command, 0, []] for command in commands]
    assert len(completed.stdout.splitlines()) > len(commands)


def test_the_pytest_plugin_imports_nothing_but_pytest() -> None:
    loaded = run_python("-c", LIST_IMPORTS.format("pytest, edgecloud_sd.pytest_plugin")).stdout.split()
    assert {name for name in loaded if name.startswith("edgecloud_sd")} == {
        "edgecloud_sd",
        "edgecloud_sd.pytest_plugin",
    }
    assert not {"numpy", "yaml", *HEAVY} & set(loaded)


def test_public_names_are_imported_when_first_used() -> None:
    assert run_python("-c", LIST_IMPORTS.format("edgecloud_sd")).stdout.count("edgecloud_sd") == 1
    for name in edgecloud_sd.__all__:
        assert getattr(edgecloud_sd, name).__name__ == name
        assert name in dir(edgecloud_sd)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'edgecloud_sd' has no attribute 'Capti0ner'"):
        getattr(edgecloud_sd, "Capti0ner")  # noqa: B009 - mypy refuses the plain form
