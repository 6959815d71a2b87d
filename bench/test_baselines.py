"""The captions that transformers' own `generate` writes, by ours and by its ways, clip by clip: what each way costs.

`bench.peers` says what is measured, and for which runs. Every way must write the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import CLIPS, WAYS, Asked, Peers, Timed, asked, differing, figures, peers, ratios, turns, ways
from bench.cases import SETTINGS
from bench.conftest import DONE, DataSet, Done, Progress, problems_in_one_line
from edgecloud_sd.config import Settings
from edgecloud_sd.models.pairs import EXACT
from edgecloud_sd.pipeline import Captioner
from edgecloud_sd.timing.clock import VirtualClock, old_objects_left_alone


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    made = peers(metafunc.config.stash[SETTINGS])
    metafunc.parametrize("peer", made, ids=[each.id for each in made])


def test_peers(
    peer: Peers,
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
        heard = chosen.clips if named else chosen.clips[:CLIPS]
        clips = [asked(captioner, chosen.request(clip), peer.cell, settings.max_new_tokens) for clip in heard]
    exact = captioner.cloud_dtype in EXACT
    found = ways(captioner, peer.cell, settings.max_new_tokens)
    bar = progress(len(clips), peer.id)
    done: list[dict[str, Timed]] = []

    def one(clip: Asked, number: int) -> dict[str, Timed]:
        captions = {way: found[way](clip) for way in turns(number)}
        if exact and (others := differing(captions)):
            name = chosen.clips[number].file_id
            said = ", ".join(WAYS[way] for way in others)
            pytest.fail(f"{name}: not the tokens of transformers' greedy generate: {said}", pytrace=False)
        return captions

    def timed(clip: Asked, number: int) -> None:
        done.append(one(clip, number))
        run_clock.advance(done[-1]["speculative"].seconds)

    one(clips[0], 0)  # whatever is done once is done now
    waiting = iter([(clip, number) for number, clip in enumerate(clips)])
    benchmark.group = "beside transformers"
    with old_objects_left_alone():
        benchmark.pedantic(
            timed, setup=lambda: (next(waiting), {}), teardown=lambda *_: bar.advance(), rounds=len(clips), iterations=1
        )
    benchmark.extra_info["peers"] = {
        "figures": figures(done),
        "intervals": {name: [each.low, each.high] for name, each in ratios(done).items()},
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
