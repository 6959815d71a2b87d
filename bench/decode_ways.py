"""Decode clips in many ways on the virtual clock. Both sides compute each clip once for all ways.

A side encodes and prefills a clip once, and computes the logits after a context once, because most ways share most
contexts. The virtual clock takes the time of every pass, recalled or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from bench.held_out import HeldOutClip
from bench.ways import CLOUD, PERFECT, ParetoWay, random_ways
from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.local import Cloud, local_verifier
from edgecloud_sd.config import Settings
from edgecloud_sd.data import prompts
from edgecloud_sd.events import Event, Output, Prompt, Trace
from edgecloud_sd.lookup import CaptionHistory, Lookup
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline, count_shared_ids, generation_events
from edgecloud_sd.session import Model, Session, check_truncation, sync
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link, parse_link
from edgecloud_sd.timing.profile import Profile, load_profile
from edgecloud_sd.verifier import Verifier

if TYPE_CHECKING:
    from torch import Tensor


class RecallingSession:
    """A session that computes the logits after a context once, and recalls them if a later way has that context."""

    def __init__(self, session: Session) -> None:
        self.tokens: list[int] = []
        self._session = session
        self._rows: dict[tuple[int, ...], Tensor] = {}  # keys are contexts

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens, and return their logits [len(tokens), vocab_size]."""
        import torch

        before = len(self.tokens)
        self.tokens.extend(tokens)
        contexts = [tuple(self.tokens[: before + count]) for count in range(1, len(tokens) + 1)]
        if new := [context for context in contexts if context not in self._rows]:
            rows = len(self.tokens) - len(new[0]) + 1
            self._rows |= zip(contexts[-rows:], sync(self._session, self.tokens, rows), strict=True)
        return torch.stack([self._rows[context] for context in contexts])

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raise ValueError if there are fewer."""
        check_truncation(length, len(self.tokens))
        del self.tokens[length:]


@dataclass
class KeptModel:
    """A model that opens a prompt once. Later callers get the same session, without tokens but with its memory."""

    model: Model
    opened: tuple[Prompt, Session] | None = None

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end a generation."""
        return self.model.eos

    def open(self, prompt: Prompt) -> Session:
        """Encode and prefill the prompt, unless it is the one of the last call."""
        if self.opened is None or self.opened[0] is not prompt:
            self.opened = (prompt, RecallingSession(self.model.open(prompt)))
        self.opened[1].truncate(0)
        return self.opened[1]


@dataclass(frozen=True)
class KeptCloud:
    """A cloud in this process for `generation_events`, with the sessions of a `KeptModel`."""

    model: KeptModel

    def verifier(self, rule: Rule, harness: Harness, wants_rest: bool = False) -> Verifier:
        """Return the verifier of one generation."""
        return local_verifier(self.model, rule, harness, wants_rest)


@dataclass(frozen=True)
class VirtualBench:
    """A loaded pair, and what every caption of a run has in common."""

    pipeline: Pipeline
    profile: Profile
    link: Link
    max_new_tokens: int
    edge: KeptModel
    cloud: KeptCloud
    histories: dict[tuple[ParetoWay, str], CaptionHistory] = field(default_factory=dict)  # keys are ways and languages

    @classmethod
    def of(cls, pipeline: Pipeline, settings: Settings) -> VirtualBench:
        """Return the bench of a run on the virtual clock."""
        return cls(
            pipeline,
            load_profile(settings.profile or ""),
            parse_link(settings.link[0]),
            settings.max_new_tokens,
            KeptModel(pipeline.edge),
            KeptCloud(KeptModel(pipeline.cloud_model)),
        )

    def decode(self, clip: HeldOutClip, way: ParetoWay, target: Sequence[int]) -> Trace:
        """Return the trace of a clip. `target` is the cloud's own caption, for a bound."""
        import torch

        output: list[int] = []
        strategy = way.strategy
        if way.make_gate:
            strategy = replace(strategy, gate=way.make_gate(output, target, clip.file_id))
        front = self.pipeline.edge
        history = self.histories.setdefault((way, clip.language), CaptionHistory())
        open_lookup = partial(Lookup, history, front.eos, prompts.control_ids(front.tokenizer))
        harness = Harness(self.profile, self.link, clip.file_id)
        events = generation_events(
            lambda: clip.prompt,
            strategy,
            Stopping(self.edge.eos, self.max_new_tokens),
            self.edge,
            cast("Cloud", self.cloud),  # nothing but its verifier is used
            harness,
            adaptive_k=self.pipeline.adaptive_k(strategy, clip.language, self.link, self.profile),
            shared_ids=count_shared_ids(front, self.pipeline.cloud_model.vocab_size),
            open_lookup=None if strategy.drafter == "model" else open_lookup,
        )
        with torch.inference_mode():
            return stamp(record_output(events, output), harness.watch)


def record_output(events: Iterable[Event], tokens: list[int]) -> Iterator[Event]:
    """Yield the events, and keep the output so far in a list before the decoder goes on."""
    output = Output()
    for event in events:
        output.see(event)
        tokens[:] = output.tokens
        yield event


def decode_all(
    bench: VirtualBench, clips: Sequence[HeldOutClip], ways: Sequence[ParetoWay]
) -> dict[ParetoWay, list[Trace]]:
    """Return the trace of each clip by way. `ways` has mode cloud before any bound.

    The ways of the random gate, with the rates of the perfect one, are added.
    """
    perfect = [way for way in ways if way.line == PERFECT]
    traces: dict[ParetoWay, list[Trace]] = {}
    name, total = clips[0].language, len(clips) * (len(ways) + len(perfect))
    with tqdm(total=total, desc=name, unit="caption", disable=None, leave=False) as bar:

        def decode_chosen(chosen: Sequence[ParetoWay]) -> None:
            traces.update((way, []) for way in chosen)
            for place, clip in enumerate(clips):
                for way in chosen:
                    target = traces[CLOUD][place].tokens if way.make_gate else ()
                    traces[way].append(bench.decode(clip, way, target))
                    bar.update()

        decode_chosen(ways)
        rates = [sum(map(metrics.counts, traces[way]), metrics.Counts()).cloud_call_rate for way in perfect]
        decode_chosen(random_ways(sorted({rate for rate in rates if rate})))
    return traces
