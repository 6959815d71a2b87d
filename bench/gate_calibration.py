"""Calibrate the level of a gate on clips that were set aside: `python -m bench.tune --calibrate N`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.cases import LANGUAGE_CODES
from bench.held_out import HeldOutClip, iterate_held_out
from edgecloud_sd.config import ConfigError, Settings
from edgecloud_sd.events import Drafted, Trace
from edgecloud_sd.forecast.budgets import (
    ALWAYS_SEND,
    LEVEL_RANGES,
    Budget,
    LevelCost,
    calibrated_strategy,
    gate_at,
    level_costs,
    own_score,
    trace_endings,
)
from edgecloud_sd.forecast.calibration import (
    Calibration,
    CalibrationError,
    choose_budget,
    choose_own,
    save_calibration,
)
from edgecloud_sd.grid import strategies
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline, count_shared_ids, generation_events
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.wire import MAX_DRAFT

PREVIEWED_OWN, PREVIEWED_CALLS = (0.95, 0.9, 0.8), (0.5, 1.0, 1.5)
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)  # shares of the tokens below a level


def calibrate_gate(pipeline: Pipeline, settings: Settings, strategy: Strategy, count: int, output: Path) -> list[Path]:
    """Decode up to `count` clips a language, and write what each level of the gate costs. Return the files.

    With several languages each has a file of its own, whose name ends in the code of the language.
    """
    files = []
    for language in settings.language:
        clips = list(iterate_held_out(pipeline, settings, language, count, "calibration"))
        decoder = CalibrationDecoder(pipeline, settings.max_new_tokens, clips)
        costs, scores = (
            _risk_costs(decoder, strategy) if strategy.gate.name == "risk" else (_token_costs(decoder, strategy), ())
        )
        code = f"-{LANGUAGE_CODES[language]}" if len(settings.language) > 1 else ""
        files.append(output.with_stem(f"{output.stem}{code}"))
        conditions = pipeline.conditions(settings, strategy, language)
        ids = tuple(clip.file_id for clip in clips)
        save_calibration(Calibration(files[-1].name, conditions, ids, tuple(costs), tuple(scores)), files[-1])
    return files


def preview_choices(calibration: Calibration) -> Iterator[str]:
    """Yield the level that a run would get by this calibration, in a line for each of some promises and budgets."""
    for own in PREVIEWED_OWN if calibration.scores else ():
        yield f"--own {own:g}: {choose_own(calibration, own).reason}"
    for calls in PREVIEWED_CALLS:
        with suppress(CalibrationError):  # no level of the gate needs so few
            yield f"--cloud-calls {calls:g}: {choose_budget(calibration, Budget('calls', calls)).reason}"


def find_strategy(settings: Settings) -> Strategy:
    """Return the strategy to calibrate, at its lowest level.

    Raise ConfigError unless it is the only one of the options, and has a level.
    """
    grid = strategies(settings)
    if len(grid) > 1:
        raise ConfigError(f"--calibrate: needs one strategy, and the options name {len(grid)}: give one value to each")
    name = grid[0].gate.name
    if name not in LEVEL_RANGES:
        raise ConfigError(f"--gate: {name} has no level to calibrate: give one of {', '.join(LEVEL_RANGES)}")
    if settings.max_new_tokens > MAX_DRAFT:
        raise ConfigError(f"--max-new-tokens: a calibration verifies whole captions, of {MAX_DRAFT} tokens at most")
    return calibrated_strategy(grid[0])


@dataclass(frozen=True)
class CalibrationDecoder:
    """The clips of a calibration, and the pair that decodes them."""

    pipeline: Pipeline
    max_new_tokens: int
    clips: Sequence[HeldOutClip]

    def traces(self, strategy: Strategy, name: str) -> Iterator[Trace]:
        """Yield the trace of each clip."""
        import torch

        edge, cloud = self.pipeline.edge, self.pipeline.cloud
        for clip in tqdm(self.clips, desc=name, unit="clip", disable=None, leave=False):
            harness = Harness()
            events = generation_events(
                lambda clip=clip: clip.prompt,  # type: ignore[misc]
                strategy,
                Stopping(edge.eos, self.max_new_tokens),
                edge,
                cloud,
                harness,
                shared_ids=count_shared_ids(edge, cloud.identity.vocab_size),
            )
            with torch.inference_mode():
                yield stamp(events, harness.watch)


def _risk_costs(decoder: CalibrationDecoder, strategy: Strategy) -> tuple[list[LevelCost], list[float]]:
    """Return the costs of each send level, and the scores if the rule is lossless, from one decode of each clip."""
    gate = gate_at(strategy.gate, ALWAYS_SEND)
    traces = decoder.traces(replace(strategy, gate=gate), "calibrating")
    captions = [trace_endings(trace, gate) for trace in traces]
    return level_costs(captions), [own_score(endings) for endings in captions] if strategy.rule.is_lossless else []


def _token_costs(decoder: CalibrationDecoder, strategy: Strategy) -> list[LevelCost]:
    """Return the costs of levels at quantiles of the statistic over the edge's own tokens. Each level is decoded."""
    low, high, _ = LEVEL_RANGES[strategy.gate.name]
    alone = replace(strategy, gate=gate_at(strategy.gate, high))
    events = (event for trace in decoder.traces(alone, "statistics") for _, event in trace.events)
    scores = [score for event in events if isinstance(event, Drafted) for score in event.draft.scores]
    costs = []
    for level in np.unique(np.quantile(scores, QUANTILES).clip(low, high)).tolist():
        traces = decoder.traces(replace(strategy, gate=gate_at(strategy.gate, level)), f"level {level:.3g}")
        counts = sum(map(metrics.counts, traces), metrics.Counts())
        costs.append(LevelCost(level, counts.cloud_calls / len(decoder.clips), counts.written / counts.tokens))
    return costs
