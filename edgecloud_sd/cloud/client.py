"""The cloud across HTTP, as a `Verifier`: the decode loop cannot tell it from a model in this process.

A failed attempt is tried again while the connection's patience lasts. If the server has lost the session, the client
opens the prompt anew. If the two sides disagree about the context, the client sends all of it. The check of each answer
shows that it belongs to the request, so a caption is either right or absent.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from edgecloud_sd import wire
from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.breaker import Breaker
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.cloud.retry import PATIENCE, PROBE_PATIENCE, REQUEST_TIMEOUT, AttemptFailed, Refused, Retries
from edgecloud_sd.cloud.transport import MODEL_PATH, SESSIONS_PATH, Transport, parse_server_timing
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.host.limits import start_outside_limit
from edgecloud_sd.models.traits import Traits
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, Verifier

_T = TypeVar("_T")
CLOSE_TIMEOUT = 2.0  # s for the request that closes a session, and for all that wait at the end
CLOSERS = 4  # such requests at once
# Answers that are no identity, after which the URL is that of another service:
SAME_ANSWERS = 5  # with equal bytes, which damage would not give so often
OTHER_ANSWERS = 10  # in all, because damage would not hit so many
SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)  # the names that are safe in a path


class Connection:
    """A connection to the server at `url`, for any number of threads. Raise ValueError for a malformed URL.

    `timeout` is the seconds for one request, or between two lines of a stream. `patience` is the seconds for which a
    failed request is tried again. All calls share one `breaker`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout: float = REQUEST_TIMEOUT,
        patience: float = PATIENCE["wait"],
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.url = url
        self.transport = Transport(url, key, timeout)
        self.breaker = Breaker()
        self._patience = patience
        self.sleep = sleep  # None: really, and a caption that is closed wakes up
        self._closer = ThreadPoolExecutor(CLOSERS, thread_name_prefix="close-session")
        self._closing_ends = math.inf

    @cached_property
    def identity(self) -> Identity:
        """The identity that the server reports, fetched once.

        Raise CloudFault for a server that does not answer, and Refused for one that wants another key.
        """
        with self.breaker.guard() as is_probe:
            answers: Counter[bytes] = Counter()
            retries = self.new_retries(is_probe=is_probe)
            return retries.run(lambda: self._fetch_identity(answers, retries.attempt_seconds))

    @property
    def local_parameters(self) -> int:
        """Always 0, because the model runs elsewhere."""
        return 0

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        """Return a verifier for one caption, timed by its harness. Raise Refused for a rule the server cannot apply."""
        if refusal := self.identity.refusal(rule):
            raise Refused(refusal)
        harness.count_messages()
        return harness.timed_verifier(RemoteVerifier(self, rule, harness, wants_rest))

    def new_retries(
        self,
        on_failure: Callable[[AttemptFailed], None] = lambda failure: None,
        is_probe: bool = False,
        sleep: Callable[[float], object] = time.sleep,
    ) -> Retries:
        """Return the attempts at a new call, with this connection's patience, or with less of it for a probe."""
        patience = min(self._patience, PROBE_PATIENCE) if is_probe else self._patience
        return Retries(patience, self.sleep or sleep, on_failure, PROBE_PATIENCE if is_probe else math.inf)

    def close_session(self, session: str) -> None:
        """Tell the server in the background and only once. The server itself closes a session that is not used."""

        def delete() -> None:
            with suppress(AttemptFailed, Refused):
                self.transport.call("DELETE", f"{SESSIONS_PATH}/{session}", seconds=self._closing_seconds)

        with suppress(RuntimeError):  # the connection is closed already
            start_outside_limit(lambda: self._closer.submit(delete))

    def _closing_seconds(self) -> float:
        return min(CLOSE_TIMEOUT, self._closing_ends - time.monotonic())

    def close(self) -> None:
        """Wait `CLOSE_TIMEOUT` at most until the sessions are closed, then close the sockets.

        This ends the calls of other threads too.
        """
        self._closing_ends = time.monotonic() + CLOSE_TIMEOUT
        self._closer.shutdown()
        self.transport.close()

    def _fetch_identity(self, answers: Counter[bytes], seconds: Callable[[], float]) -> Identity:
        """Return the identity. `answers` counts the answers that are none: enough of them are no damage."""
        answer = self.transport.call("GET", MODEL_PATH, seconds=seconds).content
        try:
            return _parse_identity(answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            other_service = (
                f"{self.url} is not an edgecloud_sd cloud of this version: check the URL, or install one version on "
                "both ends"
            )
            answers[answer] += 1
            is_other = answers[answer] >= SAME_ANSWERS or answers.total() >= OTHER_ANSWERS
            raise (Refused if is_other else AttemptFailed)(other_service) from None


def _parse_identity(answer: bytes) -> Identity:
    """Return the identity in the JSON of `/v1/model`. Raise ValueError if its check does not match."""
    message = json.loads(answer)
    fields = {name: message[name] for name in Identity.__dataclass_fields__}
    traits = Traits(**{**message["traits"], "eos": tuple(message["traits"]["eos"])})
    identity = Identity(**{**fields, "traits": traits})
    if identity.check != message["check"]:
        raise ValueError("the check does not match the other fields")
    return identity


@dataclass(frozen=True)
class RemoteVerifier:
    """A server and an acceptance rule, for one caption. Its verdicts have a rest if `wants_rest` is True."""

    connection: Connection
    rule: Rule
    harness: Harness
    wants_rest: bool = False

    def open(self, prompt: Prompt) -> RemoteVerification:
        """Return a verification of the prompt, which is not sent yet: the first call on the verification sends it."""
        return RemoteVerification(self, prompt)


class RemoteVerification:
    """One prompt at a server, which may be opened several times."""

    def __init__(self, verifier: RemoteVerifier, prompt: Prompt) -> None:
        self._connection = verifier.connection
        self._harness = verifier.harness
        self._rule = verifier.rule
        self._wants_rest = verifier.wants_rest
        self._body = wire.encode_prompt(prompt)
        self._prompt_check = wire.prompt_checksum(self._body, self._rule.text, self._wants_rest)
        self._retries = self._connection.new_retries()  # the attempts at the call that runs
        self._session: str | None = None
        self._was_opened = False
        self._closed = threading.Event()
        self._context: list[int] = []  # the tokens that the edge has committed, as of the last call of `verify`
        self._agreed = 0  # the server has this many tokens of the context

    def wait(self) -> None:
        """Return when the prompt is open at the server."""
        self._call(lambda: None)

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Return the server's verdict on `draft`. See `Verification.verify`."""
        self._context[base:] = tokens
        self._agreed = min(self._agreed, base)
        verdict = self._call(lambda: self._verify(draft))
        self._context += draft[: verdict.accepted]
        self._agreed = len(self._context)
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Generator[int]:
        """Yield the target model's tokens after `output`. After a failure, the stream continues where it stopped.

        A failure after the last token of the caption is ignored.
        """
        generated = list(output)
        self._agreed = 0  # the server's cache will contain its own tokens
        with self._guarded() as is_probe:
            self._retries, note_loss = self._new_retries(is_probe)
            while stopping.reason(generated) is None:
                try:
                    self._ensure_open(note_loss)
                    with closing(self._stream(stopping, generated)) as tokens:
                        for token in tokens:
                            generated.append(token)
                            self._connection.breaker.note_answer()
                            yield token
                            self._retries, note_loss = self._new_retries()
                except AttemptFailed as failure:
                    if stopping.reason(generated) is not None:
                        return
                    self._retries.wait(failure)

    def close(self) -> None:
        """Close the session in the background. A call of another thread soon ends, with CloudFault."""
        self._closed.set()
        session, self._session = self._session, None
        if session is not None:
            self._connection.close_session(session)

    def _call(self, call: Callable[[], _T]) -> _T:
        """Return the result of `call` on an open session, tried again after a failure."""
        with self._guarded() as is_probe:
            self._retries, note_loss = self._new_retries(is_probe)

            def attempt() -> _T:
                self._ensure_open(note_loss)
                return call()

            return self._retries.run(attempt)

    @contextmanager
    def _guarded(self) -> Iterator[bool]:
        """Let one call run in the block unless the breaker is open, and yield True for a probe."""
        try:
            with self._connection.breaker.guard() as is_probe:
                yield is_probe
        except CloudFault as fault:
            self._harness.mark_breaker(fault)
            raise

    def _new_retries(self, is_probe: bool = False) -> tuple[Retries, Callable[..., None]]:
        """Return the attempts at a new call, and the function that notes the time that failed ones have cost."""
        note_loss = self._harness.watch.record_failures("faults")

        def on_failure(failure: AttemptFailed) -> None:
            self._check_open()
            if failure.session_is_lost:
                self._session = None
            if failure.session_is_lost or failure.context_differs:
                self._agreed = 0
            note_loss(failure.was_sent)

        return self._connection.new_retries(on_failure, is_probe, self._closed.wait), note_loss

    def _attempt_seconds(self) -> float:
        """Return the seconds for an attempt at the call that runs, or at the next token; 0 for a closed caption."""
        return 0.0 if self._closed.is_set() else self._retries.attempt_seconds()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise CloudFault("the caption was closed before the cloud answered")

    def _ensure_open(self, note_loss: Callable[..., None]) -> None:
        """Open the prompt unless it has a session. The time of a second opening counts as lost."""
        self._check_open()
        if self._session is None:
            is_reopened = self._was_opened
            self._open()
            self._was_opened = True
            if is_reopened:
                note_loss(again=True)

    def _open(self) -> None:
        rest = "&rest=1" if self._wants_rest else ""
        path = f"{SESSIONS_PATH}?rule={self._rule.text}{rest}&check={self._prompt_check}"
        answer = self._post(path, self._body, wire.OCTETS, self._prompt_check)
        session, model = _read(lambda: wire.read_opened(answer, self._prompt_check))
        if not SESSION.fullmatch(session):
            raise AttemptFailed("the answer names no valid session")
        if model != self._connection.identity.fingerprint:
            self._connection.close_session(session)
            raise Refused(f"{self._connection.url} now serves another model than when this run began; start a new run")
        self._session = session

    def _verify(self, draft: Sequence[int]) -> Verdict:
        request = wire.build_verify_request(self._prompt_check, self._context, self._agreed, draft)
        answer = self._post(f"{SESSIONS_PATH}/{self._session}/verify", wire.dumps(request), wire.JSON, request.check)
        return _read(lambda: wire.read_verdict(answer, len(draft), request.check, self._wants_rest))

    def _post(self, path: str, body: bytes, content: str, check: int) -> bytes:
        """Return the answer to one attempt at the request with this check, and note its time and its bytes."""
        self._harness.send_up(wire.REQUEST_HEAD + len(body))
        start = self._harness.watch.seconds()
        answer = self._connection.transport.call("POST", path, body, content, self._attempt_seconds)
        self._note_answer(start, answer.timing, check)
        self._harness.send_down(wire.ANSWER_HEAD + len(answer.content))
        return answer.content

    def _note_answer(self, start: float, timing: str, check: int) -> None:
        """Divide the time since `start` into network, queue and model. The model's part is no span of its own."""
        _read(lambda: wire.check_timing(timing, check))
        watch = self._harness.watch
        seconds = watch.seconds() - start
        queue, model = parse_server_timing(timing, seconds)
        network = seconds - queue - model
        watch.record("network", start, start + network)
        watch.record("cloud_queue", start + network, start + network + queue)

    def _stream(self, stopping: Stopping, output: Sequence[int]) -> Generator[int]:
        """Yield the tokens of one attempt. It reads the stream to its end, so that the socket can be used again."""
        output = tuple(output)
        request = wire.build_generate_request(self._prompt_check, output, stopping.eos, stopping.max_new_tokens)
        body = wire.dumps(request)
        self._harness.send_up(wire.REQUEST_HEAD + len(body))
        start = self._harness.watch.seconds()
        generated: list[int] = []
        has_ended = False
        path = f"{SESSIONS_PATH}/{self._session}/generate"
        with self._connection.transport.stream(path, body, self._attempt_seconds) as (timing, lines):
            self._note_answer(start, timing, request.check)
            for token in self._read_stream(lines, generated, request.check):
                is_complete = stopping.reason([*output, *generated]) is not None
                if has_ended or (token is None) != is_complete:
                    raise AttemptFailed("the stream does not end with the caption")
                if token is None:
                    has_ended = True
                else:
                    generated.append(token)
                    yield token
        if not has_ended:
            raise AttemptFailed("the stream was cut off")

    def _read_stream(self, lines: Iterator[bytes], generated: Sequence[int], check: int) -> Iterator[int | None]:
        """Yield the token of each line, or None for the last line. The caller appends each token to `generated`."""
        head = wire.ANSWER_HEAD
        for line in lines:
            token = _read(lambda line=line: wire.read_stream_line(line, generated, check))  # type: ignore[misc]
            self._harness.send_down(head + wire.CHUNK_HEAD + len(line) + 1, is_continuation=bool(generated))
            head = 0
            yield token


def _read(read: Callable[[], _T]) -> _T:
    """Return the result of a reader of `wire`. Raise AttemptFailed for an answer that the reader refuses."""
    try:
        return read()
    except wire.WireError as error:
        raise AttemptFailed(f"the answer {error}") from None
