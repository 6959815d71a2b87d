"""Engine `vllm`: verification on vLLM, which batches the calls of many edges and spreads a model over GPUs.

Every call is stateless: it sends the whole context, and vLLM's prefix cache takes the place of a session's KV cache.
vLLM returns only the highest logits at each draft token. The verdict from these equals the verdict that
`LocalVerifier` computes from all logits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

from edgecloud_sd.acceptance import Rank, Rule, build_verdict
from edgecloud_sd.cloud.batching import Batcher, EngineRequest, SamplingOptions, Stream
from edgecloud_sd.data import prompts
from edgecloud_sd.events import Prompt, Verdict
from edgecloud_sd.models import hub
from edgecloud_sd.steps import Steps
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import check_base

MISSING_VLLM = "--engine vllm: vLLM is not installed: see edgecloud_sd/cloud/README.md, or use --engine transformers"
VLLM_DTYPES = ("float32", "float16", "bfloat16")
FIXED_ARGUMENTS = {  # engine arguments that the verdicts depend on
    "enable_prefix_caching": True,
    "enable_mm_embeds": True,  # without it, vLLM refuses a spectrogram
    "limit_mm_per_prompt": {"audio": 1, "image": 0, "video": 0},
    "logprobs_mode": "raw_logits",  # probabilities can round two logits to the same value
}

Row = Mapping[int, float]  # one position: the highest logits by token id, and the logit of its draft token


@dataclass(frozen=True)
class VLLMModel:
    """A model under vLLM. Any thread may call `submit`, which starts a request."""

    name: str
    submit: Callable[[EngineRequest, SamplingOptions], Stream]
    shut_down: Callable[[], None]
    placeholder: int  # the audio token
    vocab_size: int
    max_length: int  # tokens of prompt and output together
    concurrency: int  # the most requests in one batch
    max_logprobs: int  # the most logits per position that vLLM returns

    @property
    def max_rank(self) -> int:
        """Return the largest r of rule rank(r). One logit more than r shows if the r-th is tied."""
        return self.vocab_size if self.max_logprobs >= self.vocab_size else self.max_logprobs - 1

    def verifier(self, rule: Rule, wants_rest: bool = False) -> VLLMVerifier:
        """Return a verifier. Raise ValueError for a rule that needs more logits than vLLM returns."""
        if not isinstance(rule, Rank):
            raise ValueError(f"rule {rule.text}: needs all logits, and vLLM returns the highest: use greedy or rank(r)")
        return VLLMVerifier(self, rule, wants_rest)

    def close(self) -> None:
        """Stop the engine and its processes. Running requests raise RuntimeError."""
        self.shut_down()


@dataclass(frozen=True)
class VLLMVerifier:
    """A verifier on a model under vLLM. It raises ValueError for a rank that needs more logits than vLLM returns.

    Its verdicts have a rest if `wants_rest` is True.
    """

    model: VLLMModel
    rule: Rank
    wants_rest: bool = False

    def __post_init__(self) -> None:
        if min(self.rule.r, self.model.vocab_size) > self.model.max_rank:
            raise ValueError(
                f"rule rank({self.rule.r}): this engine has ranks up to {self.model.max_rank}: "
                f"give --engine-option max_logprobs={self.rule.r + 1} or more"
            )

    def open(self, prompt: Prompt) -> VLLMVerification:
        """Start the prefill and return at once. Raise ValueError if placeholders and frames do not match."""
        if prompt.features is not None:
            prompts.check_placeholders(prompt, self.model.placeholder)
        return VLLMVerification(self, prompt)

    def open_steps(self, prompt: Prompt) -> Steps[VLLMVerification]:
        """Open and prefill a prompt in one step: vLLM itself divides long passes between its requests."""
        yield len(prompt.ids)
        verification = self.open(prompt)
        verification.wait()
        return verification


class VLLMVerification:
    """A verification whose every request contains the whole context. It stores only the committed ids."""

    def __init__(self, verifier: VLLMVerifier, prompt: Prompt) -> None:
        self._model = verifier.model
        self._prompt = prompt
        self._rule = verifier.rule
        self._wants_rest = verifier.wants_rest
        self._base = _request(prompt, self._model.placeholder)
        self._agreed: list[int] = []
        # The prefill asks for no logits of the prompt, which would take time and memory. It leaves out the last id,
        # because the first verdict needs the logits after it, and vLLM returns none for a position in its cache.
        self._prefill = self._submit([], max_tokens=1) if len(prompt.ids) > 1 else None

    def wait(self) -> None:
        """Block until the prompt is in the prefix cache."""
        if self._prefill is not None:
            self._check(next(self._prefill), [])
            self._prefill = None

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        """Verify a draft in one request. A second one follows if ties or the prefix cache hide a logit that decides."""
        check_base(base, len(self._agreed))
        context = [*self._agreed[:base], *tokens, *draft]
        if len(context) == len(draft):
            raise ValueError(f"cannot return {len(draft) + 1} rows of a context of {len(context)} tokens")
        self.wait()
        verdict = self._verify_rows(context, draft)
        self._agreed = context[: base + len(tokens) + verdict.accepted]
        return verdict

    def verify_steps(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Steps[Verdict]:
        """Verify in one step."""
        yield len(tokens) + len(draft)
        return self.verify(base, tokens, draft)

    def feed_steps(self, output: Sequence[int]) -> Steps[None]:
        """Do nothing, because a request of `generate` contains its whole context."""
        yield from ()

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        """Yield vLLM's greedy tokens. Raise RuntimeError if the output does not fit the model's maximum length."""
        written = list(output)
        if stopping.reason(written) is not None:
            return
        self.wait()
        context = [self._prompt.last, *written]
        limit, ends = stopping.room(len(written)), sorted(stopping.eos)
        with closing(self._submit(context, max_tokens=limit, stop_token_ids=ends, stream=True)) as stream:
            for step in stream:
                for token in self._check(step, context).outputs[0].token_ids:
                    written.append(token)
                    yield token
        if stopping.reason(written) is None:
            raise RuntimeError(
                f"prompt and output need more than the maximum length of vLLM, {self._model.max_length} tokens"
            )

    def close(self) -> None:
        """Cancel a prefill that is still running. vLLM frees the prefix cache itself."""
        if self._prefill is not None:
            self._prefill.close()

    def _verify_rows(self, context: Sequence[int], draft: Sequence[int]) -> Verdict:
        max_width = min(self._model.max_logprobs, self._model.vocab_size)
        width = min(self._rule.r + 1, max_width)
        while True:
            rows = self._logits(context, len(draft), width)
            known = width if width < self._model.vocab_size else None
            verdict = verify_rows(draft, rows, self._rule.r, known, self._wants_rest)
            if verdict is not None:
                return verdict
            if width == max_width:
                raise RuntimeError(
                    f"more than {max_width} tokens are tied at rank {self._rule.r}: "
                    f"give --engine-option max_logprobs={2 * max_width} or more"
                )
            width = min(2 * width, max_width)

    def _logits(self, context: Sequence[int], count: int, width: int) -> list[Row]:
        """Return the `width` highest logits at each of the last `count` ids of `context`, and at the next position."""
        draft_logits = {"prompt_logprobs": width} if count else {}
        for use_cache in (True, False):
            stream = self._submit(
                context,
                max_tokens=1,
                logprobs=width,
                flat_logprobs=True,
                skip_reading_prefix_cache=not use_cache,  # vLLM skips it by default if a request asks for logits
                **draft_logits,
            )
            output = self._check(next(stream), context)
            # vLLM does not compute the positions in its cache: their rows contain arbitrary values.
            if (output.num_cached_tokens or 0) < self._length(context) - count:
                break
        rows = [*(output.prompt_logprobs[position] for position in range(-count, 0)), output.outputs[0].logprobs[0]]
        return [{token: entry.logprob for token, entry in row.items()} for row in rows]

    def _submit(self, context: Sequence[int], **options: Any) -> Stream:
        ids = [*self._base["prompt_token_ids"], *context]
        fixed = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}
        return self._model.submit({**self._base, "prompt_token_ids": ids}, {**fixed, **options})

    def _check(self, output: Any, context: Sequence[int]) -> Any:
        """Return `output`. Raise RuntimeError if it belongs to another context or is incomplete."""
        if len(output.prompt_token_ids) != self._length(context):
            raise RuntimeError(f"vLLM read {len(output.prompt_token_ids)} tokens, not {self._length(context)}")
        if output.outputs[0].finish_reason not in (None, "length", "stop"):
            raise RuntimeError(f"vLLM ended a request early: {output.outputs[0].finish_reason}")
        return output

    def _length(self, context: Sequence[int]) -> int:
        return len(self._prompt.ids) - 1 + len(context)


def verify_rows(
    draft: Sequence[int], rows: Sequence[Row], r: int, width: int | None, wants_rest: bool = False
) -> Verdict | None:
    """Return the verdict of rule rank(r) from the highest logits alone, or None if ties leave it open.

    Each of the len(draft) + 1 rows has the `width` > r highest logits of its position, or all if `width` is None.
    Equal logits rank by their ids, as in argmax. Ties at the lowest of the `width` logits may go on beyond the row:
    then more logits decide. Rows after a rejected token are read for the rest alone. Raise FloatingPointError for a
    logit that is not finite.
    """
    accepts: list[bool] = []
    best: list[int] = []  # at a place with an accepted token, ties may go on beyond the row, so any of them
    for token, row in zip([*draft, None], rows, strict=True):
        if False in accepts and (token is None or not wants_rest):
            break
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(
                "the model gave logits that are not finite: choose --dtype float32, or if it is that already, "
                "check the checkpoint and the audio"
            )
        # Tokens outside the row have at most the lowest of its logits, and may be tied with it.
        lowest = -math.inf if width is None else sorted(row.values(), reverse=True)[width - 1]
        is_accepted = False if token is None else _is_among(row, token, r, lowest)
        top = max(row.values())
        if is_accepted is None or (not is_accepted and top == lowest):
            return None
        accepts.append(is_accepted)
        best.append(min(other for other in row if row[other] == top))
    return build_verdict(draft, accepts, best)


def _is_among(row: Row, token: int, r: int, lowest: float) -> bool | None:
    """Return whether `token` is one of the r most likely, or None if that depends on ids tied with `lowest`."""
    token_logit = row[token]
    higher = sum(logit > token_logit for logit in row.values())
    if higher >= r:
        return False
    if token_logit == lowest:
        return None
    return higher + sum(other < token and logit == token_logit for other, logit in row.items()) < r


def collapse(ids: Sequence[int], placeholder: int) -> list[int]:
    """Return `ids` with one placeholder for each run of them, which vLLM expands again to the length of the audio."""
    return [token for before, token in zip((None, *ids), ids, strict=False) if not before == token == placeholder]


def _request(prompt: Prompt, placeholder: int) -> dict[str, Any]:
    """Return a request without its context: the prompt but for its last id, the spectrogram, and the session's salt."""
    base: dict[str, Any] = {"prompt_token_ids": list(prompt.ids[:-1]), "cache_salt": secrets.token_hex(8)}
    if prompt.features is None:
        return base
    import torch

    frames = prompt.features.shape[1]
    audio = {
        "input_audio_features": prompt.features,
        "audio_feature_lengths": torch.tensor([frames]),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),  # unused, but vLLM 0.32 fails without it
    }
    return {
        **base,
        "prompt_token_ids": collapse(prompt.ids[:-1], placeholder),
        "multi_modal_data": {"audio": audio},
        "multi_modal_uuids": {"audio": [base["cache_salt"]]},  # so that vLLM does not hash the spectrogram
    }


class _LLM:
    """An adapter from vLLM's `LLM` to `LLMEngine`."""

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
    """Load a whole Qwen2.5-Omni checkpoint, a folder or a name on the hub, under vLLM.

    `flags` are vLLM's engine arguments by their names in Python, for example tensor_parallel_size. Raise ValueError
    if vLLM is not installed or does not have a dtype or flag. Raise OSError for a checkpoint that it cannot load.
    """
    if dtype not in VLLM_DTYPES:
        raise ValueError(f"--dtype: {dtype} does not work with --engine vllm: use one of {', '.join(VLLM_DTYPES)}")
    try:
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:  # the last two if its libraries do not fit
        raise ValueError(f"{MISSING_VLLM} ({error})") from error
    arguments = dict(flags or {})
    allowed = {field.name for field in fields(EngineArgs)} - {"model", "dtype", *FIXED_ARGUMENTS}
    if unknown := sorted(arguments.keys() - allowed):
        raise ValueError(f"--engine-option: {unknown[0]} is not an engine argument of vLLM that may be set here")
    defaults = {
        "enforce_eager": current_platform.is_cpu(),
        "max_logprobs": 128,
        "mm_processor_cache_gb": 1,  # for spectrograms, which no later session uses
        "seed": 0,
    }
    try:
        model = _model(checkpoint, LLM(checkpoint, dtype=dtype, **{**defaults, **arguments, **FIXED_ARGUMENTS}))
        # vLLM compiles when a request first asks for logits, so ask here and not while an edge waits.
        model.verifier(Rank(1)).open(Prompt((0, 0))).verify(0, [0], [0])
    except (OSError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        reason = hub.explain_hub_error(error) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"checkpoint {checkpoint!r} cannot be loaded by vLLM: {reason}") from error
    return model


def _model(name: str, llm: Any) -> VLLMModel:
    config = llm.llm_engine.vllm_config
    thinker = config.model_config.hf_config.thinker_config
    vocab_size, logprobs = config.model_config.get_vocab_size(), config.model_config.max_logprobs
    batcher = Batcher(_LLM(llm))

    def shut_down() -> None:
        batcher.close()
        llm.llm_engine.engine_core.shutdown()

    return VLLMModel(
        name=name,
        submit=batcher.submit,
        shut_down=shut_down,
        placeholder=thinker.audio_token_index,
        vocab_size=vocab_size,
        max_length=config.model_config.max_model_len,
        concurrency=config.scheduler_config.max_num_seqs,
        max_logprobs=vocab_size if logprobs < 0 else logprobs,
    )
