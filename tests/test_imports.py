"""Imports go down only: the test reads every import, type-only and lazy ones too."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # reads every file; `tox -e lint` runs it too
PACKAGE = Path(__file__).parents[1] / "edgecloud_sd"
LEVELS = {"core": 0, "data": 1, "host": 1, "models": 2, "timing": 2, "measure": 2, "forecast": 3, "cloud": 3}
LEVELS |= {"top": 4, "pocket": 5, "command": 6, "bench": 7}
TOP = {"pipeline", "config", "grid", "connect", "pytest_plugin", "__init__"}
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
    for folder in (PACKAGE, PACKAGE.parent / "bench")
    for file in folder.rglob("*.py")
}


@cache
def imports(module: str) -> set[str]:
    """Return the modules of the project that `module` imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in FILES}


def group(module: str) -> str:
    """Return the group of a module: a folder of the package, its top or its core, its commands, or the benchmarks."""
    package, *parts = module.split(".")
    if package == "bench":
        return "bench"
    if parts[-1:] == ["__main__"]:  # an entry point, in whatever room it stands
        return "command"
    return parts[0] if len(parts) > 1 else "top" if parts[0] in TOP else "core"


def test_no_module_of_the_package_is_loaded_by_a_name_in_a_text() -> None:
    """A name in a text would hide an import. Only the package itself loads its public names so."""
    hidden = ("import_module(", "resolve_name(", "__import__(")
    users = [module for module, file in FILES.items() if any(call in file.read_text("utf-8") for call in hidden)]
    assert users == ["edgecloud_sd.__init__"]


def test_no_import_points_up() -> None:
    pairs = [(module, found) for module in FILES for found in imports(module)]
    assert [pair for pair in pairs if LEVELS[group(pair[1])] > LEVELS[group(pair[0])]] == []


def test_neither_modules_nor_groups_form_a_cycle() -> None:
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()
    groups: dict[str, set[str]] = {}
    for module in FILES:
        groups.setdefault(group(module), set()).update(group(found) for found in imports(module))
    TopologicalSorter({name: found - {name} for name, found in groups.items()}).prepare()
