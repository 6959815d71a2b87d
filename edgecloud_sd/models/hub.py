"""The Hugging Face hub: reached in seconds or not at all, without chatter, and with errors that say what to do."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CHECKPOINT_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
PROBE_SECONDS = 5.0
KEY_ADVICE = (
    "log in with `hf auth login` (formerly `huggingface-cli login`) or set HF_TOKEN, and accept the licence on the "
    "model's page"
)
OFFLINE_ADVICE = (
    "connect this machine, give a folder with the checkpoint, or copy the hub's cache here and set HF_HUB_OFFLINE=1"
)


def prepare_hub(name: str) -> None:
    """Silence the libraries of the hub, and use its cache alone if checkpoint `name` is there and it is not reachable.

    The libraries would try again for half a minute, for each file anew.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as model_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        model_logging.set_verbosity_error()
    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity(logging.ERROR)
    model_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()  # a terminal shows those of downloads
    if not Path(name).exists() and not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = bool(why_unreachable(constants.ENDPOINT))


@cache
def why_unreachable(endpoint: str) -> str:
    """Return why no request reaches the hub, or an empty text if one does. Any answer counts."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception as error:  # noqa: BLE001 - the hub's HTTP library, and so its errors, differ between versions
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def explain_hub_error(error: BaseException) -> str | None:
    """Return why a checkpoint on the hub cannot be read and what to do, or None for an error of another kind."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return f"the hub gives it only to accounts that may read it: {KEY_ADVICE}"
        if isinstance(cause, RepositoryNotFoundError):
            return f"the hub has no such checkpoint, or a private one: check the name, or {KEY_ADVICE}"
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            return f"the hub refuses access: {KEY_ADVICE}"
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled) and constants.HF_HUB_OFFLINE:
            reason = why_unreachable(constants.ENDPOINT)
            why = f"{constants.ENDPOINT} cannot be reached ({reason})" if reason else "HF_HUB_OFFLINE is set"
            return f"{why}, and the hub's cache does not have it: {OFFLINE_ADVICE}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
