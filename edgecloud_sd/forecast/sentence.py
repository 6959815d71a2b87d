"""A forecast as text for users: how fast the loop is beside the cloud alone, and where it breaks even."""

from __future__ import annotations

from edgecloud_sd.forecast.model import Forecast


def forecast_sentence(forecast: Forecast) -> str:
    """Return the forecast as a few short sentences on one line."""
    sentences = (
        f"{_headline(forecast)}: {_token_seconds(forecast)}.",
        f"This is {_speed_ups(forecast)}.",
        *_generation_seconds(forecast),
        *(_limits(forecast) if forecast.beats_cloud else _conditions(forecast)),
    )
    return " ".join(sentences)


def _headline(forecast: Forecast) -> str:
    if not forecast.beats_cloud:
        return "Not faster than the cloud alone"
    if forecast.caption is None or forecast.caption_cloud is None or forecast.caption <= forecast.caption_cloud:
        return "Faster than the cloud alone"
    return "Faster than the cloud alone after prefill, but not for captions this short"


def _token_seconds(forecast: Forecast) -> str:
    token, cloud = format_seconds(forecast.token), format_seconds(forecast.cloud)
    return f"at k={forecast.k} a token takes {token}, and with the cloud alone {cloud}"


def _speed_ups(forecast: Forecast) -> str:
    baselines = [(forecast.over_cloud, "the cloud alone"), (forecast.over_edge, "the edge alone")]
    if forecast.over_colocated is not None and forecast.rtt:
        baselines.append((forecast.over_colocated, "the same loop with both models at the cloud"))
    return _join([f"{speed_up:.2f}x as fast as {baseline}" for speed_up, baseline in baselines], "and")


def _generation_seconds(forecast: Forecast) -> list[str]:
    if forecast.caption is None or forecast.caption_cloud is None:
        return []
    ours, cloud = format_seconds(forecast.caption), format_seconds(forecast.caption_cloud)
    times = f"{ours} with its prefill, and with the cloud alone {cloud}"
    return [f"A caption of {forecast.tokens:.0f} tokens takes {times}."]


def _limits(forecast: Forecast) -> list[str]:
    """Return the best k, and the break-even points of a loop that beats the cloud alone."""
    best = "No other k is faster." if forecast.best_k == forecast.k else f"The best is {_best_k(forecast)}."
    return [best, f"It stays faster up to {_join(_break_even_points(forecast, 'of'), 'or')}."]


def _conditions(forecast: Forecast) -> list[str]:
    """Return the ceiling of a slower loop, and each change that alone would make it faster than the cloud alone."""
    without_bonus = f" ({forecast.ceiling_over_edge_without_bonus:.2f}x without the bonus token)"
    has_bonus = forecast.ceiling_over_edge != forecast.ceiling_over_edge_without_bonus
    ceiling = (
        "Even if every draft token is accepted and the link takes no time, this k cannot exceed "
        f"{forecast.ceiling_over_edge:.2f}x the edge alone{without_bonus if has_bonus else ''} and "
        f"{forecast.ceiling_over_cloud:.2f}x the cloud alone."
    )
    changes = [_best_k(forecast)] if forecast.best_over_cloud > 1 else []
    changes += _break_even_points(forecast, "below")
    if not changes:
        return [ceiling, "To be faster, it needs more than another k, a faster link or a faster draft model alone."]
    return [ceiling, f"To be faster, it needs {_join(changes, 'or')}."]


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
