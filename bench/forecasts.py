"""The forecast of each speculative cell of a run, from its cost profile or from the costs that the run shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import median
from typing import Any

from edgecloud_sd.events import Opened, Trace
from edgecloud_sd.forecast.estimate import estimate_profile, estimate_workload
from edgecloud_sd.forecast.model import Forecast, forecast
from edgecloud_sd.forecast.sentence import forecast_sentence
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Profile

NO_CLOUD_STEP = "no forecast: no step of the cloud alone was timed; add mode cloud (--mode edge,cloud,speculative)"


@dataclass(frozen=True)
class DecodedCell:
    """The traces of one cell of the grid."""

    strategy: Strategy
    link: Link
    traces: Sequence[Trace]


def forecast_cells(
    cells: Mapping[str, DecodedCell], profile: Profile | None = None, shares_device: bool = False
) -> dict[str, Forecast | str]:
    """Return the forecast of each speculative cell by id, or the reason why it has none.

    `profile` is the profile of the virtual clock. With `shares_device` both sides run on one device. The draft model
    would then take its observed step at the cloud too. Draft-ahead slows down both sides there, so the costs of cells
    with and without it are estimated apart.
    """

    @cache
    def costs(draft_ahead: int | None) -> Profile | None:
        """Return the costs of all cells for None, else of the cells with this draft-ahead and of mode cloud."""
        sources = [
            cell
            for cell in cells.values()
            if draft_ahead in (None, cell.strategy.draft_ahead) or cell.strategy.mode == "cloud"
        ]
        observed = profile or estimate_profile(trace for cell in sources for trace in cell.traces)
        if observed and shares_device:
            return replace(observed, draft_at_cloud=observed.edge.step)
        return observed

    forecasts: dict[str, Forecast | str] = {}
    for name, cell in cells.items():
        if not cell.strategy.is_speculative:
            continue
        observed = costs(cell.strategy.draft_ahead if shares_device else None)
        workload = estimate_workload(cell.traces, cell.strategy)
        if observed is None:
            forecasts[name] = NO_CLOUD_STEP
        elif workload is None:
            forecasts[name] = "no forecast: no draft was verified"
        else:
            forecasts[name] = forecast(observed, link_with_network(cell), workload, cell.strategy.needs_edge)
    return forecasts


def link_with_network(cell: DecodedCell) -> Link:
    """Return the link of a cell plus the round trip to a real service: the median over its verifications."""
    seconds = []
    for trace in cell.traces:
        opened = next((moment for moment, event in trace.events if event == Opened("cloud")), math.inf)
        seconds += [span.seconds for span in trace.spans if span.part == "network" and span.end > opened]
    return replace(cell.link, rtt=cell.link.rtt + median(seconds)) if seconds else cell.link


def answer_sentence(answer: Forecast | str) -> str:
    """Return the forecast as text, or the reason why the cell has none."""
    return answer if isinstance(answer, str) else forecast_sentence(answer)


def forecast_to_json(answer: Forecast | str) -> dict[str, Any]:
    """Return the JSON of an answer: its `sentence`, and the fields of its `forecast` or None."""
    return {"sentence": answer_sentence(answer), "forecast": None if isinstance(answer, str) else asdict(answer)}
