"""The bar of a run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import pytest

from bench.session import Progress
from edgecloud_sd.events import Committed, Draft, Drafted, Finished, Opened, Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure.summary import clip_result
from tests.test_results import clip, decode

# 2 tokens after the first, in 0.5 s
TRACE = Trace(
    (
        (0.1, Prepared(5)),
        (0.2, Opened("edge")),
        (0.5, Drafted(Draft((2,)))),
        (0.5, Committed((2,), "local")),
        (1.0, Drafted(Draft((3, 4)))),
        (1.0, Committed((3, 4), "local")),
        (1.0, Finished("length")),
    )
)


class Terminal:
    """What Progress needs of pytest's capture manager."""

    def global_and_fixture_disabled(self) -> AbstractContextManager[None]:
        return nullcontext()


def shown(capture: Terminal | None, capsys: pytest.CaptureFixture[str]) -> str:
    bar = Progress(2, "edge-pocket-zh", capture)
    for _ in range(2):
        time.sleep(0.11)  # a bar is not drawn more often than that
        bar.advance(clip_result(clip("a", "他"), TRACE, unmeasured(1.0, "test"), decode))
    bar.close()
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_a_terminal_shows_the_clips_and_the_running_otps(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(Terminal(), capsys)
    assert "edge-pocket-zh" in text
    assert "0/2" in text
    assert "1/2" in text
    assert "OTPS 4.0" in text


def test_a_log_shows_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(None, capsys) == ""
