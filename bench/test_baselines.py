"""The captions that transformers' own `generate` writes, by ours and by its ways, clip by clip: what each way costs.

`bench.peers` says what is measured, and for which runs. Every way must write the same tokens.
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
from bench.conftest import DONE, DataSet, Done, Progress, problems_in_one_line
from edgecloud_sd.config import Settings
from edgecloud_sd.models.devices import LOSSLESS_DTYPES
from edgecloud_sd.pipeline import Captioner
from edgecloud_sd.timing.clock import VirtualClock, garbage_collector_frozen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    made = baseline_cases(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("peer", made, ids=[each.id for each in made])


def test_peers(
    peer: BaselineCase,
    run_clock: VirtualClock,  # before `benchmark`, which takes it for its timer
    benchmark: BenchmarkFixture,
    captioner: Captioner,
    data: Callable[[str], DataSet],
    settings: Settings,
    progress: Callable[[int, str], Progress],
    pytestconfig: pytest.Config,
) -> None:
    chosen = data(peer.language)
    named = pytestconfig.args_source is pytest.Config.ArgsSource.ARGS
    with problems_in_one_line():
        captioner.load(peer.cell.mode)
        heard = chosen.clips if named else chosen.clips[:BASELINE_CLIPS]
        clips = [prepare_clip(captioner, chosen.request(clip), peer.cell, settings.max_new_tokens) for clip in heard]
    exact = captioner.cloud_dtype in LOSSLESS_DTYPES
    found = ways(captioner, peer.cell, settings.max_new_tokens)
    bar = progress(len(clips), peer.id)
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
    benchmark.extra_info["peers"] = {
        "figures": baseline_metrics(done),
        "intervals": {name: [each.low, each.high] for name, each in way_ratios(done).items()},
        "clips": [clip.file_id for clip in heard],
        "tokens": [len(each["speculative"].tokens) for each in done],
        "seconds": {way: [each[way].seconds for each in done] for way in WAYS},
        "ways": WAYS,
        "k": peer.k,
        "rule": peer.cell.rule.label,
        "language": peer.language,
        "prompt_type": settings.prompt_type,
        "max_new_tokens": settings.max_new_tokens,
    }
    pytestconfig.stash.setdefault(DONE, Done()).peers[peer.id] = done
