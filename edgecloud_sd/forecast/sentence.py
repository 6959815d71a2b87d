"""A forecast as text for users: if the loop pays for whole captions, and where a token breaks even with the cloud.

A forecast knows times, and no quality. A lossless loop has the captions of the cloud. For any other loop, and for the
edge alone, the text names the condition on quality.
"""

from __future__ import annotations

from edgecloud_sd.forecast.model import Forecast


def forecast_sentence(forecast: Forecast) -> str:
    """Return the forecast as a few short sentences on one line."""
    sentences = (
        f"{_headline(forecast)}.",
        f"After prefill, {_token_seconds(forecast)}: {_speed_ups(forecast)}.",
        *(_limits(forecast) if forecast.over_cloud > 1 else _conditions(forecast)),
    )
    return " ".join(sentences)


def _headline(forecast: Forecast) -> str:
    """Return if the loop pays: for whole captions, against the better of edge and cloud alone, at equal quality."""
    if forecast.caption is None or forecast.caption_edge is None or forecast.caption_cloud is None:
        return "Not decided if it pays, because the length of captions is not known"
    ours, edge, cloud = map(format_seconds, (forecast.caption, forecast.caption_edge, forecast.caption_cloud))
    caption = f"a caption of {forecast.tokens:.0f} tokens takes {ours}"
    return f"{_answer(forecast)}: {caption}, with the cloud alone {cloud}, and with the edge alone {edge}"


def _answer(forecast: Forecast) -> str:
    if not forecast.beats_cloud:
        return "Does not pay for captions this short" if forecast.over_cloud > 1 else "Does not pay"
    if forecast.beats_edge:
        return "Pays" if forecast.is_lossless else "Pays if its captions are as good as those of edge and cloud alone"
    if forecast.is_lossless:
        return "Pays if the captions of the edge alone are worse"
    return "Pays if its captions are as good as those of the cloud alone, and those of the edge alone are worse"


def _token_seconds(forecast: Forecast) -> str:
    token, cloud = format_seconds(forecast.token), format_seconds(forecast.cloud)
    return f"at k={forecast.k} a token takes {token}, and with the cloud alone {cloud}"


def _speed_ups(forecast: Forecast) -> str:
    baselines = [(forecast.over_cloud, "the cloud alone"), (forecast.over_edge, "the edge alone")]
    if forecast.over_colocated is not None and forecast.rtt:
        baselines.append((forecast.over_colocated, "the same loop with both models at the cloud"))
    return _join([f"{speed_up:.2f}x as fast as {baseline}" for speed_up, baseline in baselines], "and")


def _limits(forecast: Forecast) -> list[str]:
    """Return the best k, and the break-even points of a loop whose tokens take less time than with the cloud alone."""
    best = "No other k is faster." if forecast.best_k == forecast.k else f"The best is {_best_k(forecast)}."
    return [best, f"A token stays faster up to {_join(_break_even_points(forecast, 'of'), 'or')}."]


def _conditions(forecast: Forecast) -> list[str]:
    """Return the ceiling of a slower loop, and each change that alone would make it faster than the cloud alone."""
    without_bonus = f" ({forecast.ceiling_over_edge_without_bonus:.2f}x without the bonus token)"
    has_bonus = forecast.ceiling_over_edge != forecast.ceiling_over_edge_without_bonus
    ceiling = (
        "Even if every draft token is accepted and the link takes no time, it cannot exceed "
        f"{forecast.ceiling_over_edge:.2f}x the edge alone{without_bonus if has_bonus else ''} and "
        f"{forecast.ceiling_over_cloud:.2f}x the cloud alone."
    )
    changes = [_best_k(forecast)] if forecast.best_over_cloud > 1 else []
    changes += _break_even_points(forecast, "below")
    if not changes:
        return [ceiling, "Faster tokens need more than another k, a faster link or a faster draft model alone."]
    return [ceiling, f"For faster tokens it needs {_join(changes, 'or')}."]


def _best_k(forecast: Forecast) -> str:
    """Return the best k with its speed-up over the cloud alone, marked if it is extrapolated."""
    caveat = f", with acceptance beyond k={forecast.seen_k} extrapolated" if forecast.best_k > forecast.seen_k else ""
    return f"k={forecast.best_k} ({forecast.best_over_cloud:.2f}x the cloud alone{caveat})"


def _break_even_points(forecast: Forecast, preposition: str) -> list[str]:
    """Return the round trip and the step of the draft model at which the loop breaks even, each if it exists."""
    points = []
    if forecast.largest_rtt is not None:
        limit, now = format_seconds(forecast.largest_rtt), format_seconds(forecast.rtt)
        points.append(f"a round trip {preposition} {limit} (now {now})")
    if forecast.slowest_drafter is not None:
        limit, now = format_seconds(forecast.slowest_drafter), format_seconds(forecast.edge)
        points.append(f"a draft model {preposition} {limit} per step (now {now})")
    return points


def _join(parts: list[str], conjunction: str) -> str:
    return f" {conjunction} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def format_seconds(seconds: float) -> str:
    """Return seconds as `37 ms` or `1.2 s`, with three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
