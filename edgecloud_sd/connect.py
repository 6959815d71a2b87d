"""The cloud server of a run: one that runs already, or one that the run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.keys import read_keys
from edgecloud_sd.cloud.process import run_server
from edgecloud_sd.cloud.retry import PATIENCE
from edgecloud_sd.data.dataset import MAX_CLIP_SECONDS
from edgecloud_sd.models import pairs
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.verifier import CloudFault

if TYPE_CHECKING:
    from edgecloud_sd.config import Settings

MAX_TOKENS = 32_768  # prompt and caption together: the maximum length of the published models


@contextmanager
def connect(settings: Settings) -> Iterator[Connection | None]:
    """Yield a connection to the server of `--cloud-url`, or None for a run without a server.

    For `auto`, start a server and stop it at the end. Raise ValueError, OSError or CloudFault if no server can be
    started or reached.
    """
    if settings.cloud_url is None or settings.mode == ("edge",):
        yield None
        return
    patience = PATIENCE[settings.on_cloud_fault]
    with ExitStack() as stack:
        url, key = settings.cloud_url, None
        if settings.cloud_key_file:
            key = read_keys(Path(settings.cloud_key_file))[0]
        if url == AUTO:
            pair = pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights)
            # only this run uses the server, so the limits admit every clip of any data set
            limits = ["--max-audio-seconds", str(MAX_CLIP_SECONDS), "--max-tokens", str(MAX_TOKENS)]
            limits += ["--threads", str(settings.threads)] if settings.threads else []
            limits += ["--weights", pair.weights]
            server = stack.enter_context(run_server(pair.cloud, settings.cloud_device, settings.cloud_dtype, limits))
            url, key = server.url, server.key
        connection = Connection(url, key, settings.cloud_timeout, patience)
        stack.callback(connection.close)
        try:
            _ = connection.remote
        except CloudFault as fault:
            raise CloudFault(f"--cloud-url: {url}: {fault}") from None
        yield connection
