"""Cost profiles: what each call takes on some pair of machines, for the virtual clock and the oracle.

A profile is a YAML file; those that ship lie in `profiles/`, each saying where its figures come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecloud_sd.host.files import write_whole

PROFILE_FOLDER = Path(__file__).with_name("profiles")
PROFILE_NAMES = tuple(sorted(file.stem for file in PROFILE_FOLDER.glob("*.yaml")))


class ProfileError(ValueError):
    """A profile that cannot be used: the message names the file and the field."""


@dataclass(frozen=True)
class Costs:
    """One side: seconds for its audio encoder and prefill, and for a forward pass over n tokens.

    `forward` holds (n, seconds), n rising; between two points it is a straight line, before and beyond them one with
    the slope from the first to the last (flat where there is one point alone: a pass bound by reading the weights).
    """

    prefill: float
    forward: tuple[tuple[int, float], ...]

    def seconds(self, n: float) -> float:
        """One forward pass over `n` >= 1 tokens (or a mean of so many) after what is cached."""
        (first, least), (last, most) = self.forward[0], self.forward[-1]
        for (n0, s0), (n1, s1) in itertools.pairwise(self.forward):
            if n0 <= n <= n1:
                return s0 + (s1 - s0) * (n - n0) / (n1 - n0)
        slope = (most - least) / (last - first) if last > first else 0.0
        return max(least + slope * (n - first), 0.0) if n < first else most + slope * (n - last)

    @property
    def step(self) -> float:
        """s for one token."""
        return self.seconds(1)


@dataclass(frozen=True)
class Profile:
    """Seconds a call, on one pair of machines."""

    name: str
    edge: Costs
    cloud: Costs
    features: float = 0.0  # s a request, on either side
    gate: float = 0.0  # s a drafted token whose statistic the gate reads
    queue: float = 0.0  # s that a request waits at the cloud
    draft_at_cloud: float | None = None  # s a step of the edge's model, were it to run beside the cloud's
    source: str = ""


def load_profile(name: str) -> Profile:
    """A profile that ships, by name, or a YAML file. ProfileError for one that is neither, or that cannot be used."""
    import yaml

    path = PROFILE_FOLDER / f"{name}.yaml" if name in PROFILE_NAMES else Path(name)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ProfileError(
            f"no profile {name!r}: give a YAML file that exists, or one of {', '.join(PROFILE_NAMES)}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ProfileError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    fields = _fields(path, "", loaded, {"edge", "cloud"}, {"features", "gate", "queue", "draft_at_cloud", "source"})
    optional = {
        field: _seconds(path, field, fields[field])
        for field in ("features", "gate", "queue", "draft_at_cloud")
        if fields.get(field) is not None
    }
    return Profile(
        name=path.stem,
        edge=_costs(path, "edge", fields["edge"]),
        cloud=_costs(path, "cloud", fields["cloud"]),
        source=" ".join(str(fields.get("source") or "").split()),
        **optional,
    )


def profile_from_json(saved: Mapping[str, Any]) -> Profile:
    """The profile that `dataclasses.asdict` and JSON made this of, as results files hold it."""

    def side(costs: Mapping[str, Any]) -> Costs:
        return Costs(costs["prefill"], tuple((n, s) for n, s in costs["forward"]))

    return Profile(**{**saved, "edge": side(saved["edge"]), "cloud": side(saved["cloud"])})


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile as the YAML file that `load_profile` reads. Its name will be the file's."""
    import yaml

    def side(costs: Costs) -> dict[str, Any]:
        return {"prefill": costs.prefill, "forward": dict(costs.forward)}

    fields: dict[str, Any] = {
        "source": profile.source,
        "features": profile.features,
        "gate": profile.gate,
        "queue": profile.queue,
        "edge": side(profile.edge),
        "cloud": side(profile.cloud),
    }
    if profile.draft_at_cloud is not None:
        fields["draft_at_cloud"] = profile.draft_at_cloud
    write_whole(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def _fields(path: Path, where: str, value: object, needed: set[str], optional: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ProfileError(f"{path}{where}: must map fields to values, not be a {type(value).__name__}")
    if missing := sorted(needed - value.keys()):
        raise ProfileError(f"{path}{where}: lacks {', '.join(missing)}")
    if unknown := sorted(map(str, value.keys() - needed - optional)):
        known = ", ".join(sorted(needed | optional))
        raise ProfileError(f"{path}{where}: unknown field {', '.join(unknown)}; known are {known}")
    return value


def _seconds(path: Path, where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise ProfileError(f"{path}, {where}: must be a number of seconds, 0 or more, not {value!r}")
    return float(value)


def _costs(path: Path, side: str, value: object) -> Costs:
    fields = _fields(path, f", {side}", value, {"prefill", "forward"}, set())
    table = fields["forward"]
    if not isinstance(table, dict) or not all(type(n) is int and n >= 1 for n in table) or 1 not in table:
        raise ProfileError(f"{path}, {side}, forward: must map numbers of tokens, 1 among them, to seconds: {table!r}")
    forward = tuple(sorted((n, _seconds(path, f"{side}, forward, {n}", s)) for n, s in table.items()))
    for (_, less), (n, more) in itertools.pairwise(forward):
        if more < less:
            raise ProfileError(f"{path}, {side}, forward, {n}: {more} s is less than fewer tokens take ({less} s)")
    if forward[0][1] <= 0:
        raise ProfileError(f"{path}, {side}, forward, 1: must be more than 0 s")
    return Costs(_seconds(path, f"{side}, prefill", fields["prefill"]), forward)
