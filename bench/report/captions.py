"""The captions of clips side by side, with their differences marked and the most different first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from bench import comparison
from bench.cases import LANGUAGE_CODES
from bench.comparison import ClipRecord
from bench.report.cells import ReportCell
from bench.report.differences import TextPart, caption_distance, mark_differences
from bench.report.metric_text import format_metric, metric_name
from bench.report.page import Block, CaptionLine, ClipCaptions, Paragraph


def list_captions(cells: Sequence[ReportCell], quality: str, max_clips: int) -> list[Block]:
    """Return the captions of each clip, compared with the caption of cloud mode or else with the first reference."""
    language = cells[0].language
    cloud = next((cell for cell in cells if cell.mode == "cloud"), None)
    cloud_clips = cloud.clips if cloud else {}
    clips: dict[str, dict[str, ClipRecord]] = {}  # file_id -> label -> record
    for cell in cells:
        for file_id, clip in cell.clips.items():
            clips.setdefault(file_id, {})[cell.label] = clip
    bases = {
        file_id: cloud_clips[file_id]["generated_text"]
        if file_id in cloud_clips
        else next(iter(records.values()))["reference_captions"][0]
        for file_id, records in clips.items()
    }

    def mean_distance(file_id: str) -> float:
        texts = [clip["generated_text"] for clip in clips[file_id].values()]
        return fmean(caption_distance(bases[file_id], text, language) for text in texts)

    selected = sorted(clips, key=mean_distance, reverse=True)[:max_clips]
    base_name = "the caption of cloud mode" if cloud else "the first reference, because no cell is cloud mode"
    intro = (
        f"{_count_shown(len(selected), len(clips))} clips, ordered by how much their captions differ from {base_name}. "
        "Underlined text is not in that caption; struck-out text is only in that caption. In brackets: the clip's own "
        f"{metric_name(quality)}, if it has one."
    )
    blocks = [_list_clip_captions(file_id, clips[file_id], bases[file_id], language, quality) for file_id in selected]
    return [Paragraph(intro), *blocks]


def _list_clip_captions(
    file_id: str, clips: Mapping[str, ClipRecord], base: str, language: str, quality: str
) -> ClipCaptions:
    """Return the references, then each different caption once, beginning with the base."""
    labels_by_text: dict[str, list[str]] = {}
    for label, clip in clips.items():
        labels_by_text.setdefault(clip["generated_text"], []).append(label)
    captions = _list_references(next(iter(clips.values())))
    for text in sorted(labels_by_text, key=lambda text: text != base):
        labels = labels_by_text[text]
        score = clips[labels[0]]["scores"].get(quality)
        note = "" if score is None else f"[{format_metric(quality, score)}]"
        writers = ["every cell"] if len(labels) == len(clips) > 1 else labels
        captions.append(CaptionLine(writers, mark_differences(base, text, language), note))
    return ClipCaptions(file_id, captions, LANGUAGE_CODES[language])


def list_different_captions(pairs: Sequence[tuple[ReportCell, ReportCell]], max_clips: int) -> list[Block]:
    """Return the captions of B that differ from those of A in the same cell."""
    labels_by_change: dict[tuple[str, str, str], list[str]] = {}  # keys: file_id, caption in A, caption in B
    records: dict[str, ClipRecord] = {}
    for cell, other in pairs:
        for a, b in comparison.pair_clips(cell.document, other.document):
            if a["generated_text"] != b["generated_text"]:
                change = a["file_id"], a["generated_text"], b["generated_text"]
                labels_by_change.setdefault(change, []).append(cell.label)
                records[a["file_id"]] = a
    if not labels_by_change:
        return [Paragraph("None: the captions of A and B are the same in every cell and clip that both files have.")]
    language = pairs[0][0].language
    selected = sorted(
        labels_by_change, key=lambda change: caption_distance(change[1], change[2], language), reverse=True
    )[:max_clips]
    intro = (
        f"{_count_shown(len(selected), len(labels_by_change))} pairs of captions, the most different first. "
        "Underlined text is only in B's caption; struck-out text is only in A's."
    )
    blocks: list[Block] = [Paragraph(intro)]
    for file_id, before, after in selected:
        captions = [
            *_list_references(records[file_id]),
            CaptionLine(["A"], [TextPart("same", before)]),
            CaptionLine(["B"], mark_differences(before, after, language)),
        ]
        title = f"{file_id} ({', '.join(labels_by_change[file_id, before, after])})"
        blocks.append(ClipCaptions(title, captions, LANGUAGE_CODES[language]))
    return blocks


def _list_references(clip: ClipRecord) -> list[CaptionLine]:
    return [CaptionLine(["reference"], [TextPart("same", reference)]) for reference in clip["reference_captions"]]


def _count_shown(shown: int, count: int) -> str:
    """Return `All 3`, or `The first 2 of 3`."""
    return f"All {count}" if shown == count else f"The first {shown} of {count}"
