"""The service on a real model and sockets: one client's work beside another's."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import closing, suppress

import pytest

from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.events import Prompt
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault
from tests.support.asgi import KEY, OTHER_KEY
from tests.support.serving import served

LONG = tuple(10 + index * 37 % 400 for index in range(3000))


def measure_verification(connection: Connection) -> float:
    """Return the median time in seconds of ten verifications after a short prompt."""
    verification = connection.verifier(GREEDY, Harness()).open(Prompt(LONG[:200]))
    verification.wait()
    seconds = []
    for number in range(10):
        start = time.perf_counter()
        verification.verify(0, [LONG[199]], LONG[number : number + 4])
        seconds.append(time.perf_counter() - start)
    verification.close()
    return statistics.median(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "contexts"])
def test_long_prompts_or_contexts_of_one_client_hardly_delay_another(pipeline: Pipeline, kind: str) -> None:
    assert isinstance(pipeline.cloud, LocalCloud)
    has_ended = threading.Event()

    def flood(url: str) -> None:
        with closing(Connection(url, OTHER_KEY, patience=0.0)) as connection, suppress(CloudFault):
            verifier = connection.verifier(GREEDY, Harness())
            while not has_ended.is_set():
                verification = verifier.open(Prompt(LONG if kind == "prompts" else LONG[:5]))
                verification.wait()
                if kind == "contexts":
                    verification.verify(0, [LONG[4], *LONG], [1])
                verification.close()

    with served(pipeline.cloud, keys=(KEY, OTHER_KEY)) as url, closing(Connection(url, KEY)) as polite:
        measure_verification(polite)
        alone = measure_verification(polite)
        threads = [threading.Thread(target=flood, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)  # the flood has to be in its long passes
        beside = measure_verification(polite)
        has_ended.set()
        polite.close()
    for thread in threads:
        thread.join(60)
    assert beside <= 12 * alone  # about 2 on a quiet machine, and 200 if a long pass never pauses
