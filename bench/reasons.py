"""The reasons for dashes in a table of metrics: which columns lack a value in which cells, and why."""

from __future__ import annotations

from collections.abc import Mapping

from edgecloud_sd.measure.summary import Figures


def explain_dashes(
    names: Mapping[str, str], cells: Mapping[str, tuple[Figures, Mapping[str, str]]]
) -> list[tuple[str, str]]:
    """Return (columns and their cells, reason) for each reason why a metric of `names` has no value.

    `names` maps metrics to the names of their columns. A cell is its figures and the reasons for its null figures.
    """
    by_reason: dict[str, dict[str, list[str]]] = {}
    for label, (figures, reasons) in cells.items():
        for metric, name in names.items():
            if figures.get(metric) is None:
                reason = reasons.get(metric, "the file gives no reason")
                by_reason.setdefault(reason, {}).setdefault(name, []).append(label)
    lines = []
    for reason, labels_by_name in by_reason.items():
        names_by_labels: dict[tuple[str, ...], list[str]] = {}
        for name, labels in labels_by_name.items():
            names_by_labels.setdefault(tuple(labels), []).append(name)
        for cell_labels, columns in names_by_labels.items():
            where = "" if len(cell_labels) == len(cells) else f" ({', '.join(cell_labels)})"
            lines.append((", ".join(columns) + where, reason))
    return lines
