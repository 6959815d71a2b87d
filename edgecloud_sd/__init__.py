"""Edge-cloud speculative decoding: a small model on the device drafts, a large one on a server verifies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["Captioner", "Cell", "Request", "stamp"]

if TYPE_CHECKING:
    from edgecloud_sd.pipeline import Captioner, Cell, Request
    from edgecloud_sd.timing.clock import stamp
else:
    _MODULES = {
        "Captioner": "edgecloud_sd.pipeline",
        "Cell": "edgecloud_sd.pipeline",
        "Request": "edgecloud_sd.pipeline",
        "stamp": "edgecloud_sd.timing.clock",
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
