"""The contract of a Session as a state machine. A subclass defines `open` and the stateless `oracle`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from edgecloud_sd.session import Session, sync


class SessionMachine(RuleBasedStateMachine):
    """Random calls of extend, truncate and sync, compared with an oracle that recomputes every row without a cache."""

    vocabulary: int
    tolerance: float
    longest = 24

    def open(self) -> Session:
        raise NotImplementedError

    def oracle(self, tokens: list[int]) -> Tensor:
        """Return the logits [len(tokens), vocab] of a stateless model after the same prompt."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.session = self.open()
        self.expected: list[int] = []

    def check(self, rows: Tensor, count: int) -> None:
        torch.testing.assert_close(rows, self.oracle(self.expected)[-count:], rtol=self.tolerance, atol=self.tolerance)

    def token(self, number: int) -> int:
        return number % self.vocabulary

    @precondition(lambda self: len(self.expected) < self.longest)
    @rule(numbers=st.lists(st.integers(0, 10_000), min_size=1, max_size=5))
    def extend(self, numbers: list[int]) -> None:
        tokens = [self.token(number) for number in numbers]
        self.expected += tokens
        self.check(self.session.extend(tokens), len(tokens))

    @rule(share=st.floats(0, 1))
    def truncate(self, share: float) -> None:
        length = round(share * len(self.expected))
        del self.expected[length:]
        self.session.truncate(length)

    @rule(numbers=st.lists(st.integers(0, 10_000), min_size=1, max_size=5), share=st.floats(0, 1), data=st.data())
    def sync_to_another_context(self, numbers: list[int], share: float, data: st.DataObject) -> None:
        prefix = self.expected[: round(share * len(self.expected))][: self.longest]
        self.expected = prefix + [self.token(number) for number in numbers]
        rows = data.draw(st.integers(1, len(self.expected)))
        self.check(sync(self.session, self.expected, rows), rows)

    @rule(beyond=st.integers(1, 3))
    def truncating_beyond_the_tokens_is_an_error(self, beyond: int) -> None:
        with pytest.raises(ValueError, match="cannot truncate"):
            self.session.truncate(len(self.expected) + beyond)

    @invariant()
    def tokens_are_exactly_those_that_were_fed(self) -> None:
        assert list(self.session.tokens) == self.expected
