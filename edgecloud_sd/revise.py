"""Revise: after a correction the edge redrafts with its old draft and with the target's opinions on it.

The old draft holds a token for each place after the correction. The verdict holds the target's opinion on each of these
places, formed with the old draft before it. At each place the edge has its own most likely token, given all that is
before it now. It proposes the target's opinion in two cases:

- `repeat`: its own token is that of the old draft. The edge would say again what the target has answered.
- `context`: in that case, or if the two tokens before the place are those of the old draft there.

In every other case it proposes its own token. A third way is for captions of free form, in which places shift:

- `aligned`: `context` if the two tokens before the place are those of the old draft there. Otherwise `repeat` at the
  nearest place of the old draft after the same two or three tokens. An opinion on such a place never replaces a token
  that differs from the old draft's: captions would say one thing twice, or end early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REVISE_NAMES = ("none", "repeat", "context", "aligned")
NEIGHBOURS = 2  # tokens before a place that must be equal


@dataclass(frozen=True)
class OldDraft:
    """A sequence of context and draft tokens that a correction replaced, by place.

    `first` is the place of the first opinion. `opinions` has a token for each place from there on that was verified.
    """

    tokens: tuple[int, ...] = ()
    first: int = 0
    opinions: tuple[int, ...] = ()

    def expected(self, place: int) -> tuple[int, ...]:
        """Return the tokens that are likely to follow from a place on: the opinions, then the rest of the old draft."""
        end = self.first + len(self.opinions)
        return (*self.opinions[max(place - self.first, 0) :], *self.tokens[max(place, end) :])

    def opinion(self, place: int) -> int | None:
        """Return the target's opinion on a place, or None if it has none."""
        index = place - self.first
        return self.opinions[index] if 0 <= index < len(self.opinions) else None


def expect(old: OldDraft, context: Sequence[int], revise: str) -> tuple[int, ...]:
    """Return the tokens that are likely to follow `context`, as a guess that the edge checks in one pass."""
    return old.expected(_old_place(old, context, revise))


def propose(edge_token: int, old: OldDraft, context: Sequence[int], revise: str) -> tuple[int, bool]:
    """Return the token to propose after `context`, and True if it is an opinion of the target.

    `edge_token` is the edge's own most likely token.
    """
    place = _old_place(old, context, revise)
    opinion = old.opinion(place)
    if opinion is None or revise == "none":
        return edge_token, False
    is_repeated = edge_token == old.tokens[place]
    has_context = revise != "repeat" and place == len(context) and _has_neighbours(old, place, context, NEIGHBOURS)
    return (opinion, True) if is_repeated or has_context else (edge_token, False)


def _old_place(old: OldDraft, context: Sequence[int], revise: str) -> int:
    """Return the place of the old draft that corresponds to the place after `context`.

    It has the same number. If the two tokens before it differ, `aligned` takes the nearest place after the same three
    tokens, else the nearest one after the same two.
    """
    place = len(context)
    if revise != "aligned" or (old.opinion(place) is not None and _has_neighbours(old, place, context, NEIGHBOURS)):
        return place
    nearest = sorted(range(old.first, old.first + len(old.opinions)), key=lambda other: abs(other - place))
    for length in (NEIGHBOURS + 1, NEIGHBOURS):
        for other in nearest:
            if _has_neighbours(old, other, context, length):
                return other
    return place


def _has_neighbours(old: OldDraft, place: int, context: Sequence[int], length: int) -> bool:
    """Return True if `length` tokens of the old draft before a place are the last ones of `context`."""
    return place >= length and tuple(context[-length:]) == old.tokens[place - length : place]
