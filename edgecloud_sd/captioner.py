"""From audio to caption: the way of the data in one place, for the command line, the suite and your own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgecloud_sd import acceptance, decoder, gate, pairs, prompts
from edgecloud_sd.decoder import Decoding
from edgecloud_sd.records import Event, Prepared, Prompt
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerifier

if TYPE_CHECKING:
    from edgecloud_sd.models.hf import HFModel


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
    rule: acceptance.Rank = acceptance.GREEDY
    k: int = 1

    @property
    def exact(self) -> bool:
        """Whether the output is promised to equal the cloud's own, token for token."""
        return self.mode == "speculative" and self.gate == gate.ALWAYS and self.rule == acceptance.GREEDY


class Captioner:
    """A pair, each side loaded when a mode first needs it: edge mode never loads the cloud."""

    def __init__(
        self,
        pair: pairs.Pair = pairs.PAIRS["pocket"],
        *,
        edge_device: str = "cpu",
        edge_dtype: str = "float32",
        cloud_device: str = "cpu",
        cloud_dtype: str = "float32",
    ) -> None:
        self.pair = pair
        self._edge = (pair.edge, edge_device, edge_dtype)
        self._cloud = (pair.cloud, cloud_device, cloud_dtype)

    @cached_property
    def edge(self) -> HFModel:
        """The small model, loaded when first asked for."""
        return _load(*self._edge)

    @cached_property
    def cloud(self) -> HFModel:
        """The large model, loaded when first asked for."""
        return _load(*self._cloud)

    def load(self, mode: str) -> HFModel:
        """Load what `mode` needs, check that it fits together, and return the side that prepares its prompts."""
        if mode == "cloud":
            return self.cloud
        if mode == "speculative":
            pairs.check_tokenizers(self.edge, self.cloud)
        return self.edge

    def prompt(self, request: Request, mode: str) -> Prompt:
        side = self.load(mode)
        return prompts.build(
            request.samples,
            side.tokenizer,
            side.extractor,
            language=request.language,
            prompt_type=request.prompt_type,
            transcription=request.transcription,
        )

    def events(self, request: Request, cell: Cell, max_new_tokens: int) -> Iterator[Event]:
        """Everything that happens to one request, from its features to its last token."""
        side = self.load(cell.mode)
        how = Decoding(cell.mode, Stopping(side.eos, max_new_tokens), cell.k, cell.gate)
        prompt = self.prompt(request, cell.mode)
        yield Prepared(len(prompt.ids))
        edge = None if cell.mode == "cloud" else self.edge
        cloud = None if cell.mode == "edge" else LocalVerifier(self.cloud, cell.rule)
        yield from decoder.decode(prompt, how, edge, cloud)

    def text(self, mode: str) -> Callable[..., str]:
        """The decoding from ids to a caption: special tokens, EOS among them, have no text."""
        tokenizer = self.load(mode).tokenizer
        return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def _load(checkpoint: str, device: str, dtype: str) -> HFModel:
    from edgecloud_sd.models import hf  # brings torch and transformers, which no help text should wait for

    return hf.load(checkpoint, device, dtype)
