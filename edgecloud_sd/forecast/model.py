"""The cost model of speculative decoding: the expected seconds per token, from costs, link and acceptance.

The derivation uses these symbols.

- k: draft tokens per round.
- g: gate rate, the share of rounds that are escalated.
- p_i: probability that draft token i is accepted, and so all before it.
- b: tokens of the target per verification, which is 1: the correction or the bonus (1 - p_k without the bonus).
- e: seconds of an edge step, with the scores that gate and draft stop compute.
- L: seconds on the link per verification: rtt + 8 bytes_up / up + 8 bytes_down / down + the smaller terms of `Link`.
- q: seconds in the cloud's queue.
- V: seconds of the cloud's forward pass.
- C: seconds of a correction at the edge, beside its next step.

Tokens per round. A verification accepts A = sum_i p_i draft tokens in the mean. If p_i = a^i, then A + 1 is
(1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, equation 1). A local round commits its k draft tokens. The mean round
commits

    M = g (A + b) + (1 - g) k.

Seconds per round. A round drafts for D seconds. An escalated round then waits W seconds for its verdict. Unless its
draft was accepted whole, it spends C seconds on the correction. The mean is

    T = D + g (W + (1 - p_k) C)    with    W = L + q + V.

D is k e, plus one difference. After a draft accepted whole, the edge feeds its last token and the bonus in one pass,
which may cost more than a pass over one token. V is the cost of a pass over the tokens that the cloud has not seen.
After m local rounds these are k m + 1 committed tokens and the draft. m is geometric: P(m) = g (1 - g)^m. If the mean
number of committed tokens sent with a draft is known, V is the cost at that mean.

Seconds per token are T / M. Let e = c V, D = k e, L = q = C = 0 and g = 1. Then V M / T is the walltime improvement of
Leviathan et al. 2023 (theorem 3.8). The model adds the link, the queue and the gate.

Break-even. A baseline takes s seconds per token. The loop is as fast if T = M s. T is linear in the RTT with slope g,
and in the edge's step with slope k. So the loop breaks even at

    rtt* = rtt + (M s - T) / g    and    e* = e + (M s - T) / k.

Jitter, loss and draft-ahead bend the line. Bisection then finds rtt*, and with draft-ahead e* as well.

Draft-ahead. While a verification is on its way, the edge drafts m = min(n, ceil(W / e)) tokens, if at most n are
allowed. It reads the verdict after max(W, m e) seconds. If the draft is accepted whole and the first of the m tokens is
the bonus, the other m - 1 begin the next draft. The next draft of a lossless strategy has max(k, m - 1) tokens. The
output of a lossy strategy depends on where drafts end, so its next draft keeps k tokens. The surplus then begins the
draft after it, and counts among the n.

Let x_j be the probability of such a success in a round that follows j successes in a row. It is g p_k for the draft
length k of that round, times the rate of right guesses. Rounds of kind j then have the weight
w_j = x_0 x_1 ... x_(j-1), and M and T are the weighted means over all kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from edgecloud_sd import wire
from edgecloud_sd.timing.link import NO_LINK, Link
from edgecloud_sd.timing.profile import Costs, Profile

MAX_K = 16  # the longest draft that a search for the fastest k tries
NEGLIGIBLE = 1e-12  # the probability below which a sum over rounds ends


@dataclass(frozen=True)
class Workload:
    """The length, gate rate and acceptance of drafts. A profile and a link complete the input of a forecast.

    Raise ValueError for a k below 1, a gate rate outside (0, 1], or acceptance that is no list of probabilities.
    """

    k: int
    acceptance_by_position: tuple[float, ...]  # p_i from i = 1; beyond the last position n: p_i = p_n^(i/n)
    gate_rate: float = 1.0  # g
    scores_per_token: int = 0  # scores that gate and draft stop compute for each draft token
    has_bonus: bool = True  # False: a draft accepted whole earns no token of the target
    sent_with_draft: float | None = None  # committed tokens sent with a draft, mean; None: derived from the gate rate
    tokens_per_generation: float | None = None  # mean; None: no forecast of whole generations
    prompt_bytes: int = 0  # bytes of the request that sends a prompt to the cloud
    has_eager_prefill: bool = True  # the cloud prefills beside the edge, not at the first escalation
    draft_ahead: int = 0  # n: tokens drafted during a verification, at most
    is_lossless: bool = True  # False: no draft is longer than k
    bonus_guess_rate: float = 0.0  # probability that the first token drafted ahead is the bonus, if there is a bonus

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        if not 0 < self.gate_rate <= 1:
            raise ValueError(f"gate_rate must be above 0 and at most 1, not {self.gate_rate}")
        if not self.acceptance_by_position or not all(0 <= p <= 1 for p in self.acceptance_by_position):
            raise ValueError(
                f"acceptance_by_position must be at least one number from 0 to 1, not {self.acceptance_by_position}"
            )

    def acceptance_at(self, position: int) -> float:
        """Return p_i for draft token i = `position`, counted from 1."""
        observed = self.acceptance_by_position
        n = len(observed)
        return observed[position - 1] if position <= n else observed[-1] ** (position / n)

    def with_k(self, k: int) -> Workload:
        """Return this workload with drafts of `k` tokens.

        Each draft token is assumed to exceed the gate's threshold independently, so the gate rate becomes
        1 - (1 - g)^(new k / old k). The mean k m of the local tokens sent keeps its ratio to that of a geometric m.
        """
        if k == self.k:
            return self
        log_local_rate = math.log1p(-self.gate_rate) if self.gate_rate < 1 else -math.inf
        gate_rate = -math.expm1(k / self.k * log_local_rate)  # precise for a small g
        sent = self.sent_with_draft
        if sent is not None and self.gate_rate < 1:
            sent = 1 + (sent - 1) * (k * (1 - gate_rate) / gate_rate) / (self.k * (1 - self.gate_rate) / self.gate_rate)
        # `replace` would take most of the time of `fastest_k`, which adaptive k calls while it decodes
        workload = object.__new__(Workload)
        vars(workload).update(vars(self), k=k, gate_rate=gate_rate, sent_with_draft=sent)
        return workload


@dataclass(frozen=True)
class Round:
    """The mean round after both prefills: the tokens M that it commits and the seconds T that it takes."""

    tokens: float
    seconds: float


def per_round(profile: Profile, link: Link, workload: Workload) -> Round:
    """Return M and T of the mean round."""
    if not workload.draft_ahead:
        return _round(profile, workload, _verification_seconds(profile, link, workload))
    kinds = _weighted_rounds(profile, link, workload)
    total = sum(weight for weight, _ in kinds)
    return Round(
        sum(weight * kind.tokens for weight, kind in kinds) / total,
        sum(weight * kind.seconds for weight, kind in kinds) / total,
    )


def seconds_per_token(profile: Profile, link: Link, workload: Workload) -> float:
    """Return T / M: seconds per token after both prefills."""
    mean = per_round(profile, link, workload)
    return mean.seconds / mean.tokens


def _weighted_rounds(profile: Profile, link: Link, workload: Workload) -> list[tuple[float, Round]]:
    """Return (w_j, round of kind j), where the last kind stands for all that would follow.

    A round begins with the draft tokens that earlier rounds left. Their number grows from kind to kind until it stays
    the same. After a local round, no token is assumed to be left.
    """
    step = _step_seconds(profile, workload)
    kinds: list[tuple[float, Round]] = []
    weight, left = 1.0, 0
    while True:
        kind = workload.with_k(max(workload.k, left)) if workload.is_lossless else workload
        surplus = max(left - kind.k, 0)
        wait = _verification_seconds(profile, link, kind)
        allowed = workload.draft_ahead - surplus
        ahead = min(allowed, math.ceil(wait / step)) if step else allowed
        round_of_kind = _round(profile, kind, wait, min(left, kind.k), ahead)
        left_next = max(surplus + ahead - 1, 0)
        success = kind.gate_rate * kind.acceptance_at(kind.k) * workload.bonus_guess_rate if surplus + ahead else 0.0
        if left_next > left and weight > NEGLIGIBLE:
            kinds.append((weight, round_of_kind))
            weight, left = weight * success, left_next
        elif success < 1:
            return [*kinds, (weight / (1 - success), round_of_kind)]
        else:
            return [(1.0, round_of_kind)]


def _round(profile: Profile, workload: Workload, wait: float, left: int = 0, ahead: int = 0) -> Round:
    """Return the mean of a round that waits `wait` seconds for a verdict.

    Earlier rounds drafted `left` tokens of its draft, and the edge drafts `ahead` tokens beside its verification.
    """
    k, g = workload.k, workload.gate_rate
    accepted_whole = workload.acceptance_at(k)
    observed = workload.acceptance_by_position
    accepted = sum(observed[:k]) + sum(workload.acceptance_at(i) for i in range(len(observed) + 1, k + 1))
    from_target = 1.0 if workload.has_bonus else 1 - accepted_whole
    step = _step_seconds(profile, workload)
    draft_seconds = (k - left) * step
    if workload.has_bonus and not ahead:  # drafting ahead feeds the last draft token during the verification
        draft_seconds += g * accepted_whole * (profile.edge.seconds(2) - profile.edge.step)
    return Round(
        g * (accepted + from_target) + (1 - g) * k,
        draft_seconds + g * (max(wait, ahead * step) + (1 - accepted_whole) * profile.correction),
    )


def _verification_seconds(profile: Profile, link: Link, workload: Workload) -> float:
    """Return W: seconds from sending a draft to its verdict."""
    pass_seconds = sum(chance * profile.cloud.seconds(tokens) for chance, tokens in _pass_lengths(workload))
    return _link_seconds(link, workload) + profile.queue + pass_seconds


def _link_seconds(link: Link, workload: Workload) -> float:
    if link == NO_LINK:
        return 0.0
    up = sum(chance * link.up_seconds(wire.verify_size(tokens)) for chance, tokens in _pass_lengths(workload))
    return up + link.down_seconds(wire.VERDICT_BYTES)


def _pass_lengths(workload: Workload) -> Iterable[tuple[float, float]]:
    """Yield (probability, tokens) of the cloud's forward pass: committed tokens not sent before, and the draft."""
    if workload.sent_with_draft is not None:
        yield 1.0, workload.sent_with_draft + workload.k
        return
    chance = workload.gate_rate
    for local_rounds in itertools.count():
        yield chance, workload.k * (local_rounds + 1) + 1
        chance *= 1 - workload.gate_rate
        if chance < NEGLIGIBLE:
            return


def _step_seconds(profile: Profile, workload: Workload) -> float:
    """Return e."""
    return profile.edge.step + workload.scores_per_token * profile.gate


def cloud_seconds_per_token(profile: Profile, link: Link) -> float:
    """Return seconds per token of mode cloud: one step and the bytes of one streamed token.

    A stream pays the latency of the link once, and `expected_prefill_seconds` contains that.
    """
    return profile.cloud.step + 8 * wire.LINE_BYTES / link.down


def expected_prefill_seconds(profile: Profile, link: Link, mode: str, workload: Workload) -> float:
    """Return the seconds of a generation that are no decoding: features, prefill, and the wait for the cloud's prefill.

    With eager prefill the edge waits at its first escalation. After m local rounds, with m geometric, the edge has
    spent its own prefill and m + 1 drafts by then.
    """
    edge = profile.edge.prefill
    cloud = link.up_seconds(workload.prompt_bytes) + profile.queue + profile.cloud.prefill
    if mode == "edge":
        return profile.features + edge
    if mode == "cloud":
        return profile.features + cloud + link.down_seconds(0)
    if not workload.has_eager_prefill:
        return profile.features + edge + cloud
    chance, expected_wait, wait = workload.gate_rate, 0.0, cloud - edge
    draft_seconds = workload.k * _step_seconds(profile, workload)
    while (wait := wait - draft_seconds) > 0 and chance > NEGLIGIBLE:
        expected_wait += chance * wait
        chance *= 1 - workload.gate_rate
    return profile.features + edge + expected_wait


def fastest_k(
    profile: Profile,
    link: Link,
    workload: Workload,
    candidates: Iterable[int] = range(1, MAX_K + 1),
    free_seconds: float = 0.0,
) -> int:
    """Return the k with the least seconds per token, or the smallest of equals.

    With `free_seconds`, return the best length for one round whose first `free_seconds` of drafting cost no time,
    because the cloud still prefills. Each token of that round is worth the seconds per token of the rounds after it.
    """
    rounds = {k: per_round(profile, link, workload.with_k(k)) for k in candidates}
    per_token = {k: mean.seconds / mean.tokens for k, mean in rounds.items()}
    best = min(per_token, key=lambda k: (per_token[k], k))
    if not free_seconds:
        return best
    step = _step_seconds(profile, workload)
    net_seconds = {
        k: mean.seconds - min(free_seconds, k * step) - mean.tokens * per_token[best] for k, mean in rounds.items()
    }
    return min(net_seconds, key=lambda k: (net_seconds[k], k))


@dataclass(frozen=True)
class Forecast:
    """The expected times of one strategy and of edge and cloud alone.

    Times are seconds. Speed-ups are ratios of seconds per token after both prefills, above 1 if the loop is faster.
    """

    k: int
    rtt: float
    token: float  # s per token of the loop
    edge: float  # s per token of the edge alone
    cloud: float  # s per token of the cloud alone, streamed
    over_edge: float
    over_cloud: float
    over_colocated: float | None  # over the same loop at the cloud, without a link; None: its draft step is not timed
    best_k: int  # the fastest of 1 to MAX_K
    best_over_cloud: float  # at the best k
    seen_k: int  # the last position whose acceptance was observed; acceptance beyond it is extrapolated
    largest_rtt: float | None  # s at which the loop breaks even with the cloud alone; None: at no RTT
    slowest_drafter: float | None  # s per edge step at which it breaks even; None: at none
    ceiling_over_edge: float  # every draft token accepted and no link, at this k and gate rate
    ceiling_over_edge_without_bonus: float
    ceiling_over_cloud: float
    tokens: float | None  # per generation, mean; None: unknown
    caption: float | None  # s per generation, prefill included
    caption_edge: float | None  # s per generation of the edge alone
    caption_cloud: float | None  # s per generation of the cloud alone

    @property
    def beats_cloud(self) -> bool:
        """True if a token takes less time than with the cloud alone, whose captions are at least as good."""
        return self.over_cloud > 1


def forecast(profile: Profile, link: Link, workload: Workload, has_model: bool = True) -> Forecast:
    """Return the forecast of a workload on the machines of a profile, over a link.

    Without `has_model` nothing takes time at the edge, because drafter lookup runs no model.
    """
    alone, profile = profile, profile if has_model else profile.without_edge()
    token = seconds_per_token(profile, link, workload)
    edge, cloud = alone.edge.step, cloud_seconds_per_token(profile, link)
    best_k = fastest_k(profile, link, workload)
    largest_rtt, slowest_drafter = _break_even(profile, link, workload)
    all_accepted = replace(workload, acceptance_by_position=(1.0,), draft_ahead=0)
    ceiling = seconds_per_token(profile, NO_LINK, all_accepted)
    ceiling_without_bonus = seconds_per_token(profile, NO_LINK, replace(all_accepted, has_bonus=False))
    seconds = {"speculative": token, "edge": edge, "cloud": cloud}
    captions = {
        mode: expected_prefill_seconds(alone if mode == "edge" else profile, link, mode, workload)
        + workload.tokens_per_generation * per_token
        for mode, per_token in seconds.items()
        if workload.tokens_per_generation is not None
    }
    return Forecast(
        k=workload.k,
        rtt=link.rtt,
        token=token,
        edge=edge,
        cloud=cloud,
        over_edge=edge / token,
        over_cloud=cloud / token,
        over_colocated=_colocated_speed_up(profile, workload, token),
        best_k=best_k,
        best_over_cloud=cloud / seconds_per_token(profile, link, workload.with_k(best_k)),
        seen_k=len(workload.acceptance_by_position),
        largest_rtt=largest_rtt if largest_rtt > 0 else None,
        slowest_drafter=slowest_drafter if has_model and slowest_drafter > 0 else None,
        ceiling_over_edge=edge / ceiling,
        ceiling_over_edge_without_bonus=edge / ceiling_without_bonus,
        ceiling_over_cloud=cloud / ceiling,
        tokens=workload.tokens_per_generation,
        caption=captions.get("speculative"),
        caption_edge=captions.get("edge"),
        caption_cloud=captions.get("cloud"),
    )


def _break_even(profile: Profile, link: Link, workload: Workload) -> tuple[float, float]:
    """Return rtt* and e* against the cloud alone. A value of 0 or below cannot be reached."""
    cloud = cloud_seconds_per_token(profile, link)
    mean = per_round(profile, link, workload)
    slack = mean.tokens * cloud - mean.seconds  # M s - T
    rtt, step = link.rtt + slack / workload.gate_rate, profile.edge.step + slack / workload.k
    if workload.draft_ahead or link.jitter or link.loss:  # T is not linear in the RTT, or its slope is not g
        rtt = _solve_rising(lambda rtt: seconds_per_token(profile, replace(link, rtt=rtt), workload), cloud)
    if workload.draft_ahead:  # T is not linear in the step
        step = _solve_rising(lambda step: seconds_per_token(_with_edge_step(profile, step), link, workload), cloud)
    return rtt, step


def _solve_rising(function: Callable[[float], float], target: float) -> float:
    """Return x at which the rising function equals `target`, by bisection, or 0 if it exceeds `target` at 0."""
    low, high = 0.0, target
    while function(high) < target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return low


def _with_edge_step(profile: Profile, step: float) -> Profile:
    return replace(profile, edge=Costs(profile.edge.prefill, ((1, step),)))


def _colocated_speed_up(profile: Profile, workload: Workload, token: float) -> float | None:
    """Return the speed-up over the same loop with both models at the cloud, or None if its draft step is not timed."""
    if profile.draft_at_cloud is None:
        return None
    return seconds_per_token(_with_edge_step(profile, profile.draft_at_cloud), NO_LINK, workload) / token
