"""Recorded drafts replayed by many edges: the recording, the metrics, and the errors that end a replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from bench import load, rows
from bench.load import Call, LoadError, RecordedCaption, RecordedRound, Replay
from edgecloud_sd import config
from edgecloud_sd.acceptance import GREEDY, Rule
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import (
    Committed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Prompt,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.steps import Steps
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import LOSSLESS
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier, SteppedVerifier, Verification, Verifier
from tests.support.serving import ToyEngine, served
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

CLOUD = ToyModel(random_table(VOCABULARY, 1), frozenset())
EDGE = ToyModel(CLOUD.table + 0.3 * random_table(VOCABULARY, 2), frozenset())  # sometimes right
MakeVerifier = Callable[[Harness], Verifier]
Alter = Callable[[Callable[[Verdict], Verdict]], None]


def make_trace(*events: Event) -> Trace:
    return Trace(tuple((float(number), event) for number, event in enumerate(events)))


def test_a_recording_has_each_escalated_draft_with_its_whole_context() -> None:
    first, local, last = Draft((5, 6)), Draft((8,)), Draft((2, 3))
    trace = make_trace(
        *(Prepared(3), Opened("edge"), Drafted(first), Escalated(first, 1), Opened("cloud")),
        *(Verified(first, Verdict(1, 7)), Committed((5,), "accepted"), Committed((7,), "correction")),
        *(Drafted(local), Committed((8,), "local")),  # not escalated
        *(Drafted(last), Escalated(last, 2), Verified(last, Verdict(2, 4)), Committed((2, 3), "accepted")),
        Finished("length"),  # before the bonus
    )
    assert load.record_rounds("a", Prompt((1, 9)), trace) == RecordedCaption(
        "a",
        Prompt((1, 9)),
        (RecordedRound((9,), (5, 6), Verdict(1, 7)), RecordedRound((9, 5, 7, 8), (2, 3), Verdict(2, 4))),
    )


def test_a_caption_that_the_edge_finished_alone_is_not_recorded() -> None:
    with pytest.raises(LoadError, match="clip-1: the cloud failed while its drafts were recorded: gone"):
        load.record_rounds("clip-1", Prompt((1,)), make_trace(Degraded("gone"), Finished("length")))


def test_each_edge_starts_with_another_caption() -> None:
    clips = [RecordedCaption(name, Prompt((1,)), ()) for name in "abc"]
    names = [[caption.clip for caption in captions] for captions in load.assign_captions(clips, 4, 2)]
    assert names == [["a", "b"], ["b", "c"], ["c", "a"], ["a", "b"]]
    assert [len(captions) for captions in load.assign_captions(clips, 2, 8)] == [3, 3]


def test_fairness_is_1_for_equal_rates_and_1_of_n_for_a_single_nonzero_rate() -> None:
    assert load.compute_fairness([3.0] * 5) == pytest.approx(1.0)
    assert load.compute_fairness([0.0, 2.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert load.compute_fairness([1.0, 3.0]) == pytest.approx(16 / 20)


def test_percentiles_are_interpolated() -> None:
    assert load.compute_percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert load.compute_percentile([float(value) for value in range(101)], 99) == 99.0
    assert load.compute_percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert load.compute_percentile([7.0], 99) == 7.0


def make_call(start: float, end: float, is_verification: bool = True, queue: float = 0.0, model: float = 0.5) -> Call:
    return Call(is_verification, start, end, queue, model)


def test_the_metrics_of_two_edges_by_hand() -> None:
    """Both edges start at 10 s. The first is done at 16 s, after 3 verifications; the other has had 1 by then."""
    first = (
        make_call(10, 11, is_verification=False),
        make_call(11, 12),
        make_call(12, 14, queue=1),
        make_call(14, 16, queue=1),
    )
    second = (
        make_call(10, 13, is_verification=False),
        make_call(13, 16, queue=2),
        replace(make_call(16, 20), is_as_recorded=False),
    )
    replay = Replay(10.0, (first, second))
    assert replay.seconds == 10.0
    assert replay.rates == [3 / 6, 1 / 6]
    metrics = load.compute_load_metrics([replay])
    assert metrics == {
        "verifications": 5 / 10,
        "p50": 2.0,
        "p99": pytest.approx(3.96),
        "prefill": 2.0,
        "queue": 4 / 5,
        "fairness": pytest.approx(16 / 20),
        "slowest": pytest.approx(1 / 3),
        "model_share": 7 * 0.5 / 10,
        "differing": 1.0,
    }
    alone = Replay(0.0, ((make_call(0, 1, is_verification=False), *(make_call(at, at + 1) for at in (1, 2, 3))),))
    both = load.compute_load_metrics([replay, alone])  # times are summed, fairness is a mean over replays
    assert both["verifications"] == (5 + 3) / (10 + 4)
    assert both["fairness"] == pytest.approx((16 / 20 + 1) / 2)
    assert list(metrics) == list(load.LOAD_METRICS)


def test_the_table_has_a_row_per_load_and_notes_differing_verdicts() -> None:
    same = dict.fromkeys(load.LOAD_METRICS, 0.25) | {"differing": 0.0}
    alone = load.LoadCase("load-pocket-1-zh", 1, 6, 2, "chinese")
    many = replace(alone, id="load-pocket-16-zh", edges=16)
    shown = load.render_load({alone.id: (alone, same), many.id: (many, same | {"differing": 2.0})}).splitlines()
    assert shown[0].split("  ")[0] == "case"
    assert shown[2].split() == ["load-pocket-1-zh", "1", "0.2", "250.0", "250.0", "0.250", "0.25", "250.0", "250.0"]
    assert shown[4:] == ["- load-pocket-16-zh: 2 verdicts differ from the recorded ones, as half precision allows"]


def test_each_metric_is_a_row_of_the_saved_benchmark() -> None:
    extra = {"load": {"figures": dict.fromkeys(load.LOAD_METRICS, 0.5)}}
    saved = {"name": "test_load[x]", "fullname": "bench/test_load.py::test_load[x]", "extra_info": extra}
    metric_rows = rows.metric_rows(saved | {"params": None, "param": "x", "options": {}})
    assert [rows.row_metric(row["name"]) for row in metric_rows] == list(load.LOAD_METRICS)
    assert metric_rows[0]["group"] == "verifications (1/s, higher is better)"
    assert metric_rows[0]["stats"]["mean"] == metric_rows[0]["stats"]["ops"] == 0.5
    assert metric_rows[1]["stats"]["mean"] == 0.5 != metric_rows[1]["stats"]["ops"]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, ["load-pocket-1-zh", "load-pocket-4-zh", "load-pocket-16-zh"]),
        ({"cloud-url": "auto", "language": "english,chinese", "k": "1,2"}, [f"load-pocket-{n}-en" for n in (1, 4, 16)]),
        ({"cloud-url": "http://cloud.example:1"}, [f"load-pocket-{n}-elsewhere-zh" for n in (1, 4, 16)]),
        ({"mode": "edge,cloud"}, []),
        ({"clock": "virtual", "profile": "published"}, []),
        ({"pair": "qwen2.5-omni"}, []),  # a server would load a second copy of the cloud's model
        ({"cloud-model": "mine"}, []),
        (
            {"pair": "qwen2.5-omni", "cloud-url": "http://cloud.example:1"},
            [f"load-qwen2.5-omni-{n}-elsewhere-zh" for n in (1, 4, 16)],
        ),
    ],
)
def test_the_load_cases_of_a_run(options: dict[str, str], ids: list[str]) -> None:
    assert [case.id for case in load.list_load_cases(config.resolve(options))] == ids


STOPPING = Stopping(frozenset(), 12)


@pytest.fixture(scope="module")
def clips() -> list[RecordedCaption]:
    """Return six captions of a toy pair, each of another prompt."""
    prompts = [Prompt((number, 3, number)) for number in range(6)]
    traces = [stamp(decode(prompt, LOSSLESS, STOPPING, EDGE, LocalVerifier(CLOUD, GREEDY))) for prompt in prompts]
    pairs = enumerate(zip(prompts, traces, strict=True))
    captions = [load.record_rounds(f"clip-{n}", prompt, trace) for n, (prompt, trace) in pairs]
    assert len({recorded.verdict for caption in captions for recorded in caption.rounds}) > 5
    return captions


@dataclass
class ReplacingEngine(ToyEngine):
    """An engine that passes each opened verification through `replace_verification`."""

    model: ToyModel = CLOUD
    replace_verification: Callable[[Verification], Verification] = field(default=lambda verification: verification)

    def verifier(self, rule: Rule, *, wants_rest: bool = False) -> SteppedVerifier:
        return _ReplacingVerifier(super().verifier(rule, wants_rest=wants_rest), self)


@dataclass(frozen=True)
class _ReplacingVerifier:
    verifier: Verifier
    engine: ReplacingEngine

    def open(self, prompt: Prompt) -> _OneStep:
        return _OneStep(self.engine.replace_verification(self.verifier.open(prompt)))

    def open_steps(self, prompt: Prompt) -> Steps[_OneStep]:
        yield 1
        return self.open(prompt)


class _OneStep:
    """A verification whose calls are one step each."""

    def __init__(self, inner: Verification) -> None:
        self.wait, self.verify, self.generate, self.close = inner.wait, inner.verify, inner.generate, inner.close

    def verify_steps(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Steps[Verdict]:
        yield 1
        return self.verify(base, tokens, draft)

    def feed_steps(self, output: Sequence[int]) -> Steps[None]:
        yield from ()


@pytest.fixture(scope="module")
def engine() -> ReplacingEngine:
    return ReplacingEngine()


@pytest.fixture(scope="module")
def cloud(engine: ReplacingEngine) -> Iterator[MakeVerifier]:
    """Yield the verifiers of one connection without patience, as the benchmark makes them."""
    with served(engine) as url, closing(Connection(url, patience=0.0)) as connection:
        yield partial(connection.verifier, GREEDY)


@pytest.mark.slow
def test_every_edge_gets_the_recorded_verdicts(cloud: MakeVerifier, clips: list[RecordedCaption]) -> None:
    assignments = load.assign_captions(clips, 5, 4)
    replay = load.replay_rounds(assignments, cloud)
    for calls, captions in zip(replay.edges, assignments, strict=True):
        kinds = [kind for caption in captions for kind in (False, *(True for _ in caption.rounds))]
        assert [call.is_verification for call in calls] == kinds
        ends = [replay.start, *(call.end for call in calls)]
        assert all(before <= call.start <= call.end for before, call in zip(ends, calls, strict=False))
        assert all(call.is_as_recorded for call in calls)
        assert all(0 <= call.queue + call.model <= call.end - call.start for call in calls)
    assert load.compute_load_metrics([replay])["differing"] == 0


def test_edges_start_together(clips: list[RecordedCaption]) -> None:
    """An edge that started late would run without the load of the others."""
    thread_counts: list[int] = []

    def count(harness: Harness) -> Verifier:
        thread_counts.append(sum(thread.name.startswith("edge_") for thread in threading.enumerate()))
        return LocalVerifier(CLOUD, GREEDY)

    load.replay_rounds([clips[:1]] * 32, count)
    assert thread_counts == [32] * 32


@dataclass(frozen=True)
class RecordingVerifier:
    """A local verifier that records the base and the tokens of each request."""

    requests: list[tuple[int, list[int]]]
    replace_verification: Callable[[Verification], Verification] = lambda verification: verification

    def open(self, prompt: Prompt) -> Verification:
        self.requests.clear()
        verification = self.replace_verification(LocalVerifier(CLOUD, GREEDY).open(prompt))
        verify = verification.verify

        def record(base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
            self.requests.append((base, list(tokens)))
            return verify(base, tokens, draft)

        verification.verify = record  # type: ignore[method-assign]
        return verification


def test_a_replay_sends_the_requests_of_the_recorded_caption(clips: list[RecordedCaption]) -> None:
    sent: list[tuple[int, list[int]]] = []
    for clip in clips:
        list(decode(clip.prompt, LOSSLESS, STOPPING, EDGE, RecordingVerifier(sent)))
        before = list(sent)
        load.replay_rounds([[clip]], lambda harness: RecordingVerifier(sent))
        assert sent == before
    assert any(base for base, _ in sent)


def test_after_another_verdict_the_whole_context_is_sent(clips: list[RecordedCaption]) -> None:
    """The cloud's context then has tokens that the recording has not."""
    sent: list[tuple[int, list[int]]] = []
    clip = next(clip for clip in clips if clip.rounds[0].verdict.accepted < len(clip.rounds[0].draft))

    def accept_one_more(verification: Verification) -> Verification:
        return AlteredVerification(verification, 0, lambda verdict: replace(verdict, accepted=verdict.accepted + 1))

    load.replay_rounds([[clip]], lambda harness: RecordingVerifier(sent, accept_one_more), is_exact=False)
    assert sent[1] == (0, list(clip.rounds[1].context))
    assert sent[2][0] == len(clip.rounds[1].context) + clip.rounds[1].verdict.accepted


class AlteredVerification:
    """A verification whose verdict number `place`, from 0, is altered."""

    def __init__(self, inner: Verification, place: int, alter: Callable[[Verdict], Verdict]) -> None:
        self._inner, self._left, self._alter = inner, place, alter
        self.wait, self.generate, self.close = inner.wait, inner.generate, inner.close

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self._left -= 1
        verdict = self._inner.verify(base, tokens, draft)
        return self._alter(verdict) if self._left == -1 else verdict


def raise_error(verdict: Verdict) -> Verdict:
    raise RuntimeError("the model failed")


@pytest.fixture
def alter(engine: ReplacingEngine, monkeypatch: pytest.MonkeyPatch) -> Alter:
    """Return a function that makes the server alter the second verdict of every prompt."""

    def set_alteration(change: Callable[[Verdict], Verdict]) -> None:
        monkeypatch.setattr(
            engine, "replace_verification", lambda verification: AlteredVerification(verification, 1, change)
        )

    return set_alteration


def test_a_wrong_verdict_ends_the_replay_with_its_place(
    cloud: MakeVerifier, clips: list[RecordedCaption], alter: Alter
) -> None:
    alter(lambda verdict: replace(verdict, token=(verdict.token + 1) % VOCABULARY))
    with pytest.raises(
        LoadError, match=r"^edge 0, clip clip-2, round 1: the answer is Verdict.*, not Verdict\(accepted="
    ):
        load.replay_rounds([clips[2:]], cloud)
    with pytest.raises(LoadError, match=r"^edge \d, clip clip-\d, round 1: .*"):
        load.replay_rounds(load.assign_captions(clips, 4, 2), cloud)


def test_an_inexact_replay_counts_differing_verdicts_and_continues_from_the_recording(
    cloud: MakeVerifier, clips: list[RecordedCaption], alter: Alter
) -> None:
    alter(lambda verdict: replace(verdict, accepted=0, token=(verdict.token + 1) % VOCABULARY))
    replay = load.replay_rounds(load.assign_captions(clips, 2, 2), cloud, is_exact=False)
    assert load.compute_load_metrics([replay])["differing"] == 4  # one per caption


def test_a_failed_call_ends_the_replay(cloud: MakeVerifier, clips: list[RecordedCaption], alter: Alter) -> None:
    alter(raise_error)
    with pytest.raises(LoadError, match=r"^edge 0, clip clip-0, round 1: the cloud failed: .* 500"):
        load.replay_rounds([clips[:1]], cloud)


def test_a_second_attempt_ends_the_replay(cloud: MakeVerifier, clips: list[RecordedCaption], alter: Alter) -> None:
    alter(raise_error)
    url = cloud(Harness()).verifier.connection.url  # type: ignore[attr-defined]
    with (
        closing(Connection(url, patience=5.0, sleep=lambda seconds: None)) as patient,
        pytest.raises(LoadError, match=r"^edge 0, clip clip-0, round 1: was not answered at the first attempt"),
    ):
        load.replay_rounds([clips[:1]], partial(patient.verifier, GREEDY))


def test_a_mix_up_of_sessions_ends_the_replay(
    cloud: MakeVerifier,
    clips: list[RecordedCaption],
    engine: ReplacingEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifications: list[Verification] = []

    def always_the_first(verification: Verification) -> Verification:
        verifications.append(verification)
        return verifications[0]

    monkeypatch.setattr(engine, "replace_verification", always_the_first)
    with pytest.raises(LoadError, match=r"^edge \d, clip clip-\d, round \d: "):
        load.replay_rounds(load.assign_captions(clips, 4, 1), cloud)


def test_a_failure_of_one_edge_ends_the_replay_of_all_edges(cloud: MakeVerifier, clips: list[RecordedCaption]) -> None:
    wrong = replace(clips[0].rounds[0], verdict=Verdict(0, VOCABULARY))
    harnesses: list[Harness] = []

    def count(harness: Harness) -> Verifier:
        harnesses.append(harness)
        return cloud(harness)

    bad = replace(clips[0], rounds=(wrong, *clips[0].rounds[1:]))
    with pytest.raises(LoadError, match=r"^edge 1, clip clip-0, round 0: "):
        load.replay_rounds([clips * 50, [bad]], count)
    assert len(harnesses) < 1 + len(clips) * 50
