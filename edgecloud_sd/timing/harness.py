"""What a caption is decoded on: wrappers around both sides that time, or simulate, what events alone do not show.

They meet the same protocols as what they wrap, so the decode loop cannot tell. On the real clock they note when a gate
reads its statistic and when a cache is cut back; under a profile they also let each call take its profile's time on a
virtual clock. A link in between takes its time on either clock, asleep on the real one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from edgecloud_sd import prefill as opening
from edgecloud_sd import wire
from edgecloud_sd.events import Prompt, Span, Verdict
from edgecloud_sd.gate import DraftStop, Gate, Score
from edgecloud_sd.prefill import Pending
from edgecloud_sd.session import Model, Session
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.clock import VirtualClock, Watch
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import Verification, Verifier

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")


class Harness:
    """One request's. The real clock without a profile, a virtual one under it.

    `seed` draws the link's jitter: the same for every cell that a clip is decoded in, so that cells can be paired.
    `far` says that the cloud is a service elsewhere, so that messages cross even without an emulated link.
    """

    def __init__(
        self, profile: Profile | None = None, link: Link = links.NO_LINK, seed: str = "", far: bool = False
    ) -> None:
        self._virtual = VirtualClock()
        self.watch = Watch(self._virtual) if profile else Watch()
        self.profile = profile
        self.link = link
        self.far = far or link != links.NO_LINK
        self._random = random.Random(seed)

    def prepared(self, build: Callable[[], _T]) -> _T:
        """What `build` makes of the samples."""
        made = build()
        if self.profile:
            self.spend(self.profile.features)
        return made

    def edge(self, model: Model) -> Model:
        return _Model(model, self, self.profile.edge if self.profile else None)

    def cloud(self, model: Model) -> Model:
        return _Model(model, self, self.profile.cloud if self.profile else None)

    def linked(self, verifier: Verifier) -> Verifier:
        """A verifier of this process, through the link and the cloud's queue."""
        return _Verifier(verifier, self) if self.profile or self.far else verifier

    def opened(self, verifier: Verifier, when: str) -> Verifier:
        """Opened eager or lazy."""
        if self.far:  # or a caption of which nothing crosses would look like one that had nothing to cross
            self.watch.note("uplink", 0.0, 0.0)
        return opening.Lazy(verifier) if when == "lazy" else opening.Eager(verifier, self.begin)

    def begin_verdict(self, call: Callable[[], Verdict]) -> Pending[Verdict]:
        """As `begin`, for drafting ahead: what of the call is neither link nor queue is the cloud's forward pass."""
        return self.begin(lambda: self.watch.rest("verify", call), hides=True)

    def begin(self, call: Callable[[], _T], hides: bool = False) -> Pending[_T]:
        """Start `call` beside what follows: only waiting for its result takes time of the caption's.

        `hides`: the spans that are hidden so are noted as well.
        """
        spans: list[Span] = []

        def run() -> _T:
            with self.watch.beside(spans):
                return call()

        if not self.profile:
            return _Begun(_background().submit(run), self.watch, spans, hides)
        before = self._virtual.now
        finished = _finished(run)
        ready, self._virtual.now = self._virtual.now, before
        return _Begun(finished, self.watch, spans, hides, self._virtual, ready)

    def gate(self, gate: Gate) -> Gate:
        return replace(gate, score=self._scored(gate.score))

    def stop(self, stop: DraftStop | None) -> DraftStop | None:
        return replace(stop, score=self._scored(stop.score)) if stop else None

    def _scored(self, score: Score | None) -> Score | None:
        if score is None:
            return None

        def scored(row: Tensor) -> float:
            if self.profile:
                self.spend(self.profile.gate)
            return score(row)

        return lambda row: self.watch.timed("gate", scored, row)

    def spend(self, seconds: float) -> None:
        """Let so much time pass."""
        if self.profile:
            self._virtual.advance(seconds)
        elif seconds:
            time.sleep(seconds)

    def up(self, size: int) -> None:
        """A request of `size` bytes crosses to the cloud."""
        if self.far:
            self._cross("uplink", self.link.up_seconds(size, self._random.random), size)

    def down(self, size: int, follows: bool = False) -> None:
        """An answer crosses back. `follows`: right behind the one before, so that only its bytes take time."""
        if self.far:
            each = 8 * size / self.link.down if follows else self.link.down_seconds(size, self._random.random)
            self._cross("downlink", each, size)

    def queue(self) -> None:
        if self.profile and self.profile.queue:
            self.watch.timed("cloud_queue", self.spend, self.profile.queue)

    def _cross(self, part: str, seconds: float, size: int) -> None:
        self.watch.timed(part, self.spend, seconds, size=size)


@dataclass(frozen=True)
class _Begun(Generic[_T]):
    """`ready`: the moment at which it is done, on a virtual clock."""

    future: Future[_T]
    watch: Watch
    spans: list[Span]
    hides: bool
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
            self.watch.wait(self.spans, start, self.hides)


@dataclass(frozen=True)
class _Model:
    model: Model
    stage: Harness
    costs: Costs | None

    @property
    def eos(self) -> frozenset[int]:
        return self.model.eos

    def open(self, prompt: Prompt) -> Session:
        session = self.model.open(prompt)
        if self.costs:
            self.stage.spend(self.costs.prefill)
        return _Session(session, self.stage, self.costs)


class _Session:
    def __init__(self, session: Session, stage: Harness, costs: Costs | None) -> None:
        self._session = session
        self._stage = stage
        self._costs = costs

    @property
    def tokens(self) -> Sequence[int]:
        return self._session.tokens

    def extend(self, tokens: Sequence[int]) -> Tensor:
        rows = self._session.extend(tokens)
        if self._costs:
            self._stage.spend(self._costs.seconds(len(tokens)))
        return rows

    def truncate(self, length: int) -> None:
        self._stage.watch.timed("rollback", self._session.truncate, length)


@dataclass(frozen=True)
class _Verifier:
    verifier: Verifier
    stage: Harness

    def open(self, prompt: Prompt) -> Verification:
        """The request alone crosses here: nobody has to wait for its acknowledgement before asking for more."""
        body = wire.encode_prompt(prompt)
        self.stage.up(wire.REQUEST_HEAD + len(body))
        self.stage.queue()
        return _Verification(self.verifier.open(prompt), self.stage, wire.prompt_checksum(body, "greedy"))


class _Verification:
    def __init__(self, verification: Verification, stage: Harness, begun: int) -> None:
        self._verification = verification
        self._stage = stage
        self._begun = begun
        self._context: list[int] = []

    def wait(self) -> None:
        self._verification.wait()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self._context[base:] = tokens
        request = wire.build_verify_request(self._begun, self._context, base, draft)
        self._stage.up(wire.REQUEST_HEAD + len(wire.dumps(request)))
        self._stage.queue()
        verdict = self._verification.verify(base, tokens, draft)
        self._context += draft[: verdict.accepted]
        self._stage.down(wire.ANSWER_HEAD + len(wire.dumps(wire.build_verdict_message(verdict, request.check))))
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Asked for together with the opening; the tokens follow each other at the pace at which they are made."""
        asked = wire.build_generate_request(self._begun, output, stopping.eos, stopping.max_new_tokens).check
        written: list[int] = []
        for token in self._verification.generate(stopping, output):
            written.append(token)
            head = wire.CHUNK_HEAD if len(written) > 1 else wire.ANSWER_HEAD + wire.CHUNK_HEAD
            self._stage.down(head + len(wire.dumps(wire.build_token_line(written, asked))), follows=len(written) > 1)
            yield token

    def close(self) -> None:
        self._verification.close()


def _finished(call: Callable[[], _T]) -> Future[_T]:
    """What `call` came to, as if a thread had done it."""
    done: Future[_T] = Future()
    try:
        done.set_result(call())
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        done.set_exception(error)
    return done


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="beside")
