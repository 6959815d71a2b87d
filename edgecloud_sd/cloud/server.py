"""The cloud as an HTTP service for many edges: it opens prompts, verifies drafts and generates on one model.

Every request names the state that it relies on: an absolute base, and a check over the ids before it. A repeated,
late or misdirected request therefore changes nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, StrictInt
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from edgecloud_sd import acceptance, wire
from edgecloud_sd.cloud.admission import Admission
from edgecloud_sd.cloud.closing import ClosingGate, RunningRequests
from edgecloud_sd.cloud.engine import Engine
from edgecloud_sd.cloud.fair_queue import Completed
from edgecloud_sd.cloud.headers import parse_media_type
from edgecloud_sd.cloud.service import (
    CloudService,
    ContextMismatch,
    InvalidRequest,
    ModelOutOfMemory,
    NotFinite,
    SessionKey,
    TooLarge,
)
from edgecloud_sd.cloud.sessions import NoRoom, ServiceError, ServiceLimits, UnknownSession

MAX_RULE_LENGTH = 256  # characters, because a refusal repeats the rule
EXTRA_REQUESTS = 16  # running requests of one client beyond one per session
ERROR_STATUSES: dict[type[ServiceError], int] = {
    UnknownSession: 404,
    ContextMismatch: 409,
    TooLarge: 413,
    InvalidRequest: 422,
    NoRoom: 429,
    NotFinite: 501,
    ModelOutOfMemory: 503,
}
COMMON_STATUSES = (400, 401, 403, 408, 413, 421, 422, 429, 500, 501, 503)  # error statuses that every call can return
RETRY_STATUSES = (429, 503)
RETRY_DOCUMENT = {"headers": {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}}

TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=wire.MAX_IDS, fail_fast=True)]
Checksum = Annotated[StrictInt, Field(ge=0, lt=2**32, description="CRC-32, see `edgecloud_sd.wire`")]


class VerifyBody(BaseModel):
    """A request to verify a draft."""

    base: Annotated[StrictInt, Field(ge=0, le=wire.MAX_IDS, description="committed tokens that the cloud has already")]
    tokens: Annotated[TokenIds, Field(description="committed tokens after the base, from the prompt's last token on")]
    draft: Annotated[TokenIds, Field(description="draft tokens to verify")]
    check: Checksum


class VerdictBody(BaseModel):
    """The verdict on a draft."""

    accepted: Annotated[int, Field(description="number of draft tokens accepted")]
    token: Annotated[int, Field(description="the target's own token after them: correction or bonus")]
    rest: Annotated[list[int] | None, Field(description="the target's opinions on the draft tokens after it")] = None
    check: int


class GenerateBody(BaseModel):
    """A request to generate on the cloud alone."""

    output: Annotated[TokenIds, Field(description="tokens of the output so far")]
    eos: Annotated[TokenIds, Field(description="ids that end the output")]
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=wire.MAX_IDS)]
    check: Checksum


class OpenedBody(BaseModel):
    """The response to a prompt."""

    session: Annotated[str, Field(description="name of the open prompt in all later requests")]
    model: Annotated[str, Field(description="fingerprint of the model")]
    check: int


class Problem(BaseModel):
    """The reason for an error status."""

    detail: str
    received: Annotated[int | None, Field(description="check of the request as it arrived")] = None
    check: int


class ModelInfo(BaseModel):
    """The facts about the model that a client compares with its own side."""

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
    max_tokens: int
    max_audio_seconds: float
    max_draft: int
    fingerprint: str
    check: str


async def get_service(request: Request) -> CloudService:
    """Return the service of this application."""
    service: CloudService = request.app.state.service
    return service


async def get_client(request: Request) -> str:
    """Return the client's name, which `Admission` has put into the scope."""
    return str(request.scope["client_name"])


ServiceDependency = Annotated[CloudService, Depends(get_service)]
ClientDependency = Annotated[str, Depends(get_client)]


async def get_session_key(client: ClientDependency, session: str) -> SessionKey:
    """Return the key of the session in the path. The service looks the session up after the message is validated."""
    return SessionKey(client, session)


SessionDependency = Annotated[SessionKey, Depends(get_session_key)]


def require_media_type(request: Request, media_type: str) -> None:
    """Raise HTTPException 415 for a body of another media type."""
    if parse_media_type(request.headers.get("content-type", "")) != media_type:
        raise HTTPException(415, f"content-type: the body must be {media_type}")


async def read_octets(request: Request) -> bytes:
    """Return the body of the request. Raise HTTPException 415 for another media type than octets."""
    require_media_type(request, wire.OCTETS)
    return await request.body()


class MessageRoute(APIRoute):
    """A route with a JSON message. It refuses another media type before FastAPI, which would read some of them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handle = super().get_route_handler()

        async def handle_message(request: Request) -> Response:
            require_media_type(request, wire.JSON)
            return await handle(request)

        return handle_message


def document_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route with the common error statuses and these."""
    return {
        status: {"model": Problem} | (RETRY_DOCUMENT if status in RETRY_STATUSES else {})
        for status in (*COMMON_STATUSES, *statuses)
    }


router = APIRouter()
messages = APIRouter(route_class=MessageRoute)


@router.get("/health", openapi_extra={"security": []})
@router.get("/health/live", openapi_extra={"security": []})
async def health() -> dict[str, str]:
    """Return ok if the process answers. This call needs no key."""
    return {"status": "ok"}


@router.get("/health/ready", openapi_extra={"security": []}, responses=document_problems())
async def ready(request: Request) -> dict[str, str]:
    """Return ok if the model is loaded and the service takes calls. This call needs no key."""
    if request.app.state.requests.is_closing:
        raise HTTPException(503, "the server is shutting down", {"Retry-After": "1"})
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses=document_problems() | {200: {"content": {"text/plain": {}}}})
async def prometheus(service: ServiceDependency) -> Response:
    """Return the metrics in the format of Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/model", responses=document_problems())
async def model(service: ServiceDependency) -> ModelInfo:
    """Return the facts about the model that serves the requests."""
    return ModelInfo(**service.model_facts)


@router.post(
    "/v1/sessions",
    status_code=201,
    response_model=OpenedBody,
    responses=document_problems(404, 415),
    openapi_extra={
        "requestBody": {"required": True, "content": {wire.OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def open_prompt(
    request: Request,
    service: ServiceDependency,
    client: ClientDependency,
    body: Annotated[bytes, Depends(read_octets)],
    rule: Annotated[
        str, Query(max_length=MAX_RULE_LENGTH, description=f"acceptance rule: {', '.join(acceptance.RULE_NAMES)}")
    ],
    check: Annotated[int, Query(ge=0, lt=2**32, description="CRC-32 over rule, rest and body")],
    rest: Annotated[bool, Query(description="verdicts have opinions on the tokens after a rejected one")] = False,
) -> Response:
    """Encode the audio and prefill a prompt.

    The body is safetensors: `ids` int32 [n], and for a prompt with audio `features` float16 [mel bins, frames]. `ids`
    contains one placeholder per position of the audio encoder.
    """
    name, completed = await service.open(client, body, rule, check, rest)
    request.scope["if_unanswered"].append(partial(service.abandon, SessionKey(client, name)))
    opened = wire.build_opened_message(name, service.fingerprint, check)
    return message_response(opened, 201, timing_header(completed, check))


@messages.post("/v1/sessions/{session}/verify", response_model=VerdictBody, responses=document_problems(404, 409, 415))
async def verify(service: ServiceDependency, session: SessionDependency, message: VerifyBody) -> Response:
    """Verify a draft in one forward pass. A repeated request returns the same verdict."""
    completed = await service.verify(session, message.base, message.tokens, message.draft, message.check)
    verdict = wire.build_verdict_message(completed.result, message.check)
    return message_response(verdict, 200, timing_header(completed, message.check))


@messages.post(
    "/v1/sessions/{session}/generate",
    response_class=StreamingResponse,
    responses=document_problems(404, 409, 415)
    | {200: {"content": {wire.LINES: {}}, "description": "one line per token, and one at the end"}},
)
async def generate(service: ServiceDependency, session: SessionDependency, message: GenerateBody) -> StreamingResponse:
    """Stream the target's own greedy tokens as lines of JSON.

    Each line has `token` and `check`; the last has `end` and `check`. A stream without that last line is incomplete.
    """
    tokens = service.generate(session, message.output, message.eos, message.max_new_tokens, message.check)
    first = await anext(tokens)  # before the response starts, so that a refusal has its own status
    return TokenLines(first, tokens, message.check)


@router.delete("/v1/sessions/{session}", status_code=204, response_class=Response, responses=document_problems(404))
async def delete(service: ServiceDependency, session: SessionDependency) -> None:
    """Close a session."""
    await service.close(session)


class TokenLines(StreamingResponse):
    """A response of one line per token. It closes `tokens`, and so unlocks the session, if the client goes away."""

    def __init__(
        self, first: Completed[int | None], tokens: AsyncGenerator[Completed[int | None], None], check: int
    ) -> None:
        self._tokens = tokens
        super().__init__(self._lines(first, check), 200, timing_header(first, check), wire.LINES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, and close the tokens at its end or when the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._tokens.aclose()

    async def _lines(self, completed: Completed[int | None], check: int) -> AsyncIterator[bytes]:
        output: list[int] = []
        while completed.result is not None:
            output.append(completed.result)
            yield wire.dumps(wire.build_token_line(output, check)) + b"\n"
            try:
                completed = await anext(self._tokens)
            except ServiceError:
                return  # without the last line, from which the client sees that the stream is incomplete
        yield wire.dumps(wire.build_end_line(output, check)) + b"\n"


def message_response(message: wire.Message, status: int, headers: Mapping[str, str] | None) -> Response:
    """Return a response with a JSON message."""
    return Response(wire.dumps(message), status, headers, wire.JSON)


def timing_header(completed: Completed[Any], check: int) -> dict[str, str]:
    """Return the header with the server's time in ms. The rest of the client's time is the network's."""
    return {"Server-Timing": wire.build_timing(completed.queue_seconds, completed.run_seconds, check)}


async def refuse_request(request: Request, error: ServiceError) -> Response:
    """Return the response to a request that the service refuses."""
    status = ERROR_STATUSES[type(error)]
    headers = {"Retry-After": str(math.ceil(error.seconds))} if status in RETRY_STATUSES else None
    return _problem(request, status, str(error), headers)


async def refuse_invalid_message(request: Request, error: RequestValidationError) -> Response:
    """Return the response to a message with wrong fields.

    It does not repeat their values, which may be large or not expressible in JSON.
    """
    problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:3]]
    return _problem(request, 422, "; ".join(problems))


async def refuse_http(request: Request, error: StarletteHTTPException) -> Response:
    """Return the response to a request that no route takes."""
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"  # see CloudAPI
    return _problem(request, error.status_code, str(error.detail), headers)


def _problem(request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error. The client sees from the check of its request if the request arrived undamaged."""
    retry_after = (headers or {}).get("Retry-After", "")
    refusal = wire.build_refusal(status, detail, request.scope.get("received"), retry_after)
    return message_response(refusal, status, headers)


class CloudAPI(FastAPI):
    """An application whose OpenAPI document names the key that `Admission` requires."""

    requires_key = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. HEAD is answered as GET, and uvicorn leaves the body out."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        document = super().openapi()
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}] if self.requires_key else []
        return document


@asynccontextmanager
async def run_service(app: FastAPI) -> AsyncIterator[None]:
    """Close idle sessions while the application runs, and shut the service down at its end."""
    service: CloudService = app.state.service
    cleaning = asyncio.create_task(service.close_idle_sessions())
    yield
    cleaning.cancel()
    service.shut_down()


def create_app(
    engine: Engine, limits: ServiceLimits | None = None, keys: Sequence[str] = (), allow_remote: bool = False
) -> FastAPI:
    """Return the application that serves a model.

    Without keys, each address is one client, and everybody who can reach the server may use it. It then refuses every
    Host and Origin that is not of loopback, unless `allow_remote`.
    """
    service = CloudService(engine, limits or ServiceLimits())
    app = CloudAPI(
        title="edgecloud_sd cloud",
        description=__doc__ or "",
        version="1",
        lifespan=run_service,
        docs_url=None,  # its page would run a script of another host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.requests = RunningRequests()
    app.requires_key = bool(keys)
    app.add_middleware(
        Admission,
        keys=tuple(keys),
        only_loopback=not keys and not allow_remote,
        max_prompt_bytes=service.limits.max_prompt_bytes(service.identity.traits.mel_bins),
        max_message_bytes=service.limits.max_message_bytes,
        max_requests=service.limits.max_sessions + EXTRA_REQUESTS,
        count_response=service.metrics.count_response,
    )
    app.add_middleware(ClosingGate, requests=app.state.requests)
    app.exception_handler(ServiceError)(refuse_request)
    app.exception_handler(RequestValidationError)(refuse_invalid_message)
    app.exception_handler(StarletteHTTPException)(refuse_http)
    app.include_router(router)
    app.include_router(messages)
    return app
