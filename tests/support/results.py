"""Clips, and a decoder of token ids, for tests of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgecloud_sd.data.dataset import Clip

CHARACTERS = "。她他很高兴又悲伤"  # the text of token 0, 1, ...


def decode(ids: Sequence[int]) -> str:
    """Return the text of the tokens, one character per token."""
    return "".join(CHARACTERS[i] for i in ids)


def make_clip(file_id: str, *references: str) -> Clip:
    """Return a Chinese clip whose audio file does not exist."""
    return Clip(file_id, Path(f"{file_id}.wav"), "chinese", references)
