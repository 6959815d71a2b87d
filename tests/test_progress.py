"""The progress bar of a benchmark run."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from bench.session import Progress
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import Committed, Draft, Drafted, Finished, Opened, Prepared, Trace
from edgecloud_sd.host.utilization import unmeasured
from edgecloud_sd.measure.summary import clip_result
from tests.support.suite import ROOT, arguments

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_verbose_lines_and_the_bar_share_a_terminal_although_output_is_captured(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # tqdm draws no bar in no columns
    options = ["--mode", "edge", "--max_samples", "2", "--max-new-tokens", "4", "--verbose", "-k", "test_captioning"]
    command = [sys.executable, "-m", "pytest", *arguments(*options, "--results-dir", str(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(ours, 2**16):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "edge-pocket-zh:   0%|" in text
    assert text.index("1/2 [") < text.index("pocket_evaluation_0000 (1 of 2)") < text.index("  counts:    4 tokens")
    before, _, _ = text.partition("pocket_evaluation_0000 (1 of 2)")
    assert before.rpartition("1/2 [")[2].rstrip("\r\n").endswith(" ")  # the bar is wiped before the lines
