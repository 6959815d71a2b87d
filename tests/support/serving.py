"""The cloud's server in a thread of the test process, on a toy model that a test may replace."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.types import ASGIApp

from edgecloud_sd.acceptance import Rule
from edgecloud_sd.cloud.connections import ConnectionLimits, OpenConnections, ServerConfig
from edgecloud_sd.cloud.engine import Engine
from edgecloud_sd.cloud.identity import Identity
from edgecloud_sd.cloud.server import create_app
from edgecloud_sd.cloud.sessions import ServiceLimits
from edgecloud_sd.models.traits import TOKENIZER_PARTS, Traits
from edgecloud_sd.session import Model
from edgecloud_sd.verifier import LocalVerifier, SteppedVerifier
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

AUDIO_TOKEN = 10**6  # outside the vocabulary, because prompts of toy models are text


TOY_TRAITS = Traits(
    **dict.fromkeys(TOKENIZER_PARTS, "toy"),
    eos=(),
    audio_token=AUDIO_TOKEN,
    audio_bos=AUDIO_TOKEN,
    audio_eos=AUDIO_TOKEN,
    sampling_rate=16_000,
    mel_bins=8,
    mel_filters="toy",
    hop_length=160,
    n_fft=400,
    max_samples=4_800_000,
    padding_value=0.0,
    dither=0.0,
)


@dataclass
class ToyEngine:
    """An engine that serves its current `model` under an identity that does not change."""

    model: Model = field(default_factory=lambda: ToyModel(random_table(VOCABULARY, 0), frozenset()))
    name: str = "toy"
    concurrency: int = 1
    vocab_size: int = VOCABULARY
    max_length: int = 4096
    max_rank: int = VOCABULARY
    synthetic: bool = True
    closed: bool = False

    @property
    def identity(self) -> Identity:
        return Identity(
            self.name,
            "toy",
            "float64",
            "cpu",
            self.vocab_size,
            self.max_length,
            max_rank=self.max_rank,
            traits=TOY_TRAITS,
            synthetic=self.synthetic,
        )

    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> SteppedVerifier:
        return LocalVerifier(self.model, rule, wants_rest=wants_rest)

    def close(self) -> None:
        self.closed = True


@contextmanager
def served(engine: Engine, limits: ServiceLimits | None = None, keys: Sequence[str] = ()) -> Iterator[str]:
    """Yield the URL of a server on loopback, and stop the server at the end."""
    with running_server(create_app(engine, limits, keys)) as (url, _):
        yield url


@contextmanager
def running_server(app: ASGIApp, limits: ConnectionLimits | None = None) -> Iterator[tuple[str, OpenConnections]]:
    """Yield the URL of a server of an application, and the server's connections."""
    # asyncio turns Nagle's algorithm off only if the protocol is named, as in `cloud.__main__.open_socket`.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    config = ServerConfig(app, limits, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        listening.listen(1024)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", config.open_connections
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
