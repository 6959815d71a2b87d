"""Batches for vLLM: many threads submit requests, and one thread steps the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, Protocol

EngineRequest = Mapping[str, Any]  # vLLM's dict of a prompt
SamplingOptions = Mapping[str, Any]  # arguments of vLLM's SamplingParams, and `stream` for one output per step


class LLMEngine(Protocol):
    """The part of vLLM's `LLMEngine` that the batcher uses. It is not thread-safe.

    Outputs are vLLM's `RequestOutput`.
    """

    def add_request(self, request_id: str, prompt: EngineRequest, params: SamplingOptions) -> object:
        """Add a request to the next batch."""

    def abort_request(self, request_ids: list[str]) -> None:
        """Drop these requests."""

    def has_unfinished_requests(self) -> bool:
        """Return whether a step has work."""

    def step(self) -> list[Any]:
        """Run one step of all requests and return its outputs."""


class Stream:
    """The outputs of one request, for one thread. After an error, every further call raises the error again."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._outputs: SimpleQueue[Any] = SimpleQueue()
        self._end: BaseException | None = None

    def put(self, item: Any) -> None:
        """Add an output, or the exception that ends the request."""
        self._outputs.put(item)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._end is None:
            item = self._outputs.get()
            if not isinstance(item, BaseException):
                self._end = StopIteration() if item.finished else None
                return item
            self._end = item
        raise self._end

    def close(self) -> None:
        """Cancel the request, unless it has ended."""
        if self._end is None:
            self._cancel()


class Batcher:
    """A thread that steps an engine while it has work, with the requests of any number of other threads.

    Requests join the batch between two steps. Only the batcher's thread may use the engine until `close` returns.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._request_ids = map(str, itertools.count())
        self._changed = Condition()  # guards the fields below
        self._orders: list[Callable[[], object]] = []  # calls for the batcher's thread
        self._streams: dict[str, Stream] = {}  # key: request id
        self._is_closing = False
        self._end_reason: str | None = None
        self._thread = Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, options: SamplingOptions) -> Stream:
        """Return the stream of a request at once.

        This call or the stream raises RuntimeError if the engine is closed or has died. If vLLM refuses the request,
        only its own stream raises vLLM's error.
        """
        with self._changed:
            if self._end_reason is not None:
                raise RuntimeError(self._end_reason)
            request_id = next(self._request_ids)
            stream = self._streams[request_id] = Stream(partial(self._order, partial(self._abort, request_id)))
            self._order(partial(self._add, request_id, request, options))
        return stream

    def close(self) -> None:
        """End all running requests and join the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _order(self, order: Callable[[], object]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def _run(self) -> None:
        reason, cause = "vLLM's engine is closed", None
        try:
            while self._step():
                pass
        except BaseException as error:  # noqa: BLE001 -- the thread has no caller: the waiting streams get the error
            reason, cause = f"vLLM's engine died: {type(error).__name__}: {error}", error
        with self._changed:
            self._end_reason = reason
            waiting = list(self._streams.values())
        for stream in waiting:
            failure = RuntimeError(reason)
            failure.__cause__ = cause
            stream.put(failure)

    def _step(self) -> bool:
        """Run one step of the engine with all requests so far, and return False if the batcher is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._streams or self._is_closing)
            if self._is_closing:
                return False
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        if self._engine.has_unfinished_requests():  # a step without requests would block forever
            for output in self._engine.step():
                self._deliver(output.request_id, output, output.finished)
        return True

    def _add(self, request_id: str, request: EngineRequest, options: SamplingOptions) -> None:
        try:
            self._engine.add_request(request_id, request, options)
        except Exception as error:  # noqa: BLE001 -- the error belongs to this request: its own stream raises it
            self._deliver(request_id, error, is_last=True)

    def _abort(self, request_id: str) -> None:
        with self._changed:
            stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._engine.abort_request([request_id])

    def _deliver(self, request_id: str, item: Any, is_last: bool) -> None:
        with self._changed:
            stream = self._streams.pop(request_id, None) if is_last else self._streams.get(request_id)
        if stream is not None:  # None if the request was cancelled
            stream.put(item)
