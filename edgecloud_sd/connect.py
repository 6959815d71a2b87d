"""The cloud of a run: a model in this process, a server that is there, or a server that this run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud_sd import wire
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.keys import read_key, warn_if_others_can_read
from edgecloud_sd.cloud.local import Cloud, LocalCloud
from edgecloud_sd.cloud.process import run_server
from edgecloud_sd.cloud.retry import PATIENCE, PatienceEnded
from edgecloud_sd.cloud.url import warn_if_readable_on_the_way
from edgecloud_sd.data.dataset import MAX_CLIP_SECONDS
from edgecloud_sd.grid import asks_cloud, strategies
from edgecloud_sd.models.devices import AUTO
from edgecloud_sd.verifier import CloudFault

if TYPE_CHECKING:
    from edgecloud_sd.config import Settings


@contextmanager
def connect(settings: Settings) -> Iterator[Cloud]:
    """Yield the cloud that a run asks for, and close it at the end.

    Raise ValueError, OSError or CloudFault if there is no such server, unless the edge can caption alone in some
    strategy of the run and may do so. A local cloud loads when it is first needed.
    """
    pair = settings.run_pair
    if settings.cloud_url is None or not asks_cloud(settings):
        yield LocalCloud(pair.cloud, settings.cloud_device, settings.cloud_dtype, pair.weights)
        return
    with ExitStack() as stack:
        url, key, server = settings.cloud_url, None, None
        if settings.cloud_key_file:
            key = read_key(Path(settings.cloud_key_file))
            warn_if_others_can_read(Path(settings.cloud_key_file))
            warn_if_readable_on_the_way(url)
        if url == AUTO:
            # the server serves this run alone, so it takes whatever the data set may hold
            more = ["--max-audio-seconds", str(MAX_CLIP_SECONDS), "--max-tokens", str(wire.MAX_IDS)]
            more += ["--threads", str(settings.threads)] if settings.threads else []
            more += ["--weights", pair.weights]
            server = stack.enter_context(run_server(pair.cloud, settings.cloud_device, settings.cloud_dtype, more))
            url, key = server.url, server.key
        connection = Connection(url, key, settings.cloud_timeout, PATIENCE[settings.on_cloud_fault])
        stack.callback(connection.close)
        grid = strategies(settings)
        may_fail = settings.on_cloud_fault == "edge" and any(strategy.needs_edge for strategy in grid)
        if any(strategy.asks_cloud for strategy in grid) and not may_fail:
            try:
                _ = connection.identity
            except PatienceEnded as fault:
                advice = "; start one there with python -m edgecloud_sd.cloud serve, or give its URL (https:// for TLS)"
                raise CloudFault(f"--cloud-url: {url}: {fault}{'' if server else advice}") from None
            except CloudFault as fault:
                raise CloudFault(f"--cloud-url: {url}: {fault}") from None
        yield connection
