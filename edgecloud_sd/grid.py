"""The grid: the strategies and links that the settings of a run ask for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from edgecloud_sd.acceptance import GREEDY, Rule, parse_rule
from edgecloud_sd.config import Settings
from edgecloud_sd.forecast.budgets import LEVEL_RANGES, LevelFeedback, gate_at, start_feedback
from edgecloud_sd.gate import ALWAYS, Gate, parse_draft_stop, parse_gate
from edgecloud_sd.strategy import REVISE_LOSSLESS, Strategy
from edgecloud_sd.timing.link import NO_LINK, Link, parse_link


def cells(settings: Settings) -> list[tuple[Strategy, Link]]:
    """Return each different cell of the grid once, in the order of the settings.

    Mode edge sends nothing, so it has one cell without a link. A gate that never escalates has one cell as well.
    """
    links = [parse_link(text) for text in settings.link]
    found: list[tuple[Strategy, Link]] = []
    for strategy in strategies(settings):
        if strategy.mode == "edge":
            found.append((strategy, NO_LINK))
        elif strategy.is_speculative and not strategy.gate.can_escalate:
            found.append((strategy, links[0]))
        else:
            found += [(strategy, link) for link in links]
    return list(dict.fromkeys(found))


def strategies(settings: Settings) -> list[Strategy]:
    """Return each different strategy of the grid once, in the order of the settings."""
    found: list[Strategy] = []
    for mode in settings.mode:
        if mode == "speculative":
            rules = [parse_rule(rule, rank) for rule in settings.rule for rank in settings.rank]
            found += _speculative(settings, _levelled(settings, _gates(settings)), rules)
        elif mode == "lossless":
            found += _speculative(settings, [ALWAYS], [GREEDY])
        elif mode in ("revise", "revise-lossless"):
            found += _revising(settings, always_sends=mode == "revise-lossless")
        elif mode == "edge":
            found += [Strategy(mode, drafter=name) for name in _drafters_with_model(settings)]
        else:
            found.append(Strategy(mode))
    return list(dict.fromkeys(found))


def asks_cloud(settings: Settings) -> bool:
    """Return True if a strategy of the grid asks the cloud, or shadow verification does afterwards."""
    has_shadow = settings.shadow == "yes" and has_speculative(settings)
    return has_shadow or any(strategy.asks_cloud for strategy in strategies(settings))


def has_speculative(settings: Settings) -> bool:
    """Return True if a strategy of the grid drafts."""
    return any(strategy.is_speculative for strategy in strategies(settings))


def _revising(settings: Settings, always_sends: bool) -> Iterator[Strategy]:
    """Yield the strategies of modes revise and revise-lossless. Each token is shown at once, so k is 1."""
    usual = REVISE_LOSSLESS
    revise = tuple(name for name in settings.revise if name != "none") or (usual.revise,)
    send_above = (usual.gate.send_above,) if always_sends else settings.send_above
    drafter = _drafters_with_model(settings)
    revising = replace(settings, gate=("risk",), send_above=send_above, k=(usual.k,), revise=revise, drafter=drafter)
    gates = _gates(revising)
    yield from _speculative(revising, gates if always_sends else _levelled(settings, gates), [GREEDY])


def has_chosen_level(settings: Settings, strategy: Strategy) -> bool:
    """Return True if a calibration or a budget chose the level of the gate of a strategy of the grid."""
    if not strategy.is_speculative or strategy.gate.name not in LEVEL_RANGES:
        return False
    return (settings.own or settings.budget) is not None and next(_levelled(settings, [strategy.gate])) == strategy.gate


def find_feedback(settings: Settings, strategy: Strategy) -> LevelFeedback | None:
    """Return the feedback that moves the gate of a strategy of the grid after each caption, or None without one."""
    if not settings.budget or settings.calibration or not has_chosen_level(settings, strategy):
        return None
    return start_feedback(settings.budget, strategy.gate)


def _levelled(settings: Settings, gates: Iterable[Gate]) -> Iterator[Gate]:
    """Yield gates at the level that a calibration gives, or at which the feedback of a budget begins."""
    for gate in gates:
        if settings.gate_choice:
            yield gate_at(gate, settings.gate_choice.level)
        elif settings.budget:
            yield gate_at(gate, start_feedback(settings.budget, gate).level)
        else:
            yield gate


def _drafters_with_model(settings: Settings) -> tuple[str, ...]:
    """Return the drafters of modes that need the edge's model. In place of lookup they draft by the model alone."""
    return tuple("model" if name == "lookup" else name for name in settings.drafter)


def _gates(settings: Settings) -> Iterator[Gate]:
    for name in settings.gate:
        if name == "risk":
            numbers = itertools.product(settings.risk_limit, settings.send_above, settings.opinion_risk)
            yield from itertools.starmap(partial(parse_gate, name), numbers)
        else:
            thresholds = settings.entropy_threshold if name == "entropy" else settings.threshold
            yield from (parse_gate(name, threshold) for threshold in thresholds)


def _speculative(settings: Settings, gates: Iterable[Gate], rules: list[Rule]) -> Iterator[Strategy]:
    fields = (settings.k, settings.draft_stop, settings.draft_ahead, settings.open, settings.revise, settings.look_back)
    others = list(itertools.product(rules, *fields, settings.drafter))
    for gate in gates:
        # if nothing is sent, no other field matters
        for rule, k, stop, ahead, prefill, revise, look_back, drafter in others if gate.can_escalate else others[:1]:
            draft_stop = parse_draft_stop(stop, gate)
            yield Strategy(
                "speculative", gate, rule, k, draft_stop, ahead, prefill, revise, look_back == "yes", drafter
            )
