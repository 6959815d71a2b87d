"""Engine `vllm` without vLLM: on a fake that has the gaps and the errors of vLLM's outputs."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, make_dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from edgecloud_sd.acceptance import GREEDY, Rank, Synthetic
from edgecloud_sd.cloud import vllm_engine
from edgecloud_sd.cloud.batching import Batcher, EngineRequest, SamplingOptions, Stream
from edgecloud_sd.cloud.engine import VLLM
from edgecloud_sd.cloud.vllm_engine import VLLMModel, VLLMVerifier, collapse, verify_rows
from edgecloud_sd.data import prompts
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Committed, Prompt, Verdict
from edgecloud_sd.models import checkpoint
from edgecloud_sd.steps import run_steps
from edgecloud_sd.stopping import Stopping, check_length
from edgecloud_sd.verifier import LocalVerifier, Verification
from tests.support.serving import ToyEngine
from tests.support.strategies import VOCABULARY, Scene, ks, logit_rows, ranks, scenes, speculative
from tests.support.toy import ToyModel, random_table, stateless_verdict

AUDIO = VOCABULARY  # an id that the toy models never output
BLOCK = 3  # tokens in one block of the prefix cache


@dataclass(frozen=True)
class Logprob:
    """A logit, as in vLLM."""

    logprob: float
    rank: int


@dataclass(frozen=True)
class Completion:
    """The tokens of an output, as in vLLM."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class Output:
    """The output of a request, as in vLLM."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass
class Running:
    """A request of the fake engine."""

    request: EngineRequest
    options: SamplingOptions
    ids: list[int]
    cached: int
    written: list[int] = field(default_factory=list)


class FakeVLLM:
    """A toy model that behaves as vLLM does.

    It returns only the highest logits, and of equal ones the highest ids first. For a position in its prefix cache it
    returns arbitrary values. It expands every audio placeholder. A request for logits of the prompt does not read the
    cache, unless its options say so.
    """

    def __init__(self, model: ToyModel, max_logprobs: int = VOCABULARY) -> None:
        self.model = model
        self.max_logprobs = max_logprobs
        self.cache: set[tuple[object, ...]] = set()
        self.running: dict[str, Running] = {}
        self.requests: list[Running] = []
        self.batches: list[int] = []
        self.is_broken = False

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if params.get(name, 0) > self.max_logprobs:
                raise ValueError(f"{name} of {params[name]}, which is greater than max allowed: {self.max_logprobs}")
        ids = list(self.expanded(prompt))
        reads = not params.get("skip_reading_prefix_cache", "prompt_logprobs" in params)
        blocks = range(BLOCK, len(ids), BLOCK) if reads else ()
        cached = max((end for end in blocks if (prompt["cache_salt"], *ids[:end]) in self.cache), default=0)
        self.running[request_id] = running = Running(prompt, params, ids, cached)
        self.requests.append(running)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            del self.running[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Output]:
        assert self.running, "vLLM would block forever"
        if self.is_broken:
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
        logprobs = None if width is None else [top_logits(row, token, width)]
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
                rows.append(top_logits(self.row(ids[: before + 1]), ids[before + 1], width))
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


def top_logits(row: torch.Tensor, token: int, width: int) -> dict[int, Logprob]:
    """Return vLLM's dict of one position: its token, then the `width` highest, whose ranks replace the token's own."""
    logits = row.tolist()
    order = sorted(range(len(logits)), key=lambda other: (-logits[other], -other))[:width]
    ties = sum(logit >= logits[token] for logit in logits)
    return {token: Logprob(logits[token], ties)} | {
        other: Logprob(logits[other], rank) for rank, other in enumerate(order, start=1)
    }


def run_directly(engine: FakeVLLM) -> VLLMModel:
    """Return a model whose every request runs to its end in the calling thread."""
    names = map(str, itertools.count())

    def submit(request: EngineRequest, options: SamplingOptions) -> Stream:
        stream = Stream(lambda: None)
        engine.add_request(next(names), request, options)
        while engine.has_unfinished_requests():
            for output in engine.step():
                stream.put(output)
        return stream

    return model_of(engine, submit)


def model_of(engine: FakeVLLM, submit: Any) -> VLLMModel:
    """Return a model on a fake engine."""
    return VLLMModel("fake", submit, lambda: None, AUDIO, VOCABULARY, 99, 8, engine.max_logprobs)


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel(random_table(VOCABULARY, 1), frozenset())


def equal_logits(tied: int) -> ToyModel:
    """Return a model with the same logits everywhere: the first `tied` ids share the highest."""
    row = torch.tensor([1.0] * tied + [0.5 - index / 100 for index in range(VOCABULARY - tied)], dtype=torch.float64)
    return ToyModel(row.repeat(257, 1), frozenset())


def verdict_or_error(call: Any) -> Verdict | str:
    """Return the verdict of a call, or the message of its ValueError."""
    try:
        return call()  # type: ignore[no-any-return]
    except ValueError as error:
        return str(error)


ids = st.integers(0, VOCABULARY - 1)


@dataclass(frozen=True)
class Call:
    """One call of an edge whose base or tokens may be wrong."""

    back: int  # committed tokens after the base
    tokens: tuple[int, ...]
    draft: tuple[int, ...]
    is_own: bool  # the draft is the target's own, but for its last token
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
def test_verdicts_equal_those_of_a_local_verifier(
    scene: Scene, rule: Rank, edge_calls: list[Call], data: st.DataObject
) -> None:
    least = VOCABULARY if rule.r >= VOCABULARY - 1 else rule.r + 1
    engine = FakeVLLM(scene.cloud, VOCABULARY if data.draw(st.booleans()) else max(least, VOCABULARY))
    wants_rest = data.draw(st.booleans())
    local = LocalVerifier(scene.cloud, rule, wants_rest=wants_rest).open(scene.prompt)
    verification = run_directly(engine).verifier(rule, wants_rest).open(scene.prompt)
    verification.wait()
    committed: list[int] = []
    for call in edge_calls:
        base = len(committed) - call.back
        tokens = call.tokens if base or not call.tokens else (scene.prompt.last, *call.tokens[1:])
        context = [*committed[: max(base, 0)], *tokens]
        draft = own_draft(scene, context, len(call.draft)) if call.is_own else call.draft
        for _ in range(call.times):
            expected = verdict_or_error(lambda: local.verify(base, tokens, draft))  # noqa: B023
            assert verdict_or_error(lambda: verification.verify(base, tokens, draft)) == expected  # noqa: B023
            if isinstance(expected, Verdict):
                committed = [*committed[:base], *tokens, *draft[: expected.accepted]]


def own_draft(scene: Scene, context: Sequence[int], length: int) -> tuple[int, ...]:
    """Return the target's own tokens after the context, the last of them changed."""
    draft: list[int] = []
    while len(draft) < length:
        draft.append(int(scene.cloud.logits([*scene.prompt.ids[:-1], *context, *draft]).argmax()))
    return (*draft[:-1], (draft[-1] + 1) % VOCABULARY) if draft else ()


@given(scenes(), ks)
def test_lossless_decoding_outputs_the_targets_own_tokens(scene: Scene, k: int) -> None:
    expected = list(LocalVerifier(scene.cloud, GREEDY).open(scene.prompt).generate(scene.stopping))
    verifier = run_directly(FakeVLLM(scene.cloud)).verifier(GREEDY)
    events = decode(scene.prompt, speculative(k), scene.stopping, scene.edge, verifier)
    assert [token for event in events if isinstance(event, Committed) for token in event.tokens] == expected


@given(scenes(), st.lists(ids, max_size=4))
def test_generation_continues_an_output_greedily(scene: Scene, output: list[int]) -> None:
    local, verification = (
        verifier.open(scene.prompt)
        for verifier in (LocalVerifier(scene.cloud, GREEDY), run_directly(FakeVLLM(scene.cloud)).verifier(GREEDY))
    )
    assert list(verification.generate(scene.stopping, output)) == list(local.generate(scene.stopping, output))


@pytest.mark.parametrize("tied", range(1, VOCABULARY + 1))
@pytest.mark.parametrize("r", range(1, VOCABULARY + 1))
def test_equal_logits_rank_by_their_ids(r: int, tied: int) -> None:
    cloud = equal_logits(tied)
    for token in range(VOCABULARY):
        local = LocalVerifier(cloud, Rank(r), wants_rest=True).open(Prompt((1, 2)))
        verification = run_directly(FakeVLLM(cloud)).verifier(Rank(r), wants_rest=True).open(Prompt((1, 2)))
        assert verification.verify(0, [2], [token, 0, token]) == local.verify(0, [2], [token, 0, token])


@given(ranks, st.lists(logit_rows, min_size=1, max_size=5), st.booleans(), st.data())
def test_a_few_of_the_highest_logits_give_the_verdict_or_leave_it_open(
    rule: Rank, rows: list[torch.Tensor], wants_rest: bool, data: st.DataObject
) -> None:
    rows = [row[: min(map(len, rows))].round() for row in rows]
    vocab_size = len(rows[0])
    draft = [data.draw(st.integers(0, vocab_size - 1)) for _ in rows[1:]]
    whole = rule(draft, torch.stack(rows))
    expected = whole if wants_rest else replace(whole, rest=())
    for width in range(rule.r + 1, vocab_size + 1):
        highest = [
            {token: entry.logprob for token, entry in top_logits(row, token, width).items()}
            for row, token in zip(rows, [*draft, 0], strict=True)
        ]
        is_whole = width == vocab_size
        verdict = verify_rows(draft, highest, rule.r, None if is_whole else width, wants_rest)
        assert verdict == expected or (verdict is None and not is_whole)


def test_ties_and_logits_after_a_rejected_token_matter_for_the_rest_alone() -> None:
    rejecting, tied, bad = {0: 2.0, 1: 1.0}, {0: 2.0, 1: 2.0}, {0: 2.0, 1: math.nan}
    for later in (tied, bad):
        assert verify_rows([1, 1], [rejecting, later, rejecting], 1, 2) == Verdict(0, 0)
    assert verify_rows([1, 1], [rejecting, tied, rejecting], 1, 2, wants_rest=True) is None
    with pytest.raises(FloatingPointError, match="not finite"):
        verify_rows([1, 1], [rejecting, bad, rejecting], 1, 2, wants_rest=True)
    assert verify_rows([1, 1], [rejecting, rejecting, bad], 1, 2, wants_rest=True) == Verdict(0, 0, (0,))


def test_ties_beyond_the_logits_of_vllm_are_an_error() -> None:
    verification = run_directly(FakeVLLM(equal_logits(5), max_logprobs=3)).verifier(Rank(2)).open(Prompt((1, 2)))
    with pytest.raises(
        RuntimeError, match="more than 3 tokens are tied at rank 2: give --engine-option max_logprobs=6"
    ):
        verification.verify(0, [2], [4])


def test_a_verifier_with_a_rank_beyond_the_logits_of_vllm_is_refused(toy: ToyModel) -> None:
    limited = run_directly(FakeVLLM(toy, max_logprobs=4))
    assert limited.verifier(Rank(limited.max_rank)).rule == Rank(3)
    with pytest.raises(
        ValueError, match=r"rule rank\(4\): this engine has ranks up to 3: give --engine-option max_logprobs=5"
    ):
        limited.verifier(Rank(4))
    assert run_directly(FakeVLLM(toy)).verifier(Rank(1000))  # vLLM returns the logits of every token
    with pytest.raises(ValueError, match=r"rule synthetic\(0\.5\): needs all logits.*use greedy or rank"):
        limited.verifier(Synthetic((0.5,)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_an_error(toy: ToyModel, bad: float) -> None:
    verification = (
        run_directly(FakeVLLM(ToyModel(torch.full_like(toy.table, bad), toy.eos))).verifier(GREEDY).open(Prompt((1, 2)))
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        verification.verify(0, [2], [1])


@pytest.mark.parametrize("length", range(2, 2 + BLOCK))
def test_the_prompt_is_computed_once(toy: ToyModel, length: int) -> None:
    engine = FakeVLLM(toy)
    verification = run_directly(engine).verifier(GREEDY).open(Prompt((1,) * length))
    assert "prompt_logprobs" not in engine.requests[0].options
    verification.verify(0, [1], [1, 2])
    assert [running.cached for running in engine.requests] == [0, (length - 1) // BLOCK * BLOCK]


def test_logits_at_cached_positions_are_computed_in_a_second_request(toy: ToyModel) -> None:
    engine = FakeVLLM(toy)
    verification = run_directly(engine).verifier(GREEDY).open(Prompt((1,) * BLOCK))
    first = verification.verify(0, [1], [1] * BLOCK)
    assert verification.verify(0, [1], [1] * BLOCK) == first
    assert [running.cached for running in engine.requests] == [0, 0, BLOCK, 0]


def test_two_sessions_share_no_cache(toy: ToyModel) -> None:
    engine = FakeVLLM(toy)
    verifier = run_directly(engine).verifier(GREEDY)
    for _ in range(2):
        verifier.open(Prompt(tuple(range(6)) * 3)).wait()
    assert [running.cached for running in engine.requests] == [0, 0]


def audio_prompt(frames: int, placeholders: int) -> Prompt:
    """Return a prompt with audio."""
    return Prompt((1, *[AUDIO] * placeholders, 2, 3), torch.zeros(128, frames))


@pytest.mark.parametrize("frames", [4, 50, 333])
def test_audio_is_expanded_once(toy: ToyModel, frames: int) -> None:
    prompt = audio_prompt(frames, prompts.count_audio_positions(frames))
    local = LocalVerifier(toy, Rank(2)).open(prompt)
    engine = FakeVLLM(toy)
    verification = run_directly(engine).verifier(Rank(2)).open(prompt)
    assert verification.verify(0, [3], [4, 5, AUDIO - 1]) == local.verify(0, [3], [4, 5, AUDIO - 1])
    assert engine.requests[-1].ids == [*prompt.ids, 4, 5, AUDIO - 1]
    assert list(verification.generate(Stopping(frozenset(), 5))) == list(local.generate(Stopping(frozenset(), 5)))


def test_a_wrong_number_of_placeholders_is_an_error(toy: ToyModel) -> None:
    with pytest.raises(ValueError, match="the prompt has 7 audio placeholders for 50 frames, not 12"):
        run_directly(FakeVLLM(toy)).verifier(GREEDY).open(audio_prompt(50, 7))


def test_an_output_for_another_prompt_is_an_error(toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeVLLM(toy)
    monkeypatch.setattr(engine, "expanded", lambda prompt: iter([*prompt["prompt_token_ids"], 0]))
    with pytest.raises(RuntimeError, match="vLLM read 2 tokens, not 1"):
        run_directly(engine).verifier(GREEDY).open(Prompt((1, 2))).wait()


def test_an_output_beyond_the_maximum_length_is_an_error(toy: ToyModel) -> None:
    class Short(FakeVLLM):
        def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
            super().add_request(request_id, prompt, {**params, "max_tokens": min(params["max_tokens"], 3)})

    verification = run_directly(Short(toy)).verifier(GREEDY).open(Prompt((1, 2)))
    with pytest.raises(RuntimeError, match="more than the maximum length of vLLM, 99 tokens"):
        list(verification.generate(Stopping(frozenset(), 5)))


@given(st.lists(st.integers(0, 3)))
@example([2, 2, 0, 2])
def test_collapsing_leaves_one_placeholder_per_run(token_ids: list[int]) -> None:
    assert collapse(token_ids, 2) == [
        token for token, run in itertools.groupby(token_ids) for token in (list(run) if token != 2 else [2])
    ]


@pytest.fixture
def engine(toy: ToyModel) -> FakeVLLM:
    return FakeVLLM(toy)


@pytest.fixture
def batcher(engine: FakeVLLM) -> Iterator[Batcher]:
    batcher = Batcher(engine)
    yield batcher
    batcher.close()


def test_every_thread_gets_its_own_outputs(engine: FakeVLLM, batcher: Batcher) -> None:
    verifier = VLLMVerifier(model_of(engine, batcher.submit), Rank(2))
    local = LocalVerifier(engine.model, Rank(2))

    def edge(number: int, opened: Verification) -> list[object]:
        draft = [number % VOCABULARY, 1, 2]
        return [opened.verify(0, [2], draft), opened.verify(0, [2], draft), *opened.generate(Stopping(frozenset(), 9))]

    def both(number: int) -> bool:
        prompt = Prompt((number, 2))
        return edge(number, verifier.open(prompt)) == edge(number, local.open(prompt))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(both, range(40)))


def test_waiting_requests_run_in_one_batch(engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    has_stepped, may_step = threading.Event(), threading.Event()
    step = engine.step

    def blocked_step() -> list[Output]:
        has_stepped.set()
        assert may_step.wait(60)
        return step()

    monkeypatch.setattr(engine, "step", blocked_step)
    batcher = Batcher(engine)
    verifier = VLLMVerifier(model_of(engine, batcher.submit), GREEDY)
    first = verifier.open(Prompt((0, 1)))
    assert has_stepped.wait(60)  # so that no other request joins the first batch
    others = [verifier.open(Prompt((n, 1))) for n in range(1, 6)]
    may_step.set()
    for verification in (first, *others):
        verification.wait()
    batcher.close()
    assert max(engine.batches) >= 5
    assert len(engine.batches) <= 2


def test_a_refused_request_raises_only_in_its_own_stream(engine: FakeVLLM, batcher: Batcher) -> None:
    options: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    request = {"prompt_token_ids": [1], "cache_salt": "x"}
    bad, good = batcher.submit(request, {**options, "logprobs": 99}), batcher.submit(request, options)
    for _ in range(2):
        with pytest.raises(ValueError, match="greater than max allowed"):
            next(bad)
    assert [output.finished for output in good] == [True]
    assert list(good) == []


def test_requests_raise_the_error_of_a_dead_engine(engine: FakeVLLM, batcher: Batcher) -> None:
    verification = VLLMVerifier(model_of(engine, batcher.submit), GREEDY).open(Prompt((1, 2)))
    verification.wait()
    engine.is_broken = True
    with pytest.raises(RuntimeError, match="vLLM's engine died: OSError: out of memory") as caught:
        verification.verify(0, [2], [1])
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="vLLM's engine died: OSError: out of memory"):
        verification.verify(0, [2], [1])
    verification.close()


def test_closing_ends_the_running_requests_and_the_thread(toy: ToyModel) -> None:
    class Slow(FakeVLLM):
        def step(self) -> list[Output]:
            time.sleep(0.02)
            return super().step()

    engine = Slow(toy)
    batcher = Batcher(engine)
    verification = VLLMVerifier(model_of(engine, batcher.submit), GREEDY).open(Prompt((1, 2)))
    tokens = verification.generate(Stopping(frozenset(), 10**9))
    assert len(list(itertools.islice(tokens, 3))) == 3
    batcher.close()
    assert not any(thread.name == "vllm" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="vLLM's engine is closed"):
        for _ in tokens:
            pass
    with pytest.raises(RuntimeError, match="vLLM's engine is closed"):
        verification.verify(0, [2], [1])


def test_a_closed_stream_stops_its_request(engine: FakeVLLM, batcher: Batcher) -> None:
    verifier = VLLMVerifier(model_of(engine, batcher.submit), GREEDY)
    tokens = verifier.open(Prompt((1, 2))).generate(Stopping(frozenset(), 10**9))
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    while engine.has_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not engine.has_unfinished_requests()
    verifier.open(Prompt((1, 2))).wait()  # later requests still run


class InstalledVLLM:
    """The part of the package `vllm` that loading uses, with a fake engine."""

    def __init__(self, engine: FakeVLLM) -> None:
        self.engine = engine
        self.arguments: dict[str, object] = {}
        self.is_shut_down = False

    def llm(self, checkpoint: str, **arguments: object) -> SimpleNamespace:
        if checkpoint == "bad":
            raise RuntimeError("Engine core initialization failed.\nSee above.")
        self.arguments = arguments
        config = SimpleNamespace(
            hf_config=SimpleNamespace(thinker_config=SimpleNamespace(audio_token_index=AUDIO)),
            get_vocab_size=lambda: VOCABULARY,
            max_logprobs=-1,
            max_model_len=99,
        )
        vllm_config = SimpleNamespace(model_config=config, scheduler_config=SimpleNamespace(max_num_seqs=8))
        self.vllm_config = vllm_config
        return SimpleNamespace(llm_engine=self)

    @property
    def renderer(self) -> SimpleNamespace:
        return SimpleNamespace(render_cmpl=lambda requests: requests)

    @property
    def engine_core(self) -> SimpleNamespace:
        return SimpleNamespace(shutdown=self.shut_down)

    def shut_down(self) -> None:
        self.is_shut_down = True

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> None:
        self.engine.add_request(request_id, prompt, {**params, "stream": params["output_kind"] == "delta"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.fixture
def installed(engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> InstalledVLLM:
    package = InstalledVLLM(engine)
    arguments = make_dataclass("EngineArgs", ["model", "dtype", "tensor_parallel_size", *vllm_engine.FIXED_ARGUMENTS])
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": package.llm, "EngineArgs": arguments, "SamplingParams": dict},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta", FINAL_ONLY="final")},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return package


def test_a_loaded_model_verifies_generates_and_closes(installed: InstalledVLLM) -> None:
    loaded = vllm_engine.load_vllm("folder", "bfloat16", {"tensor_parallel_size": 2})
    assert {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        **vllm_engine.FIXED_ARGUMENTS,
    }.items() <= installed.arguments.items()
    assert (loaded.max_rank, loaded.concurrency) == (VOCABULARY, 8)
    local = LocalVerifier(installed.engine.model, GREEDY).open(Prompt((1, 2)))
    verification = loaded.verifier(GREEDY).open(Prompt((1, 2)))
    assert verification.verify(0, [2], [1, 2]) == local.verify(0, [2], [1, 2])
    stopping = Stopping(frozenset(), 5)
    assert list(verification.generate(stopping)) == list(local.generate(stopping))
    loaded.close()
    assert installed.is_shut_down


@pytest.mark.parametrize("flag", ["tensor_parallel", *vllm_engine.FIXED_ARGUMENTS])
def test_an_unknown_or_fixed_engine_argument_is_refused(installed: InstalledVLLM, flag: str) -> None:
    with pytest.raises(
        ValueError, match=f"--engine-option: {flag} is not an engine argument of vLLM that may be set here"
    ):
        vllm_engine.load_vllm("folder", flags={flag: 2})


def test_a_checkpoint_that_vllm_cannot_load_is_an_error(installed: InstalledVLLM) -> None:
    with pytest.raises(OSError, match=r"checkpoint 'bad' cannot be loaded by vLLM: Engine core init.* failed\.$"):
        vllm_engine.load_vllm("bad")


def test_loading_without_vllm_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ValueError, match=r"--engine vllm: vLLM is not installed: see .*README.md, or use --engine transformers"
    ):
        vllm_engine.load_vllm("anything")


def test_a_number_format_that_vllm_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="--dtype: float64 does not work with --engine vllm: use one of float32, float16"
    ):
        vllm_engine.load_vllm("anything", "float64")


def test_the_published_length_leaves_room_for_the_token_after_a_whole_draft(
    toy: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "weights_digest", lambda name: "")
    identity = VLLM(run_directly(FakeVLLM(toy)), ToyEngine().identity.traits, "float32").identity
    with pytest.raises(ValueError, match=r"model fake, 98 tokens: .*, or give the server another .* max_model_len$"):
        check_length(60, 39, identity.length_limits)


@pytest.mark.parametrize("wants_rest", [True, False])
def test_the_engine_of_a_server_gives_a_rest_if_it_is_asked_for(toy: ToyModel, wants_rest: bool) -> None:
    engine = VLLM(run_directly(FakeVLLM(toy)), ToyEngine().identity.traits, "float32")
    opened = run_steps(engine.verifier(Rank(2), wants_rest=wants_rest).open_steps(Prompt((1, 2))))
    expected = stateless_verdict(toy, Prompt((1, 2)), Rank(2), [2], [0] * 6)
    assert len(expected.rest) > 1
    assert run_steps(opened.verify_steps(0, [2], [0] * 6)) == (expected if wants_rest else replace(expected, rest=()))
    empty = stateless_verdict(toy, Prompt((1, 2)), Rank(2), [2], [])
    assert run_steps(opened.verify_steps(0, [2], [])) == empty
