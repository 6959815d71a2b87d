"""Help texts, and the collection of the benchmarks, come without what takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "schemathesis", "fastapi", "uvicorn")
# runs a module as `python -m` does, then says how it ended and which of the rest of the arguments it has imported
RUN = """
import json, runpy, sys
heavy, (name, *_) = json.loads(sys.argv[1]), sys.argv[2:]
sys.argv[:] = sys.argv[2:]
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print(json.dumps([ended.code, [each for each in heavy if each in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command",
    [
        "edgecloud_sd --help",
        "edgecloud_sd caption --help",
        "edgecloud_sd.cloud --help",
        "edgecloud_sd.cloud serve --help",
        "edgecloud_sd.dataset --help",
        "edgecloud_sd.pocket --help",
        "bench.report --help",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "pytest --help",
                "pytest --collect-only -q -p no:cacheprovider bench",
                "pytest --collect-only -q -p no:cacheprovider --benchmark-only",
            )
        ),
    ],
)
def test_what_only_tells_imports_nothing_heavy(command: str) -> None:
    told = [sys.executable, "-c", RUN, json.dumps(HEAVY), *command.split()]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    assert done.stdout
