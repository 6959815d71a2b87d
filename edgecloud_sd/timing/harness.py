"""Wrappers around both sides that record time where the work is done, or simulate it.

The wrappers meet the same protocols as the objects that they wrap, so the decode loop cannot tell. On the real clock
they record spans. Under a cost profile they also let each call take the profile's time on a virtual clock. A link
takes its time on either clock; on the real one the thread sleeps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from edgecloud_sd import wire
from edgecloud_sd.events import BREAKER_OPEN, Committed, Event, Prompt, Span, Verdict
from edgecloud_sd.gate import Score
from edgecloud_sd.host.limits import start_outside_limit
from edgecloud_sd.prefill import EagerPrefill, LazyPrefill, Pending
from edgecloud_sd.session import Model, Session
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import VirtualClock, Watch
from edgecloud_sd.timing.link import NO_LINK, Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import CloudFault, LocalVerifier, Verification, Verifier

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")


class Harness:
    """The clock, the link and the costs of one request: the real clock, or a virtual one under `profile`.

    `seed` draws the link's jitter. It is equal for every strategy that decodes a clip, so that they can be paired.
    """

    def __init__(self, profile: Profile | None = None, link: Link = NO_LINK, seed: str = "") -> None:
        self._virtual = VirtualClock()
        self.watch = Watch(self._virtual) if profile else Watch()
        self.profile = profile
        self.link = link
        self._counts_messages = link != NO_LINK
        self._random = random.Random(seed)

    def count_messages(self) -> None:
        """Record the bytes of messages even without an emulated link, because the cloud is a real service."""
        self._counts_messages = True

    def record_fault(self, fault: CloudFault, start: float) -> None:
        """Record the time since `start` as lost to a failed call, unless the open breaker let no call be tried."""
        if fault.breaker_mark != BREAKER_OPEN:
            self.watch.record("faults", start)

    def mark_breaker(self, fault: CloudFault) -> None:
        """Record that a failure opened the breaker of the cloud, or met it open, as a span without length."""
        if fault.breaker_mark:
            now = self.watch.seconds()
            self.watch.record(fault.breaker_mark, now, now)

    def prepared(self, build: Callable[[], _T]) -> _T:
        """Return `build()`, timed as the features of the request."""
        seconds = self.profile.features if self.profile else 0.0
        return self.watch.timed("features", lambda: self._with_cost(build, seconds))

    def timed_strategy(self, strategy: Strategy) -> Strategy:
        """Return the strategy with the scores of its gate and its draft stop timed."""
        stop = strategy.draft_stop
        return replace(
            strategy,
            gate=replace(strategy.gate, score=self._timed_score(strategy.gate.score)),
            draft_stop=replace(stop, score=self._timed_score(stop.score)) if stop else None,
        )

    def edge(self, model: Model) -> Model:
        """Return the edge's model, timed."""
        return _TimedModel(model, self, self.profile.edge if self.profile else None, "edge_prefill", "draft")

    def cloud(self, model: Model) -> Model:
        """Return a model of this process as the cloud's. `timed_verifier` times its forward passes."""
        return _TimedModel(model, self, self.profile.cloud if self.profile else None)

    def linked(self, verifier: LocalVerifier) -> Verifier:
        """Return a verifier of this process behind the emulated link and the cloud's queue."""
        return _LinkedVerifier(verifier, self) if self.profile or self.link != NO_LINK else verifier

    def timed_verifier(self, verifier: Verifier) -> Verifier:
        """Return a verifier, in this process or not, with its prefill, verifications and steps timed."""
        return _TimedVerifier(verifier, self.watch)

    def deferred(self, verifier: Verifier, prefill: str) -> Verifier:
        """Return a verifier that prefills eagerly, in the background, or lazily."""
        if self._counts_messages:  # without this span a caption that sends nothing would look like one without a link
            self.watch.spans.insert(0, Span("uplink", 0.0, 0.0))  # at the front, because spans are sorted by their ends
        return LazyPrefill(verifier) if prefill == "lazy" else EagerPrefill(verifier, self.background)

    def background_verification(self, call: Callable[[], Verdict]) -> Pending[Verdict]:
        """Start a verification in the background, and keep the time that drafting ahead hides."""
        return self.background(call, keep_hidden=True)

    def background(self, call: Callable[[], _T], keep_hidden: bool = False) -> Pending[_T]:
        """Start `call` in the background. Only the wait for its result takes time of the generation."""
        spans: list[Span] = []

        def run() -> _T:
            with self.watch.in_background(spans):
                return call()

        if not self.profile:
            future = start_outside_limit(lambda: _executor().submit(run))
            return _PendingCall(future, self.watch, spans, keep_hidden)
        before = self._virtual.now
        future = _run_at_once(run)
        ready, self._virtual.now = self._virtual.now, before
        return _PendingCall(future, self.watch, spans, keep_hidden, self._virtual, ready)

    def with_corrections(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield the events. After each correction, let the time pass in which the edge repairs its cache."""
        seconds = self.profile.correction if self.profile else 0.0
        for event in events:
            yield event
            if seconds and isinstance(event, Committed) and event.origin == "correction":
                self.watch.timed("rollback", self.spend, seconds)

    def spend(self, seconds: float) -> None:
        """Let `seconds` pass: on the virtual clock, or asleep."""
        if self.profile:
            self._virtual.advance(seconds)
        elif seconds:
            time.sleep(seconds)

    def send_up(self, size: int) -> None:
        """Let a request of `size` bytes cross to the cloud."""
        if self._counts_messages:
            self._cross("uplink", self.link.up_seconds(size, self._random.random), size)

    def send_down(self, size: int, is_continuation: bool = False) -> None:
        """Let an answer of `size` bytes cross back. A continuation follows another, so only its bytes take time."""
        if not self._counts_messages:
            return
        transmission = 8 * size / self.link.down
        seconds = transmission if is_continuation else self.link.down_seconds(size, self._random.random)
        self._cross("downlink", seconds, size)

    def wait_in_queue(self) -> None:
        """Let the profile's queueing time pass."""
        if self.profile and self.profile.queue:
            self.watch.timed("cloud_queue", self.spend, self.profile.queue)

    def _cross(self, part: str, seconds: float, size: int) -> None:
        self.watch.timed(part, self.spend, seconds, size=size)

    def _with_cost(self, call: Callable[[], _T], seconds: float) -> _T:
        result = call()
        self.spend(seconds)
        return result

    def _timed_score(self, score: Score | None) -> Score | None:
        if score is None:
            return None
        seconds = self.profile.gate if self.profile else 0.0
        return lambda row: self.watch.timed("gate", lambda: self._with_cost(lambda: score(row), seconds))


@dataclass(frozen=True)
class _PendingCall(Generic[_T]):
    """A call in the background. On a virtual clock it is done at the moment `ready`."""

    future: Future[_T]
    watch: Watch
    spans: list[Span]
    keep_hidden: bool
    virtual: VirtualClock | None = None
    ready: float = 0.0

    def done(self) -> bool:
        return self.virtual.now >= self.ready if self.virtual else self.future.done()

    def result(self) -> _T:
        start = self.watch.seconds()
        try:
            return self.future.result()
        finally:
            if self.virtual:
                self.virtual.now = max(self.virtual.now, self.ready)
            self.watch.record_wait(self.spans, start, self.keep_hidden)


@dataclass(frozen=True)
class _TimedModel:
    """A model whose calls take a profile's costs. With part names, its prefill and its passes are recorded."""

    model: Model
    harness: Harness
    costs: Costs | None
    prefill_part: str = ""
    pass_part: str = ""

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def open(self, prompt: Prompt) -> Session:
        if self.prefill_part:
            session = self.harness.watch.timed(self.prefill_part, self._open, prompt)
        else:
            session = self._open(prompt)
        return _TimedSession(session, self.harness, self.costs, self.pass_part)

    def _open(self, prompt: Prompt) -> Session:
        session = self.model.open(prompt)
        if self.costs:
            self.harness.spend(self.costs.prefill)
        return session


class _TimedSession:
    def __init__(self, session: Session, harness: Harness, costs: Costs | None, pass_part: str) -> None:
        self._session = session
        self._harness = harness
        self._costs = costs
        self._pass_part = pass_part

    @property
    def tokens(self) -> Sequence[int]:
        return self._session.tokens

    def extend(self, tokens: Sequence[int]) -> Tensor:
        if self._pass_part:
            return self._harness.watch.timed(self._pass_part, self._extend, tokens)
        return self._extend(tokens)

    def truncate(self, length: int) -> None:
        self._harness.watch.timed("rollback", self._session.truncate, length)

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        logits = self._session.extend(tokens)
        if self._costs:
            self._harness.spend(self._costs.seconds(len(tokens)))
        return logits


@dataclass(frozen=True)
class _TimedVerifier:
    verifier: Verifier
    watch: Watch

    def open(self, prompt: Prompt) -> Verification:
        return _TimedVerification(self.watch.timed_remainder("cloud_prefill", self.verifier.open, prompt), self.watch)


@dataclass(frozen=True)
class _TimedVerification:
    verification: Verification
    watch: Watch

    def wait(self) -> None:
        self.watch.timed_remainder("cloud_prefill", self.verification.wait)

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        return self.watch.timed_remainder("verify", self.verification.verify, base, tokens, draft)

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        tokens = self.verification.generate(stopping, output)
        while (token := self.watch.timed_remainder("cloud_decode", next, tokens, None)) is not None:
            yield token

    def close(self) -> None:
        self.verification.close()


@dataclass(frozen=True)
class _LinkedVerifier:
    """A verifier of this process whose messages take the time of a link. Their bytes are those of real messages."""

    verifier: LocalVerifier
    harness: Harness

    def open(self, prompt: Prompt) -> Verification:
        """Send the request. Its acknowledgement takes no time, because the edge need not wait for it."""
        body = wire.encode_prompt(prompt)
        self.harness.send_up(wire.REQUEST_HEAD + len(body))
        self.harness.wait_in_queue()
        check = wire.prompt_checksum(body, self.verifier.rule.text, self.verifier.wants_rest)
        return _LinkedVerification(self.verifier.open(prompt), self.harness, check)


class _LinkedVerification:
    def __init__(self, verification: Verification, harness: Harness, prompt_check: int) -> None:
        self._verification = verification
        self._harness = harness
        self._prompt_check = prompt_check
        self._context: list[int] = []

    def wait(self) -> None:
        self._verification.wait()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self._context[base:] = tokens
        request = wire.build_verify_request(self._prompt_check, self._context, base, draft)
        self._harness.send_up(wire.REQUEST_HEAD + len(wire.dumps(request)))
        self._harness.wait_in_queue()
        verdict = self._verification.verify(base, tokens, draft)
        self._context += draft[: verdict.accepted]
        self._harness.send_down(wire.ANSWER_HEAD + len(wire.dumps(wire.build_verdict_message(verdict, request.check))))
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Ask together with the prompt. Tokens cross one by one, as fast as the cloud generates them."""
        request = wire.build_generate_request(self._prompt_check, output, stopping.eos, stopping.max_new_tokens)
        written: list[int] = []
        for token in self._verification.generate(stopping, output):
            written.append(token)
            head = wire.CHUNK_HEAD if len(written) > 1 else wire.ANSWER_HEAD + wire.CHUNK_HEAD
            size = head + len(wire.dumps(wire.build_token_line(written, request.check)))
            self._harness.send_down(size, is_continuation=len(written) > 1)
            yield token

    def close(self) -> None:
        self._verification.close()


def _run_at_once(call: Callable[[], _T]) -> Future[_T]:
    """Return the result of `call` as a future, as if a thread had run it."""
    future: Future[_T] = Future()
    try:
        future.set_result(call())
    except Exception as error:  # noqa: BLE001 - the future raises it for whoever waits
        future.set_exception(error)
    return future


def start_background_thread(first_call: Callable[[], None]) -> None:
    """Start the thread of background calls, and run a first one. A start that lacks memory later could hang."""
    _executor().submit(first_call).result()


@cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="background")
