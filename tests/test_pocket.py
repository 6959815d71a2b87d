"""The pocket pair: equality with generate() of transformers, quality on new clips, its clips and its training."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgecloud_sd import gate
from edgecloud_sd.cloud.local import LocalCloud
from edgecloud_sd.data import prompts
from edgecloud_sd.data.dataset import load_audio, load_manifest
from edgecloud_sd.events import Opened
from edgecloud_sd.measure import metrics
from edgecloud_sd.models import pairs
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import __main__ as pocket
from edgecloud_sd.pocket import clips, tokenizer, train, voices
from edgecloud_sd.pocket.evaluate import CAPTION_TOKENS, Evaluation, evaluate
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile

SAMPLE = [(0, "chinese"), (7, "chinese"), (21, "english"), (38, "english")]


def request(index: int, language: str) -> Request:
    return Request(clips.make_clip("evaluation", index).samples, language)


def generated(pipeline: Pipeline, side: str, asked: Request) -> tuple[int, ...]:
    """Return the tokens of greedy decoding by generate() of transformers."""
    model = pipeline.edge if side == "edge" else pipeline.cloud_model
    prompt = pipeline.prompt(asked, side)
    assert prompt.features is not None
    ids = torch.tensor([prompt.ids])
    output = model.thinker.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=prompt.features[None],
        feature_attention_mask=torch.ones(1, prompt.features.shape[1], dtype=torch.long),
        max_new_tokens=CAPTION_TOKENS,
        do_sample=False,
    )
    return tuple(output[0, len(prompt.ids) :].tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("index", "language"), SAMPLE[1:3])
@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_side_alone_equals_transformers_generate(pipeline: Pipeline, side: str, index: int, language: str) -> None:
    asked = request(index, language)
    trace = stamp(pipeline.events(asked, Strategy(side), CAPTION_TOKENS))
    assert trace.tokens == generated(pipeline, side, asked)


@pytest.mark.parametrize(("k", "index", "language"), [(k, *SAMPLE[k % 4]) for k in (1, 2, 4, 7)])
def test_strict_speculative_equals_the_cloud(pipeline: Pipeline, k: int, index: int, language: str) -> None:
    asked = request(index, language)
    cloud = stamp(pipeline.events(asked, Strategy("cloud"), CAPTION_TOKENS))
    both = stamp(pipeline.events(asked, Strategy("speculative", k=k), CAPTION_TOKENS))
    assert both.tokens == cloud.tokens


def per_token(pipeline: Pipeline, strategy: Strategy, link: Link, machines: Profile) -> float:
    """Return the seconds per token after the first chunk, on a virtual clock, over clips of both languages."""
    n, seconds = 0, 0.0
    for index in (*range(6), *range(20, 26)):
        asked = request(index, "chinese" if index < 20 else "english")
        later = metrics.after_first_chunk(pipeline.trace(asked, strategy, CAPTION_TOKENS, link=link, profile=machines))
        assert later is not None
        n, seconds = n + later[0], seconds + later[1]
    return seconds / n


@pytest.mark.slow
@pytest.mark.parametrize(("trips", "gain"), [(1, 1.4), (0, 0.98)])
def test_drafting_ahead_hides_a_round_trip_as_long_as_a_draft(pipeline: Pipeline, trips: int, gain: float) -> None:
    step, k = 0.01, 4
    machines = Profile("drawn", Costs(0.1, ((1, step),)), Costs(0.1, ((1, 5 * step),)))
    link = Link("drawn", trips * k * step, math.inf, math.inf)
    waits, ahead = (Strategy("speculative", k=k, draft_ahead=n) for n in (0, 16))
    assert per_token(pipeline, waits, link, machines) >= gain * per_token(pipeline, ahead, link, machines)


@pytest.mark.slow
@pytest.mark.parametrize(("machines", "link"), [("laptop-gpu", "5g"), ("laptop-gpu", "4g"), ("published", "none")])
def test_the_length_that_finds_itself_is_within_a_twentieth_of_the_best(
    pipeline: Pipeline, machines: str, link: str
) -> None:
    asked = [request(index, "chinese") for index in range(12)]

    def seconds(k: int | None) -> float:
        strategy, over, costs = Strategy("speculative", k=k), links.find_link(link), profile.load_profile(machines)
        return sum(
            pipeline.trace(request, strategy, CAPTION_TOKENS, link=over, profile=costs, seed=str(i)).seconds
            for i, request in enumerate(asked)
        )

    assert seconds(None) <= 1.05 * min(seconds(k) for k in range(1, 13))


def test_an_entropy_gate_mixes_both(pipeline: Pipeline) -> None:
    cell = Strategy("speculative", gate.entropy_gate(1.0), k=3)
    counts = metrics.counts(stamp(pipeline.events(request(3, "chinese"), cell, CAPTION_TOKENS)))
    assert 0 < counts.cloud_calls < counts.rounds


def test_edge_mode_never_loads_the_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Pipeline()
    monkeypatch.setattr(LocalCloud, "model", property(lambda self: pytest.fail("the cloud was loaded")))
    trace = stamp(fresh.events(request(0, "chinese"), Strategy("edge"), 3))
    assert [event.side for _, event in trace.events if isinstance(event, Opened)] == ["edge"]


def test_audio_is_encoded_once_a_side(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for side in ("edge", "cloud"):
        tower = (pipeline.edge if side == "edge" else pipeline.cloud_model).thinker.model.audio_tower
        forward = tower.forward

        def counted(*inputs: object, side: str = side, forward: object = forward, **options: object) -> object:
            calls.append(side)
            return forward(*inputs, **options)  # type: ignore[operator]

        monkeypatch.setattr(tower, "forward", counted)
    list(pipeline.events(request(1, "english"), Strategy("speculative", k=3), CAPTION_TOKENS))
    assert sorted(calls) == ["cloud", "edge"]


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (2, 2)])
def test_threads_are_as_requested_or_one_for_small_models(threads: int | None, expected: int) -> None:
    before = torch.get_num_threads()
    try:
        Pipeline(threads=threads).prepare("edge")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_lossless_decoding_equals_the_cloud_on_a_gpu() -> None:
    pair = Pipeline.load(cloud_device="cuda")
    asked = request(0, "chinese")
    cloud = stamp(pair.events(asked, Strategy("cloud"), CAPTION_TOKENS))
    both = stamp(pair.events(asked, Strategy("speculative", k=4), CAPTION_TOKENS))
    assert both.tokens == cloud.tokens


@pytest.fixture(scope="module")
def evaluation(pipeline: Pipeline) -> Evaluation:
    return evaluate(pipeline, count=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "least", "most"),
    [
        ("cloud_attributes", 0.90, 1.0),
        ("edge_attributes", 0.55, 0.78),
        ("swapped_attributes", 0.20, 0.50),  # chance is about 0.4: two or three classes, unevenly drawn
        ("acceptance", 0.6, 0.9),
        ("step_ratio", 0.0, 0.2),
        ("megabytes", 0.0, 12.0),
    ],
)
def test_the_evaluation_is_within_its_bounds(evaluation: Evaluation, figure: str, least: float, most: float) -> None:
    assert least <= getattr(evaluation, figure) <= most


@pytest.mark.slow
def test_the_evaluation_prints_every_figure(evaluation: Evaluation) -> None:
    assert f"{evaluation.cloud_attributes:.1%}" in str(evaluation)
    assert f"{evaluation.acceptance:.3f}" in str(evaluation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.evaluation_set(tmp_path_factory.mktemp("pocket") / "clips")


@pytest.mark.slow
@pytest.mark.parametrize("language", prompts.LANGUAGES)
def test_the_evaluation_set_has_twenty_clips_per_language(folder: Path, language: str) -> None:
    loaded, skipped = load_manifest(folder / clips.manifest_name(language), language)
    assert len(loaded) == clips.EVALUATION_CLIPS
    assert not skipped
    captions = {voices.write_caption(clips.make_clip("evaluation", i).attributes, language) for i in range(40)}
    assert {clip.references[0] for clip in loaded} <= captions


def test_a_clip_on_disk_equals_the_synthesised_clip(folder: Path) -> None:
    samples = load_audio(folder / "wav" / "pocket_evaluation_0005.wav")
    torch.testing.assert_close(
        torch.tensor(samples), torch.tensor(clips.make_clip("evaluation", 5).samples), atol=4e-5, rtol=0
    )


def test_a_folder_with_other_files_is_refused_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="contains other files"):
        clips.evaluation_set(tmp_path)
    (tmp_path / "empty").mkdir()
    assert (clips.evaluation_set(tmp_path / "empty") / "manifest_chinese.json").is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "make_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        clips.evaluation_set(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_clips_are_the_same_on_every_call_and_differ_between_sets() -> None:
    first, again = clips.make_clip("train", 3), clips.make_clip("train", 3)
    assert (first.samples == again.samples).all()
    assert (
        clips.make_clip("evaluation", 3).samples.shape != first.samples.shape
        or (clips.make_clip("evaluation", 3).samples != first.samples).any()
    )
    assert len(set(clips.SETS.values())) == len(clips.SETS)


@pytest.mark.parametrize("language", prompts.LANGUAGES)
def test_a_caption_says_its_attributes_in_20_to_40_tokens(pipeline: Pipeline, language: str) -> None:
    for index in range(60):
        attributes = clips.make_clip("evaluation", index % 20).attributes if index < 20 else draw_attributes(index)
        text = voices.write_caption(attributes, language)
        assert voices.find_named_classes(text, language) == {
            name: getattr(attributes, name) for name in voices.ATTRIBUTE_NAMES
        }
        assert 20 <= len(pipeline.edge.tokenizer.encode(text + tokenizer.EOS)) <= 40


def draw_attributes(seed: int) -> voices.Attributes:
    import numpy as np

    return voices.draw_attributes(np.random.default_rng(seed))


@pytest.mark.parametrize("language", prompts.LANGUAGES)
def test_free_captions_name_their_attributes_in_every_wording_and_order(language: str) -> None:
    texts, orders = [], set()
    for seed in range(100):
        attributes = draw_attributes(seed)
        text = voices.write_free_caption(attributes, language, (seed,))
        assert text == voices.write_free_caption(attributes, language, (seed,))
        assert voices.read_attributes(text, language) == attributes
        assert voices.find_emotion(attributes).word(language) in text
        texts.append(text)
        written = [voices.WORDS, voices.OTHER_WORDS]
        places = {
            name: max(text.find(words[language][name][n]) for words in written) for name, n in vars(attributes).items()
        }
        orders.add(tuple(sorted(places, key=places.__getitem__)))
    wordings = [*voices.WORDS[language].values(), *voices.OTHER_WORDS[language].values()]
    assert all(any(words in text for text in texts) for words in itertools.chain(*wordings))
    assert len(orders) == len(voices.FREE_TEMPLATES[language])
    assert len({voices.write_free_caption(draw_attributes(0), language, (seed,)) for seed in range(20)}) > 5


@pytest.mark.parametrize("language", prompts.LANGUAGES)
def test_no_wording_is_part_of_another_one(language: str) -> None:
    tables = (voices.WORDS, voices.OTHER_WORDS)
    words = [word for table in tables for words in table[language].values() for word in words]
    texts = [*words, *voices.FREE_TEMPLATES[language]]
    assert [(word, text) for word in words for text in texts if word in text] == [(word, word) for word in words]


def test_a_caption_that_lacks_an_attribute_describes_none() -> None:
    assert voices.read_attributes("low pitch and high pitch, slow pace", "english") is None


def test_a_caption_with_two_classes_of_an_attribute_names_none() -> None:
    assert voices.find_named_classes("low pitch and high pitch, slow pace", "english") == dict.fromkeys(
        voices.ATTRIBUTE_NAMES
    ) | {"rate": 0}


def test_the_tokenizer_in_the_repository_is_the_one_that_training_makes(pipeline: Pipeline) -> None:
    assert tokenizer.train_tokenizer().get_vocab() == pipeline.edge.tokenizer.get_vocab()
    assert pipeline.cloud_model.tokenizer.get_vocab() == pipeline.edge.tokenizer.get_vocab()


@pytest.mark.slow
def test_training_reduces_the_loss() -> None:
    small = train.Recipe(1, 32, 32, 1, 16, steps=12, learning_rate=1e-2, tower_steps=2, batch=4, tower_batch=4)
    tokens = tokenizer.train_tokenizer()
    data = train.make_examples("train", 6, train.build_extractor())
    torch.manual_seed(0)
    losses = [
        compute_loss(thinker, tokens, data)
        for thinker in (train.build_thinker(small, tokens), train.train_side("edge", small, data, tokens))
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("path", "status", "problem"),
    [
        (str(pairs.POCKET_WEIGHTS), 2, "is that of the shipped pair"),
        (str(pairs.POCKET_WEIGHTS / ".." / "weights" / "new"), 2, "is that of the shipped pair"),
        (str(Path(__file__).parent), 1, "contains other files"),
        (__file__, 1, "is a file"),
    ],
)
def test_a_free_pair_is_not_written_over_anything(
    path: str, status: int, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_pair", lambda *_, **__: pytest.fail("the training began"))
    with pytest.raises(SystemExit) as stopped:
        pocket.main(["train", "--free", "--folder", path])
    line = capsys.readouterr().err + str(stopped.value)
    assert problem in line
    assert path in line
    assert (stopped.value.code == 2) == (status == 2)


def test_an_interrupted_training_of_a_free_pair_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path, is_free: bool) -> None:
        (folder / "cloud").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_pair", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train_free_pair(tmp_path / "pair")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_free_pair_captions_its_own_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {side: replace(recipe, steps=2, batch=4) for side, recipe in train.FREE_RECIPES.items()}
    for name, value in {"FREE_RECIPES": recipes, "FREE_TRAIN_CLIPS": 8, "FREE_CLIPS": 2}.items():
        monkeypatch.setattr(train, name, value)
    train.train_free_pair(tmp_path / "pair")
    own = Pipeline(pairs.find_pair("pocket", str(tmp_path / "pair" / "edge"), str(tmp_path / "pair" / "cloud")))
    for number, language in enumerate(prompts.LANGUAGES):
        loaded, _ = load_manifest(clips.manifest_path(tmp_path / "pair" / "clips", language), language)
        source = [clips.make_clip("held-out", 2 * number + position) for position in range(2)]
        assert [clip.references[0] for clip in loaded] == [clip.caption(language, is_free=True) for clip in source]
        asked = Request(load_audio(loaded[0].audio_path), language)
        texts = {side: stamp(own.events(asked, Strategy(side), 8)).tokens for side in ("cloud", "speculative")}
        assert texts["cloud"] == texts["speculative"]


@torch.no_grad()
def compute_loss(thinker: torch.nn.Module, tokens: object, data: list[train.Example]) -> float:
    import numpy as np

    audio, positions = train.encode_audio(thinker, data)
    return train.caption_loss(thinker, tokens, audio, positions, data, np.random.default_rng(0)).item()


@pytest.mark.slow
def test_making_the_default_data_set_is_quick_against_captioning_it(tmp_path: Path, pipeline: Pipeline) -> None:
    start = time.perf_counter()
    clips.evaluation_set(tmp_path / "set")
    synthesis_seconds = (time.perf_counter() - start) / (2 * clips.EVALUATION_CLIPS)
    start = time.perf_counter()
    list(pipeline.events(request(0, "english"), Strategy("cloud"), CAPTION_TOKENS))
    assert synthesis_seconds < time.perf_counter() - start
