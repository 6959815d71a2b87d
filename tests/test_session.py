"""Every Session compared with a stateless oracle in random calls of extend, truncate and sync."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt
from edgecloud_sd.models.hf import HFModel, HFSession
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.session import Session, sync
from tests.support.conformance import SessionMachine
from tests.support.toy import ToyModel, ToySession, random_table

TOY = ToyModel(random_table(11, seed=3), frozenset())
TOY_PROMPT = Prompt((3, 1, 4))


class ToyMachine(SessionMachine):
    vocabulary = 11
    tolerance = 0.0

    def open(self) -> Session:
        return TOY.open(TOY_PROMPT)

    def oracle(self, tokens: list[int]) -> Tensor:
        head = TOY_PROMPT.ids[:-1]
        return torch.stack([TOY.logits([*head, *tokens[: i + 1]]) for i in range(len(tokens))])


class PocketMachine(SessionMachine):
    """One side of the pocket pair. Its oracle is one forward pass of the thinker over all tokens, without a cache."""

    tolerance = 1e-3  # float32 sums in another order
    model: HFModel
    prompt: Prompt

    @classmethod
    def prepare(cls, side: str) -> None:
        pipeline = Pipeline()
        cls.model = pipeline.edge if side == "edge" else pipeline.cloud_model
        cls.vocabulary = len(cls.model.tokenizer) - 1
        cls.prompt = pipeline.prompt(Request(clips.make_clip("evaluation", 0).samples, "english"), side)

    def token(self, number: int) -> int:
        token = number % self.vocabulary
        # an audio placeholder among the output tokens would make the oracle expect more audio
        return token + 1 if token == self.model.thinker.config.audio_token_id else token

    def open(self) -> Session:
        return self.model.open(self.prompt)

    @torch.inference_mode()
    def oracle(self, tokens: list[int]) -> Tensor:
        features = self.prompt.features
        assert features is not None
        ids = torch.tensor([[*self.prompt.ids[:-1], *tokens]])
        logits: Tensor = self.model.thinker(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features[None],
            feature_attention_mask=torch.ones(1, features.shape[1], dtype=torch.long),
            use_cache=False,
        ).logits
        return logits[0, len(self.prompt.ids) - 1 :]


ToyMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
PocketMachine.TestCase.settings = settings(max_examples=5, stateful_step_count=8, deadline=None)


TestToySession = ToyMachine.TestCase


class TestEdgeSession(PocketMachine.TestCase):  # type: ignore[valid-type, misc]
    @classmethod
    def setUpClass(cls) -> None:
        PocketMachine.prepare("edge")


class TestCloudSession(PocketMachine.TestCase):  # type: ignore[valid-type, misc]
    @classmethod
    def setUpClass(cls) -> None:
        PocketMachine.prepare("cloud")


def test_sync_feeds_only_what_is_new() -> None:
    session = TOY.open(TOY_PROMPT)
    sync(session, [4, 5, 6])
    fed: list[list[int]] = []
    extend = session.extend
    session.extend = lambda tokens: (fed.append(list(tokens)), extend(tokens))[1]  # type: ignore[method-assign, func-returns-value]
    sync(session, [4, 5, 6, 7, 8])
    sync(session, [4, 5, 9])
    sync(session, [4, 5, 9], rows=2)
    assert fed == [[7, 8], [9], [5, 9]]


@pytest.mark.parametrize("rows", [0, 4])
def test_sync_refuses_rows_that_do_not_exist(rows: int) -> None:
    with pytest.raises(ValueError, match=f"cannot return {rows} rows of a context of 3"):
        sync(ToySession(TOY, 0), [1, 2, 3], rows)


def test_two_interleaved_sessions_of_one_model_are_independent(pipeline: Pipeline) -> None:
    model = pipeline.cloud_model
    clip_prompts = [
        pipeline.prompt(Request(clips.make_clip("evaluation", i).samples, "chinese"), "cloud") for i in (0, 25)
    ]
    alone = []
    for prompt in clip_prompts:
        session = model.open(prompt)
        alone.append([session.extend([token]) for token in (prompt.last, 300, 301)])
    both: list[HFSession] = [model.open(prompt) for prompt in clip_prompts]
    for step, token in enumerate((None, 300, 301)):
        for prompt, session, expected in zip(clip_prompts, both, alone, strict=True):
            rows = session.extend([prompt.last if token is None else token])
            torch.testing.assert_close(rows, expected[step])


def test_a_prompt_whose_placeholders_do_not_fit_its_audio_is_an_error(pipeline: Pipeline) -> None:
    prompt = pipeline.prompt(Request(clips.make_clip("evaluation", 0).samples), "edge")
    audio = pipeline.edge.tokenizer.convert_tokens_to_ids(prompts.AUDIO_TOKEN)
    ids = tuple(token for place, token in enumerate(prompt.ids) if token != audio or place % 2)
    with pytest.raises(ValueError, match="audio placeholders for"):
        pipeline.edge.open(Prompt(ids, prompt.features))
