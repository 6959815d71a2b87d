"""Recorded drafts replayed by many edges: what is recorded and summed up, and that nothing wrong goes unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from bench import load, rows
from bench.load import Call, LoadError, RecordedCaption, RecordedRound, Replay
from edgecloud_sd import config, gate
from edgecloud_sd.acceptance import GREEDY, Rule
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.decoder import Decoding, decode
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
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier, Verification, Verifier
from tests.support.serving import ToyEngine, served
from tests.support.strategies import VOCABULARY
from tests.support.toy import ToyModel, random_table

CLOUD = ToyModel(random_table(VOCABULARY, 1), frozenset())
EDGE = ToyModel(CLOUD.table + 0.3 * random_table(VOCABULARY, 2), frozenset())  # right about some of it


def traced(*events: Event) -> Trace:
    return Trace(tuple((float(number), event) for number, event in enumerate(events)))


def test_a_recording_holds_each_draft_that_was_sent_with_its_whole_context() -> None:
    first, own, last = Draft((5, 6)), Draft((8,)), Draft((2, 3))
    trace = traced(
        *(Prepared(3), Opened("edge"), Drafted(first), Escalated(first, 1), Opened("cloud")),
        *(Verified(first, Verdict(1, 7)), Committed((5,), "accepted"), Committed((7,), "correction")),
        *(Drafted(own), Committed((8,), "local")),  # which the gate kept here
        *(Drafted(last), Escalated(last, 2), Verified(last, Verdict(2, 4)), Committed((2, 3), "accepted")),
        Finished("length"),  # before the bonus
    )
    assert load.record_rounds("a", Prompt((1, 9)), trace) == RecordedCaption(
        "a",
        Prompt((1, 9)),
        (RecordedRound((9,), (5, 6), Verdict(1, 7)), RecordedRound((9, 5, 7, 8), (2, 3), Verdict(2, 4))),
    )


def test_a_caption_that_the_cloud_failed_is_no_recording() -> None:
    with pytest.raises(LoadError, match="clip-1: the cloud failed while its drafts were recorded: gone"):
        load.record_rounds("clip-1", Prompt((1,)), traced(Degraded("gone"), Finished("length")))


def test_each_edge_begins_at_another_caption() -> None:
    clips = [RecordedCaption(name, Prompt((1,)), ()) for name in "abc"]
    found = [[clip.clip for clip in share] for share in load.shares(clips, 4, 2)]
    assert found == [["a", "b"], ["b", "c"], ["c", "a"], ["a", "b"]]
    assert [len(share) for share in load.shares(clips, 2, 8)] == [3, 3]


def test_fairness_is_1_where_all_get_the_same_and_1_in_n_where_one_gets_all() -> None:
    assert load.fairness([3.0] * 5) == pytest.approx(1.0)
    assert load.fairness([0.0, 2.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert load.fairness([1.0, 3.0]) == pytest.approx(16 / 20)


def test_percentiles_are_interpolated() -> None:
    assert load.percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert load.percentile([float(each) for each in range(101)], 99) == 99.0
    assert load.percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert load.percentile([7.0], 99) == 7.0


def call(start: float, end: float, verify: bool = True, queue: float = 0.0, model: float = 0.5) -> Call:
    return Call(verify, start, end, queue, model)


def test_what_is_summed_up() -> None:
    """Two edges let go at 10 s. The first is done at 16 s; until then it got 3 verifications, the other 1."""
    ours = (call(10, 11, verify=False), call(11, 12), call(12, 14, queue=1), call(14, 16, queue=1))
    other = (call(10, 13, verify=False), call(13, 16, queue=2), replace(call(16, 20), same=False))
    one = Replay(10.0, (ours, other))
    assert one.seconds == 10.0
    assert one.rates == [3 / 6, 1 / 6]
    found = load.load_metrics([one])
    assert found == {
        "verifications": 5 / 10,
        "p50": 2.0,
        "p99": pytest.approx(3.96),
        "opening": 2.0,
        "queue": 4 / 5,
        "fairness": pytest.approx(16 / 20),
        "slowest": pytest.approx(1 / 3),
        "model_share": 7 * 0.5 / 10,
        "differing": 1.0,
    }
    alone = Replay(0.0, ((call(0, 1, verify=False), *(call(at, at + 1) for at in (1, 2, 3))),))
    both = load.load_metrics([one, alone])  # times together, fairness replay by replay
    assert both["verifications"] == (5 + 3) / (10 + 4)
    assert both["fairness"] == pytest.approx((16 / 20 + 1) / 2)
    assert list(found) == list(load.LOAD_METRICS)


def test_the_table_has_a_row_a_load_and_says_what_differs() -> None:
    same = dict.fromkeys(load.LOAD_METRICS, 0.25) | {"differing": 0.0}
    alone = load.LoadCase("load-pocket-1-zh", 1, 6, 2, "chinese")
    many = replace(alone, id="load-pocket-16-zh", edges=16)
    shown = load.render_load({alone.id: (alone, same), many.id: (many, same | {"differing": 2.0})}).splitlines()
    assert shown[0].split("  ")[0] == "case"
    assert shown[2].split() == ["load-pocket-1-zh", "1", "0.2", "250.0", "250.0", "0.250", "0.25", "250.0", "250.0"]
    assert shown[4:] == ["- load-pocket-16-zh: 2 verdicts are not the recorded ones, as half precision allows"]


def test_a_figure_is_a_row_of_the_saved_benchmark() -> None:
    extra = {"load": {"figures": dict.fromkeys(load.LOAD_METRICS, 0.5)}}
    saved = {"name": "test_load[x]", "fullname": "bench/test_load.py::test_load[x]", "extra_info": extra}
    found = rows.metric_rows(saved | {"params": None, "param": "x", "options": {}})
    assert [rows.row_metric(each["name"]) for each in found] == list(load.LOAD_METRICS)
    assert found[0]["group"] == "verifications (1/s, higher is better)"
    assert found[0]["stats"]["mean"] == found[0]["stats"]["ops"] == 0.5
    assert found[1]["stats"]["mean"] == 0.5 != found[1]["stats"]["ops"]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, ["load-pocket-1-zh", "load-pocket-4-zh", "load-pocket-16-zh"]),
        ({"cloud-url": "auto", "language": "english,chinese", "k": "1,2"}, [f"load-pocket-{n}-en" for n in (1, 4, 16)]),
        ({"cloud-url": "http://cloud.example:1"}, [f"load-pocket-{n}-elsewhere-zh" for n in (1, 4, 16)]),
        ({"mode": "edge,cloud"}, []),
        ({"clock": "virtual", "profile": "published"}, []),
        ({"pair": "qwen2.5-omni"}, []),  # a second copy of the cloud would be loaded beside the first
        ({"cloud-model": "mine"}, []),
        (
            {"pair": "qwen2.5-omni", "cloud-url": "http://cloud.example:1"},
            [f"load-qwen2.5-omni-{n}-elsewhere-zh" for n in (1, 4, 16)],
        ),
    ],
)
def test_which_runs_have_a_load(options: dict[str, str], ids: list[str]) -> None:
    assert [each.id for each in load.load_cases(config.resolve(options))] == ids


@pytest.fixture(scope="module")
def clips() -> list[RecordedCaption]:
    """Six captions of a toy pair, each of its own prompt."""
    how = Decoding("speculative", Stopping(frozenset(), 12), 3, gate.ALWAYS)
    prompts = [Prompt((number, 3, number)) for number in range(6)]
    traces = [stamp(decode(prompt, how, EDGE, LocalVerifier(CLOUD, GREEDY))) for prompt in prompts]
    made = [load.record_rounds(f"clip-{n}", *each) for n, each in enumerate(zip(prompts, traces, strict=True))]
    assert len({round.verdict for clip in made for round in clip.rounds}) > 5
    return made


@dataclass
class Unruly(ToyEngine):
    """Lets a test come between a client and the model: `instead` is given every verification that is opened."""

    model: ToyModel = CLOUD
    instead: Callable[[Verification], Verification] = field(default=lambda opened: opened)

    def verifier(self, rule: Rule) -> Verifier:
        return _Between(super().verifier(rule), self)


@dataclass(frozen=True)
class _Between:
    verifier: Verifier
    engine: Unruly

    def open(self, prompt: Prompt) -> Verification:
        return self.engine.instead(self.verifier.open(prompt))


@pytest.fixture(scope="module")
def engine() -> Unruly:
    return Unruly()


@pytest.fixture(scope="module")
def cloud(engine: Unruly) -> Iterator[Callable[[Harness], Verifier]]:
    """As the benchmark asks it: one key, no patience."""
    with served(engine) as url, closing(Connection(url, patience=0.0)) as connection:
        yield partial(connection.verifier, GREEDY)


def test_every_edge_gets_every_recorded_verdict(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption]
) -> None:
    given = load.shares(clips, 5, 4)
    found = load.replay_rounds(given, cloud)
    for calls, share in zip(found.edges, given, strict=True):
        assert [each.verify for each in calls] == [
            verify for clip in share for verify in (False, *(True for _ in clip.rounds))
        ]
        ends = [found.start, *(each.end for each in calls)]
        assert all(before <= each.start <= each.end for before, each in zip(ends, calls, strict=False))
        assert all(each.same and 0 <= each.queue + each.model <= each.end - each.start for each in calls)
    assert load.load_metrics([found])["differing"] == 0


def test_edges_begin_together(clips: list[RecordedCaption]) -> None:
    """Or one that starts late would find the others gone, and no load."""
    there: list[int] = []

    def counted(stage: Harness) -> Verifier:
        there.append(sum(each.name.startswith("edge_") for each in threading.enumerate()))
        return LocalVerifier(CLOUD, GREEDY)

    load.replay_rounds([clips[:1]] * 32, counted)
    assert there == [32] * 32


@dataclass(frozen=True)
class Noted:
    """Passes on what it is asked, and keeps it."""

    asked: list[tuple[int, list[int]]]
    instead: Callable[[Verification], Verification] = lambda opened: opened

    def open(self, prompt: Prompt) -> Verification:
        self.asked.clear()
        opened = self.instead(LocalVerifier(CLOUD, GREEDY).open(prompt))
        verify = opened.verify

        def noted(base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
            self.asked.append((base, list(tokens)))
            return verify(base, tokens, draft)

        opened.verify = noted  # type: ignore[method-assign]
        return opened


def test_a_replay_sends_what_the_edge_had_sent(clips: list[RecordedCaption]) -> None:
    sent: list[tuple[int, list[int]]] = []
    how = Decoding("speculative", Stopping(frozenset(), 12), 3, gate.ALWAYS)
    for clip in clips:
        list(decode(clip.prompt, how, EDGE, Noted(sent)))
        before = list(sent)
        load.replay_rounds([[clip]], lambda stage: Noted(sent))
        assert sent == before
    assert any(base for base, _ in sent)


def test_after_another_verdict_the_whole_context_is_sent(clips: list[RecordedCaption]) -> None:
    """The cloud then counts on tokens that are not in the recording."""
    sent: list[tuple[int, list[int]]] = []
    clip = next(clip for clip in clips if clip.rounds[0].verdict.accepted < len(clip.rounds[0].draft))

    def kept(opened: Verification) -> Verification:
        return Spoilt(opened, 0, lambda given: replace(given, accepted=given.accepted + 1))

    load.replay_rounds([[clip]], lambda stage: Noted(sent, kept), exact=False)
    assert sent[1] == (0, list(clip.rounds[1].context))
    assert sent[2][0] == len(clip.rounds[1].context) + clip.rounds[1].verdict.accepted


class Spoilt:
    """Passes on what it is asked, but for the `at`-th verdict, which `spoil` gives."""

    def __init__(self, inner: Verification, at: int, spoil: Callable[[Verdict], Verdict]) -> None:
        self._inner, self._left, self._spoil = inner, at, spoil
        self.wait, self.generate, self.close = inner.wait, inner.generate, inner.close

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        self._left -= 1
        given = self._inner.verify(base, tokens, draft)
        return self._spoil(given) if self._left == -1 else given


def raised(given: Verdict) -> Verdict:
    raise RuntimeError("the model broke")


@pytest.fixture
def spoil(engine: Unruly, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Verdict], Verdict]], None]:
    """Spoils the second verdict of every prompt, at the server."""
    return lambda how: monkeypatch.setattr(engine, "instead", lambda opened: Spoilt(opened, 1, how))


Spoil = Callable[[Callable[[Verdict], Verdict]], None]


def test_a_wrong_verdict_is_noticed_and_named(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption], spoil: Spoil
) -> None:
    spoil(lambda given: replace(given, token=(given.token + 1) % VOCABULARY))
    with pytest.raises(
        LoadError, match=r"^edge 0, clip clip-2, round 1: the answer is Verdict.*, not Verdict\(accepted="
    ):
        load.replay_rounds([clips[2:]], cloud)
    with pytest.raises(LoadError, match=r"^edge \d, clip clip-\d, round 1: .*"):
        load.replay_rounds(load.shares(clips, 4, 2), cloud)


def test_where_exactness_is_not_promised_it_is_counted_and_the_replay_goes_on_from_the_recording(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption], spoil: Spoil
) -> None:
    spoil(lambda given: replace(given, accepted=0, token=(given.token + 1) % VOCABULARY))
    found = load.replay_rounds(load.shares(clips, 2, 2), cloud, exact=False)
    assert load.load_metrics([found])["differing"] == 4  # one a caption


def test_a_call_that_is_not_answered_is_noticed(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption], spoil: Spoil
) -> None:
    spoil(raised)
    with pytest.raises(
        LoadError, match=r"^edge 0, clip clip-0, round 1: the cloud failed once, the last time with: .* 500"
    ):
        load.replay_rounds([clips[:1]], cloud)


def test_a_call_that_is_answered_at_a_second_attempt_is_noticed(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption], spoil: Spoil
) -> None:
    spoil(raised)
    url = cloud(Harness()).connection.url  # type: ignore[attr-defined]
    with (
        closing(Connection(url, patience=5.0, sleep=lambda seconds: None)) as patient,
        pytest.raises(LoadError, match=r"^edge 0, clip clip-0, round 1: was not answered at the first attempt"),
    ):
        load.replay_rounds([clips[:1]], partial(patient.verifier, GREEDY))


def test_a_session_that_is_mixed_up_with_anothers_is_noticed(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption], engine: Unruly, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Verification] = []

    def first(mine: Verification) -> Verification:
        opened.append(mine)
        return opened[0]

    monkeypatch.setattr(engine, "instead", first)
    with pytest.raises(LoadError, match=r"^edge \d, clip clip-\d, round \d: "):
        load.replay_rounds(load.shares(clips, 4, 1), cloud)


def test_one_edge_that_fails_ends_the_replay_of_all(
    cloud: Callable[[Harness], Verifier], clips: list[RecordedCaption]
) -> None:
    wrong = replace(clips[0].rounds[0], verdict=Verdict(0, VOCABULARY))
    asked: list[Harness] = []

    def counted(stage: Harness) -> Verifier:
        asked.append(stage)
        return cloud(stage)

    bad = replace(clips[0], rounds=(wrong, *clips[0].rounds[1:]))
    with pytest.raises(LoadError, match=r"^edge 1, clip clip-0, round 0: "):
        load.replay_rounds([clips * 50, [bad]], counted)
    assert len(asked) < 1 + len(clips) * 50
