"""The real server killed in the middle of a caption of the pocket pair, and started again: or not."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from edgecloud_sd import gate
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import PATIENCE
from edgecloud_sd.events import Committed, Degraded, Event, Finished, Trace, Verified
from edgecloud_sd.measure.breakdown import latency_breakdown
from edgecloud_sd.models import pairs
from edgecloud_sd.pipeline import Captioner, Cell, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness

pytestmark = pytest.mark.slow
STRICT = Cell("speculative", gate.ALWAYS, k=2)
CLOUD = Cell("cloud")
REQUEST = Request(clips.make_clip("evaluation", 7).samples)
LENGTH = 32


class Service:
    """The server as users start it, on a port that stays its own."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        self.ready()

    def start(self) -> None:
        """Not waiting until it listens."""
        command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--until-stdin-closes"]
        command += ["--port", str(self.port), "--model", pairs.PAIRS["pocket"].cloud]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().decode().strip() == self.url

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def restart(self) -> None:
        self.kill()
        self.start()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.kill()


@contextmanager
def far(service: Service, policy: str) -> Iterator[Captioner]:
    with closing(Connection(service.url, None, 10.0, PATIENCE[policy])) as connection:
        yield Captioner(connection=connection, alone=policy == "edge")


def caption(captioner: Captioner, cell: Cell, happens: Callable[[], None], after: int) -> Trace:
    """One caption, to which something happens after so many answers of the cloud."""
    stage = Harness(far=True)

    def events() -> Iterator[Event]:
        answers = 0
        for event in captioner.events(REQUEST, cell, LENGTH, stage):
            yield event
            answers += isinstance(event, Verified) or (isinstance(event, Committed) and event.origin == "cloud")
            if answers == after:
                happens()
                answers += 1

    return stamp(events(), stage.watch)


# in this order, on one server that is started three times in all


@pytest.mark.parametrize("cell", [STRICT, CLOUD], ids=lambda cell: cell.mode)
def test_a_cloud_that_restarts_in_the_middle_changes_no_token(
    captioner: Captioner, service: Service, cell: Cell
) -> None:
    right = captioner.trace(REQUEST, cell, LENGTH)
    with far(service, "wait") as remote:
        plain = remote.trace(REQUEST, cell, LENGTH)
        assert plain.tokens == right.tokens
        harmed = caption(remote, cell, service.restart, after=2)
    service.ready()
    assert harmed.tokens == right.tokens
    assert latency_breakdown(plain).parts["faults"] == 0
    kept = latency_breakdown(harmed)
    assert kept.parts["faults"] > kept.seconds / 2  # a start takes longer than many captions
    assert kept.seconds == pytest.approx(harmed.seconds)


def test_a_cloud_that_stays_away_leaves_the_rest_to_the_edge(captioner: Captioner, service: Service) -> None:
    right = captioner.trace(REQUEST, STRICT, LENGTH).tokens
    with far(service, "edge") as remote:
        trace = caption(remote, STRICT, service.kill, after=2)
    events = [event for _, event in trace.events]
    (mark,) = [place for place, event in enumerate(events) if isinstance(event, Degraded)]
    by_the_cloud = Trace(trace.events[:mark]).tokens
    assert len(by_the_cloud) >= 2
    assert by_the_cloud == right[: len(by_the_cloud)]
    assert {event.origin for event in events[mark:] if isinstance(event, Committed)} == {"local"}
    assert isinstance(events[-1], Finished)
    assert latency_breakdown(trace).parts["faults"] > 0
