"""Fixtures and hypothesis profiles of the correctness tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

from edgecloud_sd.captioner import Captioner

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network

pytest_plugins = ["pytester"]

settings.register_profile("default", deadline=None, max_examples=40)
settings.load_profile("default")


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    """The pocket pair, loaded once."""
    loaded = Captioner()
    loaded.load("speculative")
    return loaded


def pytest_collection_finish() -> None:
    """Collections need not look at all that was imported: one takes longer than many a test."""
    gc.collect()
    gc.freeze()
