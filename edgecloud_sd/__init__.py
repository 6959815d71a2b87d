"""Edge-cloud speculative decoding: a small model on the device drafts, a large one on a server verifies."""

from edgecloud_sd.captioner import Captioner, Cell, Request

__all__ = ["Captioner", "Cell", "Request"]
