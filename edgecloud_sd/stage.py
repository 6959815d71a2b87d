"""What a caption is decoded on: wrappers around both sides that time, or simulate, what events alone do not show.

They meet the same protocols as what they wrap, so the decode loop cannot tell. On the real clock they note when a gate
reads its statistic and when a cache is cut back; under a profile they also let each call take its profile's time on a
virtual clock, and put a link in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from edgecloud_sd import link as links
from edgecloud_sd.clock import VirtualClock, Watch
from edgecloud_sd.gate import Gate
from edgecloud_sd.link import Link
from edgecloud_sd.profile import Costs, Profile
from edgecloud_sd.records import Prompt, Verdict
from edgecloud_sd.session import Model, Session
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import Verification, Verifier

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Stage:
    """One request's. The real clock without a profile, a virtual one under it.

    `seed` draws the link's jitter: the same for every cell that a clip is decoded in, so that cells can be paired.
    """

    def __init__(self, profile: Profile | None = None, link: Link = links.NONE, seed: str = "") -> None:
        if profile is None and link != links.NONE:
            raise ValueError(f"link {link.name} can only be simulated: it needs a profile and the virtual clock")
        self._virtual = VirtualClock()
        self.watch = Watch(self._virtual) if profile else Watch()
        self.profile = profile
        self.link = link
        self._random = random.Random(seed)

    def prepared(self, build: Callable[[], T]) -> T:
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
        """Through the link, and through the cloud's queue."""
        return _Verifier(verifier, self) if self.profile else verifier

    def gate(self, gate: Gate) -> Gate:
        score = gate.score
        if score is None:
            return gate

        def scored(row: Tensor) -> float:
            if self.profile:
                self.spend(self.profile.gate)
            return score(row)

        return replace(gate, score=lambda row: self.watch.timed("gate", scored, row))

    def spend(self, seconds: float) -> None:
        """Let the virtual clock go on."""
        self._virtual.advance(seconds)

    def up(self, size: int) -> None:
        if self.link != links.NONE:
            self._cross("uplink", self.link.up_seconds(size, self._random.random()), size)

    def down(self, size: int, follows: bool = False) -> None:
        """`follows`: right behind the message before, so that only its bytes take time."""
        if self.link != links.NONE:
            each = 8 * size / self.link.down if follows else self.link.down_seconds(size, self._random.random())
            self._cross("downlink", each, size)

    def queue(self) -> None:
        if self.profile and self.profile.queue:
            self.watch.timed("cloud_queue", self.spend, self.profile.queue)

    def _cross(self, part: str, seconds: float, size: int) -> None:
        self.watch.timed(part, self.spend, seconds, size=size)


@dataclass(frozen=True)
class _Model:
    model: Model
    stage: Stage
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
    def __init__(self, session: Session, stage: Stage, costs: Costs | None) -> None:
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
    stage: Stage

    def open(self, prompt: Prompt) -> Verification:
        """The request alone crosses here: nobody has to wait for its acknowledgement before asking for more."""
        self.stage.up(links.open_bytes(prompt))
        self.stage.queue()
        return _Verification(self.verifier.open(prompt), self.stage)


@dataclass(frozen=True)
class _Verification:
    verification: Verification
    stage: Stage

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self.stage.up(int(links.verify_bytes(len(tokens) + len(draft))))
        self.stage.queue()
        verdict = self.verification.verify(base, tokens, draft)
        self.stage.down(links.VERDICT_BYTES)
        return verdict

    def generate(self, stopping: Stopping) -> Iterator[int]:
        """Asked for together with the opening; the tokens follow each other at the pace at which they are made."""
        for i, token in enumerate(self.verification.generate(stopping)):
            self.stage.down(links.TOKEN_BYTES, follows=i > 0)
            yield token

    def close(self) -> None:
        self.verification.close()
