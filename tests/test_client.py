"""The client's protocol against a real server and against a proxy that injects single faults."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from random import Random

import pytest

from edgecloud_sd import wire
from edgecloud_sd.acceptance import GREEDY, Rank, Rule, Synthetic
from edgecloud_sd.cloud import client
from edgecloud_sd.cloud.client import Connection, RemoteVerification
from edgecloud_sd.cloud.retry import CONFIRMATIONS, Refused
from edgecloud_sd.decoder import Runtime, decode
from edgecloud_sd.events import Degraded, Verdict
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import CloudFault, LocalVerifier
from tests.support.asgi import SpyModel
from tests.support.canned import (
    CHUNKED_HEAD,
    KEY,
    PROMPT,
    PROMPT_CHECK,
    SIX_TOKENS,
    CannedServer,
    connected,
    generate,
    remote_verification,
)
from tests.support.proxy import ERRORS, Fault, Proxy, http_answer, http_chunk
from tests.support.serving import ToyEngine, served
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table, stateless_verdict

MODEL = ToyModel(random_table(VOCABULARY, 0), frozenset())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(ToyEngine(MODEL), keys=[KEY]) as url:
        yield url


@pytest.fixture(scope="module")
def narrow_url() -> Iterator[str]:
    """Another model, for 8 tokens in all and without synthetic rules."""
    with served(ToyEngine(MODEL, name="narrow", max_length=8, synthetic=False), keys=[KEY]) as url:
        yield url


@pytest.fixture(scope="module")
def shared_proxy(url: str) -> Iterator[Proxy]:
    with Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Proxy:
    """Return the shared proxy without planned faults."""
    shared_proxy.plan(())
    return shared_proxy


def open_verification(
    connection: Connection, rule: Rule = GREEDY, harness: Harness | None = None, wants_rest: bool = False
) -> RemoteVerification:
    verification = remote_verification(connection, rule, harness, wants_rest)
    verification.wait()
    return verification


def cloud_tokens(output: tuple[int, ...] = (), stopping: Stopping = SIX_TOKENS) -> list[int]:
    """Return the tokens that the model generates after `output` in this process."""
    return list(LocalVerifier(MODEL, GREEDY).open(PROMPT).generate(stopping, output))


def local_verdict(context: list[int], draft: list[int]) -> Verdict:
    """Return the model's verdict in this process."""
    return LocalVerifier(MODEL, GREEDY).open(PROMPT).verify(0, context, draft)


def endpoints(proxy: Proxy) -> list[str]:
    """Return the last part of each request's path."""
    return [request.line.partition("?")[0].rpartition("/")[2] for request in proxy.requests]


# The server's identity


def test_a_connection_reports_the_servers_identity(url: str) -> None:
    identity = ToyEngine().identity
    with connected(url) as connection:
        remote = connection.identity
    assert remote == identity
    assert remote.fingerprint == identity.fingerprint


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"name":"another service"}', b"\xff\xfe", b"[" * 50_000])
def test_the_answer_of_another_service_is_refused(body: bytes) -> None:
    with (
        CannedServer(lambda number: http_answer(200, body)) as server,
        connected(server.url, patience=0.2) as connection,
        pytest.raises(CloudFault, match="is not an edgecloud_sd cloud of this version"),
    ):
        _ = connection.identity


def test_a_server_of_another_version_is_refused_before_a_prompt_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wire, "VERSION", wire.VERSION - 1)
        identity = ToyEngine().identity
        facts = {**asdict(identity), "fingerprint": identity.fingerprint, "check": identity.check}
    answer = http_answer(200, json.dumps(facts).encode())
    refusal = r"of this version: check the URL, or install one version on both ends"
    with CannedServer(lambda number: answer) as server, connected(server.url) as connection:
        with pytest.raises(Refused, match=refusal):
            connection.verifier(GREEDY, Harness(), wants_rest=True)
        assert {head.split()[1] for head in server.heads} == {b"/v1/model"}


def test_a_service_without_the_path_of_the_identity_is_refused_at_once() -> None:
    with CannedServer(lambda number: http_answer(404, b"<html>")) as server, connected(server.url) as connection:
        with pytest.raises(Refused, match="is not an edgecloud_sd cloud of this version"):
            _ = connection.identity
        assert len(server.heads) == CONFIRMATIONS


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_identity_is_fetched_again(proxy: Proxy, seed: int) -> None:
    with connected(proxy.url) as connection:
        proxy.plan([Fault.DIGIT], seed)
        assert connection.identity.fingerprint == ToyEngine().identity.fingerprint


def test_another_model_after_a_restart_is_refused(url: str, narrow_url: str) -> None:
    with Proxy(url) as proxy, connected(proxy.url) as connection:
        verification = open_verification(connection)
        verdict = verification.verify(0, [3], [1])
        proxy.set_upstream(narrow_url)
        proxy.drop_connections()
        with pytest.raises(Refused, match="another model than when this run began"):
            verification.verify(1 + verdict.accepted, [verdict.token], [1])


# Acceptance rules


def test_a_rank_above_the_engines_limit_is_refused(url: str) -> None:
    with (
        connected(url) as connection,
        pytest.raises(Refused, match=r"rule rank\(8\): the cloud's engine has rank\(r\) up to r = 7"),
    ):
        connection.verifier(Rank(8), Harness())


def test_a_synthetic_rule_is_refused_if_the_engine_has_none(narrow_url: str) -> None:
    with connected(narrow_url) as connection:
        with pytest.raises(
            Refused, match=r"rule synthetic\(0\.9/0\.8\): the cloud's engine has only greedy and rank\(r\)"
        ):
            connection.verifier(Synthetic((0.9, 0.8)), Harness())
        assert open_verification(connection, Rank(3)).verify(0, [3], []).accepted == 0


@pytest.mark.slow
@pytest.mark.parametrize("wants_rest", [True, False])
@pytest.mark.parametrize("rule", [GREEDY, Rank(3), Synthetic((0.6,)), Synthetic((0.9, 0.5, 0.1))])
def test_the_server_applies_the_rule_as_a_local_verifier_does(url: str, rule: Rule, wants_rest: bool) -> None:
    local = LocalVerifier(MODEL, rule, wants_rest=wants_rest).open(PROMPT)
    random, opinions = Random(0), 0
    with connected(url) as connection:
        remote = connection.verifier(rule, Harness(), wants_rest).open(PROMPT)
        context, base = [PROMPT.last], 0
        for length in (3, 6, 0, 1, 4, 0, 0, 6, 2, 6):
            draft = [random.randrange(VOCABULARY) for _ in range(length)]
            verdict = remote.verify(base, context[base:], draft)
            assert verdict == local.verify(base, context[base:], draft)
            plain = stateless_verdict(MODEL, PROMPT, rule, context, draft)
            assert verdict == (plain if wants_rest else replace(plain, rest=()))
            base = len(context) + verdict.accepted
            context += [*draft[: verdict.accepted], verdict.token]
            opinions += len(verdict.rest)
    assert bool(opinions) == wants_rest


# Verdicts


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [Fault.LOST, Fault.HTML, Fault.BYTES, Fault.LATE, Fault.DIGIT, Fault.STALE, Fault.SHORT, *ERRORS]
)
def test_a_repeated_request_gets_the_same_verdict(proxy: Proxy, kind: Fault) -> None:
    draft = [*cloud_tokens(stopping=replace(SIX_TOKENS, max_new_tokens=2)), 0, 0, 0]
    with connected(proxy.url) as connection:
        verification = open_verification(connection, wants_rest=True)
        plain = verification.verify(0, [3], draft)
        proxy.plan([kind])
        repeated = verification.verify(0, [3], draft)
        assert plain == repeated == stateless_verdict(MODEL, PROMPT, GREEDY, [3], draft)
        assert len(plain.rest) == 2
        verification.close()


def test_after_a_lost_session_the_prompt_is_opened_and_the_whole_context_sent(proxy: Proxy) -> None:
    with connected(proxy.url) as connection:
        verification = open_verification(connection, wants_rest=True)
        verdict = verification.verify(0, [3], [1, 2])
        base = 1 + verdict.accepted
        proxy.plan(())
        connection.transport.call("DELETE", f"/v1/sessions/{verification._session}")
        after = verification.verify(base, [verdict.token], [4])
        assert endpoints(proxy)[1:] == ["verify", "sessions", "verify"]
        first, _, last = (request.body for request in proxy.requests[1:])
        assert json.loads(first)["base"] == base
        assert json.loads(last)["base"] == 0
        assert json.loads(last)["tokens"] == [3, *[1, 2][: verdict.accepted], verdict.token]
        assert after == local_verdict(json.loads(last)["tokens"], [4])
        verification.close()


def test_the_whole_context_is_sent_when_the_sides_disagree(proxy: Proxy) -> None:
    with connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.plan(())
        verdict = verification.verify(0, [3], [1])
        path, first_body = proxy.requests[0].line.split(" ")[1], proxy.requests[0].body
        base = 1 + verdict.accepted
        verdict = verification.verify(base, [verdict.token], [1])
        connection.transport.call("POST", path, first_body, wire.JSON)  # sets the server's context back
        base, token = base + 1 + verdict.accepted, verdict.token
        verdict = verification.verify(base, [token], [1])
        assert endpoints(proxy) == ["verify"] * 5
        refused, whole = (json.loads(request.body) for request in proxy.requests[3:])
        assert (refused["base"], refused["tokens"]) == (base, [token])
        assert (whole["base"], len(whole["tokens"])) == (0, base + 1)
        assert verdict == local_verdict(whole["tokens"], [1])
        verification.close()


def test_a_request_beyond_the_servers_limit_is_refused_at_once(narrow_url: str) -> None:
    with Proxy(narrow_url) as proxy, connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.plan(())
        with pytest.raises(Refused, match="413"):
            verification.verify(0, [3, 1, 1], [1] * 4)
        assert endpoints(proxy) == ["verify"]
        proxy.plan(())
        with pytest.raises(Refused, match="413"):
            list(verification.generate(SIX_TOKENS))
        assert endpoints(proxy) == ["generate"]
        verification.close()


PERMANENT: dict[str, Callable[[RemoteVerification], object]] = {
    "too many new tokens": lambda verification: list(verification.generate(replace(SIX_TOKENS, max_new_tokens=40_000))),
    "an id beyond the vocabulary": lambda verification: verification.verify(0, [3], [VOCABULARY]),
    "a draft beyond the limit": lambda verification: verification.verify(0, [3], [1] * (wire.MAX_DRAFT + 1)),
}


@pytest.mark.parametrize("name", PERMANENT)
def test_a_refusal_of_an_undamaged_message_is_final(proxy: Proxy, name: str) -> None:
    with connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.plan(())
        with pytest.raises(Refused, match=r"the cloud refuses the request: (413|422) \S+"):
            PERMANENT[name](verification)
        assert len(proxy.requests) == 1
        verification.close()


def test_logits_that_are_not_finite_end_a_call_at_once() -> None:
    def fail(call: str) -> None:
        raise FloatingPointError("the model gave logits that are not finite")

    engine = ToyEngine(SpyModel(MODEL))
    with served(engine, keys=[KEY]) as url, Proxy(url) as proxy, connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.plan(())
        engine.model.before_call = fail  # type: ignore[attr-defined]
        with pytest.raises(Refused, match="501 the model gave logits that are not finite"):
            verification.verify(0, [3], [1])
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("body", [b"<html>", b'{"name":"another service"}', b'{"fingerprint":"12ab","name":"toy"}'])
def test_an_answer_of_another_service_that_stays_the_same_ends_a_run_in_a_second(body: bytes) -> None:
    delays: list[float] = []
    with CannedServer(lambda number: http_answer(200, body)) as server:
        connection = Connection(server.url, KEY, sleep=delays.append)
        with pytest.raises(Refused, match="is not an edgecloud_sd cloud of this version"):
            _ = connection.identity
        connection.close()
    assert sum(delays) < 1


@pytest.mark.parametrize("status", [200, 203, 206, 299])
def test_a_service_whose_answers_all_differ_is_refused_too(status: int) -> None:
    with CannedServer(lambda number: http_answer(status, b"<html>request %d" % number)) as server:
        with connected(server.url) as connection, pytest.raises(Refused, match="is not an edgecloud_sd cloud"):
            _ = connection.identity
        assert len(server.heads) == 10


def test_an_edge_that_may_finish_alone_does_so_after_a_refusal(narrow_url: str) -> None:
    edge = ToyModel(random_table(VOCABULARY, 1), frozenset())
    stopping, runtime = replace(SIX_TOKENS, max_new_tokens=12), Runtime(finish_alone=True)
    with connected(narrow_url) as connection:
        verifier = connection.verifier(GREEDY, Harness())
        trace = stamp(decode(PROMPT, Strategy("speculative"), stopping, edge, verifier, runtime))
    (degraded,) = [event for _, event in trace.events if isinstance(event, Degraded)]
    assert "413" in degraded.reason
    assert len(trace.tokens) == 12


@pytest.mark.slow
def test_one_connection_serves_many_threads(url: str) -> None:
    expected = [local_verdict([3], [token, token]) for token in range(VOCABULARY)]

    def caption(number: int) -> tuple[list[Verdict], list[int]]:
        verification = open_verification(connection)
        verdicts = [verification.verify(0, [3], [token, token]) for token in range(VOCABULARY)]
        start = cloud_tokens()[: number % 3]
        output = list(verification.generate(SIX_TOKENS, start))
        verification.close()
        return verdicts, start + output

    with connected(url) as connection, ThreadPoolExecutor(6) as threads:
        assert list(threads.map(caption, range(18))) == [(expected, cloud_tokens())] * 18


def test_an_interrupted_call_leaves_the_session_usable(proxy: Proxy) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    connection = Connection(proxy.url, KEY, sleep=interrupt)
    verification = open_verification(connection)
    proxy.plan([Fault.LOST])
    with pytest.raises(KeyboardInterrupt):
        verification.verify(0, [3], [1])
    assert verification.verify(0, [3], [1]) == local_verdict([3], [1])
    verification.close()
    connection.close()


# Streams


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Fault.STREAM_CUT, Fault.STREAM_DIGIT, Fault.STREAM_ENDED])
@pytest.mark.parametrize("place", range(7))
def test_a_stream_continues_where_it_was_cut(proxy: Proxy, kind: Fault, place: int) -> None:
    with connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.plan([kind], place=place)
        assert list(verification.generate(SIX_TOKENS)) == cloud_tokens()
        outputs = [json.loads(request.body)["output"] for request in proxy.requests]
        # the seventh line contains no token, so the client does not ask for it again
        assert outputs == [[], cloud_tokens()[:place]][: 1 if place == 6 else 2]
        verification.close()


def test_a_session_stays_usable_after_a_stream_is_left_early(proxy: Proxy) -> None:
    expected = cloud_tokens()
    with connected(proxy.url) as connection:
        verification = open_verification(connection)
        tokens = verification.generate(SIX_TOKENS)
        assert next(tokens) == expected[0]
        tokens.close()
        assert list(verification.generate(SIX_TOKENS, expected[:2])) == expected[2:]
        assert verification.verify(0, [3], expected[:3]) == Verdict(3, expected[3])
        verification.close()


def canned_stream(output: list[int], more: Callable[[int], list[bytes]]) -> bytes:
    """Return the stream of `output`, followed by the lines of `more`, which takes the request's check."""
    request = wire.build_generate_request(PROMPT_CHECK, [], SIX_TOKENS.eos, SIX_TOKENS.max_new_tokens)
    lines = [wire.dumps(wire.build_token_line(output[: n + 1], request.check)) for n in range(len(output))]
    return (
        CHUNKED_HEAD + b"".join(http_chunk(line + b"\n") for line in [*lines, *more(request.check)]) + http_chunk(b"")
    )


def test_lines_after_the_end_of_the_caption_are_ignored() -> None:
    output = [1, 2, 3, 4, 5, 6]
    answer = canned_stream(output, lambda check: [wire.dumps(wire.build_token_line([*output, 0], check))] * 3)
    with CannedServer(lambda number: answer) as server, connected(server.url, patience=0.0) as connection:
        assert list(generate(connection)) == output


def test_a_stream_that_ends_before_the_caption_is_a_failure() -> None:
    output = [1, 2, 3]
    answer = canned_stream(output, lambda check: [wire.dumps(wire.build_end_line(output, check))])
    with CannedServer(lambda number: answer) as server, connected(server.url, patience=0.0) as connection:
        tokens = generate(connection)
        assert [next(tokens) for _ in output] == output
        with pytest.raises(CloudFault, match="does not end with the caption"):
            next(tokens)


# The spans of time


def unsized_parts(harness: Harness) -> list[str]:
    """Return the parts of the spans that are no message."""
    return [span.part for span in harness.watch.spans if not span.size]


def test_a_failed_attempt_and_a_second_opening_count_as_faults_but_the_first_opening_does_not(proxy: Proxy) -> None:
    harness = Harness()
    with connected(proxy.url) as connection:
        _ = connection.identity
        proxy.plan([Fault.ERROR_503])
        verification = remote_verification(connection, harness=harness)
        verification.wait()
        assert unsized_parts(harness) == ["faults", "network", "cloud_queue"]
        proxy.plan([Fault.RESTARTED])
        connection.transport.call("DELETE", f"/v1/sessions/{verification._session}")
        verification.verify(0, [3], [1])
        reopened = ["faults", "faults", "network", "cloud_queue"]
        assert unsized_parts(harness) == ["faults", "network", "cloud_queue", *reopened]
        verification.close()


def test_the_last_failed_attempt_counts_as_a_fault(proxy: Proxy) -> None:
    harness = Harness()
    with connected(proxy.url, patience=0.0) as connection:
        verification = open_verification(connection, harness=harness)
        before = len(harness.watch.spans)
        proxy.plan([Fault.SHAPE])
        with pytest.raises(CloudFault):
            verification.verify(0, [3], [1])
        up, down, fault = harness.watch.spans[before:]
        assert (up.part, down.part, fault.part) == ("uplink", "downlink", "faults")
        assert up.size > wire.REQUEST_HEAD
        assert fault.start == up.start
        verification.close()


def test_the_first_token_of_a_stream_divides_its_time_into_network_and_queue() -> None:
    output = [1, 2, 3, 4, 5, 6]
    stream = canned_stream(output, lambda check: [wire.dumps(wire.build_end_line(output, check))])
    check = wire.generate_checksum(PROMPT_CHECK, (), (), 6)
    timing = wire.build_timing(1e6, 0.0, check).encode()
    answer = stream.replace(b"\r\n", b"\r\nServer-Timing: %b\r\n" % timing, 1)
    harness = Harness()
    with CannedServer(lambda number: answer) as server, connected(server.url, patience=0.0) as connection:
        assert list(generate(connection, harness)) == output
    network, queue = (span for span in harness.watch.spans if not span.size)
    assert (network.part, queue.part) == ("network", "cloud_queue")
    assert network.end - network.start == pytest.approx(0, abs=1e-9)
    assert queue.end > queue.start


# Closing


@pytest.mark.parametrize(
    "answer",
    [None, b"", http_answer(500, b"<html>"), b"\x00\xff garbage\r\n\r\n"],
    ids=["refused", "lost", "html", "bytes"],
)
def test_closing_a_session_never_fails(url: str, answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CLOSE_TIMEOUT", 60.0)
    with CannedServer(lambda number: answer) as bad, Proxy(url) as proxy, connected(proxy.url) as connection:
        verification = open_verification(connection)
        proxy.set_upstream(bad.url)
        proxy.drop_connections()
        verification.close()
        verification.close()
        connection.close()  # waits until the request was answered
        assert len(bad.heads) == (answer is not None)


def test_closing_a_caption_ends_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecloud_sd.cloud.transport.POLL", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as threads:
        connection = Connection(f"http://127.0.0.1:{silent.getsockname()[1]}")
        connection.identity = ToyEngine().identity
        verification = remote_verification(connection)
        waiting = threads.submit(verification.wait)
        silent.accept()[0].detach()  # the request is on its way
        start = time.monotonic()
        verification.close()
        with pytest.raises(CloudFault, match="the caption was closed"):
            waiting.result()
        assert time.monotonic() - start < 1
        connection.close()


def test_closing_a_caption_ends_a_look_up_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, release = threading.Event(), threading.Event()

    def hang(*arguments: object, **options: object) -> list[object]:
        looking.set()
        release.wait(10)
        return []

    monkeypatch.setattr("edgecloud_sd.cloud.transport.POLL", 0.01)
    monkeypatch.setattr("socket.getaddrinfo", hang)
    with connected("http://cloud.invalid:1") as connection, ThreadPoolExecutor(1) as threads:
        connection.identity = ToyEngine().identity
        verification = remote_verification(connection)
        waiting = threads.submit(verification.wait)
        assert looking.wait(10)
        start = time.monotonic()
        verification.close()
        with pytest.raises(CloudFault, match="the caption was closed"):
            waiting.result()
        assert time.monotonic() - start < 1
        release.set()


def test_closing_a_caption_ends_a_wait_before_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecloud_sd.cloud.retry.FIRST_DELAY", 10.0)
    monkeypatch.setattr("edgecloud_sd.cloud.retry.LONGEST_DELAY", 10.0)
    connection = Connection("http://127.0.0.1:1")
    connection.identity = ToyEngine().identity
    verification = remote_verification(connection)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(verification.wait)
        start = time.monotonic()
        verification.close()
        with pytest.raises(CloudFault):
            waiting.result()
        assert time.monotonic() - start < 5
    connection.close()


def test_closing_waits_a_bounded_time_for_all_sessions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CLOSE_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = Connection(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for number in range(40):
            connection.close_session(f"session{number}")
        start = time.monotonic()
        connection.close()
        assert time.monotonic() - start < 1


def test_a_healthy_server_is_told_of_every_session_that_ends(proxy: Proxy) -> None:
    with connected(proxy.url) as connection:
        for number in range(8):
            connection.close_session(f"session{number}")
    assert sorted(endpoints(proxy)) == sorted(f"session{number}" for number in range(8))


def test_closing_a_session_of_a_closed_connection_does_not_fail(url: str) -> None:
    with connected(url) as connection:
        verification = open_verification(connection)
        connection.close()
        verification.close()


def test_a_session_of_a_closed_connection_is_refused(url: str) -> None:
    with connected(url) as connection:
        verification = open_verification(connection)
    with pytest.raises(Refused, match="closed"):
        verification.verify(0, [3], [1])


def test_closing_a_session_ends_the_attempts_of_another_thread(proxy: Proxy) -> None:
    connection = Connection(proxy.url, KEY, sleep=lambda seconds: verification.close())
    verification = connection.verifier(GREEDY, Harness()).open(PROMPT)
    proxy.plan([Fault.LOST])
    with pytest.raises(CloudFault, match="the caption was closed"):
        verification.wait()
    assert len(proxy.requests) == 1
    connection.close()
