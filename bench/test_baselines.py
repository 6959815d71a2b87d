"""Caption the same clips with transformers' own `generate` and with our modes, and record the cost of each way.

`bench.baselines` defines the ways, the timing, and the runs that have this benchmark. Every way must write the same
tokens in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import (
    BASELINE_CLIPS,
    WAYS,
    BaselineCase,
    PreparedClip,
    TimedCaption,
    Way,
    baseline_cases,
    baseline_metrics,
    build_ways,
    list_differing_ways,
    order_ways,
    prepare_clip,
    way_ratios,
)
from bench.cases import SETTINGS, group_name, plain_params
from bench.session import DataSet, Progress, errors_in_one_line, outcomes
from edgecloud_sd.config import Settings
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.models.devices import LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.timing.clock import VirtualClock, garbage_collector_frozen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the benchmark of this run, if it has one."""
    cases = baseline_cases(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("baseline", cases, ids=[case.id for case in cases])


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
    """Caption each clip in every way. The benchmark's own row is the speculative mode."""
    data_set = data(baseline.language)
    is_file_named = pytestconfig.args_source is pytest.Config.ArgsSource.ARGS
    clips = data_set.clips if is_file_named else data_set.clips[:BASELINE_CLIPS]
    with errors_in_one_line():
        pipeline.prepare("speculative")
        prepared = [
            prepare_clip(pipeline, data_set.request(clip), baseline.strategy, settings.max_new_tokens) for clip in clips
        ]
    is_lossless = pipeline.cloud.identity.dtype in LOSSLESS_DTYPES
    ways = build_ways(pipeline, baseline.strategy, settings.max_new_tokens)
    bar = progress(len(clips), baseline.id)
    captions: list[dict[str, TimedCaption]] = []

    def caption(number: int) -> None:
        captions.append(caption_in_every_way(ways, clips[number], prepared[number], number, is_lossless))
        run_clock.advance(captions[-1]["speculative"].seconds)

    caption_in_every_way(ways, clips[0], prepared[0], 0, is_lossless)  # warm-up
    numbers = chain(range(len(clips)), repeat(0))  # --benchmark-cprofile captions one clip once more
    benchmark.params = plain_params(settings, baseline.strategy, baseline.language)
    benchmark.group = group_name(settings, "compared with transformers")
    with garbage_collector_frozen():
        benchmark.pedantic(
            caption,
            setup=lambda: ((next(numbers),), {}),
            teardown=lambda *_: bar.advance(),
            rounds=len(clips),
            iterations=1,
        )
    del captions[len(clips) :]
    benchmark.extra_info["baselines"] = describe_baselines(baseline, clips, captions, settings)
    outcomes(pytestconfig).baselines[baseline.id] = captions


def caption_in_every_way(
    ways: dict[str, Way], clip: Clip, prepared: PreparedClip, number: int, is_lossless: bool
) -> dict[str, TimedCaption]:
    """Return a clip's caption in every way. Fail with one line if a lossless run has a different caption."""
    captions = {way: ways[way](prepared) for way in order_ways(number)}
    if is_lossless and (differing := list_differing_ways(captions)):
        names = ", ".join(WAYS[way] for way in differing)
        pytest.fail(f"{clip.file_id}: not the tokens of transformers' greedy generate: {names}", pytrace=False)
    return captions


def describe_baselines(
    baseline: BaselineCase, clips: Sequence[Clip], captions: Sequence[dict[str, TimedCaption]], settings: Settings
) -> dict[str, Any]:
    """Return the metrics, the seconds per clip and the conditions, as they are saved in `extra_info`."""
    return {
        "figures": baseline_metrics(captions),
        "intervals": {name: [interval.low, interval.high] for name, interval in way_ratios(captions).items()},
        "clips": [clip.file_id for clip in clips],
        "tokens": [len(caption["speculative"].tokens) for caption in captions],
        "seconds": {way: [caption[way].seconds for caption in captions] for way in WAYS},
        "ways": WAYS,
        "k": baseline.k,
        "rule": baseline.strategy.rule.label,
        "language": baseline.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
