"""The report of files with known numbers: its content, its errors, and no file that is only half written."""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import comparison
from bench.comparison import Document
from bench.report import __main__ as report
from bench.report import pictures
from bench.report.differences import caption_distance, mark_differences
from bench.report.metric_text import format_change, interval_limits
from bench.report.page import BulletList, Page, Paragraph, Section
from bench.report.render import to_markdown
from bench.report.runs import read_run
from edgecloud_sd.gate import entropy_gate
from edgecloud_sd.host.errors import EXIT_INTERRUPTED
from edgecloud_sd.measure.audit import AuditCount
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.intervals import Interval
from edgecloud_sd.measure.results import SCHEMA_VERSION
from edgecloud_sd.measure.summary import METRICS
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import profile

VOID = {"source", "meta", "link", "br", "img", "input", "hr"}
SECTIONS = (
    "What was run", "Summary", "Where the time goes", "Latency against quality", "Acceptance by position",
    "Does it pay?", "Captions side by side",
)  # fmt: skip
PICTURES = ("draw_breakdown", "draw_latency_quality", "draw_acceptance", "draw_accepted_lengths", "draw_speedups")
IMAGE = r'src="data:image/svg\+xml;base64,([^"]+)"'
ANY_IMAGE = IMAGE.replace("src", "src(?:set)?", 1)
MACHINE = {"system": "Linux", "machine": "x86_64", "cpu": "Fast 9000", "cores": 8, "gpu": None}
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0", "edgecloud_sd": "1", "commit": None}
COUNTS = (
    "tokens", "local", "accepted", "correction", "bonus", "cloud", "rounds", "cloud_calls", "unanswered_calls",
    "drafted", "verified", "ahead", "ahead_wasted", "retracted", "edge_passes", "cloud_positions",
)  # fmt: skip
PUBLISHED_SCORES = ("avg_bleu", "avg_cider", "avg_bertscore_precision", "avg_bertscore_recall", "avg_bertscore_f1")
PUBLISHED_LATENCIES = (
    "ttft_mean", "ttft_min", "ttft_max", "otps_mean", "total_time_mean", "cpu_percent_mean", "ram_mb_mean",
    "gpu_util_mean",
)  # fmt: skip
SPECULATIVE = Strategy("speculative", entropy_gate(1.0), k=2)
SCORES = {"edge": 0.5, "cloud": 0.9, "speculative": 0.8}
FORECASTS = {"speculative-pocket-H1-k2-greedy-chinese": "Faster than the cloud alone: 2.00x."}
TEXTS = {"edge": "他很高兴，语速缓慢。", "cloud": "他很悲伤，语速缓慢。", "speculative": "他很悲伤，语速急促。"}


def clip(name: str, text: str, seconds: float, **fields: Any) -> Document:
    """Return the record of a clip with five tokens, the first after a fifth of the time."""
    return {
        "file_id": name,
        "generated_text": text,
        "reference_captions": ["他很悲伤，语速缓慢。"],
        "token_ids": [1, 2, 3, 4, 5],
        "finish_reason": "eos",
        "bleu_score": 0.5,
        "scores": {"bleu4": 0.5},
        "ttft": seconds / 5,
        "ttft_final": seconds / 5,
        "e2e": seconds,
        "otps": 5 / seconds,
        "after_first_chunk": [4, 0.8 * seconds],
        "total_time": seconds,
        "wall_time": seconds,
        **dict.fromkeys(("cpu_seconds", "ram_mb", "ram_peak_mb", "gpu_util", "gpu_memory_mb")),
        "not_measured": {},
        "cloud_faults": 0,
        "degraded": None,
        "counts": dict.fromkeys(COUNTS, 0) | {"tokens": 5},
        "latency_breakdown": dict.fromkeys(PARTS, 0.0),
        "discarded_draft": 0.0,
        "hindsight": None,
        **fields,
    }


def cell(
    mode: str,
    clips: Sequence[Document] | None = None,
    machine: Document | None = None,
    figures: Document | None = None,
    **settings: Any,
) -> Document:
    """Return the results of one cell with round numbers, some of them replaced by `figures`."""
    is_speculative = mode == "speculative"
    seconds = {"edge": 1.0, "cloud": 4.0, "speculative": 2.0}[mode]
    if clips is None:
        clips = [clip(f"clip{i}", TEXTS[mode], seconds * (i + 1), scores={"bleu4": SCORES[mode]}) for i in range(5)]
    known_figures = {
        "total": sum(record["total_time"] for record in clips) / len(clips),
        "ttft": 0.25,
        "otps": 10.0,
        "bleu4": SCORES[mode],
        "cpu_percent": 100.0,
        "cloud_call_rate": 0.4 if is_speculative else None,
        "discarded_draft": 0.25 if is_speculative else None,
    }
    language = settings.get("language", "chinese")
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment_config": {
            "case": f"{mode}-pocket-{'H1-k2-greedy-' if is_speculative else ''}{language}",
            "pair": "pocket",
            "strategy": (SPECULATIVE if is_speculative else Strategy(mode)).to_json(),
            **dict.fromkeys(("cloud_url", "max_cpu_cores", "max_memory_gb", "profile", "profile_costs")),
            "link": None if mode == "edge" else "none",
            "clock": "real",
            "output": {"edge": None, "cloud": "lossless", "speculative": "lossy"}[mode],
            "language": language,
            "caption_type": "audio_only",
            "prompt_type": "default",
            "max_new_tokens": 64,
            **settings,
        },
        "environment": MACHINE | VERSIONS | (machine or {}),
        "in_force": {"cores": [0, 1], "torch_threads": 1, "memory_bytes": None},
        "metrics": {
            **dict.fromkeys(PUBLISHED_SCORES),
            "tokenizer": "characters",
            "score_normalisation": "nfc",
            "bertscore_model": None,
            "empty_captions": 0,
            "latency_metrics": dict.fromkeys(PUBLISHED_LATENCIES),
            "speculative_decoding_metrics": dict.fromkeys((*COUNTS, "discarded"), 0)
            | {"acceptance_by_position": [0.9, 0.6] if is_speculative else []}
            | {"accepted_lengths": [1, 3, 6] if is_speculative else []},
            "figures": dict.fromkeys(METRICS) | known_figures | (figures or {}),
            "latency_breakdown": dict.fromkeys(PARTS, 0.0)
            | {"draft": 1.0, "verify": seconds - 1 + 0.25 * is_speculative},
            "breakdown_closure": {"median": 0.995, "worst": 0.98, "unnamed_median": 0.01},
            "reasons": {"meteor": "no Java"},
        },
        "detailed_results": clips,
        "skipped_clips": [],
    }


def grid(**settings: Any) -> list[Document]:
    return [cell(mode, **settings) for mode in ("edge", "cloud", "speculative")]


def save(path: Path, cells: Sequence[Document], **sentences: str) -> str:
    """Write a file as pytest-benchmark does, with rows that a report must ignore."""
    rows: list[Document] = [
        {"name": document["experiment_config"]["case"], "extra_info": {"results": document}} for document in cells
    ]
    rows += [{"name": "test_captioning[x]:ttft", "extra_info": {"meaning": "m"}}, {"name": "other", "extra_info": None}]
    numbers = {"over_edge": 0.5, "over_cloud": 2.0}
    forecasts = {case: {"sentence": sentence, "forecast": numbers} for case, sentence in sentences.items()}
    path.write_text(json.dumps({"benchmarks": rows, "forecasts": forecasts, "datetime": "2026-01-01T00:00:00"}))
    return str(path)


@contextmanager
def blank_pictures() -> Iterator[None]:
    """Replace the pictures, which take most of a report's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(pictures, name, lambda *_: "<svg></svg>")
        yield


def write_report(tmp_path: Path, *arguments: str, draw: bool = False) -> tuple[str, str]:
    """Return the HTML and the Markdown of a report."""
    file = tmp_path / "out" / "r.html"
    with nullcontext() if draw else blank_pictures():
        report.main([*arguments, "--output", str(file)])
    assert sorted(path.name for path in file.parent.iterdir()) == ["r.html", "r.md"]
    return file.read_text(encoding="utf-8"), file.with_suffix(".md").read_text(encoding="utf-8")


def read_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that the command prints instead of writing a report."""
    with blank_pictures(), pytest.raises(SystemExit) as caught:
        report.main(arguments)
    line = str(caught.value.code)  # Python prints a code that is text, and exits with 1
    assert line.startswith("error: ")
    assert "\n" not in line
    assert capsys.readouterr().out == ""
    return line


def read_texts(svg: str) -> list[str]:
    """Return the texts of a picture in the order of drawing, still escaped."""
    return re.findall(r"<text [^>]*>([^<]*)<", svg)


class ParsedPage(HTMLParser):
    """The titles, ids, tags and text of an HTML page whose tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids.update(value for key, value in attrs if key == "id" and value)
        if tag == "h2":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def small_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the report of a small grid, with its pictures."""
    tmp_path = tmp_path_factory.mktemp("small")
    return write_report(tmp_path, save(tmp_path / "a.json", grid(), **FORECASTS), draw=True)


def test_the_report_has_each_section_and_every_cell(small_report: tuple[str, str]) -> None:
    page, markdown = small_report
    parsed = ParsedPage(page)
    assert parsed.titles == re.findall(r"^## (.*)$", markdown, re.M) == [*SECTIONS]
    for document in grid():
        assert document["experiment_config"]["case"] in parsed.text
        assert document["experiment_config"]["case"] in markdown


def test_each_language_has_its_own_sections(tmp_path: Path) -> None:
    page, markdown = write_report(tmp_path, save(tmp_path / "a.json", grid() + grid(language="english")))
    titles = [f"{title} ({language})" for language in ("chinese", "english") for title in SECTIONS[1:]]
    assert ParsedPage(page).titles == [SECTIONS[0], *titles]
    english = markdown[markdown.index("## Does it pay? (english)") :]
    assert "- **H1 k2 greedy**: the file has no forecast" in english


def test_the_report_needs_nothing_from_outside(small_report: tuple[str, str]) -> None:
    parsed = ParsedPage(small_report[0])
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    svgs = [base64.b64decode(svg).decode() for svg in re.findall(ANY_IMAGE, small_report[0])]
    text = "".join([re.sub(ANY_IMAGE, "", small_report[0]), *svgs])
    addresses = re.findall(r'\b(?:src|href|srcset|action)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert "http" not in re.sub(ANY_IMAGE, "", small_report[0])
    assert parsed.tags["style"] == 1
    assert "@import" not in text


def test_pictures_have_a_description_and_all_ids_are_unique(small_report: tuple[str, str]) -> None:
    parsed = ParsedPage(small_report[0])
    assert len(re.findall(IMAGE + r' alt="[^"]{20,}"', small_report[0])) == parsed.tags["img"] == len(PICTURES)
    assert max(parsed.ids.values()) == 1
    assert set(re.findall(r'href="#([^"]+)', small_report[0])) <= set(parsed.ids)


@pytest.mark.slow
@pytest.mark.parametrize(("highs", "ticks"), [([1.5, 2.0], None), ([1.1, 80.0], ["0.1", "1", "10"])])
def test_a_very_wide_interval_leaves_the_others_readable(highs: list[float], ticks: list[str] | None) -> None:
    rows = [(f"cell {high}", {"over edge": Interval(1.0, 0.5 if high < 3 else 0.04, high)}) for high in highs]
    texts = read_texts(pictures.draw_speedups(rows))
    assert ticks is None or set(ticks) <= set(texts)
    assert ("10" in texts) == (ticks is not None)


def test_each_picture_has_a_version_for_a_phone_with_the_same_words(small_report: tuple[str, str]) -> None:
    pairs = re.findall(rf'<source media="[^"]+" {IMAGE.replace("src", "srcset", 1)}><img {IMAGE}', small_report[0])
    assert len(pairs) == len(PICTURES)
    for phone, desk in [[base64.b64decode(svg).decode() for svg in pair] for pair in pairs]:
        widths = [float(re.search(r'<svg [^>]*width="([\d.]+)pt"', svg)[1]) for svg in (phone, desk)]  # type: ignore[index]
        assert widths == [pytest.approx(72 * width) for width in (pictures.NARROW, pictures.WIDE)]
        for label in ("H1 k2 greedy", "edge", "cloud"):
            is_shown = [any(label in text for text in read_texts(svg)) for svg in (phone, desk)]
            assert is_shown[0] == is_shown[1]


def test_the_histogram_of_accepted_lengths_stands_beside_their_mean(tmp_path: Path) -> None:
    document = cell("speculative", figures={"mean_acceptance_length": 2.4})
    _, markdown = write_report(tmp_path, save(tmp_path / "a.json", [cell("edge"), document]))
    assert "| cell | mean length | verifications | 0 accepted | 1 accepted | 2 accepted |" in markdown
    assert "| H1 k2 greedy | 2.40 | 10 | 1 (10%) | 3 (30%) | 6 (60%) |" in markdown
    texts = read_texts(pictures.draw_accepted_lengths([pictures.LengthCounts("H1 k2", [1, 3, 6], 2.4)], pictures.WIDE))
    assert {"10%", "30%", "60%", "H1 k2", "mean length 2.40"} <= set(texts)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_cell_without_verifications_has_no_histogram(tmp_path: Path, lengths: list[int]) -> None:
    document = cell("speculative")
    document["metrics"]["speculative_decoding_metrics"]["accepted_lengths"] = lengths
    _, markdown = write_report(tmp_path, save(tmp_path / "a.json", [document]))
    assert "Accepted lengths" not in markdown


def test_the_summary_has_every_measured_metric_and_reasons_for_the_others(small_report: tuple[str, str]) -> None:
    markdown = small_report[1]
    assert "| cell | output | TTFT ms | OTPS tokens/s | total ms | BLEU-4 | escalated rounds | CPU % |" in markdown
    assert "| H1 k2 greedy | lossy | 250.0 | 10.0 | 6000.0 | 0.800 | 0.400 | 100 |" in markdown
    assert "- **METEOR**: no Java" in markdown
    assert f'title="{METRICS["ttft"].meaning} (lower is better)"' in small_report[0]


def test_the_report_says_what_a_budget_and_an_audit_say(tmp_path: Path) -> None:
    revised = cell("speculative")
    chosen = {"option": "own", "value": 0.9, "by": "calibration", "calibration": "zh.yaml", "calibration_clips": 9}
    spent = {"reason": "level 0.3", "first_level": 0.3, "last_level": 0.3, "calls": 1.0, "written_share": 0.1}
    audit = AuditCount(4, 4, 3, 0.1)
    figures = {"rate": audit.rate, "p": audit.p, "is_broken": audit.is_broken, "sentence": audit.sentence()}
    revised["metrics"] |= {"budget": chosen | spent, "audit": asdict(audit) | figures}
    text = write_report(tmp_path, save(tmp_path / "a.json", [cell("edge"), revised]))[1]
    assert "--own 0.9 by calibration: level 0.3. Here 1.00 calls a caption" in text
    assert "warning: audit: 3 of 4 drawn captions differ" in text


def test_speedups_quality_gap_and_forecast_are_shown(small_report: tuple[str, str]) -> None:
    markdown = small_report[1]
    # 2 s for 1 s of the edge and 4 s of the cloud; (0.8 - 0.5) / (0.9 - 0.5) of the gap
    for baseline, ratio in (("edge", "0.50"), ("cloud", "2.00")):
        intervals = " | ".join([rf"{ratio} \[{ratio}, {ratio}\]"] * 3)
        assert f"| H1 k2 greedy | {baseline} alone | {intervals} | {ratio} | 0.75 | lossy |" in markdown
    answer = "Not compared at equal quality with the cloud alone, the baseline of higher quality: 2.00"
    assert f"- **H1 k2 greedy**: {answer}" in markdown
    assert "Against the edge alone: 0.50" in markdown
    assert "- **H1 k2 greedy**: Faster than the cloud alone: 2.00x." in markdown


def test_captions_are_compared_with_the_caption_of_cloud_mode(small_report: tuple[str, str]) -> None:
    page, markdown = small_report
    for text in (page, markdown):
        assert "他很<del>悲伤</del><ins>高兴</ins>，语速缓慢。" in text
        assert "他很悲伤，语速<del>缓慢</del><ins>急促</ins>。" in text
    assert "| reference | 他很悲伤，语速缓慢。 |  |\n| cloud | 他很悲伤，语速缓慢。 |" in markdown


def test_cells_with_the_same_caption_share_one_line(tmp_path: Path) -> None:
    same = [clip("one", "他很悲伤。", 1.0)]
    _, markdown = write_report(tmp_path, save(tmp_path / "a.json", [cell("edge", same), cell("cloud", same)]))
    assert re.findall(r"^\| .* \| 他很悲伤。 \|", markdown, re.M) == ["| every cell | 他很悲伤。 |"]
    assert "<del>" not in re.sub("del {", "", markdown)


def test_captions_are_compared_with_the_reference_if_cloud_mode_did_not_run(tmp_path: Path) -> None:
    _, markdown = write_report(tmp_path, save(tmp_path / "a.json", [cell("edge")]))
    assert "differ from the first reference, because no cell is cloud mode" in markdown
    assert "| edge | 他很<del>悲伤</del><ins>高兴</ins>，语速缓慢。 |" in markdown


def test_the_most_different_clips_come_first_up_to_the_limit(tmp_path: Path) -> None:
    texts = {"same": "他很悲伤。", "far": "她", "near": "他很高兴。"}
    edge = cell("edge", [clip(name, text, 1.0) for name, text in texts.items()])
    cloud = cell("cloud", [clip(name, "他很悲伤。", 1.0) for name in texts])
    file = save(tmp_path / "a.json", [edge, cloud])
    _, markdown = write_report(tmp_path, file, "--clips", "2")
    assert re.findall(r"^\| \*\*(.*)\*\* \|", markdown, re.M) == ["far", "near"]
    assert "The first 2 of 3 clips" in markdown


def test_text_of_a_file_is_never_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> | a\n# b *c* `d` [e](f) $g$"
    escaped = r"&lt;script&gt;alert(1)&lt;/script&gt; \| a \# b \*c\* \`d\` \[e\](f) \$g\$"
    cells = [
        cell(mode, [clip(bad, bad, 1.0, reference_captions=[bad])], link=bad, case=f"{mode} {bad}", pair=bad)
        for mode in ("cloud", "speculative")
    ]
    cells[0]["metrics"]["reasons"]["meteor"] = bad
    cells[0]["skipped_clips"] = [{"file_id": bad, "reason": bad}]
    page, markdown = write_report(tmp_path, save(tmp_path / "a.json", cells, **{f"speculative {bad}": bad}))
    parsed = ParsedPage(page)
    assert "script" not in parsed.tags
    assert parsed.text.count("<script>alert(1)</script> | a\n# b *c* `d` [e](f) $g$") > 8
    assert "<script" not in markdown
    assert markdown.count(escaped) > 8
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert not any(line.startswith("# b") for line in markdown.splitlines())


@pytest.mark.slow
def test_the_same_file_gives_the_same_bytes(tmp_path: Path, small_report: tuple[str, str]) -> None:
    assert write_report(tmp_path, save(tmp_path / "a.json", grid(), **FORECASTS), draw=True) == small_report


def test_another_quality_metric_can_be_selected(tmp_path: Path) -> None:
    file = save(tmp_path / "a.json", [cell("edge", figures={"cider": 5.25}), cell("cloud", figures={"cider": 9.0})])
    page, _ = write_report(tmp_path, file, "--quality", "cider")
    assert "CIDEr against seconds per caption. The Pareto front, from fast to good, is edge, cloud." in page
    page, _ = write_report(tmp_path, file, "--quality", "meteor")
    assert "No cell has METEOR" in page
    assert page.count("<img") == 1


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_every_point_is_numbered_and_the_legend_names_the_numbers(count: int) -> None:
    points = [pictures.Point(f"$cell_{i}$ <i>她", "edge", i % 7, i % 5, 0.5) for i in range(count)]
    texts = read_texts(pictures.draw_latency_quality(points, [0, 1], "BLEU-4"))
    labels = [f"{i + 1}  $cell_{i}$ &lt;i&gt;她" for i in range(count)]
    assert [text for text in texts if "cell" in text] == labels
    first = texts.index("BLEU-4; up is better") + 1
    numbers = texts[first : texts.index("edge")]
    assert sorted(numbers, key=int) == [str(i + 1) for i in range(count)]


def test_points_too_close_for_two_labels_share_one() -> None:
    places = [(0.1, 0.5), (0.9, 0.5), (0.11, 0.49), (0.1, 0.9)]
    assert pictures.group_numbers(places) == {(0.1, 0.5): [1, 3], (0.9, 0.5): [2], (0.1, 0.9): [4]}


def test_equal_lines_are_drawn_once() -> None:
    lines = [pictures.Line(f"line {i}", [1.0, 1 / (i + 1)], f"H{i}", "greedy", "2") for i in range(2)]
    texts = read_texts(pictures.draw_acceptance([*lines, lines[0]]))
    assert [text for text in texts if "line" in text] == ["line 0 (and 1 more)", "line 1"]


def test_cells_with_equal_labels_are_called_by_their_ids(tmp_path: Path) -> None:
    cells = [cell("edge", case="edge-one-zh", pair="one"), cell("edge", case="edge-two-zh", pair="two")]
    _, markdown = write_report(tmp_path, save(tmp_path / "a.json", cells))
    assert "\n| edge-one-zh | - |" in markdown


def test_the_forecast_of_a_single_results_file_is_computed_from_its_traces(tmp_path: Path) -> None:
    events = [
        [0.1, "prepared", 5],
        [0.2, "opened", "edge"],
        [0.3, "opened", "cloud"],
        [0.4, "drafted", [1, 2], [0.1, 0.2], None, 0, [1, 1]],
        [0.4, "escalated", [1, 2], [0.1, 0.2], None, 1],
        [0.5, "verified", 1, 3],
        [0.5, "committed", [1], "accepted", True],
        [0.5, "committed", [3], "correction", True],
        [0.5, "finished", "eos"],
    ]
    costs = json.loads(json.dumps(asdict(profile.load_profile("published"))))
    clips = [clip("one", "他", 0.5, trace={"events": events, "spans": []})]
    one = cell("speculative", clips, clock="virtual", profile="published", profile_costs=costs)
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    _, markdown = write_report(tmp_path, str(file))
    assert re.search(r"^- \*\*H1 k2 greedy\*\*: Does not pay.*the cloud alone 38\.7 ms", markdown, re.M)
    assert "Not decided: neither the edge alone nor the cloud alone captioned these clips" in markdown


def test_an_unknown_trace_event_costs_the_forecast_but_not_the_report(tmp_path: Path) -> None:
    one = cell("speculative", [clip("one", "他", 0.5, trace={"events": [[0.1, "dreamt", 5]], "spans": []})])
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    _, markdown = write_report(tmp_path, str(file))
    assert "- **H1 k2 greedy**: no forecast: not a saved trace: unknown event 'dreamt'" in markdown


# several files


def test_files_without_a_common_cell_are_joined_by_clip(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{mode}.json", [cell(mode)]) for mode in ("edge", "cloud", "speculative")]
    _, markdown = write_report(tmp_path, *files)
    assert "# edgecloud\\_sd: edge.json, cloud.json, speculative.json" in markdown
    assert "with the cloud alone, the baseline of higher quality: 2.00" in markdown


def test_equal_cells_of_joined_files_are_told_apart_by_their_files(tmp_path: Path) -> None:
    slow = cell("edge", [clip("clip0", "他", 9.0)])
    files = [save(tmp_path / "a.json", grid()), save(tmp_path / "b.json", [slow])]
    _, markdown = write_report(tmp_path, *files, "--join")
    assert "edge-pocket-chinese (a.json)" in markdown
    assert "edge-pocket-chinese (b.json)" in markdown


def test_joined_cells_with_other_clips_or_machines_are_pointed_out(tmp_path: Path) -> None:
    other = cell("cloud", [clip("clip0", "他", 9.0)], machine={"cores": 2})
    files = [save(tmp_path / "a.json", [cell("edge")]), save(tmp_path / "b.json", [other])]
    _, markdown = write_report(tmp_path, *files)
    assert "1 of 5 clips are in every cell." in markdown
    assert "The cells have different machines, so compare them with care." in markdown


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "a.json", [cell("edge")])
    assert "its cell edge-pocket-chinese is given twice; name each file once" in read_error(
        capsys, file, file, "--join"
    )


def test_a_broken_rule_fails_the_command_after_the_report_is_written(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.json", [cell("edge")])]
    files.append(save(tmp_path / "b.json", [cell("edge", figures={"bleu4": 0.4})]))
    write_report(tmp_path, *files, "--fail-if", "bleu4:-0.2")
    with pytest.raises(SystemExit, match=r"edge-pocket-chinese: bleu4 0.5 -> 0.4 breaks bleu4:-5%"):
        write_report(tmp_path, *files, "--fail-if", "bleu4:-5%")
    assert (tmp_path / "out" / "r.html").exists()


def test_rules_need_two_files_with_a_common_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "a.json", [cell("edge")])
    assert "--fail-if compares two files" in read_error(capsys, file, "--fail-if", "bleu4:-0.2")


# two files


def compare(tmp_path: Path, a: Sequence[Document], b: Sequence[Document]) -> tuple[str, str]:
    return write_report(tmp_path, save(tmp_path / "a.json", a), save(tmp_path / "b.json", b))


def test_a_file_compared_with_itself_is_exactly_as_fast_and_as_good(tmp_path: Path) -> None:
    page, markdown = compare(tmp_path, a=grid(), b=grid())
    one = r"1.00 \[1.00, 1.00\]"
    for label in ("edge", "cloud", "H1 k2 greedy"):
        assert f"| {label} | 5 | {one} | {one} | +0.000 \\[0 of 5 clips differ: too few\\] | all the same |" in markdown
    assert "the captions of A and B are the same in every cell and clip" in page
    compared = markdown[: markdown.index("## Is B faster")]
    assert not re.search("differ|only$", compared, re.I | re.M)
    ParsedPage(page)


def test_clips_are_paired_by_id_and_not_by_position(tmp_path: Path) -> None:
    clips = [clip(f"clip{i}", f"他{i}", 1.0 + i, scores={"bleu4": i / 10}) for i in range(5)]
    _, markdown = compare(tmp_path, a=[cell("edge", clips)], b=[cell("edge", clips[::-1])])
    one = r"1.00 \[1.00, 1.00\]"
    assert f"| edge | 5 | {one} | {one} | +0.000 \\[0 of 5 clips differ: too few\\] | all the same |" in markdown


def test_changes_are_measured_over_the_clips_in_both_files(tmp_path: Path) -> None:
    a = [clip(name, "他很悲伤。", 2.0, scores={"bleu4": 0.5}) for name in ("both1", "both2", "gone")]
    b = [clip(name, "他很高兴。", 1.0, scores={"bleu4": 0.25}) for name in ("new", "both2", "both1")]
    page, markdown = compare(tmp_path, a=[cell("edge", a)], b=[cell("edge", b)])
    few = r"\[2 clips: too few\]"
    assert f"| edge | 2 | 2.00 {few} | 2.00 {few} | -0.250 {few} | 2 of 2 differ |" in markdown
    assert "- **in A only, 1**: gone (in edge-pocket-chinese)" in markdown
    assert "- **in B only, 1**: new (in edge-pocket-chinese)" in markdown
    assert "2000.0 → 1000.0 (-50.0%)" in page
    assert markdown.count("他很<del>悲伤</del><ins>高兴</ins>。") == 2


def test_cells_in_one_file_only_are_listed(tmp_path: Path) -> None:
    edge, cloud, speculative = grid()
    _, markdown = compare(tmp_path, a=[edge, cloud], b=[edge, speculative])
    assert "1 cell is in both files." in markdown
    assert "1 cell is in A (a.json) only:\n\n- cloud-pocket-chinese" in markdown
    assert "1 cell is in B (b.json) only:\n\n- speculative-pocket-H1-k2-greedy-chinese" in markdown


def test_different_settings_software_references_and_cpu_usage_are_listed(tmp_path: Path) -> None:
    other = cell("edge", machine={"torch": "2.14.0"}, max_new_tokens=32, figures={"cpu_percent": 60.0})
    other["detailed_results"][1]["reference_captions"] = ["她"]
    _, markdown = compare(tmp_path, a=[cell("edge")], b=[other])
    assert "**Different settings in the same cell:**\n\n- max\\_new\\_tokens: 64 and 32" in markdown
    assert "torch: 2.13.0 and 2.14.0" in markdown
    assert "so that their scores do not compare:**\n\n- clip1" in markdown
    assert "edge 100% and 60%" in markdown


OTHER_MACHINE = {"cpu": "Slow 1", "cores": 2, "gpu": "H100"}


def test_different_machines_are_refused_without_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.json", [cell("edge")])
    b = save(tmp_path / "b.json", [cell("edge", machine=OTHER_MACHINE)])
    output = tmp_path / "out" / "r.html"
    line = read_error(capsys, a, b, "--output", str(output))
    assert "cpu: Fast 9000 and Slow 1; cores: 8 and 2; gpu: none and H100" in line
    assert "--different-machines" in line
    assert not output.parent.exists()
    _, markdown = write_report(tmp_path, a, b, "--different-machines")
    assert "**Different machines: times on the real clock do not compare.**\n\n- cpu: Fast 9000 and Slow 1" in markdown


def test_under_a_virtual_clock_the_machine_does_not_matter(tmp_path: Path) -> None:
    settings: Document = {"clock": "virtual", "profile": "phone"}
    _, markdown = compare(tmp_path, a=[cell("edge", **settings)], b=[cell("edge", machine=OTHER_MACHINE, **settings)])
    assert "times on the real clock do not compare" not in markdown


@pytest.mark.parametrize(
    "settings", [{"clock": "real"}, {"clock": "virtual", "profile": "mine", "profile_costs": {"gate": 1}}]
)
def test_one_cell_that_does_not_share_the_virtual_clock_is_enough_to_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Document
) -> None:
    virtual: Document = {"clock": "virtual", "profile": "mine", "profile_costs": {"gate": 0}}
    a = save(tmp_path / "a.json", [cell("edge", **virtual), cell("cloud", **virtual)])
    b = save(
        tmp_path / "b.json",
        [cell("edge", machine=OTHER_MACHINE, **virtual), cell("cloud", machine=OTHER_MACHINE, **settings)],
    )
    assert "different machines" in read_error(capsys, a, b)


def test_cells_without_a_clip_in_common_are_reported_without_a_picture(tmp_path: Path) -> None:
    a, b = ([cell("edge", [clip(name, "他", 1.0)])] for name in ("one", "two"))
    page, markdown = compare(tmp_path, a=a, b=b)
    assert "| edge | 0 | - | - | - | - |" in markdown
    assert page.count("<img") == 1


# files that cannot be reported


DAMAGED_CELL = cell("edge")
del DAMAGED_CELL["detailed_results"][1]["total_time"]
NAN_CELL = cell("edge", [clip("a", "b", 1.0, trace={"events": [[0, "x", 0]], "spans": []}, extra=float("nan"))])
BAD_FILES: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "is not JSON"),
    "not UTF-8": (r'{"a": "\ud800"}', "is not JSON"),
    "too deep": ("[" * 100_000, "is not JSON (maximum recursion depth"),
    "not an object": ("[1]", "contains neither benchmarks nor results"),
    "something else": ('{"a": 1}', "contains neither benchmarks nor results"),
    "no captions": ('{"benchmarks": [{"name": "x", "extra_info": {}}, 3]}', "none of its 2 benchmarks has captions"),
    "results without fields": ('{"benchmarks": [{"name": "x", "extra_info": {"results": 3}}]}', "of version None"),
    "no benchmarks": ('{"benchmarks": []}', "none of its 0 benchmarks has captions"),
    "another version": (json.dumps(cell("edge") | {"schema_version": 1}), "of version 1, but this release reads"),
    "damaged": (json.dumps(DAMAGED_CELL), "this file is damaged (detailed_results/"),
    "NaN": (json.dumps(NAN_CELL), "a number that is NaN or infinite"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_an_unusable_file_is_named_and_the_old_report_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    output = tmp_path / "r.html"
    output.write_text("before")
    for files in (["bad.json"], ["good.json", "bad.json"]):
        save(tmp_path / "good.json", [cell("edge")])
        line = read_error(capsys, *(str(tmp_path / file) for file in files), "--output", str(output))
        assert f"{tmp_path / 'bad.json'}: " in line
        assert message in line
    assert output.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.json", "r.html"]


def test_a_file_with_a_byte_order_mark_is_reported(tmp_path: Path) -> None:
    file = Path(save(tmp_path / "a.json", [cell("edge")]))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert [*read_run(file).cells] == [cell("edge")["experiment_config"]["case"]]


def test_an_absent_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = read_error(capsys, str(tmp_path / "absent.json"))
    assert f"{tmp_path / 'absent.json'}: No such file" in line
    assert ".benchmarks/" in line


def test_a_cell_that_occurs_twice_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "edge-pocket-chinese twice" in read_error(capsys, save(tmp_path / "a.json", [cell("edge"), cell("edge")]))


def test_a_report_that_cannot_be_written_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    file = save(tmp_path / "a.json", [cell("edge")])
    assert "file" in read_error(capsys, file, "--output", str(tmp_path / "file" / "r.html"))


def test_no_file_is_written_before_both_are_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(page: object) -> str:
        raise KeyboardInterrupt

    file = save(tmp_path / "a.json", [cell("edge")])
    monkeypatch.setattr(report, "to_markdown", stop)
    with blank_pictures(), pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        report.main([file, "--output", str(tmp_path / "out" / "r.html")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("options", [["--output", "r.md"], ["--clips", "-1"], ["--clips", "x"], ["--quality", "waste"]])
def test_a_bad_option_is_an_error_that_names_it(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(["a.json", *options])
    assert options[0] in capsys.readouterr().err


# the modules


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(2, 2), (1, 1)], [1, 0]),  # from fast to good
        ([(1, 2), (2, 1)], [0]),
        ([(1, 1), (1, 1)], [0, 1]),  # equal points are on it together
        ([(1, 1), (1, 2), (1, 2)], [1, 2]),  # as fast and worse
        ([(1, 2), (2, 2)], [0]),  # as good and slower
        ([(1, 1), (2, 1), (2, 3), (3, 2)], [0, 2]),
    ],
)
def test_the_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert comparison.pareto_front(points) == front


coordinates = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=8))
def test_exactly_the_points_off_the_front_are_dominated_by_a_point_on_it(points: list[tuple[float, float]]) -> None:
    front = comparison.pareto_front(points)

    def dominates(i: int, j: int) -> bool:
        (a, b), (x, y) = points[i], points[j]
        return a <= x and b >= y and points[i] != points[j]

    for j in range(len(points)):
        assert any(dominates(i, j) for i in front) == (j not in front)


def test_the_gap_closed_needs_a_gap_above_its_noise() -> None:
    edge, cloud, ours = (
        cell(mode, [clip(str(i), "", 1.0, scores={"bleu4": score}) for i, score in enumerate(scores)])
        for mode, scores in {"edge": (0.0, 1.0) * 3, "cloud": (1.0, 0.0) * 3, "speculative": (0.5,) * 6}.items()
    )
    assert comparison.quality_gap_closed(ours, edge, cloud, "bleu4") is None  # the difference is -1 to 1 by clip
    for record in cloud["detailed_results"]:
        record["scores"] = {"bleu4": 1.0}
    for record in edge["detailed_results"]:
        record["scores"] = {"bleu4": 0.2}
    assert comparison.quality_gap_closed(ours, edge, cloud, "bleu4") == pytest.approx((0.5 - 0.2) / (1.0 - 0.2))
    assert comparison.quality_gap_closed(ours, edge, None, "bleu4") is None
    for record in cloud["detailed_results"]:
        record["scores"] = {"bleu4": None}
    assert comparison.quality_gap_closed(ours, edge, cloud, "bleu4") is None


def test_the_baseline_of_a_cell_has_its_language_clock_and_link() -> None:
    ours = cell("speculative", link="4g")
    edge, near, far = cell("edge"), cell("cloud"), cell("cloud", link="4g")
    others = [cell("edge", language="english"), cell("cloud", link="4g", clock="virtual"), edge, near, ours, far]
    assert comparison.find_baseline(ours, "edge", others) is edge
    assert comparison.find_baseline(ours, "cloud", others) is far
    assert comparison.find_baseline(ours, "cloud", [edge, near]) is None


texts = st.text("ab ,。他", max_size=12)


@given(texts, texts, st.sampled_from(["chinese", "english"]))
def test_marked_differences_contain_both_texts(base: str, text: str, language: str) -> None:
    parts = mark_differences(base, text, language)
    assert "".join(part.text for part in parts if part.kind != "deleted") == text
    assert "".join(part.text for part in parts if part.kind != "inserted") == base
    assert all(part.text for part in parts)
    assert (caption_distance(base, text, language) == 0) == (base == text)


def test_english_is_compared_by_words() -> None:
    parts = [(part.kind, part.text) for part in mark_differences("a soft voice.", "a loud voice.", "english")]
    assert parts == [("same", "a "), ("deleted", "soft"), ("inserted", "loud"), ("same", " voice.")]


def test_discarded_draft_is_a_segment_within_the_length_of_the_parts() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"draft": 0.3, "verify": 0.2}
    segments = pictures.list_segments(pictures.Bar("x", parts, discarded=0.1))
    assert [(part, is_discarded) for part, _, is_discarded in segments] == [
        ("draft", False),
        ("draft", True),
        ("verify", False),
    ]
    assert [ms for _, ms, _ in segments] == pytest.approx([200, 100, 200])


@pytest.mark.parametrize(
    ("metric", "before", "after", "text"),
    [
        ("total", 0.2, 0.1, "200.0 → 100.0 (-50.0%)"),
        ("bleu4", 0.5, 0.625, "0.500 → 0.625 (+0.125)"),
        ("cpu_percent", 60, 100, "60 → 100 (+40)"),
        ("rss_peak", 0.0, 1.0, "0 → 1"),
        ("meteor", None, 0.5, "- → 0.500"),
        ("meteor", None, None, "-"),
    ],
)
def test_a_change_is_shown_in_percent_or_as_a_difference(
    metric: str, before: float | None, after: float | None, text: str
) -> None:
    assert format_change(metric, before, after) == text


@pytest.mark.parametrize(
    ("text", "markdown"),
    [("1. a", r"1\. a"), ("- a", r"\- a"), ("+ a", r"\+ a"), ("1.5 a", "1.5 a"), ("a - b", "a - b"), ("# a", r"\# a")],
)
def test_no_text_becomes_a_list_or_a_heading_in_markdown(text: str, markdown: str) -> None:
    page = Page("x", [Section("y", [Paragraph(text), BulletList([("", text)])])])
    assert to_markdown(page) == f"# x\n\n## y\n\n{markdown}\n\n- {markdown}\n"


@pytest.mark.parametrize(
    ("clips", "kinds"), [(2, "are not among these few"), (5, "are not among these few"), (20, "are fewer than 1 in 6")]
)
def test_the_limits_of_intervals_fit_the_number_of_clips(clips: int, kinds: str) -> None:
    assert interval_limits(clips).endswith(f" nor kinds of clips that {kinds}.")
