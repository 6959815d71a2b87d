"""The whole of `bench.tune --pareto` on few clips and ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pareto, tune
from bench.ways import CLOUD, EDGE, GIVEN, PERFECT, list_ways

pytestmark = pytest.mark.slow  # decodes and draws
CHOSEN = {"revise", "revise-lossless", "lossless, k 4", "published"}


@pytest.fixture
def few_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [way for way in list_ways() if way.mark in CHOSEN or way.line == PERFECT]
    monkeypatch.setattr(pareto, "list_ways", lambda own: [EDGE, CLOUD, *ways, *list_ways(own)[len(list_ways()) :]])


@pytest.mark.usefixtures("few_ways")
def test_the_table_the_picture_and_the_numbers_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "picture.html"
    tune.main(["--pareto", "--clips", "3", "--output", str(page)])
    printed = capsys.readouterr().out
    document = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert document["clips"] == {"chinese": 3, "english": 3}
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(document["ways"])
    for row, way in zip(rows, document["ways"], strict=True):
        cells = [cell.strip() for cell in row]
        assert cells[:2] == [way["language"], way["line"]]
        assert (way["mark"] or way["label"]) in cells[2]
        assert cells[3:6] == [f"{way['cloud_calls']:.2f}", f"{way['cloud_positions']:.1f}", f"{way['seconds']:.3f}"]
        assert cells[7].startswith(f"{way['quality']['bleu1']['closed']['value']:.2f} [")
        closed = {gap["closed"]["value"] for gap in way["quality"].values()}
        if way["mark"] in ("cloud", "lossless, k 4", "revise-lossless") or way["label"] == "all calls":
            assert closed == {1}
        if way["mark"] == "edge":
            assert closed == {0}
    html = page.read_text("utf-8")
    assert html.count("<picture>") == 4
    assert {path.name for path in page.parent.iterdir()} == {"picture.html", "picture.json"}


@pytest.mark.usefixtures("few_ways")
def test_the_clips_of_a_data_set_and_its_own_strategies_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pareto, "to_html", lambda page: page.title)  # the other test draws
    from edgecloud_sd.pocket.clips import write_clips

    write_clips(tmp_path, "held-out", 3)
    page = tmp_path / "picture.html"
    arguments = ["--dataset-path", str(tmp_path / "manifest_chinese.json"), "--language", "chinese", "--clips", "2"]
    arguments += ["--gate", "always", "--rule", "greedy", "--k", "9", "--drafter", "model+lookup"]
    tune.main(["--pareto", *arguments, "--output", str(page)])
    document = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert document["clips"] == {"chinese": 2}
    assert document["ways"][0]["quality"]["attributes"]["closed"]["value"] == 0
    assert [way["label"] for way in document["ways"] if way["line"] == GIVEN] == [
        "speculative-always-k9-greedy-model_lookup"
    ]
