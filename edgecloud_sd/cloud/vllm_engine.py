"""Engine `vllm`: the cloud's side on vLLM, which batches the calls of many edges and spreads a model over GPUs.

Every call is stateless: it sends the whole context, and vLLM's prefix cache stands for the cache of a session. What
vLLM says of a draft are the highest logits before each of its tokens; who accepts and what corrects follow from those
exactly as `LocalVerifier` has it from all of them.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, Protocol

from edgecloud_sd.acceptance import Rank, Rule
from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import check_base

MISSING = "engine vllm needs vLLM, which is not installed here: see the README, or choose engine transformers"
VLLM_DTYPES = ("float32", "float16", "bfloat16")
OWN_ARGUMENTS = {  # what the verdicts rest on
    "enable_prefix_caching": True,
    "enable_mm_embeds": True,  # or a spectrogram would be refused
    "limit_mm_per_prompt": {"audio": 1, "image": 0, "video": 0},
    "logprobs_mode": "raw_logits",  # probabilities can round two logits to one
}

EngineRequest = Mapping[str, Any]  # vLLM's dict of a prompt
SamplingOptions = Mapping[str, Any]  # arguments of vLLM's SamplingParams, and `stream` for every output as it comes
Row = Mapping[int, float]  # the highest logits for one place by their ids, and the logit of the draft's token there


class LLMEngine(Protocol):
    """What of vLLM's `LLMEngine` is used. Not thread-safe. Outputs are vLLM's `RequestOutput`."""

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> object: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[Any]: ...


class Stream:
    """The outputs of one request as they come, for one thread. An error is raised on every further call too."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._arrived: SimpleQueue[Any] = SimpleQueue()
        self._end: BaseException | None = None

    def put(self, item: Any) -> None:
        """An output, or the exception that ends the request."""
        self._arrived.put(item)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._end is None:
            item = self._arrived.get()
            if not isinstance(item, BaseException):
                self._end = StopIteration() if item.finished else None
                return item
            self._end = item
        raise self._end

    def close(self) -> None:
        """Whoever asked no longer wants it: vLLM computes no more of it."""
        if self._end is None:
            self._cancel()


class Batcher:
    """Puts the requests of any number of threads to an engine that takes one thread, and steps it while it has work.

    Requests join the batch between two steps. The engine belongs to the batcher's thread until `close` returns.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._names = map(str, itertools.count())
        self._changed = Condition()  # guards what follows
        self._orders: list[Callable[[], object]] = []
        self._streams: dict[str, Stream] = {}
        self._closing = False
        self._over: str | None = None
        self._thread = Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, options: SamplingOptions) -> Stream:
        """Returns at once. RuntimeError, here or from the stream, where the engine is closed or has died.

        A request that vLLM refuses raises vLLM's own error, from its own stream alone.
        """
        with self._changed:
            if self._over is not None:
                raise RuntimeError(self._over)
            name = next(self._names)
            stream = self._streams[name] = Stream(partial(self._order, partial(self._abort, name)))
            self._order(partial(self._add, name, request, options))
        return stream

    def close(self) -> None:
        """Ends what still runs and joins the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _order(self, order: Callable[[], object]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def _run(self) -> None:
        over, cause = "vLLM's engine is closed", None
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 -- nobody is above: those who wait have to hear of it
            over, cause = f"vLLM's engine died: {type(error).__name__}: {error}", error
        with self._changed:
            self._over = over
            waiting = list(self._streams.values())
        for stream in waiting:
            failure = RuntimeError(over)
            failure.__cause__ = cause
            stream.put(failure)

    def _turn(self) -> bool:
        """One step of the engine with all who have come; False when it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._streams or self._closing)
            if self._closing:
                return False
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        if self._engine.has_unfinished_requests():  # without any, a step would wait for ever
            for output in self._engine.step():
                self._deliver(output.request_id, output, output.finished)
        return True

    def _add(self, name: str, request: EngineRequest, options: SamplingOptions) -> None:
        try:
            self._engine.add_request(name, request, options)
        except Exception as error:  # noqa: BLE001 -- a request's own fault: it is raised to who made it
            self._deliver(name, error, last=True)

    def _abort(self, name: str) -> None:
        with self._changed:
            known = self._streams.pop(name, None)
        if known is not None:
            self._engine.abort_request([name])

    def _deliver(self, name: str, item: Any, last: bool) -> None:
        with self._changed:
            stream = self._streams.pop(name, None) if last else self._streams.get(name)
        if stream is not None:  # it is gone if it was cancelled
            stream.put(item)


@dataclass(frozen=True)
class VLLMModel:
    """A model that vLLM runs. `ask` puts a request to it and may be called by any thread."""

    name: str
    ask: Callable[[EngineRequest, SamplingOptions], Stream]
    shut: Callable[[], None]
    eos: frozenset[int]
    placeholder: int  # the audio token
    vocab_size: int  # of the vocabulary
    max_length: int  # of prompt and caption together, at most
    concurrency: int  # requests in one batch, at most
    max_logprobs: int  # logits a place that vLLM gives, at most

    @property
    def max_rank(self) -> int:
        """The largest r of rule rank(r): one more logit than r shows whether the r-th is tied."""
        return self.vocab_size if self.max_logprobs >= self.vocab_size else self.max_logprobs - 1

    def verifier(self, rule: Rule) -> VLLMVerifier:
        """ValueError for a rule that takes more than vLLM shows."""
        if not isinstance(rule, Rank):
            raise ValueError(f"rule {rule.text} takes all logits, and vLLM shows the highest: choose greedy or rank(r)")
        return VLLMVerifier(self, rule)

    def close(self) -> None:
        """Stop the engine and its processes; who still waits gets a RuntimeError."""
        self.shut()


@dataclass(frozen=True)
class VLLMVerifier:
    """A model under vLLM as the cloud. ValueError for a rule that looks further than vLLM shows."""

    model: VLLMModel
    rule: Rank

    def __post_init__(self) -> None:
        if min(self.rule.r, self.model.vocab_size) > self.model.max_rank:
            raise ValueError(
                f"rule rank({self.rule.r}) is beyond rank {self.model.max_rank} of this engine: "
                f"give vLLM max_logprobs={self.rule.r + 1} or more"
            )

    def open(self, prompt: Prompt) -> VLLMVerification:
        """Returns while vLLM encodes and prefills. ValueError for another number of placeholders than frames need."""
        if prompt.features is not None:
            prompts.check_placeholders(prompt, self.model.placeholder)
        return VLLMVerification(self.model, prompt, self.rule)


class VLLMVerification:
    """Verification by requests that each hold the whole context; only the agreed ids are kept here."""

    def __init__(self, model: VLLMModel, prompt: Prompt, rule: Rank) -> None:
        self._model = model
        self._prompt = prompt
        self._rule = rule
        self._base = _request(prompt, model.placeholder)
        self._agreed: list[int] = []
        # without logits, which for every place of the prompt would take time and memory, and without the last id: the
        # logits after it are the first that are asked for, and a place in the cache has none
        self._prefill = self._ask([], max_tokens=1) if len(prompt.ids) > 1 else None

    def wait(self) -> None:
        """The prompt is in the prefix cache."""
        if self._prefill is not None:
            self._check(next(self._prefill), [])
            self._prefill = None

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """One request; rarely a second, where ties or the prefix cache hide what decides."""
        check_base(base, len(self._agreed))
        context = [*self._agreed[:base], *tokens, *draft]
        if len(context) == len(draft):
            raise ValueError(f"cannot return {len(draft) + 1} rows of a context of {len(context)} tokens")
        self.wait()
        verdict = self._judge(context, draft)
        self._agreed = context[: base + len(tokens) + verdict.accepted]
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """vLLM's greedy decoding, one token at a time. RuntimeError where the model's positions are used up."""
        written = list(output)
        if stopping.reason(written) is not None:
            return
        self.wait()
        context = [self._prompt.last, *written]
        limit, ends = stopping.room(len(written)), sorted(stopping.eos)
        with closing(self._ask(context, max_tokens=limit, stop_token_ids=ends, stream=True)) as stream:
            for step in stream:
                for token in self._check(step, context).outputs[0].token_ids:
                    written.append(token)
                    yield token
        if stopping.reason(written) is None:
            raise RuntimeError(
                f"prompt and caption need more than the maximum length of vLLM, {self._model.max_length}"
            )

    def close(self) -> None:
        """Nothing is held but a prefill that may still run; the prefix cache forgets by itself."""
        if self._prefill is not None:
            self._prefill.close()

    def _judge(self, context: Sequence[int], draft: Sequence[int]) -> Verdict:
        most = min(self._model.max_logprobs, self._model.vocab_size)
        width = min(self._rule.r + 1, most)
        while True:
            rows = self._logits(context, len(draft), width)
            verdict = judge(draft, rows, self._rule.r, width if width < self._model.vocab_size else None)
            if verdict is not None:
                return verdict
            if width == most:
                raise RuntimeError(f"over {most} tokens are tied at rank {self._rule.r}: give vLLM more max_logprobs")
            width = min(2 * width, most)

    def _logits(self, context: Sequence[int], count: int, width: int) -> list[Row]:
        """The `width` highest logits for each of the last `count` ids of `context`, and for what follows them."""
        wanted = {"prompt_logprobs": width} if count else {}
        for cached in (True, False):
            stream = self._ask(
                context,
                max_tokens=1,
                logprobs=width,
                flat_logprobs=True,
                skip_reading_prefix_cache=not cached,  # said, because vLLM does not read it where logits are asked for
                **wanted,
            )
            output = self._check(next(stream), context)
            # a place in the cache is not computed and has no logits: what stands in its row is anything
            if (output.num_cached_tokens or 0) < self._length(context) - count:
                break
        places = [*(output.prompt_logprobs[place] for place in range(-count, 0)), output.outputs[0].logprobs[0]]
        return [{token: each.logprob for token, each in place.items()} for place in places]

    def _ask(self, context: Sequence[int], **options: Any) -> Stream:
        ids = [*self._base["prompt_token_ids"], *context]
        fixed = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}
        return self._model.ask({**self._base, "prompt_token_ids": ids}, {**fixed, **options})

    def _check(self, output: Any, context: Sequence[int]) -> Any:
        """RuntimeError for an answer that is not of this context, or was cut off."""
        if len(output.prompt_token_ids) != self._length(context):
            raise RuntimeError(f"vLLM read {len(output.prompt_token_ids)} tokens, not {self._length(context)}")
        if output.outputs[0].finish_reason not in (None, "length", "stop"):
            raise RuntimeError(f"vLLM ended a request early: {output.outputs[0].finish_reason}")
        return output

    def _length(self, context: Sequence[int]) -> int:
        return len(self._prompt.ids) - 1 + len(context)


def judge(draft: Sequence[int], rows: Sequence[Row], r: int, width: int | None) -> Verdict | None:
    """What rule rank(r) says from the highest logits alone, equal ones by their ids as in argmax.

    `rows` are len(draft) + 1, each with the `width` > r highest logits of its place, or all where `width` is None. None
    where ties at the last of them leave it open: it takes more to tell. FloatingPointError for logits not finite.
    """
    for accepted, row in enumerate(rows):
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError("the model gave logits that are not finite; use a wider dtype")
        # below the last that was asked for are only tokens that nobody counts, and beside it may be more of its like
        last = -math.inf if width is None else sorted(row.values(), reverse=True)[width - 1]
        if accepted < len(draft):
            kept = _among(row, draft[accepted], r, last)
            if kept is None:
                return None
            if kept:
                continue
        top = max(row.values())
        return None if top == last else Verdict(accepted, min(token for token in row if row[token] == top))
    raise ValueError(f"{len(rows)} rows for a draft of {len(draft)} tokens")


def _among(row: Row, token: int, r: int, last: float) -> bool | None:
    """Whether `token` is one of the r most likely, or None where that depends on ids that tie with `last`."""
    own = row[token]
    above = sum(logit > own for logit in row.values())
    if above >= r:
        return False
    if own == last:
        return None
    return above + sum(other < token and logit == own for other, logit in row.items()) < r


def collapse(ids: Sequence[int], placeholder: int) -> list[int]:
    """`ids` with one placeholder for each run of them: vLLM makes of it as many as the audio fills."""
    return [token for before, token in zip((None, *ids), ids, strict=False) if not before == token == placeholder]


def _request(prompt: Prompt, placeholder: int) -> dict[str, Any]:
    """All but the context: the prompt without its last id, the spectrogram, and a salt that no other session shares."""
    base: dict[str, Any] = {"prompt_token_ids": list(prompt.ids[:-1]), "cache_salt": secrets.token_hex(8)}
    if prompt.features is None:
        return base
    import torch

    frames = prompt.features.shape[1]
    audio = {
        "input_audio_features": prompt.features,
        "audio_feature_lengths": torch.tensor([frames]),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),  # unused, and vLLM 0.32 dies without it
    }
    return {
        **base,
        "prompt_token_ids": collapse(prompt.ids[:-1], placeholder),
        "multi_modal_data": {"audio": audio},
        "multi_modal_uuids": {"audio": [base["cache_salt"]]},  # or every request would hash the spectrogram
    }


class _LLM:
    """vLLM's `LLM` as an `LLMEngine`."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> object:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = dict(params)
        kind = RequestOutputKind.DELTA if options.pop("stream", False) else RequestOutputKind.FINAL_ONLY
        (rendered,) = self._engine.renderer.render_cmpl([prompt])
        return self._engine.add_request(request_id, rendered, SamplingParams(**options, output_kind=kind))

    def abort_request(self, request_ids: list[str]) -> None:
        self._engine.abort_request(request_ids)

    def has_unfinished_requests(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[Any]:
        return list(self._engine.step())


def load_vllm(checkpoint: str, dtype: str = "float32", flags: Mapping[str, object] | None = None) -> VLLMModel:
    """A whole Qwen2.5-Omni checkpoint, a folder or a name on the hub, under vLLM.

    `flags` are vLLM's own engine arguments by their names in Python: tensor_parallel_size, pipeline_parallel_size,
    gpu_memory_utilization, max_model_len and so on. ValueError where vLLM is not installed, and for a dtype or a flag
    that it does not know; OSError for a checkpoint that it cannot load.
    """
    if dtype not in VLLM_DTYPES:
        raise ValueError(f"engine vllm has no dtype {dtype!r}: choose one of {', '.join(VLLM_DTYPES)}")
    try:
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:  # the latter two where its parts do not fit each other
        raise ValueError(f"{MISSING} ({error})") from error
    given = dict(flags or {})
    known = {field.name for field in fields(EngineArgs)} - {"model", "dtype", *OWN_ARGUMENTS}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"vLLM has no engine argument {unknown[0]!r} to give here")
    defaults = {
        "enforce_eager": current_platform.is_cpu(),
        "max_logprobs": 128,
        "mm_processor_cache_gb": 1,  # for spectrograms, which are of no use after their session
        "seed": 0,
    }
    try:
        model = _model(checkpoint, LLM(checkpoint, dtype=dtype, **{**defaults, **given, **OWN_ARGUMENTS}))
        # vLLM compiles at the first logits: not while an edge waits
        model.verifier(Rank(1)).open(Prompt((0, 0))).verify(0, [0], [0])
    except (OSError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"checkpoint {checkpoint!r} cannot be loaded by vLLM: {reason}") from error
    return model


def _model(name: str, llm: Any) -> VLLMModel:
    config = llm.llm_engine.vllm_config
    thinker = config.model_config.hf_config.thinker_config
    configured = (config.model_config.try_get_generation_config() or {}).get("eos_token_id")
    eos = {llm.get_tokenizer().eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    vocab_size, logprobs = config.model_config.get_vocab_size(), config.model_config.max_logprobs
    batcher = Batcher(_LLM(llm))

    def shut() -> None:
        batcher.close()
        llm.llm_engine.engine_core.shutdown()

    return VLLMModel(
        name=name,
        ask=batcher.submit,
        shut=shut,
        eos=frozenset(eos),
        placeholder=thinker.audio_token_index,
        vocab_size=vocab_size,
        max_length=config.model_config.max_model_len,
        concurrency=config.scheduler_config.max_num_seqs,
        max_logprobs=vocab_size if logprobs < 0 else logprobs,
    )
