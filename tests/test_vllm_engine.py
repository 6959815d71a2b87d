"""Engine `vllm` without vLLM: on a fake that answers as vLLM does, with all that its answers leave out or get wrong."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import GREEDY, Rank, Synthetic
from edgecloud_sd.cloud import vllm_engine
from edgecloud_sd.cloud.vllm_engine import (
    Batcher,
    EngineRequest,
    SamplingOptions,
    Stream,
    VLLMModel,
    VLLMVerifier,
    collapse,
)
from edgecloud_sd.data import prompts
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Committed, Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import LocalVerifier, Verification
from tests.support.strategies import VOCABULARY, Scene, ks, ranks, scenes, speculative
from tests.support.toy import ToyModel, random_table

AUDIO = VOCABULARY  # an id that the toy models never write
BLOCK = 3  # tokens of a block of the prefix cache


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class Output:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass
class Running:
    request: EngineRequest
    options: SamplingOptions
    ids: list[int]
    cached: int
    written: list[int] = field(default_factory=list)


class FakeVLLM:
    """A toy model that answers as vLLM does.

    It gives the highest logits only, of equal ones the highest ids first; for places in its prefix cache it gives
    whatever was in memory; it expands every audio placeholder; logits asked for keep it from its cache unless told.
    """

    def __init__(self, model: ToyModel, max_logprobs: int = VOCABULARY) -> None:
        self.model = model
        self.max_logprobs = max_logprobs
        self.cache: set[tuple[object, ...]] = set()
        self.running: dict[str, Running] = {}
        self.asked: list[Running] = []
        self.batches: list[int] = []
        self.broken = False

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if params.get(name, 0) > self.max_logprobs:
                raise ValueError(f"{name} of {params[name]}, which is greater than max allowed: {self.max_logprobs}")
        ids = list(self.expanded(prompt))
        reads = not params.get("skip_reading_prefix_cache", "prompt_logprobs" in params)
        blocks = range(BLOCK, len(ids), BLOCK) if reads else ()
        cached = max((end for end in blocks if (prompt["cache_salt"], *ids[:end]) in self.cache), default=0)
        self.running[request_id] = running = Running(prompt, params, ids, cached)
        self.asked.append(running)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            del self.running[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Output]:
        assert self.running, "vLLM would wait for ever"
        if self.broken:
            raise OSError("out of memory")
        self.batches.append(len(self.running))
        return [output for name in list(self.running) if (output := self.advance(name)) is not None]

    def advance(self, name: str) -> Output | None:
        running = self.running[name]
        options, ids = running.options, running.ids
        assert options["temperature"] == 0
        assert options["ignore_eos"]
        row = self.row([*ids, *running.written])
        token = int(row.argmax())
        running.written.append(token)
        stopped = token in options.get("stop_token_ids", ())
        finished = stopped or len(running.written) == options["max_tokens"]
        if finished:
            del self.running[name]
            whole = [*ids, *running.written[:-1]]
            for end in range(BLOCK, len(whole) + 1, BLOCK):
                self.cache.add((running.request["cache_salt"], *whole[:end]))
        elif not options.get("stream"):
            return None
        new = [token] if options.get("stream") else running.written
        width = options.get("logprobs")
        logprobs = None if width is None else [place(row, token, width)]
        reason = ("stop" if stopped else "length") if finished else None
        scored = self.scored(running) if "prompt_logprobs" in options else None
        return Output(name, ids, [Completion(new, reason, logprobs)], finished, running.cached, scored)

    def scored(self, running: Running) -> list[dict[int, Logprob] | None]:
        ids, width = running.ids, running.options["prompt_logprobs"]
        rows: list[dict[int, Logprob] | None] = [None]
        for before in range(len(ids) - 1):
            if before < running.cached:
                rows.append({ids[before + 1]: Logprob(9e9, 1), before % VOCABULARY: Logprob(math.nan, 1)})
            else:
                rows.append(place(self.row(ids[: before + 1]), ids[before + 1], width))
        return rows

    def row(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model.logits(ids)

    def expanded(self, prompt: EngineRequest) -> Iterator[int]:
        audio = prompt.get("multi_modal_data", {}).get("audio")
        for token in prompt["prompt_token_ids"]:
            if audio is not None and token == AUDIO:
                assert set(audio) == {"input_audio_features", "audio_feature_lengths", "feature_attention_mask"}
                assert prompt["multi_modal_uuids"] == {"audio": [prompt["cache_salt"]]}
                (frames,) = audio["audio_feature_lengths"].tolist()
                assert audio["feature_attention_mask"].shape == (1, frames)
                assert audio["input_audio_features"].shape[1] == frames
                yield from [AUDIO] * prompts.count_audio_positions(frames)
            else:
                yield token


def place(row: torch.Tensor, token: int, width: int) -> dict[int, Logprob]:
    """vLLM's dict of one place: the token there, then the `width` highest, whose ranks overwrite the token's own."""
    logits = row.tolist()
    order = sorted(range(len(logits)), key=lambda each: (-logits[each], -each))[:width]
    ties = sum(logit >= logits[token] for logit in logits)
    return {token: Logprob(logits[token], ties)} | {
        each: Logprob(logits[each], rank) for rank, each in enumerate(order, start=1)
    }


def at_once(engine: FakeVLLM) -> VLLMModel:
    """Every request runs to its end where it is made."""
    names = map(str, itertools.count())

    def ask(request: EngineRequest, options: SamplingOptions) -> Stream:
        stream = Stream(lambda: None)
        engine.add_request(next(names), request, options)
        while engine.has_unfinished_requests():
            for output in engine.step():
                stream.put(output)
        return stream

    return model(engine, ask)


def model(engine: FakeVLLM, ask: Any) -> VLLMModel:
    return VLLMModel("fake", ask, lambda: None, frozenset(), AUDIO, VOCABULARY, 99, 8, engine.max_logprobs)


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel(random_table(VOCABULARY, 1), frozenset())


def equal_logits(tied: int) -> ToyModel:
    """The same row everywhere: its first `tied` ids share the highest logit."""
    row = torch.tensor([1.0] * tied + [0.5 - place / 100 for place in range(VOCABULARY - tied)], dtype=torch.float64)
    return ToyModel(row.repeat(257, 1), frozenset())


def outcome(call: Any) -> Verdict | str:
    try:
        return call()  # type: ignore[no-any-return]
    except ValueError as error:
        return str(error)


ids = st.integers(0, VOCABULARY - 1)


@dataclass(frozen=True)
class Call:
    """One call of an edge that may be wrong about what is agreed, and may leave out what it should send."""

    back: int  # from what is agreed to the base
    tokens: tuple[int, ...]
    draft: tuple[int, ...]
    own: bool  # the draft is what the cloud itself would say, as far as it goes
    times: int


calls = st.lists(
    st.builds(
        Call,
        st.sampled_from([0, 0, 0, 0, 1, 2, -1]),
        st.lists(ids, max_size=3).map(tuple),
        st.lists(ids, max_size=5).map(tuple),
        st.booleans(),
        st.sampled_from([1, 1, 2, 3]),
    ),
    min_size=1,
    max_size=6,
)


@given(scenes(), ranks, calls, st.data())
def test_verdicts_are_those_of_a_local_verifier(
    scene: Scene, rule: Rank, made: list[Call], data: st.DataObject
) -> None:
    least = VOCABULARY if rule.r >= VOCABULARY - 1 else rule.r + 1
    engine = FakeVLLM(scene.cloud, VOCABULARY if data.draw(st.booleans()) else max(least, VOCABULARY))
    local = LocalVerifier(scene.cloud, rule).open(scene.prompt)
    ours = at_once(engine).verifier(rule).open(scene.prompt)
    ours.wait()
    agreed: list[int] = []
    for call in made:
        base = len(agreed) - call.back
        tokens = call.tokens if base or not call.tokens else (scene.prompt.last, *call.tokens[1:])
        draft = own(scene, [*agreed[: max(base, 0)], *tokens], len(call.draft)) if call.own else call.draft
        for _ in range(call.times):
            expected = outcome(lambda: local.verify(base, tokens, draft))  # noqa: B023
            assert outcome(lambda: ours.verify(base, tokens, draft)) == expected  # noqa: B023
            if isinstance(expected, Verdict):
                agreed = [*agreed[:base], *tokens, *draft[: expected.accepted]]


def own(scene: Scene, context: Sequence[int], length: int) -> tuple[int, ...]:
    """What the cloud says after the context, the last of it changed."""
    said: list[int] = []
    while len(said) < length:
        said.append(int(scene.cloud.logits([*scene.prompt.ids[:-1], *context, *said]).argmax()))
    return (*said[:-1], (said[-1] + 1) % VOCABULARY) if said else ()


@given(scenes(), ks)
def test_strict_decoding_writes_the_clouds_own(scene: Scene, k: int) -> None:
    expected = list(LocalVerifier(scene.cloud, GREEDY).open(scene.prompt).generate(scene.stopping))
    verifier = at_once(FakeVLLM(scene.cloud)).verifier(GREEDY)
    events = decode(scene.prompt, speculative(k), scene.stopping, scene.edge, verifier)
    assert [token for event in events if isinstance(event, Committed) for token in event.tokens] == expected


@given(scenes(), st.lists(ids, max_size=4))
def test_generating_is_greedy_decoding_from_what_is_written(scene: Scene, output: list[int]) -> None:
    local, ours = (
        verifier.open(scene.prompt)
        for verifier in (LocalVerifier(scene.cloud, GREEDY), at_once(FakeVLLM(scene.cloud)).verifier(GREEDY))
    )
    assert list(ours.generate(scene.stopping, output)) == list(local.generate(scene.stopping, output))


@pytest.mark.parametrize("tied", range(1, VOCABULARY + 1))
@pytest.mark.parametrize("r", range(1, VOCABULARY + 1))
def test_of_equal_logits_the_lowest_ids_count(r: int, tied: int) -> None:
    cloud = equal_logits(tied)
    for token in range(VOCABULARY):
        local = LocalVerifier(cloud, Rank(r)).open(Prompt((1, 2)))
        ours = at_once(FakeVLLM(cloud)).verifier(Rank(r)).open(Prompt((1, 2)))
        assert ours.verify(0, [2], [token, 0]) == local.verify(0, [2], [token, 0])


def test_ties_beyond_what_vllm_shows_are_an_error() -> None:
    ours = at_once(FakeVLLM(equal_logits(5), max_logprobs=3)).verifier(Rank(2)).open(Prompt((1, 2)))
    with pytest.raises(RuntimeError, match="over 3 tokens are tied at rank 2: give vLLM more max_logprobs"):
        ours.verify(0, [2], [4])


def test_a_rule_beyond_what_vllm_shows_is_refused_when_the_verifier_is_made(toy: ToyModel) -> None:
    limited = at_once(FakeVLLM(toy, max_logprobs=4))
    assert limited.verifier(Rank(limited.max_rank)).rule == Rank(3)
    with pytest.raises(ValueError, match=r"rule rank\(4\) is beyond rank 3 of this engine: give vLLM max_logprobs=5"):
        limited.verifier(Rank(4))
    assert at_once(FakeVLLM(toy)).verifier(Rank(1000))  # every token is among them
    with pytest.raises(ValueError, match=r"rule synthetic\(0\.5\) takes all logits.*choose greedy or rank"):
        limited.verifier(Synthetic((0.5,)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise(toy: ToyModel, bad: float) -> None:
    ours = at_once(FakeVLLM(ToyModel(torch.full_like(toy.table, bad), toy.eos))).verifier(GREEDY).open(Prompt((1, 2)))
    with pytest.raises(FloatingPointError, match="not finite"):
        ours.verify(0, [2], [1])


@pytest.mark.parametrize("length", range(2, 2 + BLOCK))
def test_the_prompt_is_computed_once(toy: ToyModel, length: int) -> None:
    engine = FakeVLLM(toy)
    ours = at_once(engine).verifier(GREEDY).open(Prompt((1,) * length))
    assert "prompt_logprobs" not in engine.asked[0].options
    ours.verify(0, [1], [1, 2])
    assert [running.cached for running in engine.asked] == [0, (length - 1) // BLOCK * BLOCK]


def test_logits_that_the_cache_hides_are_computed(toy: ToyModel) -> None:
    engine = FakeVLLM(toy)
    ours = at_once(engine).verifier(GREEDY).open(Prompt((1,) * BLOCK))
    first = ours.verify(0, [1], [1] * BLOCK)
    assert ours.verify(0, [1], [1] * BLOCK) == first
    assert [running.cached for running in engine.asked] == [0, 0, BLOCK, 0]


def test_two_sessions_share_no_cache(toy: ToyModel) -> None:
    engine = FakeVLLM(toy)
    verifier = at_once(engine).verifier(GREEDY)
    for _ in range(2):
        verifier.open(Prompt(tuple(range(6)) * 3)).wait()
    assert [running.cached for running in engine.asked] == [0, 0]


def clip(frames: int, found: int) -> Prompt:
    return Prompt((1, *[AUDIO] * found, 2, 3), torch.zeros(128, frames))


@pytest.mark.parametrize("frames", [4, 50, 333])
def test_audio_is_expanded_once(toy: ToyModel, frames: int) -> None:
    prompt = clip(frames, prompts.count_audio_positions(frames))
    local = LocalVerifier(toy, Rank(2)).open(prompt)
    engine = FakeVLLM(toy)
    ours = at_once(engine).verifier(Rank(2)).open(prompt)
    assert ours.verify(0, [3], [4, 5, AUDIO - 1]) == local.verify(0, [3], [4, 5, AUDIO - 1])
    assert engine.asked[-1].ids == [*prompt.ids, 4, 5, AUDIO - 1]
    assert list(ours.generate(Stopping(frozenset(), 5))) == list(local.generate(Stopping(frozenset(), 5)))


def test_another_number_of_placeholders_than_frames_need_is_an_error(toy: ToyModel) -> None:
    with pytest.raises(ValueError, match="the prompt has 7 audio placeholders for 50 frames, not 12"):
        at_once(FakeVLLM(toy)).verifier(GREEDY).open(clip(50, 7))


def test_an_answer_to_another_prompt_is_an_error(toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeVLLM(toy)
    monkeypatch.setattr(engine, "expanded", lambda prompt: iter([*prompt["prompt_token_ids"], 0]))
    with pytest.raises(RuntimeError, match="vLLM read 2 tokens, not 1"):
        at_once(engine).verifier(GREEDY).open(Prompt((1, 2))).wait()


def test_positions_that_run_out_are_an_error(toy: ToyModel) -> None:
    class Short(FakeVLLM):
        def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
            super().add_request(request_id, prompt, {**params, "max_tokens": min(params["max_tokens"], 3)})

    ours = at_once(Short(toy)).verifier(GREEDY).open(Prompt((1, 2)))
    with pytest.raises(RuntimeError, match="more than the maximum length of vLLM, 99"):
        list(ours.generate(Stopping(frozenset(), 5)))


@given(st.lists(st.integers(0, 3)))
@example([2, 2, 0, 2])
def test_collapsing_leaves_one_placeholder_of_each_run(given_ids: list[int]) -> None:
    left = collapse(given_ids, 2)
    assert left == [
        token for token, run in itertools.groupby(given_ids) for token in (list(run) if token != 2 else [2])
    ]


@pytest.fixture
def engine(toy: ToyModel) -> FakeVLLM:
    return FakeVLLM(toy)


@pytest.fixture
def batcher(engine: FakeVLLM) -> Iterator[Batcher]:
    made = Batcher(engine)
    yield made
    made.close()


def test_many_threads_get_each_their_own(engine: FakeVLLM, batcher: Batcher) -> None:
    verifier = VLLMVerifier(model(engine, batcher.submit), Rank(2))
    local = LocalVerifier(engine.model, Rank(2))

    def edge(number: int, opened: Verification) -> list[object]:
        draft = [number % VOCABULARY, 1, 2]
        return [opened.verify(0, [2], draft), opened.verify(0, [2], draft), *opened.generate(Stopping(frozenset(), 9))]

    def both(number: int) -> bool:
        prompt = Prompt((number, 2))
        return edge(number, verifier.open(prompt)) == edge(number, local.open(prompt))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(both, range(40)))


def test_requests_that_wait_together_run_together(engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gates = threading.Event(), threading.Event()
    step = engine.step

    def gated() -> list[Output]:
        begun.set()
        gates.wait(5)
        return step()

    monkeypatch.setattr(engine, "step", gated)
    batcher = Batcher(engine)
    verifier = VLLMVerifier(model(engine, batcher.submit), GREEDY)
    first = verifier.open(Prompt((0, 1)))
    assert begun.wait(5)  # or it might wait with some of the others
    others = [verifier.open(Prompt((n, 1))) for n in range(1, 6)]
    gates.set()
    for each in (first, *others):
        each.wait()
    batcher.close()
    assert max(engine.batches) >= 5
    assert len(engine.batches) <= 2


def test_a_refused_request_fails_its_caller_alone(engine: FakeVLLM, batcher: Batcher) -> None:
    options: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    request = {"prompt_token_ids": [1], "cache_salt": "x"}
    bad, good = batcher.submit(request, {**options, "logprobs": 99}), batcher.submit(request, options)
    for _ in range(2):
        with pytest.raises(ValueError, match="greater than max allowed"):
            next(bad)
    assert [output.finished for output in good] == [True]
    assert list(good) == []


def test_who_waits_for_an_engine_that_dies_is_told(engine: FakeVLLM, batcher: Batcher) -> None:
    ours = VLLMVerifier(model(engine, batcher.submit), GREEDY).open(Prompt((1, 2)))
    ours.wait()
    engine.broken = True
    with pytest.raises(RuntimeError, match="vLLM's engine died: OSError: out of memory") as caught:
        ours.verify(0, [2], [1])
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="vLLM's engine died: OSError: out of memory"):
        ours.verify(0, [2], [1])
    ours.close()


def test_closing_ends_those_who_wait_and_the_thread(toy: ToyModel) -> None:
    class Slow(FakeVLLM):
        def step(self) -> list[Output]:
            time.sleep(0.02)
            return super().step()

    engine = Slow(toy)
    batcher = Batcher(engine)
    ours = VLLMVerifier(model(engine, batcher.submit), GREEDY).open(Prompt((1, 2)))
    tokens = ours.generate(Stopping(frozenset(), 10**9))
    assert len(list(itertools.islice(tokens, 3))) == 3
    batcher.close()
    assert not any(thread.name == "vllm" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="vLLM's engine is closed"):
        for _ in tokens:
            pass
    with pytest.raises(RuntimeError, match="vLLM's engine is closed"):
        ours.verify(0, [2], [1])


def test_a_stream_that_is_dropped_is_computed_no_further(engine: FakeVLLM, batcher: Batcher) -> None:
    verifier = VLLMVerifier(model(engine, batcher.submit), GREEDY)
    tokens = verifier.open(Prompt((1, 2))).generate(Stopping(frozenset(), 10**9))
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    limit = time.monotonic() + 5
    while engine.has_unfinished_requests() and time.monotonic() < limit:
        time.sleep(0.001)
    assert not engine.has_unfinished_requests()
    verifier.open(Prompt((1, 2))).wait()  # nobody is left waiting for ever


class Installed:
    """What of the package `vllm` loading uses, with a fake for its engine."""

    def __init__(self, engine: FakeVLLM) -> None:
        self.engine = engine
        self.given: dict[str, object] = {}
        self.down: list[bool] = []

    def llm(self, checkpoint: str, **given: object) -> SimpleNamespace:
        if checkpoint == "bad":
            raise RuntimeError("Engine core initialization failed.\nSee above.")
        self.given = given
        config = SimpleNamespace(
            hf_config=SimpleNamespace(thinker_config=SimpleNamespace(audio_token_index=AUDIO)),
            try_get_generation_config=lambda: {"eos_token_id": [3, 4]},
            get_vocab_size=lambda: VOCABULARY,
            max_logprobs=-1,
            max_model_len=99,
        )
        vllm_config = SimpleNamespace(model_config=config, scheduler_config=SimpleNamespace(max_num_seqs=8))
        self.vllm_config = vllm_config
        return SimpleNamespace(llm_engine=self, get_tokenizer=lambda: SimpleNamespace(eos_token_id=5))

    @property
    def renderer(self) -> SimpleNamespace:
        return SimpleNamespace(render_cmpl=lambda requests: requests)

    @property
    def engine_core(self) -> SimpleNamespace:
        return SimpleNamespace(shutdown=lambda: self.down.append(True))

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
        self.engine.add_request(request_id, prompt, {**params, "stream": params["output_kind"] == "delta"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.fixture
def installed(engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> Installed:
    found = Installed(engine)
    arguments = make_dataclass("EngineArgs", ["model", "dtype", "tensor_parallel_size", *vllm_engine.OWN_ARGUMENTS])
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": found.llm, "EngineArgs": arguments, "SamplingParams": dict},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta", FINAL_ONLY="final")},
    }
    for name, holds in parts.items():
        module = ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_a_loaded_model_verifies_generates_and_closes(installed: Installed) -> None:
    loaded = vllm_engine.load_vllm("folder", "bfloat16", {"tensor_parallel_size": 2})
    assert {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        **vllm_engine.OWN_ARGUMENTS,
    }.items() <= installed.given.items()
    assert (loaded.eos, loaded.max_rank, loaded.concurrency) == (frozenset({3, 4, 5}), VOCABULARY, 8)
    local = LocalVerifier(installed.engine.model, GREEDY).open(Prompt((1, 2)))
    ours = loaded.verifier(GREEDY).open(Prompt((1, 2)))
    assert ours.verify(0, [2], [1, 2]) == local.verify(0, [2], [1, 2])
    stopping = Stopping(frozenset(), 5)
    assert list(ours.generate(stopping)) == list(local.generate(stopping))
    loaded.close()
    assert installed.down == [True]


@pytest.mark.parametrize("flag", ["tensor_parallel", *vllm_engine.OWN_ARGUMENTS])
def test_a_flag_that_is_not_to_be_given_is_named(installed: Installed, flag: str) -> None:
    with pytest.raises(ValueError, match=f"vLLM has no engine argument '{flag}' to give here"):
        vllm_engine.load_vllm("folder", flags={flag: 2})


def test_a_checkpoint_that_vllm_cannot_load_is_named(installed: Installed) -> None:
    with pytest.raises(OSError, match=r"checkpoint 'bad' cannot be loaded by vLLM: Engine core init.* failed\.$"):
        vllm_engine.load_vllm("bad")


def test_without_vllm_loading_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="engine vllm needs vLLM, which is not installed here"):
        vllm_engine.load_vllm("anything")


def test_a_number_format_that_vllm_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="engine vllm has no dtype 'float64': choose one of float32, float16"):
        vllm_engine.load_vllm("anything", "float64")
