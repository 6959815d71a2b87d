"""The benchmark suite, run inside a test."""

from __future__ import annotations

from pathlib import Path

import pycocoevalcap.cider.cider  # noqa: F401  see `run`
import pytest
import soundfile  # noqa: F401
import soxr  # noqa: F401

ROOT = Path(__file__).parents[2]


def arguments(*options: str) -> list[str]:
    """Return the arguments of pytest for a benchmark run with these options."""
    files = ["-c", str(ROOT / "pytest.ini"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", str(ROOT / "bench")]
    return ["--benchmark-only", "--benchmark-storage", "saved", *files, *options]


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run benchmarks in this process.

    Afterwards pytester forgets the modules that were first imported in it. Some compiled libraries cannot be imported
    twice, so they are imported above, or by the fixture `pipeline`.
    """
    return pytester.runpytest_inprocess("-s", *arguments(*options))
