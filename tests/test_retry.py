"""The delays between attempts, and the end of patience."""

from __future__ import annotations

import socket

import pytest

from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import (
    CONFIRMATIONS,
    FIRST_DELAY,
    LAST_ATTEMPT,
    LONGEST_DELAY,
    PATIENCE,
    PROBE_PATIENCE,
    REQUEST_TIMEOUT,
    AttemptFailed,
    PatienceEnded,
    Refused,
    Retries,
)
from edgecloud_sd.cloud.sessions import ROOM_WAIT
from edgecloud_sd.verifier import CloudFault


def record_delays(patience: float) -> list[float]:
    """Return the delays of a client that never reaches a server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    delays: list[float] = []
    connection = Connection(url, patience=patience, sleep=delays.append)
    with pytest.raises(CloudFault, match=r"failed( \d+ times, the last time with)?: .*ConnectError"):
        _ = connection.identity
    connection.close()
    return delays


def test_delays_double_up_to_a_bound_and_differ_between_edges() -> None:
    delays = record_delays(60.0)
    for place, seconds in enumerate(delays[:-1]):
        longest = min(FIRST_DELAY * 2**place, LONGEST_DELAY)
        assert longest / 2 <= seconds <= longest
    assert sum(delays) == pytest.approx(60.0, abs=1.0)  # the attempts took the rest
    assert 60 / LONGEST_DELAY < len(delays) < 30
    assert delays != record_delays(60.0)


def test_without_patience_there_is_no_delay() -> None:
    assert record_delays(0.0) == []


def test_the_last_delay_ends_with_patience() -> None:
    assert sum(record_delays(0.06)) <= 0.06


def test_the_time_of_the_attempts_counts_against_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    delays: list[float] = []
    retries = Retries(10.0, delays.append)

    def attempt() -> None:
        now[0] += 4.0
        raise AttemptFailed("no answer")

    with pytest.raises(CloudFault, match="failed 3 times, the last time with: no answer"):
        retries.run(attempt)
    assert len(delays) == 2


@pytest.mark.parametrize("kind", ["session_is_lost", "context_differs"])
def test_two_failures_that_change_the_next_attempt_cause_no_delay(kind: str) -> None:
    delays: list[float] = []
    retries = Retries(60.0, delays.append)
    failure = AttemptFailed("the cloud answered 404", **{kind: True})  # type: ignore[arg-type]
    for expected in (0, 0, 1, 2):
        retries.wait(failure)
        assert len(delays) == expected


def test_a_failure_is_reported_after_its_delay_even_when_the_sleep_is_interrupted() -> None:
    order: list[str] = []

    def interrupt(seconds: float) -> None:
        order.append("sleep")
        raise KeyboardInterrupt

    retries = Retries(60.0, interrupt, lambda failure: order.append(str(failure)))
    with pytest.raises(KeyboardInterrupt):
        retries.wait(AttemptFailed("no answer"))
    assert order == ["sleep", "no answer"]


@pytest.mark.parametrize(("asked", "slept"), [(20.0, 20.0), (60.0 - 1e-3, 60.0), (None, 0.05)])
def test_retry_after_lengthens_a_delay(asked: float | None, slept: float) -> None:
    delays: list[float] = []
    Retries(61.0, delays.append).wait(AttemptFailed("the cloud answered 503", retry_after=asked))
    assert slept / 2 <= delays[0] <= slept
    assert asked is None or delays == [asked]


def test_a_wait_that_patience_does_not_allow_ends_a_call_at_once() -> None:
    delays: list[float] = []
    with pytest.raises(PatienceEnded, match=r"failed.* 503 \(it asks to wait 90 s, longer than the patience"):
        Retries(60.0, delays.append).wait(AttemptFailed("the cloud answered 503", retry_after=90.0))
    assert not delays


def test_a_call_without_patience_names_no_wait_that_nobody_asked_for() -> None:
    with pytest.raises(PatienceEnded, match=r"^the cloud failed: gone$"):
        Retries(0.0, lambda seconds: None).wait(AttemptFailed("gone"))


MOST = {"edge": 2.0, "wait": 60.0, "error": REQUEST_TIMEOUT}  # s for a call, as cloud/README.md promises


@pytest.mark.parametrize("policy", MOST)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0], ids=lambda share: f"{share:.0%} of its time")
@pytest.mark.parametrize("retry_after", [None, 1.0])
def test_no_call_takes_longer_than_its_policy_promises(
    policy: str, share: float, retry_after: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt fails after a share of the time that it may take."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    def attempt() -> None:
        spend(share * min(retries.attempt_seconds(), REQUEST_TIMEOUT))
        raise AttemptFailed("no answer", retry_after=retry_after)

    retries = Retries(PATIENCE[policy], spend)
    with pytest.raises(PatienceEnded):
        retries.run(attempt)
    assert now[0] <= MOST[policy]
    if PATIENCE[policy]:
        assert now[0] >= 0.4 * MOST[policy]  # patience is not given up early


def test_a_full_cloud_says_so_before_an_edge_that_may_finish_alone_gives_up() -> None:
    assert PATIENCE["edge"] >= ROOM_WAIT + LAST_ATTEMPT


def test_one_attempt_of_a_probe_is_bounded_even_without_patience() -> None:
    connection = Connection("http://127.0.0.1:1", patience=0.0)
    assert connection.new_retries(is_probe=True).attempt_seconds() == PROBE_PATIENCE
    assert connection.new_retries().attempt_seconds() > REQUEST_TIMEOUT
    connection.close()


@pytest.mark.parametrize(
    ("answers", "patience", "attempts"),
    [
        (["401", "401", "401"], 60.0, CONFIRMATIONS),
        (["401", "", "301", "401", "", "401"], 60.0, 6),  # two damaged answers beside three that agree
        (["401"], 0.0, 1),
    ],
)
def test_a_final_answer_without_a_proof_is_final_when_it_has_come_three_times(
    answers: list[str], patience: float, attempts: int
) -> None:
    final_answers, delays = iter(answers), list[float]()

    def attempt() -> None:
        raise AttemptFailed("the key is refused", final_answer=next(final_answers))

    with pytest.raises(Refused, match=r"^the key is refused$"):
        Retries(patience, delays.append).run(attempt)
    assert list(final_answers) == answers[attempts:]
    assert len(delays) == answers[:attempts].count("")
