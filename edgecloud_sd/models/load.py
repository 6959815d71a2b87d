"""The choice between a checkpoint's own weights and dummy weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd.models.devices import DTYPES, QUANTISED_DTYPES, check_device
from edgecloud_sd.models.frontend import Frontend, read_frontend
from edgecloud_sd.models.pairs import DUMMY, REAL

if TYPE_CHECKING:
    from edgecloud_sd.models.hf import HFModel


def import_libraries() -> None:
    """Import what loading and decoding need, so that neither imports anything.

    Under a memory limit, an import may abort the process or leave a module unusable.
    """
    from safetensors import torch  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    from edgecloud_sd.models import dummy, hf, quantized  # noqa: F401


def load_model(
    checkpoint: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    weights: str = REAL,
    front: Frontend | None = None,
) -> HFModel:
    """Load a Qwen2.5-Omni checkpoint from a folder or the hub, or a model of its size with dummy weights.

    `front` is its front end, if it is read already.

    Raise ValueError for an unknown dtype or device, for a folder that does not exist and for a model that does not fit
    in memory. Raise OSError for a checkpoint of another kind, or one that lacks weights or cannot be read. Raise
    MemoryError if memory ends during the load.
    """
    from edgecloud_sd.models import dummy, hf, quantized

    if dtype not in (*DTYPES, *QUANTISED_DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join((*DTYPES, *QUANTISED_DTYPES))}")
    check_device(device)
    if dtype in QUANTISED_DTYPES:
        quantized.check_quantised_device(dtype, device)
    load = dummy.load_dummy if weights == DUMMY else hf.load_checkpoint
    return load(checkpoint, device, dtype, front)


def load_frontend(checkpoint: str | Path, weights: str = REAL) -> Frontend:
    """Read the front end of a checkpoint, or of a model with dummy weights. Raise the errors of `load_model`."""
    if weights == DUMMY:
        from edgecloud_sd.models import dummy

        return dummy.load_dummy_frontend(checkpoint)
    return read_frontend(checkpoint)
