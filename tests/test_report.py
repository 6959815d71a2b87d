"""The report, of files made by hand: what it says, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

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
from bench.report import labels, pictures, render
from bench.report.differences import distance, marked
from bench.report.page import Paragraph, Points, change
from edgecloud_sd.measure.breakdown import PARTS
from edgecloud_sd.measure.metrics import Interval
from edgecloud_sd.measure.results import SCHEMA_VERSION
from edgecloud_sd.measure.summary import METRICS
from edgecloud_sd.timing import profile

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect", "circle"}
SECTIONS = (
    "What was run", "Summary", "Where the time goes", "Latency against quality", "Acceptance by position",
    "Does it pay?", "Captions side by side",
)  # fmt: skip
PICTURES = ("draw_breakdown", "draw_latency_quality", "draw_acceptance", "draw_speedups")
MACHINE = {"system": "Linux", "machine": "x86_64", "cpu": "Fast 9000", "cores": 8, "gpu": None}
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0", "edgecloud_sd": "1"}
TEXTS = {"edge": "他很高兴，语速缓慢。", "cloud": "他很悲伤，语速缓慢。", "speculative": "他很悲伤，语速急促。"}


def clip(name: str, text: str, seconds: float, **other: Any) -> Document:
    """A caption of five tokens, the first after a fifth of the time."""
    counts = dict.fromkeys(("local", "accepted", "correction", "bonus", "rounds", "cloud_calls", "drafted"), 0)
    return {
        "file_id": name,
        "generated_text": text,
        "reference_captions": ["他很悲伤，语速缓慢。"],
        "token_ids": [1, 2, 3, 4, 5],
        "finish_reason": "eos",
        "bleu_score": 0.5,
        "scores": {"bleu4": 0.5},
        "ttft": seconds / 5,
        "e2e": seconds,
        "otps": 5 / seconds,
        "after_first_chunk": [4, 0.8 * seconds],
        "total_time": seconds,
        "wall_time": seconds,
        **dict.fromkeys(("cpu_seconds", "ram_mb", "ram_peak_mb", "gpu_util", "gpu_memory_mb")),
        "not_measured": {},
        "cloud_faults": 0,
        "degraded": None,
        "counts": counts | {"tokens": 5, "cloud": 0, "verified": 0, "ahead": 0, "ahead_wasted": 0},
        "latency_breakdown": dict.fromkeys(PARTS, 0.0),
        "discarded_draft": 0.0,
        "hindsight": None,
        **other,
    }


SCORES = {"edge": 0.5, "cloud": 0.9, "speculative": 0.8}


def cell(mode: str, clips: Sequence[Document] | None = None, machine: Document | None = None, **said: Any) -> Document:
    """One cell's results with round numbers; `figures` among `said` replaces some of them."""
    speculative = mode == "speculative"
    seconds = {"edge": 1.0, "cloud": 4.0, "speculative": 2.0}[mode]
    clips = (
        clips
        if clips is not None
        else [clip(f"clip{i}", TEXTS[mode], seconds * (i + 1), scores={"bleu4": SCORES[mode]}) for i in range(3)]
    )
    figures = dict.fromkeys(METRICS) | {
        "total": sum(each["total_time"] for each in clips) / len(clips),
        "ttft": 0.25,
        "otps": 10.0,
        "bleu4": SCORES[mode],
        "cpu_percent": 100.0,
        "cloud_call_rate": 0.4 if speculative else None,
        "discarded_draft": 0.25 if speculative else None,
    }
    language = said.get("language", "chinese")
    counts = ("tokens", "local", "accepted", "correction", "bonus", "cloud", "rounds", "cloud_calls", "drafted")
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment_config": {
            "case": f"{mode}-pocket-{'H1-k2-greedy-' if speculative else ''}{language}",
            "pair": "pocket",
            "mode": mode,
            "gate": "H1" if speculative else None,
            "k": 2 if speculative else None,
            "draft_stop": None,
            "draft_ahead": 0 if speculative else None,
            "rule": "greedy" if speculative else None,
            "link": None if mode == "edge" else "none",
            "open": "eager" if speculative else None,
            "cloud_url": None,
            "max_cpu_cores": None,
            "max_memory_gb": None,
            "clock": "real",
            "profile": None,
            "profile_costs": None,
            "output": {"edge": None, "cloud": "exact", "speculative": "lossy"}[mode],
            "language": language,
            "caption_type": "audio_only",
            "prompt_type": "default",
            "max_new_tokens": 64,
            **{key: value for key, value in said.items() if key != "figures"},
        },
        "environment": MACHINE | VERSIONS | (machine or {}),
        "in_force": {"cores": [0, 1], "torch_threads": 1, "memory_bytes": None},
        "metrics": {
            **dict.fromkeys(("avg_bleu", "avg_cider", "avg_bertscore_precision", "avg_bertscore_recall")),
            "avg_bertscore_f1": None,
            "tokenizer": "characters",
            "bertscore_model": None,
            "empty_captions": 0,
            "latency_metrics": dict.fromkeys(
                ("ttft_mean", "ttft_min", "ttft_max", "otps_mean", "total_time_mean", "cpu_percent_mean", "ram_mb_mean")
            )
            | {"gpu_util_mean": None},
            "speculative_decoding_metrics": dict.fromkeys(
                (*counts, "verified", "ahead", "ahead_wasted", "discarded"), 0
            )
            | {"acceptance_by_position": [0.9, 0.6] if speculative else []},
            "figures": figures | said.get("figures", {}),
            "latency_breakdown": dict.fromkeys(PARTS, 0.0) | {"draft": 1.0, "verify": seconds - 1 + 0.25 * speculative},
            "breakdown_closure": {"median": 0.995, "worst": 0.98, "unnamed_median": 0.01},
            "reasons": {"meteor": "no Java"},
        },
        "detailed_results": clips,
        "skipped_clips": [],
    }


def grid(**said: Any) -> list[Document]:
    return [cell(mode, **said) for mode in ("edge", "cloud", "speculative")]


def saved(path: Path, cells: Sequence[Document], **verdicts: str) -> str:
    """A file as pytest-benchmark writes it, with what a report must pass over."""
    rows: list[Document] = [
        {"name": each["experiment_config"]["case"], "extra_info": {"results": each}} for each in cells
    ]
    rows += [{"name": "test_captioning[x]:ttft", "extra_info": {"meaning": "m"}}, {"name": "other", "extra_info": None}]
    answers = {name: {"sentence": sentence, "forecast": None} for name, sentence in verdicts.items()}
    path.write_text(json.dumps({"benchmarks": rows, "verdicts": answers, "datetime": "2026-01-01T00:00:00"}))
    return str(path)


@contextmanager
def undrawn() -> Iterator[None]:
    """The pictures take most of a report's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(pictures, name, lambda *_: "<svg></svg>")
        yield


def made(tmp_path: Path, *arguments: str, draw: bool = False) -> tuple[str, str]:
    """The HTML and the Markdown of a report."""
    file = tmp_path / "out" / "r.html"
    with nullcontext() if draw else undrawn():
        report.main([*arguments, "--output", str(file)])
    assert sorted(each.name for each in file.parent.iterdir()) == ["r.html", "r.md"]
    return file.read_text(encoding="utf-8"), file.with_suffix(".md").read_text(encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said instead."""
    with undrawn(), pytest.raises(SystemExit) as caught:
        report.main(arguments)
    line = str(caught.value.code)  # which Python prints, exiting with 1
    assert line.startswith("error: ")
    assert "\n" not in line
    assert capsys.readouterr().out == ""
    return line


class Parsed(HTMLParser):
    """Checks that tags are balanced; keeps headings, ids, tags, attributes and the text outside style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids.update(value for key, value in attrs if key == "id" and value)
        if tag == "h2":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The report of a small grid, with its pictures."""
    tmp_path = tmp_path_factory.mktemp("alone")
    answers = {"speculative-pocket-H1-k2-greedy-chinese": "Pays: so it is said."}
    return made(tmp_path, saved(tmp_path / "a.json", grid(), **answers), draw=True)


def test_the_report_has_each_section_and_every_cell(alone: tuple[str, str]) -> None:
    page, markdown = alone
    parsed = Parsed(page)
    assert parsed.titles == re.findall(r"^## (.*)$", markdown, re.M) == [*SECTIONS]
    for each in grid():
        assert each["experiment_config"]["case"] in parsed.text
        assert each["experiment_config"]["case"] in markdown


def test_two_languages_are_told_apart(tmp_path: Path) -> None:
    page, markdown = made(tmp_path, saved(tmp_path / "a.json", grid() + grid(language="english")))
    wanted = [SECTIONS[0], *(f"{title} ({each})" for each in ("chinese", "english") for title in SECTIONS[1:])]
    assert Parsed(page).titles == wanted
    english = markdown[markdown.index("## Does it pay? (english)") :]
    assert "- **H1 k2 greedy**: the file holds no answer of the oracle" in english


def test_the_report_needs_nothing_from_outside(alone: tuple[str, str]) -> None:
    parsed = Parsed(alone[0])
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    addresses = [value for key, value in parsed.attributes if key in ("src", "href", "xlink:href", "srcset", "action")]
    assert addresses
    assert all(each is not None and each.startswith("#") for each in addresses)
    assert "http" not in alone[0]
    assert parsed.tags["style"] == 1
    assert "@import" not in alone[0]


def test_pictures_have_words_and_ids_of_their_own(alone: tuple[str, str]) -> None:
    parsed = Parsed(alone[0])
    pictures = parsed.attributes.count(("role", "img"))
    assert pictures == parsed.tags["svg"] == len(PICTURES)
    assert len(re.findall(r'role="img" aria-label="[^"]{20,}"', alone[0])) == pictures
    assert max(parsed.ids.values()) == 1
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', alone[0]))
    assert used <= set(parsed.ids)


def test_the_summary_says_what_is_measured_and_why_the_rest_is_not(alone: tuple[str, str]) -> None:
    markdown = alone[1]
    assert "| cell | output | TTFT ms | OTPS tokens/s | total ms | BLEU-4 | cloud calls | CPU % |" in markdown
    assert "| H1 k2 greedy | lossy | 250.0 | 10.0 | 4000.0 | 0.800 | 0.400 | 100 |" in markdown
    assert "- **METEOR**: no Java" in markdown
    assert f'title="{METRICS["ttft"].meaning} (lower is better)"' in alone[0]


def test_speedups_gap_and_the_oracles_sentence(alone: tuple[str, str]) -> None:
    markdown = alone[1]
    # 2 s for 1 s of the edge and 4 s of the cloud; (0.8 - 0.5) / (0.9 - 0.5) of the gap
    intervals = r"0.50 \[0.50, 0.50\] | 0.50 \[0.50, 0.50\] | 2.00 \[2.00, 2.00\] | 2.00 \[2.00, 2.00\]"
    assert f"| H1 k2 greedy | {intervals} | 0.75 | lossy |" in markdown
    assert "- **H1 k2 greedy**: Pays: so it is said." in markdown


def test_captions_are_marked_against_the_clouds(alone: tuple[str, str]) -> None:
    page, markdown = alone
    for text in (page, markdown):
        assert "他很<del>悲伤</del><ins>高兴</ins>，语速缓慢。" in text
        assert "他很悲伤，语速<del>缓慢</del><ins>急促</ins>。" in text
    assert "| reference | 他很悲伤，语速缓慢。 |  |\n| cloud | 他很悲伤，语速缓慢。 |" in markdown


def test_cells_that_wrote_the_same_are_named_once(tmp_path: Path) -> None:
    same = [clip("one", "他很悲伤。", 1.0)]
    _, markdown = made(tmp_path, saved(tmp_path / "a.json", [cell("edge", same), cell("cloud", same)]))
    assert re.findall(r"^\| .* \| 他很悲伤。 \|", markdown, re.M) == ["| every cell | 他很悲伤。 |"]
    assert "<del>" not in re.sub("del {", "", markdown)


def test_without_the_cloud_captions_are_marked_against_the_reference(tmp_path: Path) -> None:
    _, markdown = made(tmp_path, saved(tmp_path / "a.json", [cell("edge")]))
    assert "differ most from the first reference, as no cell is the cloud alone" in markdown
    assert "| edge | 他很<del>悲伤</del><ins>高兴</ins>，语速缓慢。 |" in markdown


def test_the_clips_that_differ_most_come_first_and_no_more_than_asked(tmp_path: Path) -> None:
    written = {"same": "他很悲伤。", "far": "她", "near": "他很高兴。"}
    edge = cell("edge", [clip(name, text, 1.0) for name, text in written.items()])
    cloud = cell("cloud", [clip(name, "他很悲伤。", 1.0) for name in written])
    file = saved(tmp_path / "a.json", [edge, cloud])
    _, markdown = made(tmp_path, file, "--clips", "2")
    assert re.findall(r"^\| \*\*(.*)\*\* \|", markdown, re.M) == ["far", "near"]
    assert "The first 2 of 3 clips" in markdown


def test_nothing_that_a_file_says_is_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> | a\n# b *c* `d` [e](f) $g$"
    escaped = r"&lt;script&gt;alert(1)&lt;/script&gt; \| a \# b \*c\* \`d\` \[e\](f) \$g\$"
    cells = [
        cell(mode, [clip(bad, bad, 1.0, reference_captions=[bad])], gate=bad, case=f"{mode} {bad}", pair=bad)
        for mode in ("cloud", "speculative")
    ]
    cells[0]["metrics"]["reasons"]["meteor"] = bad
    cells[0]["skipped_clips"] = [{"file_id": bad, "reason": bad}]
    page, markdown = made(tmp_path, saved(tmp_path / "a.json", cells, **{f"speculative {bad}": bad}))
    parsed = Parsed(page)
    assert "script" not in parsed.tags
    assert parsed.text.count("<script>alert(1)</script> | a\n# b *c* `d` [e](f) $g$") > 8
    assert "<script" not in markdown
    assert markdown.count(escaped) > 8
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert not any(line.startswith("# b") for line in markdown.splitlines())


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", grid())
    assert made(tmp_path, file) == made(tmp_path, file)
    rows = [("x", [("y", Interval(1.0, 0.5, 1.5))])]
    assert pictures.draw_speedups("a", rows) == pictures.draw_speedups("a", rows)


def test_another_quality_can_be_set_against_latency(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", [cell("edge", figures={"cider": 5.25}), cell("cloud", figures={"cider": 9.0})])
    page, _ = made(tmp_path, file, "--quality", "cider")
    assert "CIDEr against seconds a caption. On the Pareto front, from fast to good: edge, cloud." in page
    page, _ = made(tmp_path, file, "--quality", "meteor")
    assert "No cell has METEOR" in page
    assert page.count("<svg") == 1


def test_many_cells_are_numbered_where_they_are_and_named_beside() -> None:
    points = [pictures.Point(f"$cell_{i}$ <i>她", "edge", i % 3, i, 0.5) for i in range(9)]
    texts = re.findall(r"<text [^>]*>([^<]*)<", pictures.draw_latency_quality("x", points, [0, 3], "BLEU-4"))
    assert texts.count("9") == 1
    assert [text.split() for text in texts if "cell" in text] == [
        [str(i + 1), f"$cell_{i}$", "&lt;i&gt;她"] for i in range(len(points))
    ]


def test_lines_that_are_alike_are_drawn_once_and_many_are_not_named_one_by_one() -> None:
    def texts(n: int) -> list[str]:
        lines = [pictures.Line(f"{n} line", [1.0, 1 / (i + 1)], f"H{i}", "greedy", "2") for i in range(n)]
        return re.findall(r"<text [^>]*>([^<]*)<", pictures.draw_acceptance("x", [*lines, lines[0]]))

    assert "2 line (and 1 more)" in texts(2)
    many = texts(17)
    assert {"H0", "H16", "greedy", "k=2"} <= set(many)
    assert not any("line" in text for text in many)


def test_cells_whose_labels_are_alike_are_called_by_their_ids(tmp_path: Path) -> None:
    cells = [cell("edge", case="edge-one-zh", pair="one"), cell("edge", case="edge-two-zh", pair="two")]
    _, markdown = made(tmp_path, saved(tmp_path / "a.json", cells))
    assert "\n| edge-one-zh | - |" in markdown


def test_the_results_file_of_one_cell_has_its_answer_computed(tmp_path: Path) -> None:
    events = [
        [0.1, "prepared", 5],
        [0.2, "opened", "edge"],
        [0.3, "opened", "cloud"],
        [0.4, "drafted", [1, 2], [0.1, 0.2], 0],
        [0.4, "escalated", 1],
        [0.5, "verified", 1, 3],
        [0.5, "committed", [1], "accepted"],
        [0.5, "committed", [3], "correction"],
        [0.5, "finished", "eos"],
    ]
    costs = json.loads(json.dumps(asdict(profile.load_profile("published"))))
    clips = [clip("one", "他", 0.5, trace={"events": events, "spans": []})]
    one = cell("speculative", clips, clock="virtual", profile="published", profile_costs=costs)
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    _, markdown = made(tmp_path, str(file))
    assert re.search(r"^- \*\*H1 k2 greedy\*\*: Does not pay: .*the cloud alone 38\.7 ms", markdown, re.M)
    assert "Neither the edge nor the cloud alone captioned these clips" in markdown


def test_a_trace_or_a_link_that_is_not_known_costs_the_answer_and_not_the_report(tmp_path: Path) -> None:
    one = cell("speculative", [clip("one", "他", 0.5, trace={"events": [[0.1, "dreamt", 5]], "spans": []})])
    file = tmp_path / "one.json"
    file.write_text(json.dumps(one))
    assert "- **H1 k2 greedy**: no answer: not a saved trace: unknown event 'dreamt'" in made(tmp_path, str(file))[1]


# two files


def after(tmp_path: Path, *arguments: str, a: Sequence[Document], b: Sequence[Document]) -> tuple[str, str]:
    return made(tmp_path, saved(tmp_path / "a.json", a), saved(tmp_path / "b.json", b), *arguments)


def test_a_file_compared_with_itself_is_exactly_as_fast_and_as_good(tmp_path: Path) -> None:
    page, markdown = after(tmp_path, a=grid(), b=grid())
    one = r"1.00 \[1.00, 1.00\]"
    for label in ("edge", "cloud", "H1 k2 greedy"):
        assert f"| {label} | 3 | {one} | {one} | +0.000 \\[+0.000, +0.000\\] | all the same |" in markdown
    assert "every clip that both hold has the same caption" in page
    compared = markdown[: markdown.index("## Is B faster")]
    assert not re.search("differ|only$", compared, re.I | re.M)
    Parsed(page)


def test_clips_are_paired_by_id_and_not_by_place(tmp_path: Path) -> None:
    clips = [clip(f"clip{i}", f"他{i}", 1.0 + i, scores={"bleu4": i / 10}) for i in range(5)]
    _, markdown = after(tmp_path, a=[cell("edge", clips)], b=[cell("edge", clips[::-1])])
    assert (
        r"| edge | 5 | 1.00 \[1.00, 1.00\] | 1.00 \[1.00, 1.00\] | +0.000 \[+0.000, +0.000\] | all the same |"
        in markdown
    )


def test_a_change_is_measured_over_the_clips_in_both(tmp_path: Path) -> None:
    a = [clip(name, "他很悲伤。", 2.0, scores={"bleu4": 0.5}) for name in ("both1", "both2", "gone")]
    b = [clip(name, "他很高兴。", 1.0, scores={"bleu4": 0.25}) for name in ("new", "both2", "both1")]
    page, markdown = after(tmp_path, a=[cell("edge", a)], b=[cell("edge", b)])
    twice = r"2.00 \[2.00, 2.00\]"
    assert f"| edge | 2 | {twice} | {twice} | -0.250 \\[-0.250, -0.250\\] | 2 of 2 differ |" in markdown
    assert "- **in A only, 1**: gone (in edge-pocket-chinese)" in markdown
    assert "- **in B only, 1**: new (in edge-pocket-chinese)" in markdown
    assert "2000.0 → 1000.0 (-50.0%)" in page
    assert markdown.count("他很<del>悲伤</del><ins>高兴</ins>。") == 2


def test_cells_in_one_file_only_are_listed(tmp_path: Path) -> None:
    edge, cloud, speculative = grid()
    _, markdown = after(tmp_path, a=[edge, cloud], b=[edge, speculative])
    assert "1 cell is in both files." in markdown
    assert "1 cell is in A (a.json) only:\n\n- cloud-pocket-chinese" in markdown
    assert "1 cell is in B (b.json) only:\n\n- speculative-pocket-H1-k2-greedy-chinese" in markdown


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    other = cell("edge", machine={"torch": "2.14.0"}, max_new_tokens=32, figures={"cpu_percent": 60.0})
    other["detailed_results"][1]["reference_captions"] = ["她"]
    _, markdown = after(tmp_path, a=[cell("edge")], b=[other])
    assert "**Different settings in the same cell:**\n\n- max\\_new\\_tokens: 64 and 32" in markdown
    assert "torch: 2.13.0 and 2.14.0" in markdown
    assert "so that their scores do not compare:**\n\n- clip1" in markdown
    assert "edge 100% and 60%" in markdown


OTHER = {"cpu": "Slow 1", "cores": 2, "gpu": "H100"}


def test_different_machines_are_refused_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [saved(tmp_path / "a.json", [cell("edge")]), saved(tmp_path / "b.json", [cell("edge", machine=OTHER)])]
    output = tmp_path / "out" / "r.html"
    line = refused(capsys, *files, "--output", str(output))
    assert "cpu: Fast 9000 and Slow 1; cores: 8 and 2; gpu: none and H100" in line
    assert "--different-machines" in line
    assert not output.parent.exists()
    _, markdown = made(tmp_path, *files, "--different-machines")
    assert "**Different machines: no time on the real clock compares.**\n\n- cpu: Fast 9000 and Slow 1" in markdown


def test_under_a_virtual_clock_the_machine_does_not_matter(tmp_path: Path) -> None:
    said: Document = {"clock": "virtual", "profile": "phone"}
    _, markdown = after(tmp_path, a=[cell("edge", **said)], b=[cell("edge", machine=OTHER, **said)])
    assert "no time on the real clock compares" not in markdown


@pytest.mark.parametrize(
    "said", [{"clock": "real"}, {"clock": "virtual", "profile": "mine", "profile_costs": {"gate": 1}}]
)
def test_one_cell_that_does_not_share_the_virtual_clock_is_enough_to_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: Document
) -> None:
    virtual: Document = {"clock": "virtual", "profile": "mine", "profile_costs": {"gate": 0}}
    a = saved(tmp_path / "a.json", [cell("edge", **virtual), cell("cloud", **virtual)])
    b = saved(tmp_path / "b.json", [cell("edge", machine=OTHER, **virtual), cell("cloud", machine=OTHER, **said)])
    assert "different machines" in refused(capsys, a, b)


def test_files_without_a_cell_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path / "a.json", [cell("edge")]), saved(tmp_path / "b.json", [cell("cloud")])
    line = refused(capsys, a, b, "--different-machines")
    assert "A (a.json) has edge-pocket-chinese, B (b.json) has cloud-pocket-chinese" in line


def test_cells_without_a_clip_in_common_are_reported_without_a_picture(tmp_path: Path) -> None:
    a, b = ([cell("edge", [clip(name, "他", 1.0)])] for name in ("one", "two"))
    page, markdown = after(tmp_path, a=a, b=b)
    assert "| edge | 0 | - | - | - | - |" in markdown
    assert page.count("<svg") == 1


# files that are of no use


def damaged() -> Document:
    bad = cell("edge")
    del bad["detailed_results"][1]["total_time"]
    return bad


BAD: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is no JSON"),
    "no text": (r'{"a": "\ud800"}', "is no JSON"),
    "no object": ("[1]", "holds neither benchmarks nor results"),
    "something else": ('{"a": 1}', "holds neither benchmarks nor results"),
    "no captions": ('{"benchmarks": [{"name": "x", "extra_info": {}}, 3]}', "none of its 2 benchmarks holds captions"),
    "results that are none": ('{"benchmarks": [{"name": "x", "extra_info": {"results": 3}}]}', "of version None"),
    "no benchmark": ('{"benchmarks": []}', "none of its 0 benchmarks holds captions"),
    "another version": (json.dumps(cell("edge") | {"schema_version": 1}), "of version 1 and not of version"),
    "damaged": (json.dumps(damaged()), "this file is damaged (detailed_results/"),
    "nan": (
        json.dumps(
            cell("edge", [clip("a", "b", 1.0, trace={"events": [[0, "x", 0]], "spans": []}, extra=float("nan"))])
        ),
        "a number that is none",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_an_unusable_file_is_named_and_the_report_before_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    output = tmp_path / "r.html"
    output.write_text("before")
    for files in (["bad.json"], ["good.json", "bad.json"]):
        saved(tmp_path / "good.json", [cell("edge")])
        line = refused(capsys, *(str(tmp_path / file) for file in files), "--output", str(output))
        assert f"{tmp_path / 'bad.json'}: " in line
        assert message in line
    assert output.read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.json", "good.json", "r.html"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, str(tmp_path / "absent.json"))
    assert f"{tmp_path / 'absent.json'}: No such file" in line
    assert ".benchmarks/" in line


def test_a_cell_that_is_there_twice_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "edge-pocket-chinese twice" in refused(capsys, saved(tmp_path / "a.json", [cell("edge"), cell("edge")]))


def test_a_report_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    file = saved(tmp_path / "a.json", [cell("edge")])
    assert "file" in refused(capsys, file, "--output", str(tmp_path / "file" / "r.html"))


def test_nothing_is_written_before_all_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(page: object) -> str:
        raise KeyboardInterrupt

    file = saved(tmp_path / "a.json", [cell("edge")])
    monkeypatch.setattr(report, "as_markdown", stop)
    with undrawn(), pytest.raises(KeyboardInterrupt):
        report.main([file, "--output", str(tmp_path / "out" / "r.html")])
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("options", [["--output", "r.md"], ["--clips", "-1"], ["--clips", "x"], ["--quality", "waste"]])
def test_an_option_that_makes_no_sense_is_an_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(["a.json", *options])
    assert options[0] in capsys.readouterr().err


# the parts


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
def test_every_point_off_the_front_is_beaten_by_one_on_it_and_none_on_it_is(points: list[tuple[float, float]]) -> None:
    front = comparison.pareto_front(points)

    def beats(i: int, j: int) -> bool:
        (a, b), (x, y) = points[i], points[j]
        return a <= x and b >= y and points[i] != points[j]

    for j in range(len(points)):
        assert any(beats(i, j) for i in front) == (j not in front)


def test_the_gap_closed_needs_a_gap_above_its_noise() -> None:
    edge, cloud, ours = (
        cell(mode, [clip(str(i), "", 1.0, scores={"bleu4": score}) for i, score in enumerate(scores)])
        for mode, scores in {"edge": (0.0, 1.0), "cloud": (1.0, 0.0), "speculative": (0.5, 0.5)}.items()
    )
    assert comparison.quality_gap_closed(ours, edge, cloud, "bleu4") is None  # 0.4, and from -1 to 1 by the clips
    for each in cloud["detailed_results"]:
        each["scores"] = {"bleu4": 1.0}
    for each in edge["detailed_results"]:
        each["scores"] = {"bleu4": 0.2}
    assert comparison.quality_gap_closed(ours, edge, cloud, "bleu4") == pytest.approx((0.5 - 0.2) / (1.0 - 0.2))
    assert comparison.quality_gap_closed(ours, edge, None, "bleu4") is None
    for each in cloud["detailed_results"]:
        each["scores"] = {"bleu4": None}
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
def test_marks_hold_both_texts_whole(base: str, text: str, language: str) -> None:
    parts = marked(base, text, language)
    assert "".join(part.text for part in parts if part.kind != "deleted") == text
    assert "".join(part.text for part in parts if part.kind != "inserted") == base
    assert all(part.text for part in parts)
    assert (distance(base, text, language) == 0) == (base == text)


def test_english_is_compared_by_words() -> None:
    parts = [(part.kind, part.text) for part in marked("a soft voice.", "a loud voice.", "english")]
    assert parts == [("same", "a "), ("deleted", "soft"), ("inserted", "loud"), ("same", " voice.")]


def test_a_bar_is_as_long_as_its_parts_and_its_discarded_draft_lies_within() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"draft": 0.3, "verify": 0.2}
    found = pictures.segments(pictures.Bar("x", parts, discarded=0.1))
    assert [(part, lost) for part, _, lost in found] == [("draft", False), ("draft", True), ("verify", False)]
    assert [ms for _, ms, _ in found] == pytest.approx([200, 100, 200])


def test_labels_cover_neither_each_other_nor_a_marker() -> None:
    area = labels.Box(0, 0, 400, 200)
    markers = [labels.Box(x - 5, y - 5, x + 5, y + 5) for x in (100, 104, 110, 200, 390) for y in (100, 103)]
    placed = labels.place(markers, [(60.0, 12.0)] * len(markers), area)
    for i, box in enumerate(placed):
        assert box.within(area)
        assert not any(box.meets(other) for other in (*markers, *placed[:i]))


@pytest.mark.parametrize(
    ("figure", "before", "later", "shown"),
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
    figure: str, before: float | None, later: float | None, shown: str
) -> None:
    assert change(figure, before, later) == shown


@pytest.mark.parametrize(
    ("text", "markdown"),
    [("1. a", r"1\. a"), ("- a", r"\- a"), ("+ a", r"\+ a"), ("1.5 a", "1.5 a"), ("a - b", "a - b"), ("# a", r"\# a")],
)
def test_no_line_of_text_becomes_a_list_or_a_heading(text: str, markdown: str) -> None:
    assert render._block(Paragraph(text)) == [markdown]
    assert render._block(Points([("", text)])) == [f"- {markdown}"]
