"""Proposals from the prompt's text and from earlier captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd import gate
from edgecloud_sd.events import Committed, Drafted, Event, Opened, Prompt, Trace, Verified
from edgecloud_sd.lookup import MAX_NGRAM, START, CaptionHistory, Lookup, Match, NgramIndex
from edgecloud_sd.pipeline import generation_events
from edgecloud_sd.revise import REVISE_NAMES
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.clock import Watch, stamp
from edgecloud_sd.verifier import CloudFault
from tests.support.fakes import ModelCloud, Scripted
from tests.support.strategies import VOCABULARY, Scene, gates, ks, ranks, scenes

EOS = 9
texts = st.lists(st.integers(0, 3), max_size=8)
histories = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=24), max_size=6)
more_gates = st.sampled_from([gate.risk_gate(), gate.risk_gate(0.9, 0.5), gate.parse_gate("token", 1.0)])


def history_of(captions: Sequence[Sequence[int]], capacity: int = 1000) -> CaptionHistory:
    history = CaptionHistory(capacity)
    for caption in captions:
        history.add(caption)
    return history


@pytest.mark.parametrize(
    ("captions", "prompt", "output", "expected"),
    [
        ([], [], [], ()),
        ([[1, 2, EOS]], [], [], (1, 2, EOS)),  # nothing follows EOS
        ([[1, 3, EOS], [1, 3, EOS], [1, 2, EOS]], [], [1], (3, EOS)),  # the most frequent
        ([[1, 3, EOS], [1, 2, EOS]], [], [1], (2, EOS)),  # the latest of equals
        ([[1, 2, 3, EOS], [4, 2, 5, EOS], [4, 2, 5, EOS]], [], [1, 2], (3, EOS)),  # the longest suffix
        ([[1, 2, EOS]], [], [7], ()),
        ([[1, 2, EOS]], [7, 1, 4], [7], (1, 4)),  # the prompt, with more tokens that match
        ([[1, 2, EOS]], [1, 4], [1], (2, EOS)),  # the history, with as many tokens that match
        ([], [5, 8, 6], [5], ()),  # 8 is a control token
        ([[1, 2, 3, 4, 5, 6]], [], [1], (2, 3, 4, 5)),  # the length
        ([[2, 1, 3]], [0, 5], [], (2, 1, 3)),  # the last prompt token is no word of a caption
    ],
)
def test_a_proposal_is_what_followed_the_longest_suffix(
    captions: list[list[int]], prompt: list[int], output: list[int], expected: tuple[int, ...]
) -> None:
    lookup = Lookup(history_of(captions), {EOS}, {8}, prompt)
    assert lookup.propose([0, *output], 4) == expected


@given(st.lists(texts, max_size=6), texts)
def test_a_match_is_the_most_frequent_then_latest_follower_of_the_longest_suffix(
    captions: list[list[int]], context: list[int]
) -> None:
    match = NgramIndex(captions).match(context)
    for length in range(min(MAX_NGRAM, len(context)), 0, -1):
        followers = [
            caption[i] for caption in captions for i in range(length, len(caption))
            if caption[i - length : i] == context[-length:]
        ]  # fmt: skip
        if followers:
            counts = Counter(followers)
            best = max(reversed(followers), key=lambda token: counts[token])
            assert match == Match(length, best)
            return
    assert match is None


@given(st.lists(texts, max_size=9), st.integers(0, 20))
def test_a_full_history_equals_one_of_its_latest_captions(captions: list[list[int]], capacity: int) -> None:
    history = history_of(captions, capacity)
    kept = list(captions)
    while sum(map(len, kept)) > capacity:
        del kept[0]
    fresh = history_of(kept)
    for context in ([START], *([START, *caption[:n]] for caption in captions for n in range(len(caption)))):
        assert history.match(context) == fresh.match(context)
    history.clear()
    assert history.match([START]) is None


def test_captions_of_many_threads_stay_whole() -> None:
    history = CaptionHistory(capacity=40)
    captions = [[n, 10 + n, 20 + n, EOS] for n in range(10)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(history.add, captions * 30))
    assert sum(history.match([n]) == (1, 10 + n) for n in range(10)) <= 10
    for n in range(10):
        assert history.match([n]) in (None, (1, 10 + n))


def decoded(
    scene: Scene, strategy: Strategy, captions: Sequence[Sequence[int]] = (), shared_ids: int | None = None
) -> Trace:
    """Decode a scene with lookup in its prompt and in earlier captions."""
    events = generation_events(
        lambda: scene.prompt,
        strategy,
        scene.stopping,
        scene.edge if strategy.needs_edge else None,
        ModelCloud(scene.cloud),
        shared_ids=shared_ids,
        open_lookup=partial(Lookup, history_of(captions), scene.stopping.eos, ()),
    )
    return stamp(events, Watch())


def passes(trace: Trace) -> list[int]:
    return [fed for _, event in trace.events if isinstance(event, Drafted) for fed in event.passes]


@st.composite
def strategies_of_a_model(draw: st.DrawFn) -> Strategy:
    """Draw mode edge, or any way to decode in which the edge's model drafts."""
    if draw(st.booleans()):
        return Strategy("edge")
    revise, looks_back = draw(st.sampled_from(REVISE_NAMES)), draw(st.booleans())
    chosen, ahead = draw(gates | more_gates), draw(st.sampled_from([0, 0, 3]))
    return Strategy("speculative", chosen, draw(ranks), draw(ks), None, ahead, "lazy", revise, looks_back)


@given(scenes(), strategies_of_a_model(), histories, st.sampled_from([None, 3, VOCABULARY]))
def test_guesses_of_any_history_change_no_token_and_take_no_more_passes(
    scene: Scene, strategy: Strategy, captions: list[list[int]], shared_ids: int | None
) -> None:
    alone = decoded(scene, strategy, shared_ids=shared_ids)
    guessed = decoded(scene, replace(strategy, drafter="model+lookup"), captions, shared_ids)
    assert guessed.tokens == alone.tokens
    if not strategy.draft_ahead:
        assert len(passes(guessed)) <= len(passes(alone))


@given(scenes(), ks, histories)
def test_drafts_of_any_history_are_lossless_without_a_model_at_the_edge(
    scene: Scene, k: int, captions: list[list[int]]
) -> None:
    own = decoded(scene, Strategy("cloud")).tokens
    for known in (captions, [*captions, own]):
        trace = decoded(scene, Strategy(k=k, drafter="lookup"), known)
        assert trace.tokens == own
        assert Opened("edge") not in [event for _, event in trace.events]
        assert passes(trace) == []


def test_a_caption_that_was_written_before_takes_few_passes_or_calls() -> None:
    scene = Scene(Scripted(), Scripted(), Prompt((5, 6)), Stopping(frozenset(), 20))  # type: ignore[arg-type]
    edge = decoded(scene, Strategy("edge", drafter="model+lookup"), [[0] * 20])
    assert passes(edge) == [9, 9, 2]  # a guess has up to 8 tokens, and each pass gives one more
    calls = decoded(scene, Strategy(k=6, drafter="lookup"), [[0] * 20]).events
    assert [event.verdict.accepted for _, event in calls if isinstance(event, Verified)] == [6, 6, 6]


def scripted_events(history: CaptionHistory, fault: CloudFault | None = None) -> Iterator[Event]:
    """Decode three tokens with drafter lookup, for an edge that may finish alone."""
    return generation_events(
        lambda: Prompt((5, 6)),
        Strategy(drafter="lookup"),
        Stopping(frozenset(), 3),
        None,
        ModelCloud(Scripted()),
        finish_alone=True,
        fault=fault,
        open_lookup=partial(Lookup, history, ()),
    )


def test_a_caption_enters_the_history_when_it_has_finished() -> None:
    history = CaptionHistory()
    events = scripted_events(history)
    assert any(isinstance(event, Committed) for event in events)
    assert history.match([START]) is None
    events.close()  # type: ignore[attr-defined]
    assert history.match([START]) is None
    assert list(scripted_events(history))
    assert history.match([START, 0, 0]) == Match(3, 0)


def test_no_edge_can_finish_a_caption_of_lookup_after_a_fault() -> None:
    with pytest.raises(CloudFault, match="gone"):
        list(scripted_events(CaptionHistory(), CloudFault("gone")))
