"""Adaptive k: close to the best fixed k, and learned from the generations alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.events import (
    Ahead,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Opened,
    Prompt,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.forecast import adaptive_k
from edgecloud_sd.forecast.adaptive_k import (
    CHANCE_DECAY,
    COST_DECAY,
    FIRST_K,
    MAX_CHANGE,
    PRIOR_ACCEPTANCE,
    PRIOR_WEIGHT,
    AdaptiveK,
    DecayingMean,
    DraftLengths,
)
from edgecloud_sd.forecast.model import MAX_K, Workload
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing import profile as profiles
from edgecloud_sd.timing.clock import stamp
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile
from tests.support.fakes import ModelCloud, Scripted

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
    "published as run": (profiles.load_profile("published-as-run"), links.NO_LINK),
}


def wrong_positions(rate: float) -> list[frozenset[int]]:
    """Return the positions at which the edge is wrong in each caption, drawn with probability `1 - rate`."""
    source = random.Random(5)
    return [frozenset(i for i in range(TOKENS) if source.random() > rate) for _ in range(CLIPS)]


def decode_caption(wrong: frozenset[int], k: int | AdaptiveK, harness: Harness, ahead: int = 0) -> Trace:
    """Decode one caption losslessly, with a fixed k or with adaptive k."""
    run = k if isinstance(k, AdaptiveK) else None
    strategy = Strategy("speculative", k=None if isinstance(k, AdaptiveK) else k, draft_ahead=ahead)
    stopping, cloud = Stopping(frozenset(), TOKENS), ModelCloud(Scripted())
    events = generation_events(lambda: PROMPT, strategy, stopping, Scripted(wrong), cloud, harness, adaptive_k=run)
    return stamp(events, harness.watch)


def seconds(
    k: int | AdaptiveK, machines: Profile, link: Link, captions: Sequence[frozenset[int]], ahead: int = 0
) -> float:
    """Return the seconds of all captions without the edge's prefill, which takes the same time at each k."""
    total = 0.0
    for number, wrong in enumerate(captions):
        trace = decode_caption(wrong, k, Harness(machines, link, str(number)), ahead)
        total += trace.seconds - min(s for s, event in trace.events if isinstance(event, Opened))
    return total


# with draft-ahead the forecast leaves out the right tokens of a guess that the draft has no room for
@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "most"), [(0, 1.05), (16, 1.12)])
@pytest.mark.parametrize("name", SETTINGS)
def test_adaptive_k_takes_little_more_time_than_the_best_fixed_k(name: str, ahead: int, most: float) -> None:
    machines, link = SETTINGS[name]
    captions = wrong_positions(0.92)
    fixed = {k: seconds(k, machines, link, captions, ahead) for k in range(1, 13)}
    run = AdaptiveK(ahead, correction=machines.correction)
    assert seconds(run, machines, link, captions, ahead) <= most * min(fixed.values())


@pytest.mark.slow
def test_drafts_grow_with_the_round_trip_and_shrink_with_a_slow_draft_model() -> None:
    captions = wrong_positions(0.95)[:12]
    far, slow = AdaptiveK(), AdaptiveK()
    for number, wrong in enumerate(captions):
        decode_caption(wrong, far, Harness(IN_PROCESS, Link("far", 1.0, 1e9, 1e9), str(number)))
        decode_caption(wrong, slow, Harness(profiles.load_profile("published"), links.NO_LINK, str(number)))
    assert far.fastest() > 10
    assert slow.fastest() == 1


@pytest.mark.slow
def test_a_faster_link_in_mid_run_shortens_drafts() -> None:
    run = AdaptiveK()
    captions = wrong_positions(0.95)
    machines = Profile("slow draft model", Costs(0.02, ((1, 0.1),)), Costs(0.04, ((1, 0.02),)))
    for number, wrong in enumerate(captions[:4]):
        decode_caption(wrong, run, Harness(machines, Link("far", 1.0, 1e9, 1e9), str(number)))
    before = run.fastest(near=run.last_k)
    for number, wrong in enumerate(captions):
        decode_caption(wrong, run, Harness(machines, links.NO_LINK, str(number)))
    assert run.fastest(near=run.last_k) < before / 2


@pytest.mark.slow
@given(st.floats(0.001, 0.1), st.floats(0.001, 0.5), st.floats(0.001, 0.2), st.integers(1, 12))
def test_the_observed_costs_are_those_of_the_profile(step: float, base: float, slope: float, k: int) -> None:
    machines = Profile("drawn", Costs(0.1, ((1, step),)), Costs(0.1, ((1, base), (40, base + 39 * slope))), queue=0.25)
    run = AdaptiveK()
    for wrong in wrong_positions(0.8)[:3]:
        run.replay(decode_caption(wrong, k, Harness(machines, Link("still", 0.5, float("inf"), float("inf")))))
    assert run.edge_costs.step == pytest.approx(step)
    lengths = {run.trip.x / run.trip.n} if run.trip.slope == 0 else {1.0, 20.0, 40.0}
    for fed in lengths:  # drafts of one length show no slope
        assert run.trip.at(fed) == pytest.approx(0.75 + base + (fed - 1) * slope)


def test_replaying_a_trace_gives_the_statistics_of_the_generation_itself() -> None:
    original, replayed = AdaptiveK(), AdaptiveK()
    for number, wrong in enumerate(wrong_positions(0.9)[:5]):
        harness = Harness(*SETTINGS["laptop over 4g"], str(number))
        replayed.replay(decode_caption(wrong, original, harness))
    assert original == replayed


def test_a_correction_that_costs_time_is_no_part_of_a_step_in_a_run_or_replayed() -> None:
    machines = Profile("costly", Costs(0.5, ((1, 0.125),)), Costs(0.5, ((1, 1.0),)), correction=4.0)
    original, replayed = AdaptiveK(correction=4.0), AdaptiveK(correction=4.0)
    for wrong in wrong_positions(0.8)[:5]:
        replayed.replay(decode_caption(wrong, original, Harness(machines)))
    assert original == replayed
    assert original.step.mean == pytest.approx(0.125)


@pytest.mark.slow
def test_the_first_draft_fills_the_time_until_the_cloud_is_ready() -> None:
    cloud = Costs(0.215, ((1, 0.02), (2, 0.023)))  # a longer draft costs time, although its discarded tokens are reused
    machines = Profile("late", Costs(0.1, ((1, 0.01),)), cloud)
    captions = wrong_positions(0.7)
    eager, lazy, fast_prefill = AdaptiveK(), AdaptiveK(has_eager_prefill=False), AdaptiveK()
    for wrong in captions:
        first_lengths = [
            next(len(event.draft.tokens) for _, event in trace.events if isinstance(event, Drafted))
            for trace in (
                decode_caption(wrong, eager, Harness(machines, links.NO_LINK)),
                decode_caption(wrong, lazy, Harness(machines, links.NO_LINK)),
                decode_caption(
                    wrong, fast_prefill, Harness(replace(machines, cloud=replace(cloud, prefill=0.1)), links.NO_LINK)
                ),
            )
        ]
    assert eager.cloud_delay.mean == pytest.approx(0.115, abs=0.02)
    assert first_lengths[0] in (10, 11, 12)
    assert max(first_lengths[1:]) < 6


def add_two_rounds(
    run: AdaptiveK, step_beside_prefill: float, step: float, k: int = 4, accepted: int = 4
) -> DraftLengths:
    """Add a generation of two rounds, whose first draft is beside the cloud's prefill. Return the generation."""
    draft, generation = Draft(tuple(range(k))), run.for_generation()
    generation.see(Opened("edge"), 0.0)
    for seconds_per_step, wait in ((step_beside_prefill, 0.1), (step, None)):
        generation.see(Drafted(draft, passes=(1,) * k), k * seconds_per_step)
        generation.see(Escalated(draft, 1), 0.0)
        if wait is not None:
            generation.see(Opened("cloud"), wait)
        generation.see(Verified(draft, Verdict(accepted, 9)), 0.02)
    return generation


def start_generation(run: AdaptiveK) -> DraftLengths:
    """Return a generation whose edge has prefilled its prompt."""
    generation = run.for_generation()
    generation.see(Opened("edge"), 0.0)
    return generation


def test_drafting_beside_the_prefill_is_free_except_on_a_shared_processor() -> None:
    separate, shared, lazy = AdaptiveK(), AdaptiveK(), AdaptiveK(has_eager_prefill=False)
    for _ in range(10):
        add_two_rounds(separate, 0.01, 0.01, accepted=2)
        add_two_rounds(shared, 0.02, 0.01, accepted=2)
        add_two_rounds(lazy, 0.01, 0.01, accepted=2)
    assert shared.step.mean == separate.step.mean == pytest.approx(0.01)
    assert shared.cloud_delay.mean == pytest.approx(0.18)
    length = start_generation(lazy).fastest()
    assert start_generation(separate).fastest() > start_generation(shared).fastest() == length


def test_a_search_within_a_generation_changes_the_length_little() -> None:
    run = AdaptiveK(last_k=12)
    generation = add_two_rounds(run, 0.01, 10.0, accepted=0)
    assert generation.fastest() == 12 - MAX_CHANGE
    assert run.fastest(near=2) == 1
    run.last_k = 16
    assert start_generation(run).fastest() == 1


def test_the_time_of_the_consumer_of_events_does_not_count() -> None:
    harness = Harness(IN_PROCESS, links.NO_LINK)
    draft = Draft((1, 2))
    events: list[Event] = [Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(2, 3))]
    run = AdaptiveK()
    for _ in run.for_generation().observe(events, harness.watch.seconds):
        harness.spend(5.0)
    assert (run.step.mean, run.trip.mean) == (0.0, 0.0)


@pytest.mark.parametrize(("search", "searches"), [(0.0, 6), (0.0149, 6), (0.016, 3), (0.5, 1)])
def test_the_search_for_a_length_takes_at_most_1_percent_of_the_time(
    monkeypatch: pytest.MonkeyPatch, search: float, searches: int
) -> None:
    harness = Harness(IN_PROCESS, links.NO_LINK)
    run = AdaptiveK()
    add_two_rounds(run, 0.01, 0.01)
    spent = []

    def fastest(near: int | None = None) -> int:
        harness.spend(search)
        spent.append(search)
        return 4

    monkeypatch.setattr(run, "fastest", fastest)

    def rounds() -> Iterator[Event]:
        draft = Draft((1, 2))
        yield Opened("edge")
        for _ in range(5):
            for event in (Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(2, 3))):
                harness.spend(0.5)
                yield event

    for _ in run.for_generation().observe(rounds(), harness.watch.seconds):
        pass
    assert len(spent) == searches


def test_interleaved_generations_share_the_statistics_and_nothing_else() -> None:
    one_by_one, interleaved = AdaptiveK(), AdaptiveK()
    for _ in range(2):
        add_two_rounds(one_by_one, 0.01, 0.01)
    first, second = interleaved.for_generation(), interleaved.for_generation()
    draft = Draft((0, 1, 2, 3))
    for event, seconds in ((Opened("edge"), 0.0), (Drafted(draft), 0.04), (Escalated(draft, 1), 0.0)):
        first.see(event, seconds)
        second.see(event, seconds)
    for generation in (first, second):
        generation.see(Opened("cloud"), 0.1)
        generation.see(Verified(draft, Verdict(4, 9)), 0.02)
    assert interleaved.cloud_delay == one_by_one.cloud_delay
    assert interleaved.trip.mean == pytest.approx(one_by_one.trip.mean)


def test_a_length_exists_after_thousands_of_local_rounds() -> None:
    run = AdaptiveK()
    generation = run.for_generation()
    draft = Draft((1, 2, 3))
    events: list[Event] = [
        Drafted(draft),
        Escalated(draft, 1),
        Verified(draft, Verdict(1, 4)),
        *[Drafted(draft)] * 5000,
    ]
    for event in events:
        generation.see(event, 0.01)
    assert run.escalated.mean < 1e-40
    assert 1 <= run.fastest() <= MAX_K


def test_rounds_after_a_fault_of_the_cloud_do_not_count_for_the_gate_rate() -> None:
    run = AdaptiveK()
    draft = Draft((1, 2, 3))
    start: list[Event] = [Opened("edge"), Drafted(draft), Escalated(draft, 1), Verified(draft, Verdict(1, 4))]
    generation = run.for_generation()
    for event in [*start, Degraded("gone"), *[Drafted(draft)] * 20]:
        generation.see(event, 0.01)
    assert run.escalated.mean == 1.0
    generation = run.for_generation()
    for event in [*start, Drafted(draft)]:
        generation.see(event, 0.01)
    assert run.escalated.mean < 1.0


def test_the_statistics_of_two_rounds_written_by_hand() -> None:
    first, second = Draft((1, 2, 3)), Draft((5, 6, 7, 8))
    run = AdaptiveK(draft_ahead=9)
    generation = run.for_generation()
    assert generation.choose_k() == FIRST_K
    generation.see(Drafted(first, passes=(1, 1, 1)), 0.3)
    generation.see(Escalated(first, 2), 0.0)
    generation.see(Ahead((4, 5, 6), 3), 0.6)
    generation.see(Verified(first, Verdict(3, 4)), 0.4)
    assert run.step.mean == pytest.approx((COST_DECAY * 0.3 + 0.6) / (COST_DECAY * 3 + 3))
    assert (run.trip.mean, run.trip.x) == (1.0, 5.0)  # 0.6 spent drafting ahead, and 0.4 waiting
    assert [position.mean for position in run.accepted] == [1.0, 1.0, 1.0]
    assert run.guessed.mean == 1.0
    generation.see(Drafted(second, 2, (1, 1)), 0.2)  # two tokens were drafted ahead, two are new
    assert run.drafted.mean == 3.0  # the draft without tokens drafted ahead
    generation.see(Escalated(second, 1), 0.0)
    generation.see(Verified(second, Verdict(1, 9)), 0.5)
    assert [position.n for position in run.accepted] == [1 + CHANCE_DECAY, 1 + CHANCE_DECAY, CHANCE_DECAY]
    assert [position.y for position in run.accepted] == [1 + CHANCE_DECAY, CHANCE_DECAY, CHANCE_DECAY]


def test_a_wide_pass_is_no_step_and_shows_how_many_discarded_tokens_were_right() -> None:
    run = AdaptiveK()
    generation = run.for_generation()
    draft = Draft((1, 2, 3, 4, 5))
    for passes, seconds in (((1,) * 5, 5 * 0.1), ((4, 2), 0.1 + 0.3 + 0.1 + 0.1)):  # 0.1 s, and 0.1 s per token above 1
        generation.see(Drafted(draft, passes=passes), seconds)
        generation.see(Escalated(draft, 1), 0.0)
        generation.see(Verified(draft, Verdict(1, 9)), 1.0)
    assert run.edge_costs.step == pytest.approx(0.1)
    assert run.edge_costs.seconds(4) == pytest.approx(0.4)
    assert run.repeated.mean == 1.0  # two passes instead of five saved three, for the three discarded tokens


def test_the_workload_of_rounds_written_by_hand_with_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads: list[Workload] = []

    def fastest_k(machines: Profile, link: Link, workload: Workload, *_: object) -> int:
        workloads.append(workload)
        return 1

    monkeypatch.setattr(adaptive_k, "fastest_k", fastest_k)
    first, second, third = Draft((1, 2, 3)), Draft((4, 5)), Draft((6,))
    run = AdaptiveK(draft_ahead=5, is_lossless=False)
    generation = run.for_generation()
    events: list[Event] = [
        *(Opened("edge"), Drafted(first), Drafted(second), Escalated(second, 4)),
        *(Ahead((7, 8), 2), Verified(second, Verdict(2, 7))),
        *(Drafted(third, 1), Escalated(third, 1), Ahead((9,), 1), Verified(third, Verdict(1, 3))),
    ]
    for event in events:
        generation.see(event, 0.5)
    generation.fastest()
    (workload,) = workloads
    old = CHANCE_DECAY  # the weight of the value before the last
    assert workload.k == 2  # the mean of 3 and 2, the drafts without tokens drafted ahead
    assert workload.gate_rate == pytest.approx((old + 1) / (old**2 + old + 1))
    assert workload.sent_with_draft == pytest.approx((4 * old + 1) / (old + 1))
    assert workload.bonus_guess_rate == pytest.approx(
        (old + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (old + 1 + PRIOR_WEIGHT)
    )
    assert (workload.draft_ahead, workload.is_lossless) == (5, False)
    assert workload.acceptance_by_position == run.acceptance()


def test_acceptance_is_assumed_high_until_it_is_observed() -> None:
    assert AdaptiveK().acceptance() == pytest.approx([PRIOR_ACCEPTANCE**i for i in range(1, MAX_K + 1)])
    run = AdaptiveK()
    for _ in range(200):
        run.for_generation().see(Verified(Draft((1, 2)), Verdict(1, 3)), 0.1)
    first, second, third, *_ = run.acceptance()
    assert first > 0.98
    assert second == pytest.approx(first * PRIOR_WEIGHT * PRIOR_ACCEPTANCE / (run.accepted[1].n + PRIOR_WEIGHT))
    assert third == pytest.approx(second * PRIOR_ACCEPTANCE)


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 2))), st.floats(0, 1), st.floats(0, 1))
def test_the_fitted_line_is_exact_on_a_line_and_never_falls(
    points: list[tuple[int, float]], base: float, slope: float
) -> None:
    line, noise = DecayingMean(), DecayingMean()
    for x, y in points:
        line.add(base + slope * x, x)
        noise.add(y, x)
    if len({x for x, _ in points}) > 1:
        assert line.at(20) == pytest.approx(base + 20 * slope, abs=1e-6)
    if points:
        assert 0 <= noise.at(1) <= noise.at(2) <= noise.at(30)
