"""Edge-cloud speculative decoding: a small model on the device drafts, a large one on a server verifies."""

from edgecloud_sd.pipeline import Captioner, Cell, Request
from edgecloud_sd.timing.clock import stamp

__all__ = ["Captioner", "Cell", "Request", "stamp"]
