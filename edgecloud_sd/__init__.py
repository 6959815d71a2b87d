"""Edge-cloud speculative decoding: a small model on the device drafts, a large one on a server verifies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Caption", "Pipeline", "Request", "Strategy"]

if TYPE_CHECKING:
    from edgecloud_sd.pipeline import Caption, Pipeline, Request
    from edgecloud_sd.strategy import Strategy
else:
    _MODULES = {
        "Caption": "edgecloud_sd.pipeline",
        "Pipeline": "edgecloud_sd.pipeline",
        "Request": "edgecloud_sd.pipeline",
        "Strategy": "edgecloud_sd.strategy",
    }

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562), because importing numpy and torch takes seconds."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        """List the public names before their first use too."""
        return sorted({*globals(), *__all__})
