"""From audio to caption: the way of the data in one place, for the command line, the suite and your own code."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd import acceptance, decoder, gate
from edgecloud_sd import prefill as opening
from edgecloud_sd.data import prompts
from edgecloud_sd.decoder import Decoding
from edgecloud_sd.events import Event, Prepared, Prompt, Trace
from edgecloud_sd.forecast.adaptive_k import AdaptiveK
from edgecloud_sd.gate import DraftStop
from edgecloud_sd.models import devices, frontend, pairs
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.verifier import LocalVerifier, Verifier

if TYPE_CHECKING:
    from edgecloud_sd.cloud.client import Connection
    from edgecloud_sd.cloud.engine import Identity
    from edgecloud_sd.config import Settings
    from edgecloud_sd.models.frontend import Frontend
    from edgecloud_sd.models.hf import HFModel
    from edgecloud_sd.timing.profile import Profile


@dataclass(frozen=True)
class Request:
    """One clip to caption: mono samples at 16 kHz, and how to ask for the caption."""

    samples: NDArray[np.float32]
    language: str = "chinese"
    prompt_type: str = "default"
    transcription: str | None = None


@dataclass(frozen=True)
class Cell:
    """One way to decode, by name: what a cell of the benchmark grid fixes."""

    mode: str
    gate: gate.Gate = gate.NEVER
    rule: acceptance.Rule = acceptance.GREEDY
    k: int | None = 1  # None: found anew each round
    link: Link = links.NO_LINK
    open: str = "eager"
    stop: DraftStop | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        decoder.check_mode(self.mode)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, or None to have it found, not {self.k}")
        if self.open not in opening.PREFILL_TIMES:
            raise ValueError(f"open must be one of {', '.join(opening.PREFILL_TIMES)}, not {self.open!r}")
        if self.ahead < 0:
            raise ValueError(f"ahead must be 0 or more tokens, not {self.ahead}")
        if self.stop and self.stop.score is None and self.gate.score is None:
            raise ValueError(f"stop {self.stop.label} reads the gate's score, and gate {self.gate.label} has none")

    @property
    def is_lossless(self) -> bool:
        """Whether the output is promised to equal the cloud's own, token for token (in float32 and float64)."""
        return self.mode == "speculative" and self.gate == gate.ALWAYS and self.rule.is_lossless


def cells(settings: Settings) -> list[Cell]:
    """Each different way to decode that a run asks for, once, in the order of its settings."""
    found: list[Cell] = []
    crossed = [links.parse_link(text) for text in settings.link]
    for mode in settings.mode:
        if mode == "edge":
            found.append(Cell(mode))
            continue
        if mode == "cloud":
            found.extend(Cell(mode, link=link) for link in crossed)
            continue
        gates = [
            gate.parse_gate(name, threshold)
            for name in settings.gate
            for threshold in (settings.entropy_threshold if name == "entropy" else (0.0,))
        ]
        rules = [acceptance.parse_rule(rule, r) for rule in settings.rule for r in settings.rank]
        ways = list(
            itertools.product(rules, settings.k, crossed, settings.open, settings.draft_stop, settings.draft_ahead)
        )
        found.extend(
            Cell(mode, chosen, rule, k, link, when, gate.parse_draft_stop(stop, chosen), ahead)
            for chosen in gates
            # where nothing is sent, nothing else of a cell matters
            for rule, k, link, when, stop, ahead in (ways if chosen.escalates else ways[:1])
        )
    return list(dict.fromkeys(found))


class Captioner:
    """A pair, each side loaded when a mode first needs it: edge mode never loads the cloud.

    `threads` is how many CPU threads torch may use, for the whole process; None leaves it torch's own choice for a pair
    with a model of 50 M parameters or more, and is one otherwise. With a `connection` the cloud is a service
    elsewhere, and no weights of it are loaded here. `alone` lets the edge finish what the cloud fails.
    """

    @classmethod
    def of(cls, settings: Settings, connection: Connection | None = None) -> Captioner:
        """The captioner that a run asks for."""
        return cls(
            pairs.find_pair(settings.pair, settings.edge_model, settings.cloud_model, settings.weights),
            edge_device=settings.edge_device,
            edge_dtype=settings.edge_dtype,
            cloud_device=settings.cloud_device,
            cloud_dtype=settings.cloud_dtype,
            threads=settings.threads,
            connection=connection,
            alone=settings.on_cloud_fault == "edge",
        )

    def __init__(
        self,
        pair: pairs.Pair = pairs.PAIRS["pocket"],
        *,
        edge_device: str = "cpu",
        edge_dtype: str = "float32",
        cloud_device: str = "cpu",
        cloud_dtype: str = "float32",
        threads: int | None = None,
        connection: Connection | None = None,
        alone: bool = False,
    ) -> None:
        self.pair = pair
        self._edge = (pair.edge, edge_device, edge_dtype, pair.weights)
        self._cloud = (pair.cloud, cloud_device, cloud_dtype, pair.weights)
        self._threads = threads
        self._connection = connection
        self._alone = alone
        self._paces: dict[tuple[Cell, str, Profile | None], AdaptiveK] = {}
        self._loaded: dict[str, tuple[Frontend, int]] = {}

    def elsewhere(self, connection: Connection) -> Captioner:
        """The same pair with its cloud at a server, on the same edge: it is not loaded again. A fault is an error."""
        _ = self.edge  # or each of the two would load its own
        other = copy.copy(self)
        other._connection, other._alone, other._paces, other._loaded = connection, False, {}, {}
        return other

    @cached_property
    def edge(self) -> HFModel:
        """The small model, loaded when first asked for."""
        return _load(*self._edge)

    @cached_property
    def cloud(self) -> HFModel:
        """The large model, loaded when first asked for."""
        return _load(*self._cloud)

    @cached_property
    def front(self) -> Frontend:
        """The edge's front end: where the cloud is elsewhere, cloud mode needs no weights here."""
        from edgecloud_sd.models import load

        return load.load_frontend(self.pair.edge, self.pair.weights)

    def load(self, mode: str) -> Frontend:
        """Load what `mode` needs, check that it fits together, and return the side that prepares its prompts."""
        if mode not in self._loaded:
            models = [] if mode == "cloud" else [self.edge]
            if mode != "edge" and self._connection is None:
                models.append(self.cloud)
            side = models[0] if models else self.front
            if mode != "edge":
                cloud = self._connection.remote if self._connection else None
                there = cloud.traits if cloud else frontend.frontend_traits(self.cloud)
                name = cloud.name if cloud else self.cloud.name
                frontend.check_pair(side.name, frontend.frontend_traits(side), name, there)
                if cloud and (cloud.weights == pairs.DUMMY) != (self.pair.weights == pairs.DUMMY):
                    raise ValueError(f"{name}, at the server, and {side.name} are not both of dummy weights: --weights")
                if models and self.pair.weights == pairs.DUMMY:
                    from edgecloud_sd.models import dummy

                    dummy.check_vocab_sizes(models[0].vocab_size, cloud.vocab_size if cloud else self.cloud.vocab_size)
            threads = devices.choose_threads(self._threads, [model.thinker for model in models])
            self._loaded[mode] = side, threads
        side, threads = self._loaded[mode]
        devices.use_threads(threads)
        return side

    def prompt(self, request: Request, mode: str) -> Prompt:
        side = self.load(mode)
        return prompts.build_prompt(
            request.samples,
            side.tokenizer,
            side.extractor,
            language=request.language,
            prompt_type=request.prompt_type,
            transcription=request.transcription,
        )

    def events(
        self, request: Request, cell: Cell, max_new_tokens: int, stage: Harness | None = None
    ) -> Iterator[Event]:
        """Everything that happens to one request, from its features to its last token."""
        stage = stage or self._stage(cell)
        side = self.load(cell.mode)
        stopping = Stopping(side.eos, max_new_tokens)
        k = self._pace(cell, request.language, stage.profile) if cell.k is None else cell.k
        how = Decoding(
            cell.mode,
            stopping,
            k=k,
            gate=stage.gate(cell.gate),
            alone=self._alone,
            stop=stage.stop(cell.stop),
            begin=stage.begin_verdict if cell.ahead else None,
            ahead=cell.ahead,
            is_lossless=cell.is_lossless,
        )
        prompt = stage.prepared(lambda: self.prompt(request, cell.mode))
        yield Prepared(len(prompt.ids))
        edge = None if cell.mode == "cloud" else stage.edge(self.edge)
        cloud = None if cell.mode == "edge" else self.verifier(cell.rule, stage)
        if cloud and cell.mode == "speculative":
            cloud = stage.opened(cloud, cell.open)
        decoded = decoder.decode(prompt, how, edge, cloud)
        yield from k.look(decoded, stage.watch.seconds) if isinstance(k, AdaptiveK) else decoded

    def remember(self, trace: Trace, cell: Cell, language: str, profile: Profile | None = None) -> None:
        """A caption of an earlier run that this one goes on from: what it shows is not to be found out again."""
        if cell.k is None:
            self._pace(cell, language, profile).look_back(trace)

    def _pace(self, cell: Cell, language: str, profile: Profile | None) -> AdaptiveK:
        return self._paces.setdefault(
            (cell, language, profile), AdaptiveK(cell.ahead, cell.is_lossless, cell.open == "eager")
        )

    def verifier(self, rule: acceptance.Rule, stage: Harness | None = None) -> Verifier:
        """The cloud, wherever it is, for one caption."""
        stage = stage or Harness()
        if self._connection:
            return self._connection.verifier(rule, stage)
        return stage.linked(LocalVerifier(stage.cloud(self.cloud), rule))

    def trace(
        self,
        request: Request,
        cell: Cell,
        max_new_tokens: int,
        profile: Profile | None = None,
        seed: str = "",
        finished: Callable[[], None] = lambda: None,
    ) -> Trace:
        """One caption, timed: on the real clock, or under `profile` on a virtual one; the cell's link on either.

        `finished` is called at its last event, before anything is cleared away.
        """
        import torch

        stage = self._stage(cell, profile, seed)
        with torch.inference_mode():
            return stamp(self.events(request, cell, max_new_tokens, stage), stage.watch, finished)

    def _stage(self, cell: Cell, profile: Profile | None = None, seed: str = "") -> Harness:
        return Harness(profile, cell.link, seed, far=self._connection is not None and cell.mode != "edge")

    @property
    def cloud_dtype(self) -> str:
        """The number format of the cloud, wherever it is."""
        return self._connection.remote.dtype if self._connection else self._cloud[2]

    @property
    def remote(self) -> Identity | None:
        """What the server says of itself, where the cloud is one."""
        return self._connection.remote if self._connection else None

    def text(self, mode: str) -> Callable[..., str]:
        """The decoding from ids to a caption: special tokens, EOS among them, have no text."""
        tokenizer = self.load(mode).tokenizer
        return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def _load(checkpoint: str, device: str, dtype: str, weights: str) -> HFModel:
    from edgecloud_sd.models import load  # brings torch and transformers, which no help text should wait for

    return load.load_model(checkpoint, device, dtype, weights)
