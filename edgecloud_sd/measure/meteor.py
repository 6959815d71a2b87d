"""METEOR 1.5 (Denkowski and Lavie 2014): one Java process per language runs the jar that pycocoevalcap ships.

The Python class of pycocoevalcap is not used, for three reasons. It supports English only, it waits forever for a Java
process that gives no answer, and it loses its paraphrases if its folder has a space in its name.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgecloud_sd.data.prompts import look_up

# English has exact, stem, synonym and paraphrase matches, with parameters tuned to human rankings. METEOR has no data
# for Chinese, so it gets exact matches and the universal parameters (alpha 0.75, beta 1.4, gamma 0.7, delta 0.5).
METEOR_OPTIONS = {"chinese": ("-l", "other"), "english": ("-l", "en")}
PARAPHRASES = Path("data/paraphrase-en.gz")  # in the folder of the jar; Java reads its 16 million lines in about 15 s
START_SECONDS = 300.0  # time limit for the process to start and read its tables
CLIP_SECONDS = 1.0  # added per clip; 1 ms is usual, and one token repeated 512 times took 17 s


class MeteorUnavailable(RuntimeError):
    """METEOR has no score; the message says if Java is absent, failed or took too long."""


class Meteor:
    """One Java process, which starts at the first score and restarts after a failure."""

    def __init__(self, language: str) -> None:
        self._options = look_up(METEOR_OPTIONS, language, "language")
        self._java: subprocess.Popen[str] | None = None
        self._stderr: IO[str] | None = None

    def score(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        """Return the corpus score and the score of each clip, 0 to 1.

        Texts are tokens separated by single spaces. A score is the F-mean of unigram precision and recall, less a
        penalty for scattered matches, against the best reference. The corpus score comes from summed statistics, so it
        is not the mean of the clips. Raise MeteorUnavailable if Java is absent, fails or takes too long.
        """
        seconds = START_SECONDS + CLIP_SECONDS * len(captions)
        java = self._start()
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            _kill(java)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            clips = []
            for text, texts in zip(captions, references, strict=True):
                self._write("SCORE", *texts, text)
                clips.append(" ".join(map(str, self._read_numbers())))
            self._write("EVAL", *clips)
            *scores, corpus = (self._read_numbers()[0] for _ in range(len(clips) + 1))
        except (OSError, ValueError) as error:
            is_late = timed_out.is_set()
            reason = f"took longer than {seconds:g} s" if is_late else f"failed: {self._failure_message(error)}"
            self.close()
            raise MeteorUnavailable(f"METEOR {reason}") from error
        except BaseException:
            self.close()  # an unread answer would be taken for the answer to the next clip
            raise
        finally:
            timer.cancel()
        return corpus, scores

    def close(self) -> None:
        """End the process if one runs."""
        if self._java is not None:
            _kill(self._java)
            with contextlib.suppress(OSError), self._java:  # the pipe may hold text that Java has not read
                pass
            self._java = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def _start(self) -> subprocess.Popen[str]:
        """Return the running process, or start one."""
        if self._java is not None and self._java.poll() is None:
            return self._java
        self.close()
        if shutil.which("java") is None:
            raise MeteorUnavailable("METEOR needs Java, which is not installed")
        from pycocoevalcap.meteor import meteor as coco_meteor

        # a file, because Java would block on a full pipe that nobody reads
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # without -norm, METEOR reads the same tokens as the other metrics
        command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", *self._options]
        try:
            self._java = subprocess.Popen(
                [*command, "-a", str(PARAPHRASES)] if "en" in self._options else command,
                cwd=Path(coco_meteor.__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C must not end Java, because a stopped run still scores its clips
                encoding="utf-8",
                errors="replace",  # half a surrogate pair has no UTF-8 form
            )
        except OSError as error:
            self.close()
            raise MeteorUnavailable(f"METEOR needs Java, which cannot be started: {error}") from error
        return self._java

    def _write(self, *parts: str) -> None:
        """Send one line to Java."""
        assert self._java is not None
        assert self._java.stdin is not None
        self._java.stdin.write(" ||| ".join(parts) + "\n")
        self._java.stdin.flush()

    def _read_numbers(self) -> list[float]:
        """Read one line of Java's answer. Raise ValueError if the line is empty or has anything but numbers."""
        assert self._java is not None
        assert self._java.stdout is not None
        line = self._java.stdout.readline().strip()
        try:
            return [float(number) for number in line.split()] or [float(line)]
        except ValueError:
            raise ValueError(line or "Java ended") from None

    def _failure_message(self, error: Exception) -> str:
        """End the process, so that its output ends too, and return its messages without the stack trace."""
        assert self._java is not None
        assert self._java.stdout is not None
        assert self._stderr is not None
        _kill(self._java)
        self._stderr.seek(0)
        messages = [line.strip() for line in (*self._stderr, *self._java.stdout) if not line.startswith("\t")]
        return " ".join([*messages, str(error)])[:300]


def _kill(java: subprocess.Popen[str]) -> None:
    """Kill the process and its children. If `java` is a script, a surviving child would keep the pipe open."""
    with contextlib.suppress(OSError):
        os.killpg(java.pid, signal.SIGKILL)


@functools.cache
def get_meteor(language: str) -> Meteor:
    """Return the METEOR process for a language of `METEOR_OPTIONS`. It ends with this Python process."""
    meteor = Meteor(language)
    atexit.register(meteor.close)
    return meteor
