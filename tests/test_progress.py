"""The progress bar of a benchmark run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import pytest

from bench.session import Progress
from edgecloud_sd.events import Committed, Draft, Drafted, Finished, Opened, Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure.summary import clip_result
from tests.support.results import decode, make_clip

# 2 tokens in the 0.5 s after the first token
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
    """A stand-in for the capture manager of pytest."""

    def global_and_fixture_disabled(self) -> AbstractContextManager[None]:
        return nullcontext()


def printed_by_progress(capture: Terminal | None, capsys: pytest.CaptureFixture[str]) -> str:
    bar = Progress(2, "edge-pocket-zh", capture)
    for _ in range(2):
        time.sleep(0.11)  # tqdm draws the bar at most every 0.1 s
        bar.advance(clip_result(make_clip("a", "他"), TRACE, unmeasured(1.0, "test"), decode))
    bar.close()
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_a_terminal_shows_the_clips_and_the_running_otps(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by_progress(Terminal(), capsys)
    assert "edge-pocket-zh" in text
    assert "0/2" in text
    assert "1/2" in text
    assert "OTPS 4.0" in text


def test_a_log_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_by_progress(None, capsys) == ""
