"""A server that sends prepared answers, and the calls of a client against it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from edgecloud_sd import wire
from edgecloud_sd.acceptance import GREEDY, Rule
from edgecloud_sd.cloud.client import Connection, RemoteVerification, RemoteVerifier
from edgecloud_sd.events import Prompt
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.harness import Harness
from tests.support.proxy import PeerClosed, read_request
from tests.support.serving import ToyEngine

KEY = "a-key-of-sixteen-characters-or-more"
TOY = ToyEngine().identity
PROMPT = Prompt((1, 2, 3))
PROMPT_CHECK = wire.prompt_checksum(wire.encode_prompt(PROMPT), "greedy")
SIX_TOKENS = Stopping(frozenset(), 6)
OK_HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED_HEAD = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class CannedServer:
    """A server that answers the n-th request with `answer(n)`, n from 0, and closes the connection.

    If the answer is None, the server closes the connection without reading the request.
    """

    def __init__(self, answer: Callable[[int], bytes | Iterator[bytes] | None]) -> None:
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.heads: list[bytes] = []  # request heads, in order
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> CannedServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client, client.makefile("rb") as inbound, suppress(OSError, PeerClosed):
                client.settimeout(10)
                answer = self._answer(len(self.heads))
                if answer is None:
                    continue
                self.heads.append(read_request(inbound).head)
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    client.sendall(piece)
                    self.sent_bytes += len(piece)


@contextmanager
def connected(url: str, patience: float = 60.0, timeout: float = 10.0, key: str | None = KEY) -> Iterator[Connection]:
    """Yield a connection whose delays between attempts take no time."""
    connection = Connection(url, key, timeout, patience, sleep=lambda seconds: None)
    try:
        yield connection
    finally:
        connection.close()


def fetch_identity(connection: Connection) -> None:
    _ = connection.identity


def remote_verification(
    connection: Connection, rule: Rule = GREEDY, harness: Harness | None = None, wants_rest: bool = False
) -> RemoteVerification:
    """Return a verification of the prompt that records its messages, without the spans of `timed_verifier`."""
    harness = harness or Harness()
    harness.count_messages()
    return RemoteVerifier(connection, rule, harness, wants_rest).open(PROMPT)


def open_prompt(connection: Connection) -> None:
    connection.identity = TOY
    remote_verification(connection).wait()


def verify_draft(connection: Connection) -> None:
    """Verify a draft on a session that counts as open."""
    connection.identity = TOY
    verification = remote_verification(connection)
    verification._session = "open"
    verification.verify(0, [3], [1])


def generate(connection: Connection, harness: Harness | None = None) -> Iterator[int]:
    """Return the tokens of a stream on a session that counts as open."""
    connection.identity = TOY
    verification = remote_verification(connection, harness=harness)
    verification._session = "open"
    return verification.generate(SIX_TOKENS)


CALLS: dict[str, Callable[[Connection], object]] = {
    "identity": fetch_identity,
    "open": open_prompt,
    "verify": verify_draft,
    "generate": lambda connection: list(generate(connection)),
}
