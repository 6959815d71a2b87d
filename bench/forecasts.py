"""The oracle's answer for each speculative cell of a run, from its profile or the costs that the run itself shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import median
from typing import Any

from edgecloud_sd.events import Opened, Trace
from edgecloud_sd.forecast import model as oracle
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Profile


@dataclass(frozen=True)
class Decoded:
    """One cell's captions, and what the oracle must know of the cell."""

    mode: str
    k: int | None  # the length that drafts have but at the end of a caption; None where it varies
    gated: int
    link: Link
    eager: bool
    ahead: int
    is_lossless: bool
    traces: Sequence[Trace]


def forecast_cells(
    cells: Mapping[str, Decoded], profile: Profile | None = None, together: bool = False
) -> dict[str, oracle.Forecast | str]:
    """By id, the forecast of each speculative cell, or why there is none.

    `profile`: the virtual clock's. `together`: both sides run on one device, so that the drafter's step beside the
    cloud is its own; and each slows the other down where the edge drafts ahead, so that costs seen with and without it
    are kept apart.
    """

    @cache
    def costs(ahead: int | None) -> Profile | None:
        """Of all cells for None, else of those that draft so far ahead and the cloud's own."""
        alike = [each for each in cells.values() if ahead is None or ahead == each.ahead or each.mode == "cloud"]
        seen = profile or oracle.observed(trace for each in alike for trace in each.traces)
        return replace(seen, draft_at_cloud=seen.edge.step) if seen is not None and together else seen

    found: dict[str, oracle.Forecast | str] = {}
    for name, cell in cells.items():
        if cell.mode != "speculative":
            continue
        seen = costs(cell.ahead if together else None)
        work = oracle.workload(cell.traces, cell.k, cell.gated, cell.eager, cell.ahead, cell.is_lossless)
        if seen is None:
            found[name] = "no answer: a step of the cloud alone was not timed (--mode edge,cloud,speculative)"
        elif work is None:
            found[name] = "no answer: nothing was verified"
        else:
            found[name] = oracle.forecast(seen, link_with_network(cell), work)
    return found


def link_with_network(cell: Decoded) -> Link:
    """The link of a cell, with the round trip to a real service on top of what is emulated: the median of the calls
    that verify."""
    network = []
    for trace in cell.traces:
        opened = next((s for s, event in trace.events if event == Opened("cloud")), math.inf)
        network += [span.seconds for span in trace.spans if span.part == "network" and span.end > opened]
    return replace(cell.link, rtt=cell.link.rtt + median(network)) if network else cell.link


def forecast_sentence(answer: oracle.Forecast | str) -> str:
    """What to say of a cell."""
    return answer if isinstance(answer, str) else answer.sentence


def forecast_to_json(answer: oracle.Forecast | str) -> dict[str, Any]:
    """`forecast_sentence`, and `forecast` with its fields or None."""
    return {"sentence": forecast_sentence(answer), "forecast": None if isinstance(answer, str) else asdict(answer)}
