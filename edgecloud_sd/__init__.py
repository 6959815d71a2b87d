"""Edge-cloud speculative decoding: decode with a small model on the device and a large one on a server, and measure it."""

from edgecloud_sd.captioner import Captioner, Cell, Request

__all__ = ["Captioner", "Cell", "Request"]
