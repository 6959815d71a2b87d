"""Help texts, and the collection of the benchmarks, come without what takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "schemathesis", "fastapi", "uvicorn")
# runs modules as `python -m` does, and says of each how it ended and what heavy it had imported by then
RUN = """
import json, runpy, sys
heavy, commands = map(json.loads, sys.argv[1:])
for command in commands:
    sys.argv[:] = command.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print(json.dumps([command, ended.code, [each for each in heavy if each in sys.modules]]), file=sys.stderr)
"""
HELP = (
    "edgecloud_sd --help",
    "edgecloud_sd caption --help",
    "edgecloud_sd.cloud --help",
    "edgecloud_sd.cloud serve --help",
    "edgecloud_sd.data --help",
    "edgecloud_sd.pocket --help",
    "bench.report --help",
)


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
def test_what_only_tells_imports_nothing_heavy(commands: tuple[str, ...]) -> None:
    told = [sys.executable, "-c", RUN, json.dumps(HEAVY), json.dumps(commands)]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=120)
    ended = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert ended == [[command, 0, []] for command in commands]
    assert len(done.stdout.splitlines()) > len(commands)
