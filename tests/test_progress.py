"""The progress bar of a benchmark run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from bench.session import Progress
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import Committed, Draft, Drafted, Finished, Opened, Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure.summary import clip_result

# two tokens in the 0.5 s after the first token
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


@pytest.fixture(autouse=True)
def tqdm_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock of tqdm by one second per reading. It draws a bar at most every 0.1 s."""
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)


def decode(ids: Sequence[int]) -> str:
    return "他" * len(ids)


def print_progress(capture: Terminal | None, capsys: pytest.CaptureFixture[str]) -> str:
    clip = Clip("a", Path("a.wav"), "chinese", ("他",))
    bar = Progress(2, "edge-pocket-zh", capture)
    for _ in range(2):
        bar.advance(clip_result(clip, TRACE, unmeasured(1.0, "test"), decode))
    bar.close()
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_a_terminal_shows_the_clips_and_the_running_otps(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_progress(Terminal(), capsys)
    assert "edge-pocket-zh" in text
    assert "0/2" in text
    assert "1/2" in text
    assert "OTPS 4.0" in text


def test_a_log_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_progress(None, capsys) == ""
