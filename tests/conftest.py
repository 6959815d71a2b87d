"""Fixtures and hypothesis profiles of the correctness tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from edgecloud_sd.pipeline import Captioner

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network

pytest_plugins = ["pytester"]

settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile(  # tox's: more examples, the same in each run, and no minutes spent on a shorter one
    "tox", deadline=None, max_examples=40, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.target)
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    """The pocket pair, loaded once."""
    loaded = Captioner()
    loaded.load("speculative")
    return loaded


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is slow from its first to its last test is not even imported where no slow test is to run."""
    return True if collection_path.name == "test_fuzz.py" and config.getoption("markexpr") == "not slow" else None


def pytest_collection_finish() -> None:
    """Collections need not look at all that was imported: one takes longer than many a test."""
    gc.collect()
    gc.freeze()
