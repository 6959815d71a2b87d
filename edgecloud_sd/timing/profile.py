"""Cost profiles: the seconds of each call on a pair of machines, for the virtual clock and the forecast.

A profile is a YAML file. The profiles of the package are in `profiles/`, and each names the source of its numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecloud_sd.data.texts import BadText, parse_yaml, read_utf8
from edgecloud_sd.host.files import write_whole

PROFILE_FOLDER = Path(__file__).with_name("profiles")
OPTIONAL_SECONDS = ("features", "gate", "queue", "draft_at_cloud", "correction")
PROFILE_NAMES = tuple(sorted(file.stem for file in PROFILE_FOLDER.glob("*.yaml")))


class ProfileError(ValueError):
    """An error in a profile. The message names the file and the field."""


@dataclass(frozen=True)
class Costs:
    """The seconds of one side: `prefill`, audio encoder included, and `forward` for a pass over n tokens.

    `forward` lists points (n, seconds) with rising n. Costs between two points are interpolated linearly. Costs outside
    the points follow the slope from the first point to the last. One point gives a constant cost, because a pass over
    few tokens is bound by reading the weights.
    """

    prefill: float
    forward: tuple[tuple[int, float], ...]

    def seconds(self, n: float) -> float:
        """Return the seconds of a forward pass over `n` >= 1 tokens with a KV cache. `n` may be a mean."""
        for (n0, s0), (n1, s1) in itertools.pairwise(self.forward):
            if n0 <= n <= n1:
                return s0 + (s1 - s0) * (n - n0) / (n1 - n0)
        (first, first_seconds), (last, last_seconds) = self.forward[0], self.forward[-1]
        slope = (last_seconds - first_seconds) / (last - first) if last > first else 0.0
        return max(first_seconds + slope * (n - first), 0.0) if n < first else last_seconds + slope * (n - last)

    @property
    def step(self) -> float:
        """The seconds of a pass over one token."""
        return self.seconds(1)


@dataclass(frozen=True)
class Profile:
    """The seconds of each call on one pair of machines."""

    name: str
    edge: Costs
    cloud: Costs
    features: float = 0.0  # s per request, on either side
    gate: float = 0.0  # s per score that gate or draft stop computes for a draft token
    queue: float = 0.0  # s per request in the cloud's queue
    draft_at_cloud: float | None = None  # s per step of the edge model if it ran at the cloud
    correction: float = 0.0  # s per correction at the edge, to repair its cache, beside its next step
    source: str = ""

    def without_edge(self) -> Profile:
        """Return the profile of a drafter that runs no model: nothing takes time at the edge."""
        return replace(self, edge=Costs(0.0, ((1, 0.0),)), draft_at_cloud=None, correction=0.0)


def load_profile(name: str) -> Profile:
    """Return the profile of the package with this name, or the profile in a YAML file.

    Raise ProfileError for an unknown name, and for a file with a missing, unknown or bad field.
    """
    path = PROFILE_FOLDER / f"{name}.yaml" if name in PROFILE_NAMES else Path(name)
    try:
        loaded = parse_yaml(read_utf8(path, "YAML"), str(path), is_typed=True)
    except OSError:
        raise ProfileError(
            f"no profile {name!r}: give a YAML file that exists, or one of {', '.join(PROFILE_NAMES)}"
        ) from None
    except BadText as error:
        raise ProfileError(str(error)) from error
    fields = _fields(path, "", loaded, {"edge", "cloud"}, {*OPTIONAL_SECONDS, "source"})
    optional = {field: _seconds(path, field, fields[field]) for field in OPTIONAL_SECONDS if field in fields}
    source = fields.get("source", "")
    if not isinstance(source, str):
        raise ProfileError(f"{path}, source: must be a text, not {source!r}")
    return Profile(
        name=path.stem,
        edge=_costs(path, "edge", fields["edge"]),
        cloud=_costs(path, "cloud", fields["cloud"]),
        source=" ".join(source.split()),
        **optional,
    )


def profile_from_json(saved: Mapping[str, Any]) -> Profile:
    """Return the profile that was saved as `dataclasses.asdict` in JSON, as in results files."""

    def side(costs: Mapping[str, Any]) -> Costs:
        return Costs(costs["prefill"], tuple((n, s) for n, s in costs["forward"]))

    return Profile(**{**saved, "edge": side(saved["edge"]), "cloud": side(saved["cloud"])})


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile as a YAML file for `load_profile`. The loaded profile has the name of the file."""
    import yaml

    def side(costs: Costs) -> dict[str, Any]:
        return {"prefill": costs.prefill, "forward": dict(costs.forward)}

    optional = {field: getattr(profile, field) for field in OPTIONAL_SECONDS}
    fields: dict[str, Any] = {
        "source": profile.source,
        **{field: seconds for field, seconds in optional.items() if seconds is not None},
        "edge": side(profile.edge),
        "cloud": side(profile.cloud),
    }
    write_whole(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def _fields(path: Path, where: str, value: object, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    """Return `value` if it is a dict with all required fields and no unknown ones, or raise ProfileError."""
    if not isinstance(value, dict):
        raise ProfileError(f"{path}{where}: must be a map of fields to values, not a {type(value).__name__}")
    if missing := sorted(required - value.keys()):
        raise ProfileError(f"{path}{where}: missing field {', '.join(missing)}")
    if unknown := sorted(map(str, value.keys() - required - optional)):
        fields = ", ".join(sorted(required | optional))
        raise ProfileError(f"{path}{where}: unknown field {', '.join(unknown)}; choose from {fields}")
    return value


def _seconds(path: Path, where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise ProfileError(f"{path}, {where}: must be a number of seconds, 0 or more, not {value!r}")
    return float(value)


def _costs(path: Path, side: str, value: object) -> Costs:
    fields = _fields(path, f", {side}", value, {"prefill", "forward"}, set())
    table = fields["forward"]
    if not isinstance(table, dict) or not all(type(n) is int and n >= 1 for n in table) or 1 not in table:
        raise ProfileError(f"{path}, {side}, forward: must map token counts, 1 included, to seconds, not {table!r}")
    forward = tuple(sorted((n, _seconds(path, f"{side}, forward, {n}", s)) for n, s in table.items()))
    for (fewer, before), (n, seconds) in itertools.pairwise(forward):
        if seconds < before:
            error = f"{seconds} s is less than at {fewer} ({before} s); use times that do not fall"
            raise ProfileError(f"{path}, {side}, forward, {n}: {error}")
    if forward[0][1] <= 0:
        raise ProfileError(f"{path}, {side}, forward, 1: must be above 0 s")
    return Costs(_seconds(path, f"{side}, prefill", fields["prefill"]), forward)
