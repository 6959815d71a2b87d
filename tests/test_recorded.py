"""Forecasts from counts alone: exact sums, the published hybrid, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud_sd.events import Prompt, Verified
from edgecloud_sd.forecast.__main__ import main
from edgecloud_sd.forecast.model import Workload, forecast, seconds_per_token
from edgecloud_sd.forecast.recorded import RoundCounts, forecast_from_results, workload_from_counts
from edgecloud_sd.gate import risk_gate
from edgecloud_sd.measure import imported, meteor
from edgecloud_sd.measure.traces import trace_to_json
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.timing.link import NO_LINK
from edgecloud_sd.timing.profile import Profile, load_profile
from tests.support.fakes import Scripted
from tests.support.recorded import CLIPS, write_lines, write_published
from tests.support.strategies import play, profiles

# Ori1anna/Edge-cloud-SEC, English hybrid on 332 captions, k 5, entropy threshold 3.5: summed counts, and seconds after
# the first token per token after it (ratio of sums). Alone, the edge took 0.380 s per token and the cloud 0.0387 s.
HYBRID = RoundCounts(tokens=24_530, drafted=27_635, verifications=3_082, corrections=894, generations=332)
HYBRID_SECONDS, HYBRID_PER_TOKEN, EDGE_PER_TOKEN, CLOUD_PER_TOKEN = 12_013, 0.4965, 0.380, 0.0387


def test_the_profile_published_as_run_forecasts_the_published_hybrid_within_5_percent() -> None:
    result = forecast(load_profile("published-as-run"), NO_LINK, workload_from_counts(HYBRID, 5))
    assert result.token == pytest.approx(HYBRID_PER_TOKEN, rel=0.05)
    assert result.token * HYBRID.tokens == pytest.approx(HYBRID_SECONDS, rel=0.05)
    assert result.edge == pytest.approx(EDGE_PER_TOKEN, rel=0.05)
    assert result.cloud == pytest.approx(CLOUD_PER_TOKEN, rel=0.05)
    assert result.over_edge == pytest.approx(EDGE_PER_TOKEN / HYBRID_PER_TOKEN, rel=0.05)
    assert result.tokens == HYBRID.tokens / 332


def test_the_profile_published_with_a_bonus_is_20_percent_off() -> None:
    workload = replace(workload_from_counts(HYBRID, 5), has_bonus=True)
    assert seconds_per_token(load_profile("published"), NO_LINK, workload) / HYBRID_PER_TOKEN == pytest.approx(
        0.80, abs=0.01
    )


def test_the_ceiling_of_1_18_is_of_the_profile_published_and_not_of_the_published_run() -> None:
    every = Workload(5, (1.0,))
    ideal, as_run = (forecast(load_profile(name), NO_LINK, every) for name in ("published", "published-as-run"))
    ceilings = [(result.ceiling_over_edge, result.ceiling_over_edge_without_bonus) for result in (ideal, as_run)]
    assert ceilings == [pytest.approx((1.18, 0.98), abs=0.005), pytest.approx((1.02, 0.85), abs=0.005)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, RoundCounts]:
    """Draw the counts of rounds without a bonus, each with a draft of k tokens."""
    k, verdicts = draw(st.integers(1, 7)), draw(st.lists(st.integers(0, 7), min_size=1, max_size=9))
    local = draw(st.integers(0, 9))
    accepted = [min(length, k) for length in verdicts]
    corrections = sum(length < k for length in accepted)
    rounds = local + len(accepted)
    return k, RoundCounts(local * k + sum(accepted) + corrections, rounds * k, len(accepted), corrections)


@given(runs(), profiles(edge_points=1))
def test_the_forecast_of_counts_is_the_sum_of_their_costs(run: tuple[int, RoundCounts], machines: Profile) -> None:
    k, counts = run
    machines = replace(machines, cloud=replace(machines.cloud, forward=((1, 0.25),)))  # for any number of tokens
    seconds = counts.drafted * machines.edge.step + counts.verifications * (machines.queue + 0.25)
    seconds += counts.corrections * machines.correction
    workload = workload_from_counts(counts, k)
    assert list(workload.acceptance_by_position) == sorted(workload.acceptance_by_position, reverse=True)
    assert counts.tokens * seconds_per_token(machines, NO_LINK, workload) == pytest.approx(seconds, rel=1e-9)


def test_a_short_last_draft_and_a_bonus_are_allowed() -> None:
    workload = workload_from_counts(RoundCounts(13, 10, 4, 1, bonus=3, generations=1), 3)  # 3 + 3 + 3 + 1 tokens
    assert (workload.gate_rate, workload.has_bonus, workload.tokens_per_generation) == (1.0, True, 13)


@pytest.mark.parametrize(
    ("counts", "k", "message"),
    [
        (RoundCounts(9, 9, 0, 0), 3, "no draft was verified"),
        (replace(HYBRID, generations=None), 50, "drafts of k=50 tokens cannot give RoundCounts"),
        (HYBRID, 1, "drafts of k=1 tokens cannot give"),
        (replace(HYBRID, corrections=4_000), 5, "drafts of k=5 tokens cannot give"),
    ],
)
def test_counts_that_no_run_gives_are_refused(counts: RoundCounts, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload_from_counts(counts, k)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with imported runs of three kinds."""
    monkeypatch.setattr(meteor, "get_meteor", lambda language: (_ for _ in ()).throw(meteor.MeteorUnavailable("none")))
    counted = CLIPS["counts"]
    latency = counted["latency_metrics"] | {"ttft": 20.0, "oet": 26.0}
    line = {"mode": "speculative", "file_id": "a", "reference": "他", "caption": "她", "total_s": 2.0, "ttft_s": 1.0}
    line |= {"output_tokens": 15, "cloud_calls": 2, "drafted": 15, "corrections": 0}
    files = [
        write_published(tmp_path / "hybrid.json", "counts", [counted | {"latency_metrics": latency}]),
        write_published(tmp_path / "edge.json", "streamed"),
        write_published(tmp_path / "sc.json", "rounds"),
        write_lines(tmp_path / "zh.jsonl", [line]),
    ]
    imported.import_files(files, tmp_path / "out")
    return tmp_path / "out"


def test_the_command_forecasts_imported_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder / "zh-speculative.json"), "--profile", "published-as-run", "--k", "5"])
    (line,) = capsys.readouterr().out.splitlines()
    start = "zh-speculative.json, published-as-run: Does not pay: a caption of 15 tokens takes 13.8 s, with the cloud "
    assert line.startswith(start)
    assert " After prefill, at k=5 a token takes 422 ms, " in line
    assert line.endswith(" Recorded after the first text: 71.4 ms per token.")
    assert "bonus" not in line


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("edge", (), "mode edge drafts nothing; give the file of a speculative run"),
        ("sc", (), "the file does not have the count drafted and cloud_calls and correction"),
        ("zh-speculative", (), "the draft length is None; python -m edgecloud_sd.forecast takes one from 1 with --k"),
        (
            "zh-speculative",
            ("--k", "0"),
            "the draft length is 0; python -m edgecloud_sd.forecast takes one from 1 with --k",
        ),
        ("hybrid", ("--k", "20"), "drafts of k=20 tokens cannot give"),
        ("missing", (), "No such file"),
    ],
)
def test_a_file_that_cannot_be_forecast_is_refused_by_name(
    folder: Path, name: str, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{name}.json.*{message}|^error: .*{message}.*{name}.json"):
        main([str(folder / f"{name}.json"), "--profile", "published", *arguments])


def results_of(trace: dict[str, object] | None, **strategy: object) -> dict[str, object]:
    """Return the parts of a results file that a forecast reads, with one clip."""
    saved = Strategy("speculative", risk_gate(), k=1, revise="context").to_json() | strategy
    return {"experiment_config": {"strategy": saved}, "detailed_results": [{"trace": trace}]}


def test_a_file_with_traces_is_forecast_from_its_rounds() -> None:
    machines, scripted = load_profile("laptop-gpu"), Scripted(wrong=frozenset({3}))
    strategy = Strategy("speculative", risk_gate(), k=1, revise="context")
    trace = play(Prompt((5, 6)), scripted, Scripted(), strategy, Stopping(frozenset(), 8), Harness(machines))
    result = forecast_from_results(results_of(trace_to_json(trace)), machines)
    assert result.caption == pytest.approx(trace.seconds)
    with pytest.raises(ValueError, match=r"its rounds \(gate risk\) cannot be told from counts; give the file with "):
        forecast_from_results(results_of(None), machines)
    silent = replace(trace, events=tuple(event for event in trace.events if not isinstance(event[1], Verified)))
    with pytest.raises(ValueError, match="no draft was verified"):
        forecast_from_results(results_of(trace_to_json(silent)), machines)


def test_a_file_that_is_no_results_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"a": 1}), encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"^error: .*other\.json: top level: .*; give a results file .*import the file"
    ):
        main([str(path), "--profile", "published"])
