"""Work in passes of bounded length: the passes, and that their result is that of one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.steps import (
    MAX_ROWS,
    MIN_ROWS,
    Outcome,
    RowLimit,
    advance,
    limit_rows,
    no_limit,
    run_steps,
    split_rows,
)
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerifier
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

TOY = ToyModel(random_table(VOCABULARY, 0), frozenset())
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)


@given(st.integers(0, 5000), st.integers(0, 500))
def test_the_parts_cover_all_rows_within_the_limit(begin: int, rows: int) -> None:
    parts = list(split_rows(begin, begin + rows, limit_rows))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(begin, begin + rows))
    assert all(1 <= part.stop - part.start <= limit_rows(part.start) <= MAX_ROWS for part in parts)


def test_a_pass_after_a_long_context_has_fewer_rows() -> None:
    assert [limit_rows(length) for length in (0, 512, 1024, 2048, 32_000)] == [MAX_ROWS, 64, 32, MIN_ROWS, MIN_ROWS]


@given(IDS, IDS, IDS, st.integers(1, 8), st.integers(0, 30))
def test_verdicts_do_not_depend_on_the_length_of_a_pass(
    prompt: list[int], context: list[int], draft: list[int], limit: int, base: int
) -> None:
    whole, stepped = (
        run_steps(LocalVerifier(TOY, GREEDY, row_limit).open_steps(Prompt(tuple(prompt))))
        for row_limit in (no_limit, lambda _: limit)
    )
    for verification in (whole, stepped):
        verification.verify(0, context, draft)
    base = min(base, len(context))
    changed = [*context[base:], draft[0]]
    steps, passes = stepped.verify_steps(base, changed, draft), []
    while not isinstance(outcome := advance(steps), Outcome):
        passes.append(outcome)
    assert max(passes) <= limit
    assert outcome.result == whole.verify(base, changed, draft)
    output = [*draft, 1]
    run_steps(stepped.feed_steps(output))
    stopping = Stopping(frozenset(), len(output) + 3)
    assert list(stepped.generate(stopping, output)) == list(whole.generate(stopping, output))


def text_prompt(pipeline: Pipeline) -> Prompt:
    return Prompt(tuple(index * 37 % 400 + 10 for index in range(100)))


def audio_prompt(pipeline: Pipeline, frames: int = 1703) -> Prompt:
    model = pipeline.cloud_model
    features = torch.randn(model.extractor.feature_size, frames, generator=torch.Generator().manual_seed(0))
    positions = prompts.count_audio_positions(frames)
    return Prompt((5, 6, *[model.audio_token] * positions, 7, 8, 9), features)


@pytest.mark.parametrize("build_prompt", [text_prompt, audio_prompt, partial(audio_prompt, frames=301)])
@pytest.mark.parametrize("limit", [limit_rows, pytest.param(lambda length: 20, marks=pytest.mark.slow)])
def test_a_prompt_prefilled_in_steps_gives_the_verdicts_of_one_prefilled_at_once(
    pipeline: Pipeline, build_prompt: Callable[[Pipeline], Prompt], limit: RowLimit
) -> None:
    prompt = build_prompt(pipeline)
    whole = LocalVerifier(pipeline.cloud_model, GREEDY).open(prompt)
    stepped = run_steps(LocalVerifier(pipeline.cloud_model, GREEDY, limit).open_steps(prompt))
    stopping = Stopping(frozenset(), 8)
    expected = list(whole.generate(stopping))
    assert list(stepped.generate(stopping)) == expected
    for draft in (expected[:4], [*expected[:2], 3, *expected[3:]]):
        assert stepped.verify(0, [prompt.last], draft) == whole.verify(0, [prompt.last], draft)
