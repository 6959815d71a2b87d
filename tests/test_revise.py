"""Revise: its rules by hand, and the wide pass of the drafter against drafting token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.drafter import Drafter
from edgecloud_sd.events import Prompt
from edgecloud_sd.revise import REVISE_NAMES, OldDraft, expect, propose
from edgecloud_sd.strategy import Strategy
from tests.support.fakes import Scripted
from tests.support.replay import Old, plain_proposal
from tests.support.strategies import VOCABULARY, Scene, scenes

# Place 3 was corrected from 5 to 9. The target has opinions on places 4 to 7.
OLD = OldDraft((1, 2, 3, 5, 6, 7, 6, 8, 4), 4, (16, 17, 18, 19))
SHIFTED = OldDraft((1, 2, 3, 5, 6, 7, 6, 7, 8), 4, (16, 17, 18, 19, 20))  # 6 7 comes twice


@pytest.mark.parametrize(
    ("old", "context", "own", "none", "repeat", "context_too", "aligned"),
    [
        (OLD, (1, 2, 3, 9), 6, 6, 16, 16, 16),  # the edge says again what the target has answered
        (OLD, (1, 2, 3, 9), 5, 5, 5, 5, 5),  # its own token is another, after another token
        (OLD, (1, 2, 3, 9, 6), 5, 5, 5, 5, 5),  # only one of the two tokens before is the old one
        (OLD, (1, 2, 3, 9, 6, 7), 5, 5, 5, 18, 18),  # both are
        (OLD, (1, 2, 3, 9, 6, 7), 6, 6, 18, 18, 18),
        (OLD, (1, 2, 3, 9, 6, 7, 6, 8), 4, 4, 4, 4, 4),  # no opinion on this place
        (OLD, (1, 2, 3, 9, 0, 6, 7), 6, 6, 6, 6, 18),  # the old draft has these two tokens one place before
        (OLD, (1, 2, 3, 9, 0, 6, 7), 5, 5, 5, 5, 5),  # but there it has another token
        (OLD, (1, 2, 3, 9, 0, 6, 7), 8, 8, 19, 19, 8),
        (SHIFTED, (1, 2, 3, 9, 0, 6, 7), 6, 6, 6, 6, 18),  # the first of two places equally near
        (SHIFTED, (1, 2, 3, 9, 7, 6, 7), 8, 8, 8, 8, 20),  # three equal tokens before two
        (SHIFTED, (1, 2, 3, 9, 0, 5, 6, 7), 5, 5, 5, 20, 20),  # the place of the same number before all others
        (OldDraft(), (1,), 6, 6, 6, 6, 6),
        (OldDraft((1, 2, 3), 2, ()), (1, 4), 3, 3, 3, 3, 3),  # the target was not asked for its opinions
    ],
)
def test_the_rules_by_hand(
    old: OldDraft, context: tuple[int, ...], own: int, none: int, repeat: int, context_too: int, aligned: int
) -> None:
    answers = [propose(own, old, context, revise) for revise in REVISE_NAMES]
    assert [token for token, _ in answers] == [none, repeat, context_too, aligned]
    assert all(is_opinion == (token >= 16) for token, is_opinion in answers)


@pytest.mark.parametrize(
    ("context", "revise", "expected"),
    [
        ((1, 2, 3, 9), "none", (16, 17, 18, 19, 4)),  # the opinions, then the rest of the old draft
        ((1, 2, 3, 9, 16, 17, 18), "context", (19, 4)),
        ((1, 2, 3, 9, 16, 17, 18, 19), "repeat", (4,)),
        ((1, 2, 3, 9, 16, 17, 18, 19, 4), "repeat", ()),
        ((1, 2, 3, 9, 0, 6, 7), "aligned", (18, 19, 4)),
        ((1, 2, 3, 9, 0, 6, 7), "context", (19, 4)),
    ],
)
def test_the_guess_of_what_follows_by_hand(context: tuple[int, ...], revise: str, expected: tuple[int, ...]) -> None:
    assert expect(OLD, context, revise) == expected


ids = st.integers(0, VOCABULARY - 1)
lists = st.lists(ids, max_size=12)
sizes = st.sampled_from([None, None, 4])


@settings(max_examples=4 * settings().max_examples)
@given(scenes(), lists, st.integers(1, 12), st.data(), st.sampled_from(REVISE_NAMES), sizes)
def test_a_wide_pass_drafts_the_tokens_of_drafting_one_by_one(
    scene: Scene, start: list[int], k: int, data: st.DataObject, revise: str, shared_ids: int | None
) -> None:
    drafter = Drafter(scene.edge.open(scene.prompt), scene.stopping.eos, Strategy(k=k, revise=revise), shared_ids)
    before = [scene.prompt.last, *start]
    drafter.follow(before)
    drafted = drafter.draft(data.draw(st.integers(1, 12)), 12).tokens
    place = data.draw(st.integers(0, len(drafted) - 1))
    correction = data.draw(ids.filter(lambda token: token != drafted[place]))
    later = len(drafted) - place - 1
    rest = data.draw(st.lists(ids, min_size=later, max_size=later) | st.just([]))
    drafter.take_passes()

    context, room = [*before, *drafted[:place], correction], data.draw(st.integers(k, 20))
    drafter.follow(context, rest)
    guess = expect(OldDraft((*before, *drafted), len(context), tuple(rest)), context, revise)
    tokens = drafter.draft(k, room).tokens
    old = Old((*before, *drafted), tuple(enumerate(rest, len(context))))
    expected = draft_one_by_one(scene, context, old, k, revise, shared_ids)
    assert tokens == expected
    passes = drafter.take_passes()
    assert 1 <= len(passes) <= len(tokens)
    if tokens[: len(guess)] == guess[: len(tokens)] and len(tokens) <= min(len(guess), room - 1) + 1:
        assert len(passes) == 1
    assert len(drafter.tokens) <= room


def draft_one_by_one(
    scene: Scene, context: list[int], old: Old, k: int, revise: str, shared_ids: int | None
) -> tuple[int, ...]:
    """Return up to `k` tokens from plain rows of logits."""
    tokens: tuple[int, ...] = ()
    while len(tokens) < k and scene.stopping.eos.isdisjoint(tokens):
        before = [*context, *tokens]
        read = [min(token, shared_ids - 1) for token in before] if shared_ids else before
        own = scene.edge.logits([*scene.prompt.ids[:-1], *read])[:shared_ids].argmax()
        tokens += (plain_proposal(int(own), old, before, revise)[0],)
    return tokens


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_opinions_stay_until_the_next_correction_however_much_was_drafted_ahead(ahead: int) -> None:
    drafter = Drafter(Scripted().open(Prompt((1,))), frozenset(), Strategy(k=1, revise="repeat"))
    drafter.follow([1])
    assert drafter.draft(6, 9).tokens == (0, 0, 0, 0, 0, 0)
    drafter.follow([1, 2], [5, 6, 7, 8, 9])  # a correction of the first token
    assert drafter.draft(1, 1).tokens == (5,)  # there is no room for a guess
    drafter.draft_ahead(1, 1 + ahead, lambda: False)
    drafter.follow([1, 2, 5, 6])  # the draft is accepted, and the bonus is the token that the edge would draft
    assert drafter.draft(3, 3).tokens == drafter.tokens == (7, 8, 9)
    drafter.follow([1, 2, 5, 6, 7, 3], [4])
    assert drafter.draft(2, 9).tokens == (0, 0)


def test_a_wide_pass_ends_at_eos() -> None:
    drafter = Drafter(Scripted().open(Prompt((1,))), frozenset({7}), Strategy(k=6, revise="repeat"))
    drafter.follow([1])
    drafter.draft(6, 9)
    drafter.follow([1, 2], [5, 6, 7, 8, 9])
    assert drafter.draft(6, 9).tokens == drafter.tokens == (5, 6, 7)
    assert drafter.take_passes()[-1] == 6  # the correction and the guess, which goes on after EOS
