"""The cloud as a service: prompts are opened, drafts verified, captions written, for many edges on one model.

Every request names what it counts on (an absolute base, and a check over the ids before it), so that a repeated, late
or misdirected one changes nothing that anybody relies on. Everything a client sends is checked before the model runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, Field, StrictInt
from starlette.types import Receive, Scope, Send

from edgecloud_sd import acceptance, wire
from edgecloud_sd import events as records
from edgecloud_sd.cloud.admission import Admission
from edgecloud_sd.cloud.engine import Engine
from edgecloud_sd.cloud.fair_queue import Completed, FairQueue
from edgecloud_sd.cloud.sessions import FRAMES_A_SECOND, NoRoom, OpenSession, ServiceLimits, SessionClosed, Sessions
from edgecloud_sd.data import prompts
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.verifier import Verification

_logger = logging.getLogger(__name__)
MAX_RULE = 256  # characters: a refusal repeats them
RULES = ", ".join(acceptance.RULE_NAMES)
MORE_REQUESTS = 16  # of one client at once, beside one for each session
PROBLEMS = (400, 401, 408, 413, 422, 429, 500, 503)  # statuses that every call may have
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # s

TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(max_length=wire.MAX_IDS, fail_fast=True)]
Check = Annotated[StrictInt, Field(ge=0, lt=2**32, description="CRC-32, see `edgecloud_sd.wire`")]


class VerifyRequest(BaseModel):
    base: Annotated[StrictInt, Field(ge=0, le=wire.MAX_IDS, description="tokens that the cloud holds already")]
    tokens: Annotated[Ids, Field(description="committed since then, the prompt's last token first of all")]
    draft: Annotated[Ids, Field(description="to be judged")]
    check: Check


class VerdictMessage(BaseModel):
    accepted: Annotated[int, Field(description="draft tokens kept")]
    token: Annotated[int, Field(description="the cloud's own for the place after them")]
    check: int


class GenerateRequest(BaseModel):
    output: Annotated[Ids, Field(description="written already")]
    eos: Annotated[Ids, Field(description="ids that end the caption")]
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=wire.MAX_IDS)]
    check: Check


class OpenedMessage(BaseModel):
    session: Annotated[str, Field(description="names the open prompt in all that follows")]
    model: Annotated[str, Field(description="fingerprint of the model")]
    check: int


class Problem(BaseModel):
    detail: str


class ModelInfo(BaseModel):
    """What a client compares with its own side."""

    name: str
    engine: str
    dtype: str
    device: str
    vocab_size: int
    max_length: int
    max_rank: int
    synthetic: bool
    traits: dict[str, Any]
    weights: str
    fingerprint: str
    max_audio_seconds: float


class Metrics:
    """What Prometheus reads, of one server."""

    def __init__(self, sessions: Sessions) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        of = partial(Counter, registry=self.registry)
        self.requests = of("edgecloud_requests", "requests answered", ["call", "status"])
        self.drafted = of("edgecloud_draft_tokens", "draft tokens judged")
        self.accepted = of("edgecloud_accepted_tokens", "draft tokens kept")
        self.written = of("edgecloud_written_tokens", "tokens of the cloud's own captions")
        self.evicted = of("edgecloud_sessions_evicted", "sessions closed by the server", ["why"])
        self.seconds = Histogram(
            "edgecloud_seconds", "time of a call", ["call", "what"], registry=self.registry, buckets=BUCKETS
        )
        held = Gauge("edgecloud_sessions", "sessions open", registry=self.registry)
        held.set_function(lambda: len(sessions))

    def answered(self, call: str, status: int) -> None:
        self.requests.labels(call, status).inc()

    def ran(self, call: str, ran: Completed[Any]) -> None:
        self.seconds.labels(call, "queue").observe(ran.queued)
        self.seconds.labels(call, "model").observe(ran.took)


def create_app(engine: Engine, limits: ServiceLimits | None = None, keys: Sequence[str] = ()) -> FastAPI:
    """The service. Without keys whoever can reach it may use it, each address as one client."""
    limits = limits or ServiceLimits()
    identity = engine.identity
    traits, fingerprint = identity.traits, identity.fingerprint
    sessions = Sessions(limits.max_sessions, limits.idle_timeout)
    turns = FairQueue(engine.concurrency)
    metrics = Metrics(sessions)
    most = min(identity.max_length, limits.max_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        cleaning = asyncio.create_task(clean())
        yield
        cleaning.cancel()
        turns.close()
        engine.close()

    async def clean() -> None:
        while True:
            await asyncio.sleep(min(max(limits.idle_timeout / 4, 0.05), 60.0))
            for held in sessions.idle():
                await close(held, held.owner, "idle")

    async def close(held: OpenSession, by: str, why: str = "") -> None:
        """In the turn of the client `by`, for whom it is done."""
        sessions.drop(held)
        if why:
            metrics.evicted.labels(why).inc()
        try:
            await turns.run(by, held.close)
        except Exception:
            _logger.exception("a session could not be closed")

    app = Service(
        title="edgecloud_sd cloud",
        description=__doc__ or "",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.keyed = bool(keys)
    app.add_middleware(
        Admission,
        keys=tuple(keys),
        largest_prompt=limits.largest_prompt(traits.mel_bins),
        largest_message=wire.MAX_MESSAGE,
        at_once=limits.max_sessions + MORE_REQUESTS,
        answered=metrics.answered,
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # what was sent is not sent back: it may be large, or nothing that JSON can hold
        found = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3]]
        return JSONResponse({"detail": "; ".join(found)}, 422)

    def held_by(request: Request, session: str) -> OpenSession:
        try:
            return sessions.get(client(request), session)
        except KeyError:
            raise gone() from None

    def refuse_ids(ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < identity.vocab_size:
            raise HTTPException(422, f"token ids must be below {identity.vocab_size}")

    def refuse_length(tokens: int) -> None:
        if tokens > most:
            raise HTTPException(
                413, f"{tokens} tokens are more than the {most} of a prompt and its caption (--max-tokens)"
            )

    def refuse_prompt(prompt: records.Prompt) -> None:
        refuse_length(len(prompt.ids))
        refuse_ids(prompt.ids)
        if prompt.features is not None:
            bins, frames = prompt.features.shape
            if bins != traits.mel_bins:
                raise HTTPException(422, f"features must have {traits.mel_bins} mel bins, not {bins}")
            if frames > limits.max_frames:
                most_seconds = f"at most {limits.max_audio_seconds:g} s (--max-audio-seconds)"
                raise HTTPException(413, f"{frames / FRAMES_A_SECOND:g} s of audio, {most_seconds}")
        try:
            prompts.check_placeholders(prompt, traits.audio_token)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if prompt.ids[-1] == traits.audio_token:
            raise HTTPException(422, "the last of the ids must be text")

    async def run(call: str, held: OpenSession, what: Callable[[], Any]) -> Completed[Any]:
        """Model code, in its client's turn. Where that fails in the middle, half of a pass may be in the session's
        cache: the session goes."""
        try:
            ran = await turns.run(held.owner, what)
        except SessionClosed:
            raise gone() from None
        except Exception as error:
            await close(held, held.owner, "failed")
            if isinstance(error, FloatingPointError):
                raise HTTPException(422, str(error)) from None
            if out_of_memory(error):
                _logger.warning("%s: out of memory", call)
                raise HTTPException(503, "the model is out of memory", {"Retry-After": "1"}) from None
            raise
        metrics.ran(call, ran)
        return ran

    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in PROBLEMS}

    @app.get("/health", openapi_extra={"security": []})
    async def health() -> dict[str, str]:
        """Whether the server answers. Needs no key."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses=problems | {200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/model", responses=problems)
    async def model() -> ModelInfo:
        """Which model answers."""
        return ModelInfo(**asdict(identity), fingerprint=fingerprint, max_audio_seconds=limits.max_audio_seconds)

    on_session = problems | {404: {"model": Problem}, 409: {"model": Problem}}
    body = {
        "requestBody": {"required": True, "content": {wire.OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
    }

    @app.post(
        "/v1/sessions",
        status_code=201,
        response_model=OpenedMessage,
        responses=problems | {404: {"model": Problem}, 415: {"model": Problem}},
        openapi_extra=body,
    )
    async def open_prompt(
        request: Request,
        rule: Annotated[str, Query(max_length=MAX_RULE, description=f"what is kept of a draft: {RULES}")],
        check: Annotated[int, Query(ge=0, lt=2**32, description="CRC-32 of the body, begun with that of rule")],
    ) -> Response:
        """Encode the audio and prefill a prompt. The body is safetensors: `ids` int32 [n], and `features` float16
        [mel bins, frames] where there is audio, of which `ids` hold one placeholder for each encoder position."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != wire.OCTETS:
            raise HTTPException(415, f"the body must be {wire.OCTETS}")
        sent = await request.body()
        if wire.prompt_checksum(sent, rule) != check:
            raise HTTPException(422, "body and rule do not match their check")
        try:
            judges = acceptance.parse_rule(rule)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if refusal := identity.refusal(judges):
            raise HTTPException(422, refusal)
        try:
            prompt = wire.decode_prompt(sent)
        except wire.WireError as error:
            raise HTTPException(422, f"the body {error}") from None
        refuse_prompt(prompt)
        held = OpenSession(client(request), check, len(prompt.ids))
        async with held.lock:
            try:
                out = sessions.add(held)
            except NoRoom as error:
                raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
            if out:
                await close(out, held.owner, "room")
            begin = partial(engine.verifier(judges).open, prompt)
            ran = await run("open", held, partial(held.open, begin))
        return answer(wire.build_opened_message(held.name, fingerprint, check), 201, ran)

    @app.post("/v1/sessions/{session}/verify", response_model=VerdictMessage, responses=on_session)
    async def verify(request: Request, session: str, asked: VerifyRequest) -> Response:
        """Judge a draft in one forward pass. A repeated request gives the same verdict."""
        held = held_by(request, session)
        refuse_ids(asked.tokens)
        refuse_ids(asked.draft)
        async with held.lock:
            context = held.context[: asked.base] + asked.tokens
            if asked.base > len(held.context) or wire.checksum(context + asked.draft, held.begun) != asked.check:
                raise HTTPException(409, f"{len(held.context)} tokens are held here, and not those that are counted on")
            if not context:
                raise HTTPException(422, "nothing to judge after: send the prompt's last token first")
            refuse_length(held.prompt_tokens + len(context) + len(asked.draft))

            def judge(verification: Verification) -> records.Verdict:
                return verification.verify(asked.base, asked.tokens, asked.draft)

            ran = await run("verify", held, partial(held.call, judge))
            held.context = context + asked.draft[: ran.result.accepted]
        metrics.drafted.inc(len(asked.draft))
        metrics.accepted.inc(ran.result.accepted)
        return answer(wire.build_verdict_message(ran.result, asked.check), 200, ran)

    @app.post(
        "/v1/sessions/{session}/generate",
        response_class=StreamingResponse,
        responses=on_session
        | {200: {"content": {wire.LINES: {}}, "description": "one line a token, and one at the end"}},
    )
    async def generate(request: Request, session: str, asked: GenerateRequest) -> StreamingResponse:
        """The cloud's own greedy tokens, streamed: JSON objects with `token` and `check`, then one with `end`. A stream
        without that one was cut short."""
        held = held_by(request, session)
        refuse_ids(asked.output)
        refuse_ids(asked.eos)
        if wire.checksum((*asked.output, *asked.eos, asked.max_new_tokens), held.begun) != asked.check:
            raise HTTPException(409, "the request does not match its check")
        refuse_length(held.prompt_tokens + asked.max_new_tokens)
        stopping = Stopping(frozenset(asked.eos), asked.max_new_tokens)

        async def lines() -> AsyncGenerator[tuple[bytes, Completed[Any]], None]:
            async with held.lock:
                held.context = []  # what follows is not agreed upon
                tokens: Iterator[int] | None = None

                def step(verification: Verification) -> int | None:
                    nonlocal tokens
                    tokens = tokens or verification.generate(stopping, asked.output)
                    return next(tokens, None)

                written: list[int] = []
                while (ran := await run("generate", held, partial(held.call, step))).result is not None:
                    written.append(ran.result)
                    metrics.written.inc()
                    yield wire.dumps(wire.build_token_line(written, asked.check)) + b"\n", ran
                yield wire.dumps(wire.build_end_line(written, asked.check)) + b"\n", ran

        begun = lines()
        first, ran = await anext(begun)  # what fails before there is one has its own status
        return Lines(first, ran, begun)

    @app.delete(
        "/v1/sessions/{session}",
        status_code=204,
        response_class=Response,
        responses=problems | {404: {"model": Problem}},
    )
    async def delete(request: Request, session: str) -> None:
        """Close a session."""
        held = held_by(request, session)
        async with held.lock:
            if held.gone:
                raise gone()
            await close(held, held.owner)

    return app


class Service(FastAPI):
    """Tells in its document of the key that the guard asks for."""

    keyed = False

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}] if self.keyed else []
        return document


class Lines(StreamingResponse):
    """An answer that has begun. Whoever goes away in the middle of it leaves nothing behind: no lock, no turn."""

    def __init__(
        self, first: bytes, ran: Completed[Any], rest: AsyncGenerator[tuple[bytes, Completed[Any]], None]
    ) -> None:
        async def every() -> AsyncIterator[bytes]:
            yield first
            with suppress(HTTPException):  # without its last line the client knows that there is more
                async for line, _ in rest:
                    yield line

        self._rest = rest
        super().__init__(every(), 200, timing(ran), wire.LINES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()


def client(request: Request) -> str:
    """Who asks, as the guard has found."""
    return str(request.scope["client_name"])


def gone() -> HTTPException:
    """The same for a session that never was, that went, and that is another client's."""
    return HTTPException(404, "no such session: open the prompt anew")


def out_of_memory(error: Exception) -> bool:
    from torch import OutOfMemoryError

    # on a CPU torch says it in words
    return isinstance(error, MemoryError | OutOfMemoryError) or "can't allocate memory" in str(error)


def answer(message: wire.Message, status: int, ran: Completed[Any]) -> Response:
    return Response(wire.dumps(message), status, timing(ran), wire.JSON)


def timing(ran: Completed[Any]) -> dict[str, str]:
    """The time it took, in ms: what is left of the client's own is the network's."""
    return {"Server-Timing": f"queue;dur={1e3 * ran.queued:.3f},model;dur={1e3 * ran.took:.3f}"}
