"""Fixtures and hypothesis profiles of the correctness tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from edgecloud_sd.pipeline import Pipeline

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, so that no test waits for a network

pytest_plugins = ["pytester"]

settings.register_profile("default", deadline=None, max_examples=10)
settings.register_profile(  # tox: more examples, equal in each run, and no minutes spent on shrinking one
    "tox", deadline=None, max_examples=40, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.target)
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """Load the pocket pair once."""
    return Pipeline.load("pocket")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Escape texts and bytes in the ids of tests, which pytest.ini leaves as they are for the ids of benchmarks."""
    text = val.decode("latin-1") if isinstance(val, bytes) else val
    return text.encode("unicode_escape").decode() if isinstance(text, str) else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import a file whose tests are all slow if no slow test is to run."""
    return True if collection_path.name == "test_fuzz.py" and config.getoption("markexpr") == "not slow" else None


def pytest_collection_finish() -> None:
    """Keep garbage collections from visiting all that was imported: one takes longer than many tests."""
    gc.collect()
    gc.freeze()
