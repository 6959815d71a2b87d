"""A circuit breaker: after repeated failure of one cloud, calls fail at once instead of waiting out their patience."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgecloud_sd.cloud.retry import PatienceEnded
from edgecloud_sd.events import BREAKER_OPEN, BREAKER_OPENED
from edgecloud_sd.verifier import CloudFault

BREAKER_FAILURES = 2  # calls in a row whose patience ended
BREAKER_SECONDS = 30.0  # before a call is let through again


class BreakerOpen(CloudFault):
    """A call that was not tried, because the cloud has failed repeatedly."""

    breaker_mark = BREAKER_OPEN


class Breaker:
    """The state of one cloud for all calls of a run, on any number of threads.

    It is closed until `BREAKER_FAILURES` calls in a row end without an answer, and then open for `BREAKER_SECONDS`.
    After that it is half-open: one call, the probe, is let through. An answer closes the breaker, and a failure of the
    probe opens it again.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._failures = 0
        self._reopens_at: float | None = None  # None while closed
        self._is_probing = False
        self._reason = ""

    @contextmanager
    def guard(self) -> Iterator[bool]:
        """Let one call run in the block, and yield True for a probe. Raise BreakerOpen if the call must not be tried.

        A failure that opens the breaker says so in its `breaker_mark`.
        """
        is_probe = self._admit()
        try:
            yield is_probe
        except PatienceEnded as failure:
            if failure.is_busy:
                self.note_answer()
            elif self._count_failure(str(failure), is_probe):
                failure.breaker_mark = BREAKER_OPENED
            raise
        except BaseException:
            self._release(is_probe)
            raise
        else:
            self.note_answer()

    def note_answer(self) -> None:
        """Close the breaker, because the cloud has answered."""
        with self._lock:
            self._failures = 0
            self._reopens_at = None
            self._is_probing = False

    def _admit(self) -> bool:
        with self._lock:
            if self._reopens_at is None:
                return False
            left = self._reopens_at - self._now()
            if left > 0 or self._is_probing:
                when = f"{left:.0f} s from now" if left > 0 else "by a call that is running"
                raise BreakerOpen(
                    f"not tried, because the cloud failed {self._failures} calls in a row; "
                    f"the next is tried {when} ({self._reason})"
                )
            self._is_probing = True
            return True

    def _count_failure(self, reason: str, is_probe: bool) -> bool:
        """Return True if this failure opens the breaker."""
        with self._lock:
            self._failures += 1
            self._reason = reason
            if is_probe:
                self._is_probing = False
            elif self._reopens_at is not None or self._failures < BREAKER_FAILURES:
                return False
            self._reopens_at = self._now() + BREAKER_SECONDS
            return True

    def _release(self, is_probe: bool) -> None:
        """Let the next call be the probe, because this one has ended without a result."""
        if is_probe:
            with self._lock:
                self._is_probing = False
