"""The HTTP parser of the server, with caps on the work that a client without a key can cause."""

from __future__ import annotations

import re

import h11

PARSED_BYTES = 2**14  # at once, so that a head or trailers of twice this size are refused and not parsed
MAX_HEADERS = 100  # in a request; 4,000 block the event loop for 15 ms
FREE_CHUNKS = 16  # in a body, whatever their size
CHUNK_BYTES = 256  # on average in the other chunks; 256 KiB in chunks of a byte block the event loop for half a second
_HEAD_END = re.compile(rb"\n\r?\n")


class BoundedParser(h11.Connection):
    """The parser of one connection. It refuses a request that takes much more time to parse than its bytes are worth.

    `problem` is the reason, if it has refused one.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self.problem = ""
        self._chunks = self._body_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event. Raise RemoteProtocolError for bytes that are no HTTP or cost too much."""
        if self.their_state is h11.IDLE:
            self._check_head(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
        elif isinstance(event, h11.Data):
            self._count_chunk(event)
        return event

    def _check_head(self, data: bytes) -> None:
        end = _HEAD_END.search(data)
        if data.count(b"\n", 0, end.start() if end else len(data)) > MAX_HEADERS:
            self._refuse(f"the request has more than {MAX_HEADERS} headers")

    def _count_chunk(self, part: h11.Data) -> None:
        self._chunks += part.chunk_end
        self._body_bytes += len(part.data)
        if self._chunks > FREE_CHUNKS + self._body_bytes / CHUNK_BYTES:
            self._refuse(f"the chunks of the body have less than {CHUNK_BYTES} bytes: send larger ones, or its length")

    def _refuse(self, problem: str) -> None:
        self.problem = problem
        raise h11.RemoteProtocolError(problem)
