"""One way to decode, as one frozen record. The grid, the loop, the results, the report and the forecast share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from edgecloud_sd import probs
from edgecloud_sd.acceptance import GREEDY, Rank, Rule, Synthetic, parse_rule
from edgecloud_sd.fields import check_type, whole_number
from edgecloud_sd.gate import ALWAYS, DraftStop, Gate, parse_draft_stop, parse_gate, risk_gate, statistics_per_token
from edgecloud_sd.lookup import DRAFTERS
from edgecloud_sd.prefill import PREFILL_TIMES
from edgecloud_sd.revise import REVISE_NAMES
from edgecloud_sd.wire import MAX_DRAFT

MODES = ("edge", "cloud", "speculative")
ADAPTIVE_K = "auto"  # the text for a draft length that is found while decoding
# The only values of these fields that drafter lookup can have, because it runs no model
WITHOUT_MODEL = {"gate": "always", "draft_stop": "none", "draft_ahead": 0, "revise": "none"}


@dataclass(frozen=True)
class Strategy:
    """One way to decode.

    `Strategy("speculative", k=4)` is lossless: every draft is verified, and the cloud accepts its own tokens only.
    Raise ValueError for values that do not fit together, and TypeError for one of another type. Mode cloud takes no
    other field, and mode edge takes drafter model+lookup only.
    """

    mode: str = "speculative"
    gate: Gate = ALWAYS
    rule: Rule = GREEDY
    k: int | None = 3  # draft tokens per round, at most (see `draft_ahead`); None is adaptive k
    draft_stop: DraftStop | None = None
    draft_ahead: int = 0  # tokens drafted during a verification, at most; a lossless draft may keep more than k of them
    prefill: str = "eager"  # when the cloud prefills: beside the edge, or at the first escalation
    revise: str = "none"  # the way to redraft after a correction (see `edgecloud_sd.revise`)
    look_back: bool = False  # send the local tokens since the last verdict as draft; gate risk always does
    drafter: str = "model"  # the source of drafts; with model+lookup, lookup guesses what the model drafts

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}: choose one of {', '.join(MODES)}")
        check_type("gate", self.gate, Gate, "write parse_gate('never')")
        check_type("rule", self.rule, (Rank, Synthetic), "write parse_rule('greedy')")
        if self.draft_stop is not None:
            check_type("draft_stop", self.draft_stop, DraftStop, "write parse_draft_stop('margin=0.3', gate)")
        if self.k is not None:
            self._set("k", whole_number("k", self.k, 1, ", or None to find it while decoding"))
        self._set("draft_ahead", whole_number("draft_ahead", self.draft_ahead, 0))
        if self.prefill not in PREFILL_TIMES:
            raise ValueError(f"prefill must be one of {', '.join(PREFILL_TIMES)}, not {self.prefill!r}")
        if self.revise not in REVISE_NAMES:
            raise ValueError(f"revise must be one of {', '.join(REVISE_NAMES)}, not {self.revise!r}")
        check_type("look_back", self.look_back, bool, "write True or False")
        if self.gate.name == "risk":
            self._set("look_back", True)
        if self.draft_stop and self.draft_stop.score is self.gate.score is probs.entropy:
            self._set("draft_stop", replace(self.draft_stop, score=None))  # one entropy serves both
        if self.draft_stop and self.draft_stop.score is None and self.gate.score is None:
            raise ValueError(
                f"draft_stop {self.draft_stop.label} reads the gate's score, and gate {self.gate.label} has none"
            )
        if self.drafter not in DRAFTERS:
            raise ValueError(f"unknown drafter {self.drafter!r}: choose one of {', '.join(DRAFTERS)}")
        if self.mode != "speculative":
            if self.mode == "edge" and self.drafter == "lookup":
                raise ValueError("mode edge needs the edge's model: give drafter model or model+lookup, not 'lookup'")
            for field in fields(self)[1:]:
                value = getattr(self, field.name)
                if value != field.default and (self.mode, value) != ("edge", "model+lookup"):
                    raise ValueError(f"mode {self.mode} drafts nothing, so it takes no {field.name}")
        elif self.drafter == "lookup":
            values = self.to_json() | {"draft_stop": self.draft_stop.text if self.draft_stop else "none"}
            for name, usual in WITHOUT_MODEL.items():
                if values[name] != usual:
                    raise ValueError(f"drafter lookup runs no model, so its {name} is {usual}, not {values[name]}")

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def is_speculative(self) -> bool:
        """True if the edge drafts and the cloud may verify."""
        return self.mode == "speculative"

    @property
    def asks_cloud(self) -> bool:
        """True unless the edge decodes alone: in mode edge, and under a gate that never escalates."""
        return self.mode == "cloud" or (self.is_speculative and self.gate.can_escalate)

    @property
    def load_mode(self) -> str:
        """The mode whose sides this strategy needs: edge if it never asks the cloud."""
        return self.model_mode if self.asks_cloud else "edge"

    @property
    def model_mode(self) -> str:
        """The mode whose models decode and verify for this strategy: with drafter lookup those of mode cloud."""
        return self.mode if self.needs_edge else "cloud"

    @property
    def needs_edge(self) -> bool:
        """True unless the edge's model computes nothing: in mode cloud, and with drafter lookup."""
        return self.mode != "cloud" and self.drafter != "lookup"

    @property
    def is_lossless(self) -> bool:
        """True if the output is promised to equal the cloud's own, token for token (in float32 and float64).

        Mode cloud is lossless. Mode speculative is lossless with rule greedy under gate always, and under gate risk if
        it always sends.
        """
        return self.mode == "cloud" or (self.is_speculative and self.gate.sends_all and self.rule.is_lossless)

    @property
    def wants_rest(self) -> bool:
        """True if the edge reads the target's opinions on the rest of a rejected draft."""
        return self.revise != "none"

    def longest_draft(self, max_new_tokens: int) -> int:
        """Return the most tokens that are sent as draft. Adaptive k stays far below any limit of a server."""
        if not self.is_speculative:
            return 0
        reused = self.draft_ahead if self.is_lossless else 0
        return min(MAX_DRAFT if self.look_back else max(self.k or 1, reused), max_new_tokens)

    @property
    def scores_per_token(self) -> int:
        """The number of scores that the gate and the draft stop compute for each draft token."""
        return statistics_per_token(self.gate, self.draft_stop)

    @property
    def details(self) -> tuple[str, ...]:
        """The parts of a case id after the mode and the pair."""
        drafter = [self.drafter.replace("+", "_")] if self.drafter != "model" else []
        if not self.is_speculative:
            return tuple(drafter)
        details = [self.gate.label, f"k{self.k or ADAPTIVE_K}", self.rule.label]
        details += [self.draft_stop.label] if self.draft_stop else []
        details += [f"ahead{self.draft_ahead}"] if self.draft_ahead else []
        details += [self.prefill] if self.prefill != "eager" else []
        details += [f"revise_{self.revise}"] if self.revise != "none" else []
        details += ["lookback"] if self.look_back and self.gate.name != "risk" else []
        return (*details, *drafter)

    @property
    def label(self) -> str:
        """A short name: the mode, then the details."""
        return "-".join((self.mode, *self.details))

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads as this strategy. Fields without a meaning are null."""
        values = {
            "mode": self.mode,
            "gate": self.gate.name,
            "threshold": self.gate.limit if self.gate.score else None,
            "send_above": self.gate.send_above if self.gate.name == "risk" else None,
            "opinion_risk": self.gate.opinion_risk if self.gate.name == "risk" else None,
            "rule": self.rule.text,
            "k": ADAPTIVE_K if self.k is None else self.k,
            "draft_stop": self.draft_stop.text if self.draft_stop else None,
            "draft_ahead": self.draft_ahead,
            "prefill": self.prefill,
            "revise": self.revise,
            "look_back": self.look_back,
            "drafter": self.drafter,
        }
        if self.is_speculative:
            return values
        return dict.fromkeys(values) | {"mode": self.mode, "drafter": self.drafter if self.mode == "edge" else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Strategy:
        """Return the strategy that `to_json` wrote. Raise ValueError for anything else."""
        try:
            if values["mode"] != "speculative":
                return cls(values["mode"], drafter=values["drafter"] or "model")
            if values["k"] is None:
                raise ValueError(f"not a saved strategy: its k is null; adaptive k is {ADAPTIVE_K!r}")
            numbers = [values[name] for name in ("threshold", "send_above", "opinion_risk")]  # null without a meaning
            gate = parse_gate(values["gate"], *(number for number in numbers if number is not None))
            return cls(
                values["mode"],
                gate,
                parse_rule(values["rule"]),
                None if values["k"] == ADAPTIVE_K else values["k"],
                parse_draft_stop(values["draft_stop"] or "none", gate),
                values["draft_ahead"],
                values["prefill"],
                values["revise"],
                values["look_back"],
                values["drafter"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a saved strategy: {error!r}") from error


LOSSLESS = Strategy()
REVISE_LOSSLESS = Strategy(gate=risk_gate(), k=1, revise="context")  # k=1 shows every token at once
