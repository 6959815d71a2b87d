"""Cost profiles: those of the package, saving and loading, and the errors of a bad file."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud_sd.timing import profile
from edgecloud_sd.timing.profile import Costs, Profile, ProfileError
from tests.support.strategies import costs, profiles

GOOD = """
source: timed by hand
features: 0.01
gate: 0.002
queue: 0.1
draft_at_cloud: 0.004
correction: 0.3
edge:
  prefill: 0.5
  forward: {1: 0.04, 2: 0.05}
cloud:
  prefill: 1
  forward: {8: 0.09, 1: 0.02}
"""


@pytest.mark.parametrize("name", profile.PROFILE_NAMES)
def test_every_profile_of_the_package_loads_and_names_its_source(name: str) -> None:
    loaded = profile.load_profile(name)
    assert loaded.name == name
    assert len(loaded.source) > 80
    assert loaded.edge.step > 0
    assert loaded.cloud.step > 0


def test_the_published_profile_has_the_published_figures() -> None:
    published = profile.load_profile("published")
    assert (published.edge.step, published.cloud.step) == (0.380, 0.0387)
    assert (published.edge.prefill, published.cloud.prefill) == (7.5, 0.35)
    assert (published.features, published.gate, published.queue, published.draft_at_cloud) == (0, 0, 0, None)


def test_the_published_run_took_longer_for_a_verification_and_for_a_correction() -> None:
    as_run, published = profile.load_profile("published-as-run"), profile.load_profile("published")
    assert (as_run.edge.step, as_run.cloud.step, as_run.correction) == (0.376, 0.0387, 0.704)
    assert {as_run.cloud.seconds(n) for n in (2, 6, 7.5, 400)} == {0.342}  # no verification feeds a single token
    assert as_run.edge.prefill == published.edge.prefill
    assert as_run.cloud.prefill == published.cloud.prefill
    assert published.correction == 0


def test_a_file_is_read_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert profile.load_profile(str(path)) == Profile(
        "mine",
        Costs(0.5, ((1, 0.04), (2, 0.05))),
        Costs(1.0, ((1, 0.02), (8, 0.09))),
        features=0.01,
        gate=0.002,
        queue=0.1,
        draft_at_cloud=0.004,
        correction=0.3,
        source="timed by hand",
    )


words = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), max_size=3).map(" ".join)


@settings(max_examples=20)  # YAML is slow
@given(profiles(), words, st.sampled_from([None, 0.0, 0.25]), st.floats(0, 1e9))
def test_a_saved_profile_loads_unchanged(
    drawn: Profile, source: str, draft_at_cloud: float | None, features: float
) -> None:
    before = replace(drawn, source=source, draft_at_cloud=draft_at_cloud, features=features)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "drawn.yaml")
        profile.save_profile(before, path)
        assert profile.load_profile(str(path)) == before


@given(profiles(), words)
def test_a_profile_from_json_is_unchanged(drawn: Profile, source: str) -> None:
    before = replace(drawn, source=source)
    assert profile.profile_from_json(json.loads(json.dumps(asdict(before)))) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GOOD, "- 1", ": must be a map of fields to values, not a list"),
        (GOOD, "", ": must be a map of fields to values, not a NoneType"),
        (GOOD, "a: [", ": is not YAML"),
        (GOOD, "source: x", ": missing field cloud, edge"),
        ("queue:", "queues:", ": unknown field queues; choose from cloud, correction, draft_at_cloud, edge, "),
        ("features: 0.01", "features: -0.01", ", features: must be a number of seconds, 0 or more, not -0.01"),
        ("gate: 0.002", "gate: fast", ", gate: must be a number of seconds, 0 or more, not 'fast'"),
        ("queue: 0.1", "queue: .inf", ", queue: must be a number of seconds, 0 or more, not inf"),
        ("queue: 0.1", "queue: .nan", ", queue: must be a number of seconds, 0 or more, not nan"),
        ("queue: 0.1", "queue: true", ", queue: must be a number of seconds, 0 or more, not True"),
        ("draft_at_cloud: 0.004", "draft_at_cloud: []", ", draft_at_cloud: must be a number of seconds"),
        ("queue: 0.1", "queue:", ", queue: must be a number of seconds, 0 or more, not None"),
        ("correction: 0.3", "correction: -1", ", correction: must be a number of seconds, 0 or more, not -1"),
        ("correction: 0.3", "correction: .nan", ", correction: must be a number of seconds, 0 or more, not nan"),
        ("correction: 0.3", "corrections: 0.3", ": unknown field corrections; choose from cloud, correction, "),
        ("source: timed by hand", "source: [a, b]", ", source: must be a text, not ['a', 'b']"),
        ("prefill: 0.5", "prefill: -1", ", edge, prefill: must be a number of seconds, 0 or more, not -1"),
        ("prefill: 1\n", "prefill:\n", ", cloud, prefill: must be a number of seconds, 0 or more, not None"),
        ("  prefill: 0.5\n", "", ", edge: missing field prefill"),
        ("  prefill: 1\n", "  prefill: 1\n  step: 2\n", ", cloud: unknown field step; choose from forward, prefill"),
        ("{1: 0.04, 2: 0.05}", "0.04", ", edge, forward: must map token counts, 1 included, to seconds, not 0.04"),
        ("{1: 0.04, 2: 0.05}", "{2: 0.05}", ", edge, forward: must map token counts, 1 included, to seconds"),
        ("{8: 0.09, 1: 0.02}", "{0: 0.01, 1: 0.02}", ", cloud, forward: must map token counts, 1 included"),
        ("{8: 0.09, 1: 0.02}", "{x: 0.01, 1: 0.02}", ", cloud, forward: must map token counts, 1 included"),
        ("{8: 0.09, 1: 0.02}", "{8: x, 1: 0.02}", ", cloud, forward, 8: must be a number of seconds, 0 or more"),
        (
            "{8: 0.09, 1: 0.02}",
            "{8: 0.01, 1: 0.02}",
            ", cloud, forward, 8: 0.01 s is less than at 1 (0.02 s); use times that do not fall",
        ),
        ("{1: 0.04, 2: 0.05}", "{1: 0}", ", edge, forward, 1: must be above 0 s"),
    ],
)
def test_a_bad_profile_is_refused_with_its_file_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ProfileError, match=re.escape(f"{path}{message}")):
        profile.load_profile(str(path))


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"^no profile 'toaster': .* phone-npu, published, published-as-run$"):
        profile.load_profile("toaster")


def test_a_file_that_is_not_text_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match=r"bad\.yaml: is not YAML"):
        profile.load_profile(str(path))


def test_costs_with_one_point_are_constant() -> None:
    assert [Costs(0, ((1, 0.5),)).seconds(n) for n in (1, 2, 99)] == [0.5, 0.5, 0.5]


def test_costs_are_linear_between_points_and_follow_the_overall_slope_outside() -> None:
    table = Costs(0, ((2, 2.0), (4, 3.0), (6, 6.0)))
    assert [table.seconds(n) for n in (1, 2, 3, 4, 5, 6, 7, 10)] == [1, 2, 2.5, 3, 4.5, 6, 7, 10]
    assert table.step == 1


def test_extrapolated_costs_are_never_negative() -> None:
    assert Costs(0, ((3, 1.0), (4, 2.0))).step == 0


@given(costs(), st.integers(1, 20))
def test_a_pass_over_more_tokens_never_costs_less(drawn: Costs, n: int) -> None:
    assert drawn.seconds(n) <= drawn.seconds(n + 1) + 1e-12
    assert all(drawn.seconds(n) == pytest.approx(seconds) for n, seconds in drawn.forward)
