"""The retry policy of the client: for how long a call is tried again, and after which delays."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from edgecloud_sd.verifier import CloudFault

_T = TypeVar("_T")
PROBE_PATIENCE = 2.0  # s for a call that finds out if a cloud is back, at most
PATIENCE = {"wait": 60.0, "edge": 2.0, "error": 0.0}  # s for which a call is tried again, by --on-cloud-fault
REQUEST_TIMEOUT = 30.0  # s for one request, or between two lines of a stream
LAST_ATTEMPT = 0.5  # s of patience that no delay takes, so that the last attempt can be answered
CONFIRMATIONS = 3  # equal answers without a proof: damage on the way would not give the same one so often
FIRST_DELAY, LONGEST_DELAY = 0.05, 5.0  # s before the next attempt: doubled each time, minus a random part


class Refused(CloudFault, ValueError):
    """An answer that no other attempt can change. The message gives the reason."""


class PatienceEnded(CloudFault):
    """A call that was tried as long as patience lasted. `is_busy` if the cloud answered that it has no room yet."""

    def __init__(self, reason: str, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.is_busy = is_busy


class AttemptFailed(Exception):
    """The failure of one attempt at a call. Another attempt may succeed."""

    def __init__(
        self,
        reason: str,
        session_is_lost: bool = False,
        context_differs: bool = False,
        was_sent: bool = True,
        retry_after: float | None = None,
        final_answer: str = "",
        is_busy: bool = False,
    ) -> None:
        super().__init__(reason)
        self.session_is_lost = session_is_lost
        self.context_differs = context_differs  # the two sides count on different contexts
        self.was_sent = was_sent  # part of the request may have reached the server
        self.retry_after = retry_after  # s that the server asks for, or None
        self.final_answer = final_answer  # a name of the answer if it is final, unless it was damaged on its way
        self.is_busy = is_busy  # the cloud is there, and has no room yet

    @property
    def can_retry_at_once(self) -> bool:
        """True if the next attempt differs: it opens a new session first, or it sends the whole context."""
        return self.session_is_lost or self.context_differs


class Retries:
    """The attempts at one call, until `patience` seconds have passed since its start. Without patience there is one.

    `on_failure` is called for each failed attempt, after the delay that follows it. `longest` is the seconds for one
    attempt.
    """

    def __init__(
        self,
        patience: float,
        sleep: Callable[[float], object],
        on_failure: Callable[[AttemptFailed], None] = lambda failure: None,
        longest: float = math.inf,
    ) -> None:
        self._patience = patience
        self._longest = longest
        self._sleep = sleep
        self._on_failure = on_failure
        self._start = time.monotonic()
        self._slept = 0.0
        self._failures = 0
        self._final_answers: Counter[str] = Counter()

    def attempt_seconds(self) -> float:
        """Return the seconds that an attempt may take from now on, so that the call ends when patience does."""
        return min(self._longest, self._left()) if self._patience else self._longest

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Return the result of the first `attempt` that succeeds. Raise PatienceEnded or Refused after the last."""
        while True:
            try:
                return attempt()
            except AttemptFailed as failure:
                self.wait(failure)

    def wait(self, failure: AttemptFailed) -> None:
        """Sleep before the next attempt. Raise PatienceEnded when patience is over, or will be when it may start.

        Raise Refused for a final answer that came `CONFIRMATIONS` times, or once to a call without patience.
        """
        try:
            self._delay(failure)
        finally:
            self._on_failure(failure)

    def _delay(self, failure: AttemptFailed) -> None:
        self._failures += 1
        if failure.final_answer:
            self._final_answers[failure.final_answer] += 1
            if not self._patience or self._final_answers[failure.final_answer] == CONFIRMATIONS:
                raise Refused(str(failure)) from failure
        left, reserve = self._left(), min(LAST_ATTEMPT, self._patience / 4)
        asked = failure.retry_after or 0.0
        if left <= reserve or asked > left:
            attempts = "" if self._failures == 1 else f" {self._failures} times, the last time with"
            wait = f" (it asks to wait {asked:.0f} s, longer than the patience of this call)" if asked > left else ""
            raise PatienceEnded(f"the cloud failed{attempts}: {failure}{wait}", failure.is_busy) from failure
        if failure.final_answer or (failure.can_retry_at_once and self._failures <= 2):
            return
        seconds = max(min(retry_delay(self._failures), left - reserve), asked)
        self._slept += seconds
        self._sleep(seconds)

    def _left(self) -> float:
        # a test's `sleep` may return at once, but its seconds count as well
        return max(self._patience - max(time.monotonic() - self._start, self._slept), 0.0)


def retry_delay(failures: int) -> float:
    """Return the seconds to wait after so many failures. The random part spreads the attempts of many edges."""
    longest = min(FIRST_DELAY * 2.0 ** min(failures - 1, 32), LONGEST_DELAY)
    return longest * random.uniform(0.5, 1.0)
