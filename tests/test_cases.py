"""The cases of a grid and their ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import baselines, cases, load, tables
from edgecloud_sd import config
from edgecloud_sd.timing import profile


def ids(**options: str) -> list[str]:
    values = {name.replace("_", "-"): value for name, value in options.items()}
    return [case.id for case in cases.cases(config.resolve(values))]


def test_modes_edge_and_cloud_appear_once_in_a_grid_of_thresholds() -> None:
    assert ids(mode="edge,cloud", entropy_threshold="1,2", k="3,5") == ["edge-pocket-zh", "cloud-pocket-zh"]


def test_a_grid_is_every_combination_in_order() -> None:
    assert ids(mode="speculative", entropy_threshold="1.0,1.5", k="3,5", language="chinese,english", rule="greedy") == [
        f"speculative-pocket-H{h}-k{k}-greedy-{language}"
        for h in ("1", "1.5")
        for k in (3, 5)
        for language in ("zh", "en")
    ]


def test_equivalent_cells_are_one_case() -> None:
    grid = ids(mode="speculative", gate="always,entropy", entropy_threshold="0,-1", rule="greedy,rank", rank="1,20")
    assert grid == ["speculative-pocket-always-k3-greedy-zh", "speculative-pocket-always-k3-rank20-zh"]


def test_the_id_of_a_synthetic_rule_fits_a_file_name_and_its_output_is_lossy() -> None:
    grid = cases.cases(
        config.resolve({"mode": "speculative", "gate": "always", "rule": "synthetic(0.9/0.8),greedy,synthetic(1)"})
    )
    assert [case.id for case in grid] == [
        "speculative-pocket-always-k3-synthetic0.9_0.8-zh",
        "speculative-pocket-always-k3-greedy-zh",
        "speculative-pocket-always-k3-synthetic1-zh",
    ]
    assert [tables.output_promise(case.strategy, "float32") for case in grid] == ["lossy", "lossless", "lossy"]


def test_mode_lossless_verifies_every_draft_greedily_whatever_the_gate_and_the_rule_are() -> None:
    found = cases.cases(config.resolve({"mode": "lossless,speculative", "k": "3,auto", "gate": "always"}))
    assert [case.strategy.label for case in found] == [
        "speculative-always-k3-greedy",
        "speculative-always-kauto-greedy",
        "speculative-always-k3-rank20",
        "speculative-always-kauto-rank20",
    ]
    assert [case.strategy.is_lossless for case in found] == [True, True, False, False]
    assert ids(mode="lossless,speculative", gate="always", rule="greedy") == ["speculative-pocket-always-k3-greedy-zh"]


def test_the_id_says_what_was_asked_for_and_scored_against_unless_it_is_usual(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Say it.")
    asked = {"prompt_type": "detailed", "with_transcription": "yes", "caption_type": "audio_only"}
    assert ids(mode="edge", **asked) == ["edge-pocket-detailed-transcription-audio_only-zh"]
    assert ids(mode="edge", prompt_file=str(tmp_path / "own.txt")) == ["edge-pocket-prompt_98862978-zh"]
    assert ids(mode="edge", caption_type="original", prompt_type="default") == ["edge-pocket-zh"]


def test_own_models_are_in_the_id_without_their_folders(tmp_path: Path) -> None:
    grid = ids(mode="cloud", edge_model="Qwen/Qwen2.5-Omni-3B", cloud_model=str(tmp_path / "mine"))
    assert grid == ["cloud-Qwen2.5-Omni-3B+mine-zh"]


def test_a_folder_has_one_name_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "模型 1"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for spelt in (str(folder), f"{folder}/", "../模型 1", "../link/", "."):
        assert ids(mode="edge", edge_model=spelt, dataset_path=spelt) == ["edge-模型_1+cloud-模型_1-zh"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dataset_path": "data/secap"}, ["edge-pocket-secap-zh", "cloud-pocket-secap-zh"]),
        ({"dataset_path": "secap/manifest.json"}, ["edge-pocket-secap-zh", "cloud-pocket-secap-zh"]),
        ({"dataset_path": "data/mine.json"}, ["edge-pocket-mine-zh", "cloud-pocket-mine-zh"]),
        ({"dataset_path": "data/pocket"}, ["edge-pocket-pocket-zh", "cloud-pocket-pocket-zh"]),
        ({"edge_dtype": "int8"}, ["edge-pocket-int8-zh", "cloud-pocket-zh"]),
        ({"cloud_dtype": "float64"}, ["edge-pocket-zh", "cloud-pocket-float64-zh"]),
        ({"cloud_dtype": "auto"}, ["edge-pocket-zh", "cloud-pocket-zh"]),
    ],
)
def test_the_data_set_and_unusual_number_formats_are_in_the_id(options: dict[str, str], expected: list[str]) -> None:
    assert ids(mode="edge,cloud", **options) == expected


def test_both_number_formats_are_in_the_id_if_one_is_unusual_and_both_sides_decode() -> None:
    assert ids(mode="lossless", edge_dtype="int4") == ["speculative-pocket-int4+float32-always-k3-greedy-zh"]
    settings = config.resolve({"edge-dtype": "int4", "cloud-url": "http://a", "dataset-path": "secap"})
    assert load.list_load_cases(settings)[0].id == "load-pocket-int4-1-elsewhere-secap-zh"
    settings = config.resolve({"edge-dtype": "int4", "dataset-path": "secap"})
    assert [case.id for case in baselines.baseline_cases(settings)] == ["baselines-pocket-int4+float32-k3-secap-zh"]


def test_links_and_the_virtual_clock_are_in_the_id_and_mode_edge_has_no_link() -> None:
    assert ids(mode="edge,cloud,speculative", clock="virtual", profile="phone-npu", link="none,4g", gate="always") == [
        "edge-pocket-virtual-phone-npu-zh",
        "cloud-pocket-virtual-phone-npu-zh",
        "cloud-pocket-4g-virtual-phone-npu-zh",
        "speculative-pocket-always-k3-rank20-virtual-phone-npu-zh",
        "speculative-pocket-always-k3-rank20-4g-virtual-phone-npu-zh",
    ]


def test_an_own_profile_is_in_the_id_without_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    profile.save_profile(profile.load_profile("published"), file)
    assert ids(mode="edge", clock="virtual", profile=str(file)) == ["edge-pocket-virtual-mine-zh"]
