"""Tables on a terminal: short names of the cases, and widths."""

from __future__ import annotations

import pytest

from bench.tables import MAX_TABLE_WIDTH, describe_costs, describe_lengths, grid, milliseconds, short_names

SPECULATIVE = "speculative-pocket-H1.5-k3-rank20-zh"


@pytest.mark.parametrize(
    ("cases", "names"),
    [
        ([SPECULATIVE], [SPECULATIVE]),
        (["edge-pocket-zh", "cloud-pocket-zh", SPECULATIVE], ["edge", "cloud", "H1.5 k3 rank20"]),
        (["edge-pocket-zh", "edge-pocket-en"], ["zh", "en"]),
        ([SPECULATIVE, f"{SPECULATIVE}-4g"], [SPECULATIVE, f"{SPECULATIVE}-4g"]),  # one would have no name
        (["edge-a-zh", "speculative-a-edge-zh"], ["edge-a-zh", "speculative-a-edge-zh"]),
        ([], []),
    ],
)
def test_a_short_name_has_the_parts_that_tell_cases_apart(cases: list[str], names: list[str]) -> None:
    assert short_names(cases) == dict(zip(cases, names, strict=True))


def test_a_table_is_aligned_also_with_chinese_names() -> None:
    assert grid([["数据", "1.0"], ["b", "-"]], ["case", "a"]).splitlines() == [
        "case    a",
        "----  ---",
        "数据  1.0",
        "b       -",
    ]


def test_a_wide_table_has_narrower_gaps() -> None:
    headings = ["x" * 10] * 12
    assert len(grid([], headings).splitlines()[0]) == 131 <= MAX_TABLE_WIDTH
    assert len(grid([], headings[:8]).splitlines()[0]) == 94


def test_accepted_lengths_are_shares_of_the_verifications() -> None:
    assert describe_lengths([1, 3, 0, 6]) == "0 in 10%, 1 in 30%, 3 in 60% of 10 verifications"


def test_the_costs_at_the_cloud_are_four_figures_and_a_null_one_is_left_out() -> None:
    names = ("cloud_calls", "written_share", "covered_share", "cloud_positions_per_token")
    assert describe_costs(dict(zip(names, (1.5, 0.25, 1.0, 2.125), strict=True))) == (
        "1.50 calls per caption, 0.250 of the tokens written, 1.000 written or accepted, "
        "2.12 positions computed per token"
    )
    assert describe_costs(dict.fromkeys(names) | {"cloud_calls": 2}) == "2.00 calls per caption"


@pytest.mark.parametrize(("seconds", "text"), [(-1e-9, "0.0"), (0.0, "0.0"), (0.01234, "12.3"), (-0.002, "-2.0")])
def test_a_time_that_rounds_to_zero_has_no_sign(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text
