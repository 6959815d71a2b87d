"""`--k auto`: near the best fixed length wherever it is, and learnt from what a caption shows alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import gate
from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.decoder import Decoding, decode
from edgecloud_sd.events import (
    Ahead,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Opened,
    Prepared,
    Prompt,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.forecast import model as oracle
from edgecloud_sd.forecast.adaptive_k import (
    CHANCE_DECAY,
    COST_DECAY,
    FIRST_K,
    MAX_CHANGE,
    PRIOR_ACCEPTANCE,
    PRIOR_WEIGHT,
    AdaptiveK,
    DecayingMean,
)
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile as profiles
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from edgecloud_sd.verifier import LocalVerifier
from tests.support.strategies import Scripted, play

PROMPT = Prompt((5, 6))
TOKENS, CLIPS = 64, 16
IN_PROCESS = Profile("in process", Costs(0.02, ((1, 0.002),)), Costs(0.04, ((1, 0.012), (4, 0.015), (12, 0.03))))
SETTINGS = {
    "in process": (IN_PROCESS, links.NO_LINK),
    "laptop over 5g": (profiles.load_profile("laptop-gpu"), links.find_link("5g")),
    "laptop over 4g": (profiles.load_profile("laptop-gpu"), links.find_link("4g")),
    "phone over 5g": (profiles.load_profile("phone-npu"), links.find_link("5g")),
    "phone over 4g": (profiles.load_profile("phone-npu"), links.find_link("4g")),
    "published": (profiles.load_profile("published"), links.NO_LINK),
}


def wrongs(rate: float) -> list[frozenset[int]]:
    """Where the edge is wrong in each caption, as often as `1 - rate`, anywhere."""
    source = random.Random(5)
    return [frozenset(i for i in range(TOKENS) if source.random() > rate) for _ in range(CLIPS)]


def decoded(wrong: frozenset[int], k: int | AdaptiveK, stage: Harness, ahead: int = 0) -> Trace:
    how = Decoding("speculative", Stopping(frozenset(), TOKENS), k, gate.ALWAYS, ahead=ahead, is_lossless=True)
    if not isinstance(k, AdaptiveK):
        return play(PROMPT, Scripted(wrong), Scripted(), how, stage)

    def events() -> Iterator[Event]:
        verifier = stage.opened(stage.linked(LocalVerifier(stage.cloud(Scripted()), GREEDY)), "eager")
        yield Prepared(len(PROMPT.ids))
        begun = replace(how, begin=stage.begin_verdict if ahead else None)
        yield from k.look(decode(PROMPT, begun, stage.edge(Scripted(wrong)), verifier), stage.watch.seconds)

    return stamp(events(), stage.watch)


def seconds(
    k: int | AdaptiveK, machines: Profile, link: Link, captions: Sequence[frozenset[int]], ahead: int = 0
) -> float:
    """Of all captions, once both sides are open: openings are the same at each k."""
    total = 0.0
    for number, wrong in enumerate(captions):
        trace = decoded(wrong, k, Harness(machines, link, str(number)), ahead)
        total += trace.seconds - min(s for s, event in trace.events if isinstance(event, Opened))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 16])
@pytest.mark.parametrize("name", SETTINGS)
def test_auto_is_within_a_twentieth_of_the_best_fixed_length(name: str, ahead: int) -> None:
    machines, link = SETTINGS[name]
    captions = wrongs(0.92)
    fixed = {k: seconds(k, machines, link, captions, ahead) for k in range(1, 13)}
    assert seconds(AdaptiveK(ahead), machines, link, captions, ahead) <= 1.05 * min(fixed.values())


def test_where_the_round_trip_is_all_drafts_grow_and_where_the_drafter_is_slow_they_are_one_token() -> None:
    captions = wrongs(0.95)[:12]
    far, slow = AdaptiveK(), AdaptiveK()
    for number, wrong in enumerate(captions):
        decoded(wrong, far, Harness(IN_PROCESS, Link("far", 1.0, 1e9, 1e9), str(number)))
        decoded(wrong, slow, Harness(profiles.load_profile("published"), links.NO_LINK, str(number)))
    assert far.fastest() > 10
    assert slow.fastest() == 1


def test_a_faster_link_halfway_is_noticed() -> None:
    pace = AdaptiveK()
    captions = wrongs(0.95)
    for number, wrong in enumerate(captions[:4]):
        decoded(wrong, pace, Harness(profiles.load_profile("laptop-gpu"), Link("far", 1.0, 1e9, 1e9), str(number)))
    before = pace.fastest()
    for number, wrong in enumerate(captions):
        decoded(wrong, pace, Harness(profiles.load_profile("laptop-gpu"), links.NO_LINK, str(number)))
    assert pace.fastest() < before / 2


@given(st.floats(0.001, 0.1), st.floats(0.001, 0.5), st.floats(0.001, 0.2), st.integers(1, 12))
def test_what_a_caption_shows_are_the_costs_it_was_played_under(step: float, one: float, more: float, k: int) -> None:
    machines = Profile("drawn", Costs(0.1, ((1, step),)), Costs(0.1, ((1, one), (40, one + 39 * more))), queue=0.25)
    pace = AdaptiveK()
    for wrong in wrongs(0.8)[:3]:
        pace.look_back(decoded(wrong, k, Harness(machines, Link("still", 0.5, float("inf"), float("inf")))))
    assert pace.step.mean == pytest.approx(step)
    lengths = {pace.trip.x / pace.trip.n} if pace.trip.slope == 0 else {1.0, 20.0, 40.0}
    for fed in lengths:  # drafts of one length alone show no slope
        assert pace.trip.at(fed) == pytest.approx(0.75 + one + (fed - 1) * more)


def test_looking_at_events_as_they_come_is_looking_back_at_them() -> None:
    coming, back = AdaptiveK(), AdaptiveK()
    for number, wrong in enumerate(wrongs(0.9)[:5]):
        stage = Harness(*SETTINGS["laptop over 4g"], str(number))
        back.look_back(decoded(wrong, coming, stage))
    assert coming == back


def test_the_first_draft_is_as_long_as_the_cloud_takes_to_be_ready() -> None:
    machines = Profile("late", Costs(0.1, ((1, 0.01),)), Costs(0.215, ((1, 0.02),)))
    captions = wrongs(0.7)
    eager, lazy, soon = AdaptiveK(), AdaptiveK(eager=False), AdaptiveK()
    for wrong in captions:
        firsts = [
            next(len(event.draft.tokens) for _, event in trace.events if isinstance(event, Drafted))
            for trace in (
                decoded(wrong, eager, Harness(machines, links.NO_LINK)),
                decoded(wrong, lazy, Harness(machines, links.NO_LINK)),
                decoded(wrong, soon, Harness(replace(machines, cloud=Costs(0.1, ((1, 0.02),))), links.NO_LINK)),
            )
        ]
    assert eager.opening.mean == pytest.approx(0.115, abs=0.01)
    assert firsts[0] in (10, 11, 12)
    assert max(firsts[1:]) < 6


def caption(pace: AdaptiveK, beside: float, step: float, k: int = 4, accepted: int = 4) -> None:
    """Two rounds: a draft beside the opening of the cloud at `beside` s a step, then one at `step` s."""
    draft = Draft(tuple(range(k)))
    pace.see(Opened("edge"), 0.0)
    for drafted, waited in ((beside, 0.1), (step, None)):
        pace.see(Drafted(draft), k * drafted)
        pace.see(Escalated(draft, 1), 0.0)
        if waited is not None:
            pace.see(Opened("cloud"), waited)
        pace.see(Verified(draft, Verdict(accepted, 9)), 0.02)


def test_drafting_beside_an_opening_is_free_but_on_a_processor_that_both_share() -> None:
    apart, together, lazy = AdaptiveK(), AdaptiveK(), AdaptiveK(eager=False)
    for _ in range(10):
        caption(apart, 0.01, 0.01, accepted=2)
        caption(together, 0.02, 0.01, accepted=2)
        caption(lazy, 0.01, 0.01, accepted=2)
    assert together.step.mean == apart.step.mean == pytest.approx(0.01)
    assert together.opening.mean == pytest.approx(0.18)
    for pace in (apart, together, lazy):
        pace.see(Opened("edge"), 0.0)
    assert apart.fastest() > together.fastest() == lazy.fastest()


def test_within_a_caption_a_draft_is_about_as_long_as_the_one_before_it() -> None:
    pace = AdaptiveK()
    pace._k = 12
    caption(pace, 0.01, 10.0, accepted=0)
    assert pace.fastest() == 12 - MAX_CHANGE
    pace._k = 2
    assert pace.fastest() == 1
    pace._k = 16
    pace.see(Opened("edge"), 0.0)
    assert pace.fastest() == 1


def test_the_time_of_who_reads_the_events_is_not_the_rounds() -> None:
    stage = Harness(IN_PROCESS, links.NO_LINK)
    draft = Draft((1, 2))
    events: list[Event] = [Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(2, 3))]
    pace = AdaptiveK()
    for _ in pace.look(events, stage.watch.seconds):
        stage.spend(5.0)
    assert (pace.step.mean, pace.trip.mean) == (0.0, 0.0)


@pytest.mark.parametrize(("look", "looks"), [(0.0, 6), (0.0149, 6), (0.016, 3), (0.5, 1)])
def test_to_look_for_a_length_takes_a_hundredth_of_the_time(
    monkeypatch: pytest.MonkeyPatch, look: float, looks: int
) -> None:
    stage = Harness(IN_PROCESS, links.NO_LINK)
    pace = AdaptiveK()
    caption(pace, 0.01, 0.01)
    looked = []

    def fastest() -> int:
        stage.spend(look)
        looked.append(look)
        return 4

    monkeypatch.setattr(pace, "fastest", fastest)

    def rounds() -> Iterator[Event]:
        draft = Draft((1, 2))
        yield Opened("edge")
        for _ in range(5):
            for event in (Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(2, 3))):
                stage.spend(0.5)
                yield event

    for _ in pace.look(rounds(), stage.watch.seconds):
        pass
    assert len(looked) == looks


def test_thousands_of_rounds_that_stay_on_the_device_leave_a_length() -> None:
    pace = AdaptiveK()
    draft = Draft((1, 2, 3))
    events: list[Event] = [
        Drafted(draft),
        Escalated(draft, 1),
        Verified(draft, Verdict(1, 4)),
        *[Drafted(draft)] * 5000,
    ]
    for event in events:
        pace.see(event, 0.01)
    assert pace.escalated.mean < 1e-40
    assert 1 <= pace.fastest() <= oracle.MAX_K


def test_what_the_edge_does_alone_after_a_fault_tells_nothing_of_the_gate() -> None:
    pace = AdaptiveK()
    draft = Draft((1, 2, 3))
    caption: list[Event] = [Opened("edge"), Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(1, 4))]
    for event in [*caption, Degraded("gone"), *[Drafted(draft)] * 20]:
        pace.see(event, 0.01)
    assert pace.escalated.mean == 1.0
    for event in [*caption, Drafted(draft)]:
        pace.see(event, 0.01)
    assert pace.escalated.mean < 1.0


def test_a_round_by_hand() -> None:
    first, second = Draft((1, 2, 3)), Draft((5, 6, 7, 8))
    pace = AdaptiveK(ahead=9)
    assert pace() == FIRST_K
    pace.see(Drafted(first), 0.3)
    pace.see(Escalated(first, 2), 0.0)
    pace.see(Ahead((4, 5, 6), 3), 0.6)
    pace.see(Verified(first, Verdict(3, 4)), 0.4)
    assert pace.step.mean == pytest.approx((COST_DECAY * 0.3 + 0.6) / (COST_DECAY * 3 + 3))
    assert (pace.trip.mean, pace.trip.x) == (1.0, 5.0)  # 0.6 beside which it drafted, and 0.4 that it waited
    assert [place.mean for place in pace.kept] == [1.0, 1.0, 1.0]
    assert pace.guessed.mean == 1.0
    pace.see(Drafted(second, 2), 0.2)  # two that were there, two more
    assert pace.drafted.mean == 3.0  # of those begun anew
    pace.see(Escalated(second, 1), 0.0)
    pace.see(Verified(second, Verdict(1, 9)), 0.5)
    assert [place.n for place in pace.kept] == [1 + CHANCE_DECAY, 1 + CHANCE_DECAY, CHANCE_DECAY]
    assert [place.y for place in pace.kept] == [1 + CHANCE_DECAY, CHANCE_DECAY, CHANCE_DECAY]


def test_what_the_oracle_is_asked_of_a_gate_that_keeps_rounds_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[oracle.Workload] = []

    def fastest_k(machines: Profile, link: Link, work: oracle.Workload, *_: object) -> int:
        asked.append(work)
        return 1

    monkeypatch.setattr(oracle, "fastest_k", fastest_k)
    first, second, third = Draft((1, 2, 3)), Draft((4, 5)), Draft((6,))
    pace = AdaptiveK(ahead=5, is_lossless=False)
    events: list[Event] = [
        *(Opened("edge"), Drafted(first), Drafted(second), Escalated(second, 4)),
        *(Ahead((7, 8), 2), Verified(second, Verdict(2, 7))),
        *(Drafted(third, 1), Escalated(third, 1), Ahead((9,), 1), Verified(third, Verdict(1, 3))),
    ]
    for event in events:
        pace.see(event, 0.5)
    pace.fastest()
    (work,) = asked
    old = CHANCE_DECAY  # what was seen one step before counts so much
    assert work.k == 2  # of the drafts begun anew, 3 and 2
    assert work.gate_rate == pytest.approx((old + 1) / (old**2 + old + 1))
    assert work.sent == pytest.approx((4 * old + 1) / (old + 1))
    assert work.guess == pytest.approx((old + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (old + 1 + PRIOR_WEIGHT))
    assert (work.ahead, work.is_lossless) == (5, False)
    assert work.accepted == pace.acceptance()


def test_acceptance_is_believed_better_than_most_until_it_is_seen() -> None:
    assert AdaptiveK().acceptance() == pytest.approx([PRIOR_ACCEPTANCE**i for i in range(1, oracle.MAX_K + 1)])
    pace = AdaptiveK()
    for _ in range(200):
        pace.see(Verified(Draft((1, 2)), Verdict(1, 3)), 0.1)
    first, second, third, *_ = pace.acceptance()
    assert first > 0.98
    assert second == pytest.approx(first * PRIOR_WEIGHT * PRIOR_ACCEPTANCE / (pace.kept[1].n + PRIOR_WEIGHT))
    assert third == pytest.approx(second * PRIOR_ACCEPTANCE)


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 2))), st.floats(0, 1), st.floats(0, 1))
def test_a_line_is_found_and_never_falls(points: list[tuple[int, float]], base: float, slope: float) -> None:
    line, noise = DecayingMean(), DecayingMean()
    for x, y in points:
        line.add(base + slope * x, x)
        noise.add(y, x)
    if len({x for x, _ in points}) > 1:
        assert line.at(20) == pytest.approx(base + 20 * slope, abs=1e-6)
    if points:
        assert 0 <= noise.at(1) <= noise.at(2) <= noise.at(30)
