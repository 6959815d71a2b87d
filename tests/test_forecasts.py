"""The forecast of each cell of a run, from its own link and from the costs that apply to it."""

from __future__ import annotations

import pytest

from bench.forecasts import DecodedCell, forecast_cells, link_with_network
from edgecloud_sd.events import (
    Ahead,
    Committed,
    Draft,
    Drafted,
    Escalated,
    Finished,
    Opened,
    Prepared,
    Span,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.forecast.model import Forecast
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.timing import link as links

DRAFT = Draft((1, 2))
CLOUD = Trace(
    (
        (0.0, Prepared(3)),
        (1.0, Opened("cloud")),
        (5.0, Committed((1,), "cloud")),
        (9.0, Committed((2,), "cloud")),
        (9.0, Finished("length")),
    ),
    (Span("cloud_decode", 1.0, 5.0), Span("cloud_decode", 5.0, 9.0)),
)


def one_round(step: float, is_ahead: bool = False, spans: tuple[Span, ...] = ()) -> Trace:
    """Return the trace of one round: a draft of two tokens, accepted whole, whose verdict takes 4 s."""
    sent = 1 + 2 * step
    drafted_ahead = ((sent + 3, Ahead((3,), 1)),) if is_ahead else ()
    steps = [Span("draft", 1.0, 1 + step), Span("draft", 1 + step, sent)]
    steps += [Span("draft", sent, sent + 3)] if is_ahead else []
    return Trace(
        (
            (0.0, Prepared(3)),
            (1.0, Opened("edge")),
            (sent, Drafted(DRAFT, passes=(1, 1))),
            (sent, Escalated(DRAFT, 1)),
            (sent, Opened("cloud")),
            *drafted_ahead,
            (sent + 4, Verified(DRAFT, Verdict(2, 3))),
            (sent + 4, Committed((1, 2), "accepted")),
            (sent + 4, Committed((3,), "bonus")),
            (sent + 4, Finished("length")),
        ),
        (*spans, *steps, Span("verify", steps[-1].end, sent + 4)),
    )


def cell(mode: str, *traces: Trace, draft_ahead: int = 0) -> DecodedCell:
    strategy = Strategy(mode, k=2, draft_ahead=draft_ahead) if mode == "speculative" else Strategy(mode)
    return DecodedCell(strategy, links.NO_LINK, traces)


def test_the_round_trip_to_a_service_includes_its_hidden_time() -> None:
    verification = Span("network", 4.0, 5.0, 10, hidden=2.0)
    prompt = Span("network", 0.5, 1.0, 100)
    served = one_round(0.5, is_ahead=True, spans=(prompt, verification))
    assert link_with_network(cell("speculative", served, draft_ahead=4)).rtt == 3.0
    assert link_with_network(cell("speculative", one_round(0.5))) == links.NO_LINK


@pytest.mark.parametrize("shares_device", [False, True])
def test_on_one_device_cells_that_draft_ahead_keep_their_own_costs(shares_device: bool) -> None:
    forecasts = forecast_cells(
        {
            "cloud": cell("cloud", CLOUD),
            "waits": cell("speculative", one_round(0.5)),
            "ahead": cell("speculative", one_round(2.0, is_ahead=True), draft_ahead=1),
        },
        shares_device=shares_device,
    )
    waits, ahead = forecasts["waits"], forecasts["ahead"]
    assert isinstance(waits, Forecast)
    assert isinstance(ahead, Forecast)
    pooled = (2 * 0.5 + 2 * 2.0 + 3.0) / 5
    assert waits.edge == pytest.approx(0.5 if shares_device else pooled)
    assert ahead.edge == pytest.approx((2 * 2.0 + 3.0) / 3 if shares_device else pooled)


def test_a_run_without_mode_cloud_gets_a_reason_instead_of_a_forecast() -> None:
    trace = one_round(0.5, is_ahead=True)
    answer = forecast_cells({"ahead": cell("speculative", trace, draft_ahead=1)}, shares_device=True)["ahead"]
    assert str(answer).startswith("no forecast: no step of the cloud alone was timed")
