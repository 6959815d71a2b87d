"""The cloud across HTTP, as a `Verifier`: nobody above can tell it from a model in this process.

Whatever fails in between (no connection, no answer, one that is garbage or to another question, a restarted server, a
lost session) is tried again for as long as the connection's patience lasts: the prompt is opened anew where the session
is gone, and the whole context sent where the two sides no longer agree on it. Each answer proves by its check that it
is to the question that was asked, so a caption is right or not there. What a request may take is bounded, in time and
in bytes, whatever the other end sends.
"""

from __future__ import annotations

import json
import math
import random
import re
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpcore2

from edgecloud_sd import wire
from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.engine import Identity
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.models.frontend import Traits
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault

_T = TypeVar("_T")
# What to do about a fault: for how many seconds a call is tried again
PATIENCE = {"wait": 60.0, "edge": 2.0, "error": 0.0}
FIRST_DELAY, LONGEST_DELAY = 0.05, 5.0  # s between attempts: doubled each time, less a random part of up to a half
KEPT_ALIVE = 60.0  # s that an unused connection is kept; the server keeps its end longer
CONNECTING, CLOSING = 5.0, 1.0  # s, at most, for a connection to stand, and for a session's end to be told
LARGEST_ANSWER = 2**16  # bytes, of an answer or of one line of a stream: the longest there is has some hundred
WRITTEN_AT_ONCE = 2**16  # bytes
SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)  # it stands in paths


class Refused(CloudFault, ValueError):
    """The cloud answers, and will not do what is asked however often: the message says why."""


class _Fault(Exception):
    """One attempt has failed, in a way that another may not."""

    def __init__(self, what: str, lost: bool = False, unsure: bool = False, sent: bool = True) -> None:
        super().__init__(what)
        self.sent = sent  # whether anything may have reached the other end
        self.lost = lost  # the session is gone
        self.unsure = unsure  # the two sides count on different contexts


@dataclass(frozen=True)
class Answer:
    """A whole one, of a request that succeeded."""

    content: bytes
    timing: str  # its Server-Timing header


class Connection:
    """A server, by its URL. Used from many threads at once. ValueError for a URL that is none.

    `timeout` is how long one request may take from its connection to its last byte (of a stream: each line of it),
    `patience` how long one that fails is repeated: both s.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout: float = 30.0,
        patience: float = PATIENCE["wait"],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self.patience = patience
        self.sleep = sleep
        self._timeout = timeout
        self._base = _base(url)
        host = self._base.host if b":" not in self._base.host else b"[%b]" % self._base.host
        self._headers = [(b"Host", host if self._base.port is None else b"%b:%d" % (host, self._base.port))]
        if key:
            self._headers.append((b"Authorization", b"Bearer " + key.encode()))
        self._closed = False
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="ending")
        # httpcore follows no redirect, keeps no cookie, decodes nothing and asks no environment for a proxy
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpcore2.default_ssl_context() if self._base.scheme == b"https" else None,
            max_connections=None,
            keepalive_expiry=KEPT_ALIVE,
            network_backend=_Backend(),
        )

    @cached_property
    def remote(self) -> Identity:
        """What the server says of itself, asked once. CloudFault where it cannot be had, Refused where it wants another
        key."""
        return self.tried(self._remote)

    def verifier(self, rule: Rule, stage: Harness) -> RemoteVerifier:
        """For one caption, timed by its stage. Refused for a rule that the server cannot judge by."""
        if refusal := self.remote.refusal(rule):
            raise Refused(refusal)
        return RemoteVerifier(self, rule, stage)

    def close(self) -> None:
        """Drops what stands, under whoever still waits for it, once the ends of sessions are told."""
        self._telling.shutdown()
        self._closed = True
        self._pool.close()

    def end(self, session: str) -> None:
        """Tell the server in the background, once and without patience: what it does not hear of, it finds unused."""

        def tell() -> None:
            with suppress(_Fault, Refused):
                self.call("DELETE", f"/v1/sessions/{session}", timeout=CLOSING)

        with suppress(RuntimeError):  # closed already
            self._telling.submit(tell)

    def call(
        self, method: str, path: str, body: bytes | None = None, content: str = "", timeout: float = math.inf
    ) -> Answer:
        """One attempt at a request. _Fault where another may succeed, Refused where none will."""
        with self._asked(method, path, body, content, _Deadline(min(timeout, self._timeout))) as response:
            return Answer(_content(response), _timing(response))

    @contextmanager
    def stream(self, path: str, body: bytes) -> Iterator[tuple[str, Iterator[bytes]]]:
        """A request whose answer comes in lines, each within `timeout` of the one before: its Server-Timing header, and
        they. As `call`."""
        deadline = _Deadline(self._timeout)
        with self._asked("POST", path, body, wire.JSON, deadline) as response:
            yield _timing(response), _lines(response, deadline)

    def tried(self, attempt: Callable[[], _T], failed: Callable[[_Fault], None] = lambda fault: None) -> _T:
        """What `attempt` gives, tried again while patience lasts: CloudFault then. `failed` is told of each fault."""
        retries = Retries(self)
        while True:
            try:
                return attempt()
            except _Fault as fault:
                try:
                    retries.wait(fault)
                finally:
                    failed(fault)

    @contextmanager
    def _asked(
        self, method: str, path: str, body: bytes | None, content: str, deadline: _Deadline
    ) -> Iterator[httpcore2.Response]:
        if self._closed:
            raise Refused(f"{self.url}: the connection was closed")
        url = httpcore2.URL(
            scheme=self._base.scheme,
            host=self._base.host,
            port=self._base.port,
            target=self._base.target + path.encode("ascii"),
        )
        headers = [*self._headers, (b"Content-Type", content.encode())] if content else self._headers
        timeouts = {"timeout": dict.fromkeys(("connect", "read", "write"), deadline)}
        try:
            with self._pool.stream(method, url, headers=headers, content=body, extensions=timeouts) as response:
                if response.status not in (200, 201, 204):
                    raise _problem(response)
                yield response
        except FAILURES as error:
            sent = not isinstance(error, httpcore2.ConnectError | httpcore2.ConnectTimeout)
            raise _Fault(f"{type(error).__name__} {_shown(str(error))}".strip(), sent=sent) from None

    def _remote(self) -> Identity:
        try:
            answer = self.call("GET", "/v1/model").content
        except _Fault as fault:
            if fault.lost:  # there is no such path
                raise Refused(NO_CLOUD.format(self.url)) from None
            raise
        try:
            said = json.loads(answer)
            known = {name: said[name] for name in Identity.__dataclass_fields__}
            traits = Traits(**{**said["traits"], "eos": tuple(said["traits"]["eos"])})
            whole = Identity(**{**known, "traits": traits})
            if whole.fingerprint != said["fingerprint"]:
                raise ValueError("what it says does not match its fingerprint")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Fault(NO_CLOUD.format(self.url)) from None
        return whole


NO_CLOUD = "{} is no edgecloud_sd cloud, or one of another version"


class Retries:
    """The waits of one call that fails."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._began = time.monotonic()
        self._slept = 0.0
        self._count = 0

    def wait(self, fault: _Fault) -> None:
        """Sleep before the next attempt. CloudFault where patience is at an end."""
        self._count += 1
        # what was slept counts even where sleeping is only pretended
        left = self._connection.patience - max(time.monotonic() - self._began, self._slept)
        if left <= 0:
            tried = "once" if self._count == 1 else f"{self._count} times"
            raise CloudFault(f"the cloud failed {tried}, the last time so: {fault}") from fault
        if not (fault.lost or fault.unsure) or self._count > 2:
            longest = min(FIRST_DELAY * 2.0 ** min(self._count - 1, 32), LONGEST_DELAY)
            # less a random part, so that edges do not come back all at one moment
            delay = min(longest * random.uniform(0.5, 1.0), left)
            self._slept += delay
            self._connection.sleep(delay)


@dataclass(frozen=True)
class RemoteVerifier:
    """A server and a rule, for one caption."""

    connection: Connection
    rule: Rule
    stage: Harness

    def open(self, prompt: Prompt) -> RemoteVerification:
        """Sends nothing yet: `wait` does, or whatever else is asked first."""
        return RemoteVerification(self, prompt)


class RemoteVerification:
    """One prompt at a server, opened as often as it takes."""

    def __init__(self, verifier: RemoteVerifier, prompt: Prompt) -> None:
        self._connection = verifier.connection
        self._stage = verifier.stage
        self._rule = verifier.rule
        self._body = wire.encode_prompt(prompt)
        self._begun = wire.prompt_checksum(self._body, self._rule.text)
        self._session: str | None = None
        self._opened = False  # at least once
        self._over = False
        self._context: list[int] = []  # what the edge has committed, as far as it was told here
        self._held = 0  # how much of it the server holds

    def wait(self) -> None:
        """Returns when the prompt is open at the server."""
        self._tried(lambda: None)

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self._context[base:] = tokens
        self._held = min(self._held, base)
        verdict = self._tried(lambda: self._verify(draft))
        self._context += draft[: verdict.accepted]
        self._held = len(self._context)
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Generator[int]:
        """The stream goes on where a fault has ended it; what follows the caption's last token matters to nobody."""
        written = list(output)
        self._held = 0  # the server's cache will hold its own tokens
        retries, lost = Retries(self._connection), self._stage.watch.losses("faults")
        while stopping.reason(written) is None:
            try:
                self._ready(lost)
                with closing(self._stream(stopping, written)) as tokens:
                    for token in tokens:
                        written.append(token)
                        yield token
                        retries, lost = Retries(self._connection), self._stage.watch.losses("faults")
            except _Fault as fault:
                if stopping.reason(written) is not None:
                    return
                try:
                    retries.wait(fault)
                finally:
                    self._failed(fault)
                    lost(fault.sent)

    def close(self) -> None:
        """The caption does not wait for the server to hear of it.

        From another thread it also ends the attempts of whoever waits.
        """
        self._over = True
        session, self._session = self._session, None
        if session is not None:
            self._connection.end(session)

    def _tried(self, call: Callable[[], _T]) -> _T:
        """`call()` on an open session, again and again; what failed is noted as time lost."""
        lost = self._stage.watch.losses("faults")

        def attempt() -> _T:
            self._ready(lost)
            return call()

        def failed(fault: _Fault) -> None:
            self._failed(fault)
            lost(fault.sent)

        return self._connection.tried(attempt, failed)

    def _failed(self, fault: _Fault) -> None:
        if fault.lost:
            self._session = None
        if fault.lost or fault.unsure:
            self._held = 0

    def _ready(self, lost: Callable[..., None]) -> None:
        """Sees to it that there is a session; opening anew is time lost."""
        if self._over:
            raise CloudFault("the caption was over before the cloud could be had")
        if self._session is None:
            anew = self._opened
            self._open()
            self._opened = True
            if anew:
                lost(again=True)

    def _open(self) -> None:
        path = f"/v1/sessions?rule={self._rule.text}&check={self._begun}"
        answer = self._timed(path, self._body, wire.OCTETS)
        session, model = _read(lambda: wire.read_opened(answer, self._begun))
        if not SESSION.fullmatch(session):
            raise _Fault("the answer names no session")
        if model != self._connection.remote.fingerprint:
            raise Refused(f"{self._connection.url} serves another model than it did when this run began")
        self._session = session

    def _verify(self, draft: Sequence[int]) -> Verdict:
        request = wire.build_verify_request(self._begun, self._context, self._held, draft)
        answer = self._timed(f"/v1/sessions/{self._session}/verify", wire.dumps(request), wire.JSON)
        return _read(lambda: wire.read_verdict(answer, len(draft), request.check))

    def _timed(self, path: str, body: bytes, content: str) -> bytes:
        """One attempt, its time told apart: the server's queue and model by what it says, the rest is the network's."""
        self._stage.up(wire.REQUEST_HEAD + len(body))
        start = self._stage.watch.seconds()
        answer = self._connection.call("POST", path, body, content)
        self._answered(start, answer.timing)
        self._stage.down(wire.ANSWER_HEAD + len(answer.content))
        return answer.content

    def _answered(self, start: float, timing: str) -> None:
        """What a request took since `start`, now that there is an answer: the model's part is no span of its own."""
        watch = self._stage.watch
        took = watch.seconds() - start
        queue, model = server_timing(timing, took)
        network = took - queue - model
        watch.note("network", start, start + network)
        watch.note("cloud_queue", start + network, start + network + queue)

    def _stream(self, stopping: Stopping, output: Sequence[int]) -> Generator[int]:
        """The tokens of one attempt. Read to its end, or the connection could not be used again."""
        output = tuple(output)
        request = wire.build_generate_request(self._begun, output, stopping.eos, stopping.max_new_tokens)
        body = wire.dumps(request)
        self._stage.up(wire.REQUEST_HEAD + len(body))
        start = self._stage.watch.seconds()
        written: list[int] = []
        ended = False
        with self._connection.stream(f"/v1/sessions/{self._session}/generate", body) as (timing, lines):
            self._answered(start, timing)
            head = wire.ANSWER_HEAD
            for line in lines:
                token = _read(lambda line=line: wire.read_stream_line(line, written, request.check))  # type: ignore[misc]
                self._stage.down(head + wire.CHUNK_HEAD + len(line) + 1, follows=bool(written))
                head = 0
                whole = stopping.reason([*output, *written]) is not None
                if ended or (token is None) != whole:
                    raise _Fault("the stream does not end where the caption does")
                if token is None:
                    ended = True
                else:
                    written.append(token)
                    yield token
        if not ended:
            raise _Fault("the stream broke off")


# Whatever httpcore raises for what the other end or the network does
FAILURES = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    httpcore2.ProxyError,
)


class _Deadline:
    """When a request must be done.

    httpcore applies a timeout to each read and write, of which an answer may take any number; but it hands on what it
    is given, so that one object can bound them all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self._seconds

    def left(self, late: type[Exception]) -> float:
        """Seconds. Raises `late` where there are none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise late("took too long")
        return seconds


class _Backend(httpcore2.NetworkBackend):
    """Sockets whose timeouts are `_Deadline`s."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: Any = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        seconds = min(timeout.left(httpcore2.ConnectTimeout), CONNECTING)
        return _Stream(httpcore2.SyncBackend().connect_tcp(host, port, seconds, local_address, socket_options))


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        return self._stream.read(max_bytes, timeout.left(httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        for start in range(0, len(buffer), WRITTEN_AT_ONCE):
            self._stream.write(buffer[start : start + WRITTEN_AT_ONCE], timeout.left(httpcore2.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore2.NetworkStream:
        seconds = min(timeout.left(httpcore2.ConnectTimeout), CONNECTING)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _base(url: str) -> httpcore2.URL:
    """What all paths of a server begin with. ValueError for what is no URL, or says more than that."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as connecting will
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL ({error})") from None
    plain = url.isascii() and url.isprintable() and " " not in url and not (parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not host or not plain or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is no URL: give http://host:port or https://host")
    return httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=parts.path.rstrip("/"))


def _content(response: httpcore2.Response) -> bytes:
    """The whole body. _Fault for one that is larger than any answer."""
    found = bytearray()
    for chunk in response.iter_stream():
        found += chunk
        if len(found) > LARGEST_ANSWER:
            raise _Fault(f"the answer is longer than {LARGEST_ANSWER} bytes")
    return bytes(found)


def _timing(response: httpcore2.Response) -> str:
    return b",".join(value for name, value in response.headers if name.lower() == b"server-timing").decode("latin-1")


def _lines(response: httpcore2.Response, deadline: _Deadline) -> Iterator[bytes]:
    """What ends in a newline, as it comes: a last line without one was cut off."""
    rest = b""
    for chunk in response.iter_stream():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if lines:
            deadline.renew()
        if len(rest) > LARGEST_ANSWER:
            raise _Fault(f"a line of the answer is longer than {LARGEST_ANSWER} bytes")


def server_timing(header: str, most: float) -> tuple[float, float]:
    """(queue, model) s from a Server-Timing header of this server's, together at most `most`; 0 what it lacks."""
    said = {}
    for entry in header.split(","):
        name, _, milliseconds = entry.partition(";dur=")
        with suppress(ValueError):
            seconds = float(milliseconds) / 1e3
            if math.isfinite(seconds):
                said[name.strip()] = max(seconds, 0.0)
    model = min(said.get("model", 0.0), most)
    return min(said.get("queue", 0.0), most - model), model


def _read(read: Callable[[], _T]) -> _T:
    try:
        return read()
    except wire.WireError as error:
        raise _Fault(f"the answer {error}") from None
    except ValueError:  # such as text that no bytes can hold
        raise _Fault("the answer is garbage") from None


def _problem(response: httpcore2.Response) -> Exception:
    """What to raise for an answer that is none."""
    status = response.status
    try:
        detail = str(json.loads(_content(response))["detail"])
    except (_Fault, ValueError, KeyError, TypeError, RecursionError):
        detail = ""
    said = f"{status} {_shown(detail)}".strip()
    if status in (401, 403):
        return Refused(f"the cloud refuses the key: {said} (see --cloud-key-file)")
    if status == 413:
        return Refused(f"the cloud refuses the request: {said}")
    return _Fault(f"the cloud answered {said}", lost=status == 404, unsure=status == 409)


def _shown(text: str) -> str:
    """What may stand in a message, whoever wrote it: a terminal obeys some characters."""
    return "".join(each if each.isprintable() else " " for each in text[:200])
