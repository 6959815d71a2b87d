"""The client's promises one by one: against a real server, and against whatever else may answer at its URL."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from edgecloud_sd import gate, wire
from edgecloud_sd.acceptance import GREEDY, Rank, Rule, Synthetic
from edgecloud_sd.cloud.client import Connection, RemoteVerification
from edgecloud_sd.cloud.retry import FIRST_DELAY, LONGEST_DELAY, Refused
from edgecloud_sd.cloud.transport import LARGEST_ANSWER, parse_server_timing
from edgecloud_sd.decoder import Decoding, decode
from edgecloud_sd.events import Degraded, Prompt, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, LocalVerifier
from tests.support.proxy import ERRORS, Fault, Gone, Proxy, framed, read_request, said
from tests.support.serving import ToyEngine, served
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

pytestmark = pytest.mark.slow

KEY = "a key of sixteen characters or more".replace(" ", "-")
MODEL = ToyModel(random_table(VOCABULARY, 0), frozenset())
PROMPT = Prompt((1, 2, 3))
ALL = Stopping(frozenset(), 6)
BEGUN = wire.prompt_checksum(wire.encode_prompt(PROMPT), "greedy")
SHORT = 0.15  # s, of requests that are meant to be too late


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(ToyEngine(MODEL), keys=[KEY]) as url:
        yield url


@pytest.fixture(scope="module")
def shared(url: str) -> Iterator[Proxy]:
    with Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared: Proxy) -> Proxy:
    """Harming nothing yet."""
    shared.plan(())
    return shared


@contextmanager
def connected(url: str, patience: float = 60.0, timeout: float = 10.0, key: str | None = KEY) -> Iterator[Connection]:
    connection = Connection(url, key, timeout, patience, sleep=lambda seconds: None)
    try:
        yield connection
    finally:
        connection.close()


def opened(connection: Connection, rule: Rule = GREEDY, stage: Harness | None = None) -> RemoteVerification:
    verification = connection.verifier(rule, stage or Harness(far=True)).open(PROMPT)
    verification.wait()
    return verification


def right(output: tuple[int, ...] = (), stopping: Stopping = ALL) -> list[int]:
    """What the cloud writes after `output`."""
    return list(LocalVerifier(MODEL, GREEDY).open(PROMPT).generate(stopping, output))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cloud",
        "cloud:8700",
        "ftp://cloud",
        "http://",
        "http://:8700",
        "http://cloud:port",
        "http://cloud:99999",
        "http://[::1",
        "http://a..b",
        "http://cloud/a path",
        "http://cloud/\n",
        "http://name:password@cloud",
        "http://cloud?key=1",
        "http://cloud#there",
    ],
)
def test_what_is_no_url_is_said_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="is not a URL|user name or password"):
        Connection(text)


@pytest.mark.parametrize(
    ("text", "host", "target"),
    [
        ("http://127.0.0.1:{port}", "127.0.0.1:{port}", "/v1/model"),
        ("http://127.0.0.1:{port}/", "127.0.0.1:{port}", "/v1/model"),
        ("http://localhost:{port}/behind/a/proxy", "localhost:{port}", "/behind/a/proxy/v1/model"),
    ],
)
def test_paths_go_behind_what_the_url_holds(text: str, host: str, target: str) -> None:
    with Canned(lambda heard: said(404, b"")) as other, connected(text.format(port=other.port), key=None) as connection:
        with pytest.raises(Refused):
            _ = connection.remote
        (head,) = other.heads
    assert head.startswith(f"GET {target} HTTP/1.1\r\n".encode())
    assert f"\r\nHost: {host.format(port=other.port)}\r\n".encode() in head


@pytest.mark.parametrize("key", [None, "another-key-of-sixteen-characters"])
def test_a_wrong_key_is_refused_and_the_option_named(url: str, key: str | None) -> None:
    with connected(url, key=key) as connection, pytest.raises(Refused, match=r"401.*--cloud-key-file"):
        _ = connection.remote


def test_what_a_server_says_of_itself(url: str) -> None:
    identity = ToyEngine().identity
    with connected(url) as connection:
        found = connection.remote
    assert found == identity
    assert found.fingerprint == identity.fingerprint


def test_a_rank_that_the_engine_cannot_judge_by_is_refused(url: str) -> None:
    with connected(url) as connection, pytest.raises(Refused, match="by rank 7 at most, not 8"):
        connection.verifier(Rank(8), Harness())


def test_a_synthetic_rule_that_the_engine_cannot_judge_by_is_refused_at_once() -> None:
    with served(ToyEngine(synthetic=False), keys=(KEY,)) as url, connected(url) as connection:
        with pytest.raises(Refused, match=r"judges by greedy and rank\(r\) alone, not by synthetic\(0\.9/0\.8\)"):
            connection.verifier(Synthetic((0.9, 0.8)), Harness())
        assert opened(connection, Rank(3)).verify(0, [3], []).accepted == 0


@pytest.mark.parametrize("rule", [Rank(3), Synthetic((0.6,)), Synthetic((0.9, 0.5, 0.1))])
def test_a_rule_crosses_whole(url: str, rule: Rule) -> None:
    local = LocalVerifier(MODEL, rule).open(PROMPT)
    with connected(url) as connection:
        remote = opened(connection, rule)
        context, told = [PROMPT.last], 0
        for _ in range(20):
            verdict = remote.verify(told, context[told:], [1, 2, 3])
            assert verdict == local.verify(told, context[told:], [1, 2, 3])
            told = len(context) + verdict.accepted
            context += [*[1, 2, 3][: verdict.accepted], verdict.token]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"name":"another service"}', b"\xff\xfe", b"[" * 50_000])
def test_another_service_is_told_from_a_cloud(body: bytes) -> None:
    with (
        Canned(lambda heard: said(200, body)) as other,
        connected(other.url, patience=0.2) as connection,
        pytest.raises(CloudFault, match="is not an edgecloud_sd cloud of this version"),
    ):
        _ = connection.remote


def test_a_service_without_such_a_path_is_refused_at_once() -> None:
    with Canned(lambda heard: said(404, b"<html>")) as other, connected(other.url) as connection:
        with pytest.raises(Refused, match="is not an edgecloud_sd cloud of this version"):
            _ = connection.remote
        assert len(other.heads) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_answer_to_who_it_is_is_asked_for_again(proxy: Proxy, seed: int) -> None:
    with connected(proxy.url) as connection:
        proxy.plan([Fault.DIGIT], seed)
        assert connection.remote.fingerprint == ToyEngine().identity.fingerprint


def test_another_model_after_a_restart_is_refused(url: str) -> None:
    with (
        served(ToyEngine(MODEL, name="other"), keys=[KEY]) as other,
        Proxy(url) as proxy,
        connected(proxy.url) as connection,
    ):
        verification = opened(connection)
        verdict = verification.verify(0, [3], [1])
        proxy.move(other)
        proxy.drop()
        with pytest.raises(Refused, match="another model than when this run began"):
            verification.verify(1 + verdict.accepted, [verdict.token], [1])


@pytest.mark.parametrize(
    ("header", "queue", "model"),
    [
        ("", 0, 0),
        ("queue;dur=1.500,model;dur=250.000", 0.0015, 0.25),
        ("model;dur=250", 0, 0.25),
        (" model;dur=250 , queue;dur=0", 0, 0.25),
        ("queue;dur=nan,model;dur=inf", 0, 0),
        ("queue;dur=-5,model;dur=-1e9", 0, 0),
        ("queue;dur=1e99,model;dur=400", 0.6, 0.4),
        ("queue;dur=400,model;dur=1e99", 0, 1),
        ("queue;dur=700,model;dur=700", 0.3, 0.7),
        ("queue;dur=x;dur=3,;dur=7,model", 0, 0),
        ("\xff\x00,,;;==", 0, 0),
    ],
)
def test_what_a_server_says_of_its_time_never_exceeds_the_clock(header: str, queue: float, model: float) -> None:
    found = parse_server_timing(header, 1.0)
    assert found == pytest.approx((queue, model))
    assert sum(found) <= 1.0


def unreachable() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def waits(patience: float) -> list[float]:
    slept: list[float] = []
    connection = Connection(unreachable(), patience=patience, sleep=slept.append)
    with pytest.raises(CloudFault, match=r"failed (once|\d+ times), the last time with: .*ConnectError"):
        _ = connection.remote
    connection.close()
    return slept


def test_waits_between_attempts_double_up_to_a_bound_and_differ_from_edge_to_edge() -> None:
    slept = waits(60.0)
    for place, seconds in enumerate(slept[:-1]):
        longest = min(FIRST_DELAY * 2**place, LONGEST_DELAY)
        assert longest / 2 <= seconds <= longest
    assert sum(slept) == pytest.approx(60.0, abs=1.0)  # the attempts took the rest
    assert 60 / LONGEST_DELAY < len(slept) < 30
    assert slept != waits(60.0)


def test_without_patience_nothing_is_waited_for() -> None:
    assert waits(0.0) == []


def test_the_last_wait_ends_with_patience() -> None:
    assert sum(waits(0.06)) <= 0.06


@pytest.mark.parametrize(
    "kind", [Fault.LOST, Fault.HTML, Fault.BYTES, Fault.LATE, Fault.DIGIT, Fault.STALE, Fault.SHORT, *ERRORS]
)
def test_a_verdict_is_the_same_however_often_it_is_asked_for(proxy: Proxy, kind: Fault) -> None:
    draft = [*right(stopping=replace(ALL, max_new_tokens=2)), 0, 0, 0]
    with connected(proxy.url) as connection:
        verification = opened(connection)
        plain = verification.verify(0, [3], draft)
        proxy.plan([kind])
        harmed = verification.verify(0, [3], draft)
        local = LocalVerifier(MODEL, GREEDY).open(PROMPT).verify(0, [3], draft)
        assert plain == harmed == local
        verification.close()


def lines(proxy: Proxy) -> list[str]:
    """Method and first part of the path of each request."""
    return [request.line.partition("?")[0].rpartition("/")[2] for request in proxy.requests]


def test_a_lost_session_is_opened_anew_and_fed_the_whole_context(proxy: Proxy) -> None:
    with connected(proxy.url) as connection:
        verification = opened(connection)
        verdict = verification.verify(0, [3], [1, 2])
        known = 1 + verdict.accepted
        proxy.plan(())
        connection.transport.call("DELETE", f"/v1/sessions/{verification._session}")
        again = verification.verify(known, [verdict.token], [4])
        assert lines(proxy)[1:] == ["verify", "sessions", "verify"]
        first, _, last = (request.body for request in proxy.requests[1:])
        assert json.loads(first)["base"] == known
        assert json.loads(last)["base"] == 0
        assert json.loads(last)["tokens"] == [3, *[1, 2][: verdict.accepted], verdict.token]
        local = LocalVerifier(MODEL, GREEDY).open(PROMPT)
        assert again == local.verify(0, json.loads(last)["tokens"], [4])
        verification.close()


def test_where_the_sides_no_longer_agree_the_whole_context_is_sent(proxy: Proxy) -> None:
    stage = Harness(far=True)
    with connected(proxy.url) as connection:
        verification = opened(connection, stage=stage)
        proxy.plan(())
        verdict = verification.verify(0, [3], [1])
        path, late = proxy.requests[0].line.split(" ")[1], proxy.requests[0].body
        base = 1 + verdict.accepted
        verdict = verification.verify(base, [verdict.token], [1])
        connection.transport.call("POST", path, late, "application/json")  # sets the server's context back
        base, before = base + 1 + verdict.accepted, verdict.token
        verdict = verification.verify(base, [before], [1])
        assert lines(proxy) == ["verify"] * 5
        refused, whole = (json.loads(request.body) for request in proxy.requests[3:])
        assert (refused["base"], refused["tokens"]) == (base, [before])
        assert (whole["base"], len(whole["tokens"])) == (0, base + 1)
        assert verdict == LocalVerifier(MODEL, GREEDY).open(PROMPT).verify(0, whole["tokens"], [1])
        verification.close()


@pytest.mark.parametrize("kind", [Fault.STREAM_CUT, Fault.STREAM_DIGIT, Fault.STREAM_ENDED])
@pytest.mark.parametrize("place", range(7))
def test_a_stream_goes_on_where_it_broke_off(proxy: Proxy, kind: Fault, place: int) -> None:
    with connected(proxy.url) as connection:
        verification = opened(connection)
        proxy.plan([kind], place=place)
        assert list(verification.generate(ALL)) == right()
        outputs = [json.loads(request.body)["output"] for request in proxy.requests]
        # the seventh line only says that there are no more
        assert outputs == [[], right()[:place]][: 1 if place == 6 else 2]
        verification.close()


def test_a_stream_may_be_left_early_and_the_session_still_serves(proxy: Proxy) -> None:
    with connected(proxy.url) as connection:
        verification = opened(connection)
        tokens = verification.generate(ALL)
        assert next(tokens) == right()[0]
        tokens.close()
        assert list(verification.generate(ALL, right()[:2])) == right()[2:]
        assert verification.verify(0, [3], right()[:3]) == Verdict(3, right()[3])
        verification.close()


def test_what_is_too_large_is_refused_at_once() -> None:
    with served(ToyEngine(MODEL, max_length=5)) as url, Proxy(url) as proxy, connected(proxy.url) as connection:
        verification = opened(connection)
        proxy.plan(())
        with pytest.raises(Refused, match="413"):
            verification.verify(0, [3, 1, 1], [1, 1, 1])
        assert lines(proxy) == ["verify"]
        proxy.plan(())
        with pytest.raises(Refused, match="413"):
            list(verification.generate(ALL))
        assert lines(proxy) == ["generate"]
        verification.close()


def test_an_edge_that_may_go_on_alone_does_so_when_it_is_refused() -> None:
    edge = ToyModel(random_table(VOCABULARY, 1), frozenset())
    how = Decoding("speculative", replace(ALL, max_new_tokens=12), 3, gate.ALWAYS, alone=True)
    with served(ToyEngine(MODEL, max_length=8)) as url, connected(url) as connection:
        trace = stamp(decode(PROMPT, how, edge, connection.verifier(GREEDY, Harness())))
    (degraded,) = [event for _, event in trace.events if isinstance(event, Degraded)]
    assert "413" in degraded.reason
    assert len(trace.tokens) == 12


@pytest.mark.parametrize("kind", [Fault.REFUSED, Fault.LOST, Fault.HTML, Fault.BYTES])
def test_closing_a_session_never_fails(url: str, kind: Fault) -> None:
    answers = {
        Fault.REFUSED: None,
        Fault.LOST: b"",
        Fault.HTML: said(500, b"<html>"),
        Fault.BYTES: b"\x00\xff garbage\r\n\r\n",
    }
    with Canned(lambda heard: answers[kind]) as bad, Proxy(url) as proxy, connected(proxy.url) as connection:
        verification = opened(connection)
        proxy.move(bad.url)
        proxy.drop()
        verification.close()
        verification.close()
        connection.close()  # waits until it was told
        assert len(bad.heads) == (kind is not Fault.REFUSED)


def test_closing_a_session_of_a_closed_connection_does_not_fail_either(url: str) -> None:
    with connected(url) as connection:
        verification = opened(connection)
        connection.close()
        verification.close()


def test_after_its_end_a_connection_opens_no_other(url: str) -> None:
    with connected(url) as connection:
        verification = opened(connection)
    with pytest.raises(Refused, match="closed"):
        verification.verify(0, [3], [1])


def test_closing_ends_the_attempts_of_whoever_still_waits(proxy: Proxy) -> None:
    connection = Connection(proxy.url, KEY, sleep=lambda seconds: verification.close())
    verification = connection.verifier(GREEDY, Harness()).open(PROMPT)
    proxy.plan([Fault.LOST])
    with pytest.raises(CloudFault, match="the caption was closed"):
        verification.wait()
    assert len(proxy.requests) == 1
    connection.close()


def test_one_connection_serves_many_threads(url: str) -> None:
    expected = [LocalVerifier(MODEL, GREEDY).open(PROMPT).verify(0, [3], [n, n]) for n in range(VOCABULARY)]

    def caption(number: int) -> tuple[list[Verdict], list[int]]:
        verification = opened(connection)
        verdicts = [verification.verify(0, [3], [n, n]) for n in range(VOCABULARY)]
        output = list(verification.generate(ALL, right()[: number % 3]))
        verification.close()
        return verdicts, right()[: number % 3] + output

    with connected(url) as connection, ThreadPoolExecutor(6) as threads:
        assert list(threads.map(caption, range(18))) == [(expected, right())] * 18


def test_an_interrupted_call_leaves_everything_usable(proxy: Proxy) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    connection = Connection(proxy.url, KEY, sleep=interrupt)
    verification = opened(connection)
    proxy.plan([Fault.LOST])
    with pytest.raises(KeyboardInterrupt):
        verification.verify(0, [3], [1])
    assert verification.verify(0, [3], [1]) == LocalVerifier(MODEL, GREEDY).open(PROMPT).verify(0, [3], [1])
    verification.close()
    connection.close()


def test_the_first_opening_is_no_fault_though_an_attempt_before_it_was(proxy: Proxy) -> None:
    stage = Harness(far=True)
    with connected(proxy.url) as connection:
        verifier = connection.verifier(GREEDY, stage)
        proxy.plan([Fault.ERROR_503])
        verification = verifier.open(PROMPT)
        verification.wait()
        parts = [span.part for span in stage.watch.spans if not span.size]
        assert parts == ["faults", "network", "cloud_queue"]
        proxy.plan([Fault.RESTARTED])
        connection.transport.call("DELETE", f"/v1/sessions/{verification._session}")
        verification.verify(0, [3], [1])
        parts = [span.part for span in stage.watch.spans if not span.size]
        assert parts == ["faults", "network", "cloud_queue", "faults", "faults", "network", "cloud_queue"]
        verification.close()


def test_an_attempt_that_was_the_last_is_time_lost_too(proxy: Proxy) -> None:
    stage = Harness(far=True)
    with connected(proxy.url, patience=0.0) as connection:
        verification = opened(connection, stage=stage)
        known = len(stage.watch.spans)
        proxy.plan([Fault.SHAPE])
        with pytest.raises(CloudFault):
            verification.verify(0, [3], [1])
        up, down, lost = stage.watch.spans[known:]
        assert (up.part, down.part, lost.part) == ("uplink", "downlink", "faults")
        assert up.size > wire.REQUEST_HEAD
        assert lost.start == up.start
        verification.close()


def test_the_time_of_a_stream_is_told_apart_by_what_the_server_says_of_its_first_token() -> None:
    output = [1, 2, 3, 4, 5, 6]
    whole = told(output, lambda asked: [wire.dumps(wire.build_end_line(output, asked))])(0)
    timing = b"Server-Timing: queue;dur=1e9,model;dur=0\r\n"
    answer = whole.replace(b"\r\n", b"\r\n" + timing, 1)
    stage = Harness(far=True)
    with Canned(lambda heard: answer) as other, connected(other.url, patience=0.0) as connection:
        assert list(streaming(connection, stage)) == output
    network, queue = (span for span in stage.watch.spans if not span.size)
    assert (network.part, queue.part) == ("network", "cloud_queue")
    assert network.end - network.start == pytest.approx(0, abs=1e-9)
    assert queue.end > queue.start


def test_no_proxy_is_taken_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, unreachable())
    with connected(url, patience=0.0) as connection:
        assert connection.remote.name == "toy"


# Whatever else may answer


class Canned:
    """Answers each request with what `say` makes of how many were heard before, and closes: None without reading it."""

    def __init__(self, say: Callable[[int], bytes | Iterator[bytes] | None]) -> None:
        self._say = say
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.heads: list[bytes] = []
        self.sent = 0  # bytes
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Canned:
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
            with client, client.makefile("rb") as inbound, suppress(OSError, Gone):
                client.settimeout(10)
                answer = self._say(len(self.heads))
                if answer is None:
                    continue
                self.heads.append(read_request(inbound).head)
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    client.sendall(piece)
                    self.sent += len(piece)


HEAD = b"HTTP/1.1 200 OK\r\n"
GARBAGE = {
    "nothing": b"",
    "noise": b"\x00\x9f\xffnoise",
    "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "http 0.9": b"{}",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status that is none": b"HTTP/1.1 999 So\r\n\r\n",
    "switched protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "only preliminary": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "part of it": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\n{}",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "nameless header": HEAD + b": no name\r\n\r\n{}",
    "binary header": HEAD + b"Server-Timing: \xff\xfe;dur=\xff\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "negative length": HEAD + b"Content-Length: -2\r\n\r\n{}",
    "endless length": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "chunks that are none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "no line": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "compressed noise": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "unknown text": HEAD + b"Content-Type: application/json; charset=klingon\r\nContent-Length: 2\r\n\r\n{}",
    "no utf-8": HEAD + b"Content-Length: 3\r\n\r\n\xc3\x28\n",
    "a surrogate": said(201, b'{"session":"\\ud800","model":"m","check":1}\n'),
    "a number without end": said(200, b'{"accepted":' + b"9" * 5000 + b',"token":1,"check":1}\n'),
    "no number": said(200, b'{"accepted":NaN,"token":Infinity,"check":1e5}\n'),
    "nested": said(200, b"[" * 60_000 + b"\n"),
    "a redirect to nowhere": b"HTTP/1.1 307 Go\r\nLocation: http://[::bad\r\nContent-Length: 0\r\n\r\n",
    "a redirect to itself": b"HTTP/1.1 308 Go\r\nLocation: /v1/model\r\nContent-Length: 0\r\n\r\n",
}
TOY = ToyEngine().identity


def verifying(connection: Connection) -> None:
    connection.remote = TOY
    verification = connection.verifier(GREEDY, Harness(far=True)).open(PROMPT)
    verification.verify(0, [3], [1])


def judging(connection: Connection) -> None:
    """On a session that was opened when all was well."""
    connection.remote = TOY
    verification = connection.verifier(GREEDY, Harness(far=True)).open(PROMPT)
    verification._session = "there"
    verification.verify(0, [3], [1])


def generating(connection: Connection) -> None:
    connection.remote = TOY
    verification = connection.verifier(GREEDY, Harness(far=True)).open(PROMPT)
    verification._session = "there"
    list(verification.generate(ALL))


CALLS = [lambda connection: connection.remote, verifying, judging, generating]
NAMES = ["remote", "open", "verify", "generate"]


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_a_fault_and_nothing_else(what: str, call: Callable[[Connection], object]) -> None:
    with Canned(lambda heard: GARBAGE[what]) as other, connected(other.url, patience=0.04) as connection:
        with pytest.raises(CloudFault, match="the cloud failed"):
            call(connection)
        assert len(other.heads) >= 2


@pytest.mark.parametrize("session", ["", "../model", "a b", "a\nb", "é", "x" * 65])
def test_a_session_whose_name_no_path_can_hold_is_garbage(session: str) -> None:
    answer = said(201, wire.dumps(wire.build_opened_message(session, TOY.fingerprint, BEGUN)))
    with Canned(lambda heard: answer) as other, connected(other.url, patience=0.0) as connection:
        connection.remote = TOY
        verification = connection.verifier(GREEDY, Harness()).open(PROMPT)
        with pytest.raises(CloudFault, match="names no valid session"):
            verification.wait()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_a_redirect_is_not_followed_and_the_key_goes_nowhere(status: int, call: Callable[[Connection], object]) -> None:
    with Canned(lambda heard: said(404, b"")) as target:
        location = f"HTTP/1.1 {status} Go\r\nLocation: {target.url}\r\nContent-Length: 0\r\n\r\n".encode()
        with (
            Canned(lambda heard: location) as other,
            connected(other.url, patience=0.0) as connection,
            pytest.raises(CloudFault, match=str(status)),
        ):
            call(connection)
    assert target.heads == []


def test_no_cookie_is_kept() -> None:
    cookie = b"HTTP/1.1 503 Later\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"
    with Canned(lambda heard: cookie) as other, connected(other.url, patience=0.2) as connection:
        with pytest.raises(CloudFault):
            _ = connection.remote
        assert not any(b"cookie" in head.lower() for head in other.heads[1:])


def test_what_a_server_says_of_a_problem_cannot_command_a_terminal() -> None:
    body = json.dumps({"detail": "\x1b]0;title\x07\u202e" + "x" * 1000}).encode()
    with (
        Canned(lambda heard: said(503, body)) as other,
        connected(other.url, patience=0.0) as connection,
        pytest.raises(CloudFault) as caught,
    ):
        _ = connection.remote
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096),
    "chunks": (CHUNKED, framed(b"x" * 4096)),
    "head": (HEAD, b"X-Name: " + b"x" * 4096 + b"\r\n"),
    "problem": (b"HTTP/1.1 500 Oh\r\n\r\n", b"x" * 4096),
}


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_answer_is_not_read_for_ever(what: str, call: Callable[[Connection], object]) -> None:
    head, more = ENDLESS[what]
    most = 12 * 2**20  # bytes: far more than what buffers on the way may hold

    def say(heard: int) -> Iterator[bytes]:
        yield head
        while other.sent < most:
            yield more

    with Canned(say) as other, connected(other.url, patience=0.0) as connection, pytest.raises(CloudFault):
        call(connection)
    assert most / 100 > LARGEST_ANSWER
    assert other.sent < most


def trickled(answer: bytes) -> Iterator[bytes]:
    """The head at once, the rest a byte at a time: each soon enough, all of them together far too late."""
    yield answer[:9]
    for place in range(9, len(answer)):
        pause.wait(SHORT / 10)
        yield answer[place : place + 1]


pause = threading.Event()


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
@pytest.mark.parametrize("where", ["head", "body", "preliminary"])
def test_an_answer_that_trickles_is_not_waited_for(where: str, call: Callable[[Connection], object]) -> None:
    heads = {"head": HEAD, "body": said(200, b"x" * 500), "preliminary": b"HTTP/1.1 100 Continue\r\n\r\n" * 50}

    def say(heard: int) -> Iterator[bytes]:
        if where == "body":
            head, _, body = heads[where].partition(b"\r\n\r\n")
            yield head + b"\r\n\r\n"
            yield from trickled(body)
        else:
            yield from trickled(heads[where] + b"X-Name: " + b"x" * 500)
        ended.append(True)

    ended: list[bool] = []
    with (
        Canned(say) as other,
        connected(other.url, patience=0.0, timeout=SHORT) as connection,
        pytest.raises(CloudFault, match=r"took too long|Timeout"),
    ):
        call(connection)
    assert not ended


def told(output: list[int], more: Callable[[int], list[bytes]]) -> Callable[[int], bytes]:
    """A stream that is right up to `output`, and then goes on with `more`, made of the request's check."""

    def say(heard: int) -> bytes:
        asked = wire.build_generate_request(BEGUN, [], ALL.eos, ALL.max_new_tokens).check
        lines = [wire.dumps(wire.build_token_line(output[: n + 1], asked)) for n in range(len(output))]
        return CHUNKED + b"".join(framed(line + b"\n") for line in [*lines, *more(asked)]) + framed(b"")

    return say


def test_a_stream_that_goes_on_after_the_captions_end_is_left() -> None:
    output = [1, 2, 3, 4, 5, 6]
    more = told(output, lambda asked: [wire.dumps(wire.build_token_line([*output, 0], asked))] * 3)
    with Canned(more) as other, connected(other.url, patience=0.0) as connection:
        assert list(streaming(connection)) == output


def test_a_stream_that_ends_before_the_caption_is_a_fault() -> None:
    output = [1, 2, 3]
    more = told(output, lambda asked: [wire.dumps(wire.build_end_line(output, asked))])
    with Canned(more) as other, connected(other.url, patience=0.0) as connection:
        tokens = streaming(connection)
        assert [next(tokens) for _ in output] == output
        with pytest.raises(CloudFault, match="does not end with the caption"):
            next(tokens)


def streaming(connection: Connection, stage: Harness | None = None) -> Iterator[int]:
    connection.remote = TOY
    verification = connection.verifier(GREEDY, stage or Harness(far=True)).open(PROMPT)
    verification._session = "there"
    return verification.generate(ALL)
