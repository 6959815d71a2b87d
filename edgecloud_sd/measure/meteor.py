"""METEOR 1.5 (Denkowski and Lavie 2014): the jar that pycocoevalcap ships, as one Java process a language and session.

Why not pycocoevalcap's own class: it is English only, waits for ever for a Java that has nothing to say, and a folder
with a space in its name keeps it from its paraphrases.
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

# English: exact, stem, synonym and paraphrase matches, tuned to rankings. METEOR knows no Chinese: exact matches, and
# the parameters found to do for languages it was not tuned to (alpha 0.75, beta 1.4, gamma 0.7, delta 0.5).
METEOR_OPTIONS = {"chinese": ("-l", "other"), "english": ("-l", "en")}
PARAPHRASES = Path("data/paraphrase-en.gz")  # in the jar's folder; 16 million lines, which take Java some 15 s to read
START_SECONDS = 300.0  # for the process to start and read its tables
CLIP_SECONDS = 1.0  # and for each clip: 1 ms is usual, 17 s was seen for one token 512 times over


class MeteorUnavailable(RuntimeError):
    """Java is absent, failed or took too long; the message says which."""


class Meteor:
    """One Java process: it starts when first asked, and anew after it has failed."""

    def __init__(self, language: str) -> None:
        self._options = METEOR_OPTIONS[language]
        self._java: subprocess.Popen[str] | None = None
        self._complaints: IO[str] | None = None

    def score(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        """Corpus score and one a clip, 0 to 1, of tokens separated by single spaces, as a tokenizer leaves them.

        F-mean of unigram precision and recall, less a penalty for how scattered the matches are; of several references
        the one that scores best. The corpus score is that of the summed statistics, not a mean. Raises NoMeteor.
        """
        seconds = START_SECONDS + CLIP_SECONDS * len(captions)
        java = self._started()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _kill(java)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            clips = []
            for text, texts in zip(captions, references, strict=True):
                self._tell("SCORE", *texts, text)
                clips.append(" ".join(map(str, self._numbers())))
            self._tell("EVAL", *clips)
            *scores, corpus = (self._numbers()[0] for _ in range(len(clips) + 1))
        except (OSError, ValueError) as error:
            why = f"took longer than {seconds:g} s" if late.is_set() else f"failed: {self._explain(error)}"
            self.close()
            raise MeteorUnavailable(f"METEOR {why}") from error
        except BaseException:
            self.close()  # an answer may still be on its way, and would be taken for the next one's
            raise
        finally:
            timer.cancel()
        return corpus, scores

    def close(self) -> None:
        """End the process, if there is one."""
        if self._java is not None:
            _kill(self._java)
            with contextlib.suppress(OSError), self._java:  # what it had not read yet cannot be flushed
                pass
            self._java = None
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None

    def _started(self) -> subprocess.Popen[str]:
        if self._java is not None and self._java.poll() is None:
            return self._java
        self.close()
        if shutil.which("java") is None:
            raise MeteorUnavailable("Java is not installed")
        from pycocoevalcap.meteor import meteor as theirs

        # a file, because a pipe that nobody reads fills up and blocks Java
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # without -norm: the tokens of the other metrics, as they are
        command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", *self._options]
        try:
            self._java = subprocess.Popen(
                [*command, "-a", str(PARAPHRASES)] if "en" in self._options else command,
                cwd=Path(theirs.__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                start_new_session=True,  # Ctrl-C is not for it: a run that is stopped still scores what it has
                encoding="utf-8",
                errors="replace",  # half a surrogate pair has no UTF-8
            )
        except OSError as error:
            self.close()
            raise MeteorUnavailable(f"Java cannot be started: {error}") from error
        return self._java

    def _tell(self, *parts: str) -> None:
        assert self._java is not None
        assert self._java.stdin is not None
        self._java.stdin.write(" ||| ".join(parts) + "\n")
        self._java.stdin.flush()

    def _numbers(self) -> list[float]:
        """One line of answer. ValueError where it has anything but numbers, or nothing."""
        assert self._java is not None
        assert self._java.stdout is not None
        line = self._java.stdout.readline().strip()
        try:
            return [float(each) for each in line.split()] or [float(line)]
        except ValueError:
            raise ValueError(line or "Java ended") from None

    def _explain(self, error: Exception) -> str:
        """What Java said of it, without its stack trace. Ends the process, so that nobody waits for more."""
        assert self._java is not None
        assert self._java.stdout is not None
        assert self._complaints is not None
        _kill(self._java)
        self._complaints.seek(0)
        said = [line.strip() for line in (*self._complaints, *self._java.stdout) if not line.startswith("\t")]
        return " ".join([*said, str(error)])[:300]


def _kill(java: subprocess.Popen[str]) -> None:
    """End it with its children: where `java` is a script, one of them would go on and hold the pipe open."""
    with contextlib.suppress(OSError):
        os.killpg(java.pid, signal.SIGKILL)


@functools.cache
def scorer(language: str) -> Meteor:
    """The session's process for a language of OPTIONS; it ends with the session."""
    meteor = Meteor(language)
    atexit.register(meteor.close)
    return meteor
