"""The state of a benchmark session: its data, its progress bar, its outcomes, and the tables at its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tqdm import tqdm

from bench import baselines, load, tables
from bench.cases import Case
from bench.clip_text import explain_no_escalation
from bench.comparison import Document
from bench.forecasts import DecodedCell, forecast_cells
from bench.resume import SavedClips
from edgecloud_sd.config import Settings
from edgecloud_sd.data import dataset
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.forecast.model import Forecast
from edgecloud_sd.host.errors import explain_error
from edgecloud_sd.host.limits import lift_memory_limit
from edgecloud_sd.measure import metrics
from edgecloud_sd.measure.summary import ClipResult, Summary
from edgecloud_sd.pipeline import Request
from edgecloud_sd.pocket.clips import manifest_path
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault


@dataclass
class Outcomes:
    """The outcomes that a session shows at its end, by case id."""

    captions: dict[str, tuple[Case, list[ClipResult]]] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    loads: dict[str, tuple[load.LoadCase, dict[str, float]]] = field(default_factory=dict)
    baselines: dict[str, list[dict[str, baselines.TimedCaption]]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    profile: Profile | None = None  # the costs of the virtual clock
    saved: SavedClips | None = None  # the clips of the latest captioning cell
    notes: list[str] = field(default_factory=list)  # lines for the end of the run
    regressions: list[str] = field(default_factory=list)  # lines of --fail-if

    def sections(self, settings: Settings) -> Iterator[tuple[str, list[str]]]:
        """Yield the title and the lines of each section of the terminal summary."""
        if self.summaries:
            yield "captions", [tables.render_summaries(self.summaries), *self.escalation_notes()]
            yield "where the time goes", [tables.render_breakdowns(self.summaries)]
            if text := tables.render_payoff(self.documents, self.forecasts(settings)):
                yield "does it pay?", [text]
        if self.loads:
            yield "many edges on one cloud", [load.render_load(self.loads)]
        if self.baselines:
            yield "baselines", [baselines.render_baselines(self.baselines)]

    def escalation_notes(self) -> Iterator[str]:
        """Yield a line for each speculative cell that sent nothing to the cloud, with the reason."""
        labels = tables.short_names(self.summaries)
        for name, (case, results) in self.captions.items():
            if reason := explain_no_escalation(case.strategy, results):
                yield f"- {labels.get(name, name)}: no draft was verified: {reason}"

    def forecasts(self, settings: Settings) -> dict[str, Forecast | str]:
        """Return the forecast of each speculative cell, or the reason why there is none."""
        cells = {
            name: DecodedCell(case.strategy, case.link, [result.trace for result in results])
            for name, (case, results) in self.captions.items()
        }
        is_one_process = settings.clock == "real" and not settings.cloud_url
        shares_device = is_one_process and settings.edge_device == settings.cloud_device
        return forecast_cells(cells, self.profile, shares_device)


OUTCOMES = pytest.StashKey[Outcomes]()


def outcomes(config: pytest.Config) -> Outcomes:
    """Return the outcomes of the session so far."""
    return config.stash.setdefault(OUTCOMES, Outcomes())


@contextmanager
def errors_in_one_line(hint: str = "", prefix: str = "") -> Iterator[None]:
    """Fail with one line, without a traceback, for an expected failure, such as a clip that cannot be used.

    Any failure lifts the memory limit, because a report needs memory.
    """
    try:
        yield
    except Exception as error:
        expected = explain_error(error, lift_memory_limit())
        if expected is None:
            raise
        raise pytest.fail.Exception(f"{prefix}{expected.line}{hint}", pytrace=False) from None


def is_cloud_fault(failure: BaseException) -> bool:
    """Return whether a CloudFault is behind a failure of one line, or behind the error that this line explains."""
    error: BaseException | None = failure
    while error is not None and not isinstance(error, CloudFault):
        error = error.__cause__ or error.__context__
    return error is not None


class DataSet:
    """The clips of a run in one language. Each audio file is read once."""

    def __init__(self, settings: Settings, language: str) -> None:
        path = manifest_path(settings.dataset_path, language)
        self.clips, self.skipped = dataset.load_manifest(
            path,
            language,
            settings.caption_type,
            settings.on_bad_clip,
            settings.max_samples,
            settings.with_transcription == "yes",
        )
        self._prompt_type = settings.prompt_type
        self._task = settings.own_task(language)
        self._samples: dict[str, NDArray[np.float32]] = {}

    @cached_property
    def digest(self) -> str:
        """The digest of the clips: their entries without paths, and their samples."""
        digest = hashlib.sha256()
        for clip in self.clips:
            entry = {name: value for name, value in asdict(clip).items() if name not in ("audio_path", "doubts")}
            digest.update(json.dumps(entry, sort_keys=True).encode() + self.request(clip).samples.tobytes())
        return digest.hexdigest()

    def request(self, clip: Clip) -> Request:
        """Return the request for a clip. Raise BadClip for audio that cannot be used."""
        if clip.file_id not in self._samples:
            self._samples[clip.file_id] = dataset.load_audio(clip.audio_path)
        return Request(self._samples[clip.file_id], clip.language, self._prompt_type, clip.transcription, self._task)


def past_capture(capture: Any) -> AbstractContextManager[None]:
    """Return a block whose output pytest does not capture. `capture` is its capture manager, or None without one."""
    block: AbstractContextManager[None] = capture.global_and_fixture_disabled() if capture else nullcontext()
    return block


class Progress:
    """A bar with clips and the running OTPS on a terminal, and nothing elsewhere."""

    def __init__(self, total: int, name: str, capture: Any) -> None:
        tqdm.monitor_interval = 0  # its thread would start under the memory limit, and only redraw
        self._capture = capture
        self._tokens, self._seconds = 0, 0.0
        with self._uncaptured():
            self._bar = tqdm(total=total, desc=name, unit="clip", leave=False, disable=capture is None)

    def advance(self, result: ClipResult | None = None) -> None:
        """Count one more clip."""
        if result and result.after_first:
            tokens, seconds = result.after_first
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        otps = metrics.otps(self._tokens + 1, 0.0, self._seconds)
        with self._uncaptured():
            self._bar.set_postfix_str("" if otps is None else f"OTPS {otps:.1f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        with self._uncaptured():
            self._bar.close()

    def _uncaptured(self) -> AbstractContextManager[None]:
        return past_capture(self._capture)
