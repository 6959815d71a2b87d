"""The captions that transformers' own `generate` writes, by ours and by its ways, clip by clip: what each way costs.

`bench.baselines` says what is measured, and for which runs. Every way must write the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import (
    BASELINE_CLIPS,
    WAYS,
    BaselineCase,
    PreparedClip,
    TimedCaption,
    baseline_cases,
    baseline_metrics,
    differing,
    prepare_clip,
    turns,
    way_ratios,
    ways,
)
from bench.cases import SETTINGS
from bench.session import DataSet, Progress, errors_in_one_line, outcomes
from edgecloud_sd.config import Settings
from edgecloud_sd.models.devices import LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.timing.clock import VirtualClock, garbage_collector_frozen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    made = baseline_cases(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("baseline", made, ids=[each.id for each in made])


def test_baselines(
    baseline: BaselineCase,
    run_clock: VirtualClock,  # before `benchmark`, which takes it for its timer
    benchmark: BenchmarkFixture,
    pipeline: Pipeline,
    data: Callable[[str], DataSet],
    settings: Settings,
    progress: Callable[[int, str], Progress],
    pytestconfig: pytest.Config,
) -> None:
    chosen = data(baseline.language)
    named = pytestconfig.args_source is pytest.Config.ArgsSource.ARGS
    with errors_in_one_line():
        pipeline.prepare("speculative")
        heard = chosen.clips if named else chosen.clips[:BASELINE_CLIPS]
        clips = [
            prepare_clip(pipeline, chosen.request(clip), baseline.strategy, settings.max_new_tokens) for clip in heard
        ]
    exact = pipeline.cloud.identity.dtype in LOSSLESS_DTYPES
    found = ways(pipeline, baseline.strategy, settings.max_new_tokens)
    bar = progress(len(clips), baseline.id)
    done: list[dict[str, TimedCaption]] = []

    def one(clip: PreparedClip, number: int) -> dict[str, TimedCaption]:
        captions = {way: found[way](clip) for way in turns(number)}
        if exact and (others := differing(captions)):
            name = chosen.clips[number].file_id
            said = ", ".join(WAYS[way] for way in others)
            pytest.fail(f"{name}: not the tokens of transformers' greedy generate: {said}", pytrace=False)
        return captions

    def timed(clip: PreparedClip, number: int) -> None:
        done.append(one(clip, number))
        run_clock.advance(done[-1]["speculative"].seconds)

    one(clips[0], 0)  # whatever is done once is done now
    waiting = iter([(clip, number) for number, clip in enumerate(clips)])
    benchmark.group = "beside transformers"
    with garbage_collector_frozen():
        benchmark.pedantic(
            timed, setup=lambda: (next(waiting), {}), teardown=lambda *_: bar.advance(), rounds=len(clips), iterations=1
        )
    benchmark.extra_info["baselines"] = {
        "figures": baseline_metrics(done),
        "intervals": {name: [each.low, each.high] for name, each in way_ratios(done).items()},
        "clips": [clip.file_id for clip in heard],
        "tokens": [len(each["speculative"].tokens) for each in done],
        "seconds": {way: [each[way].seconds for each in done] for way in WAYS},
        "ways": WAYS,
        "k": baseline.k,
        "rule": baseline.strategy.rule.label,
        "language": baseline.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
    outcomes(pytestconfig).baselines[baseline.id] = done
