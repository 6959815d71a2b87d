"""The cost model of speculative decoding: the expected seconds per token, from costs, link and acceptance.

The derivation uses these symbols.

- k: draft tokens per round.
- g: gate rate, the share of rounds that are escalated.
- p_i: probability that draft token i is accepted, and so all before it.
- b: tokens of the target per verification, which is 1: the correction or the bonus (1 - p_k without the bonus).
- e: seconds of an edge step, a pass over one token, with the scores that gate and draft stop compute.
- h: probability that the edge drafts a discarded token again after a correction, given those before it.
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

D is k e, plus two differences. After a draft accepted whole, the edge feeds its last token and the bonus in one pass,
which may cost more than a pass over one token. After a correction it feeds the t discarded tokens after the correction
in the same pass, as a guess. Each of them that it would draft again saves a pass. The others start a new pass, which is
assumed to check half of the guess. With E(n) for the seconds of a pass over n tokens, and t for its mean, drafting
1 + t tokens takes

    E(1 + t) + (1 - h) t E(1 + t/2)    instead of    (1 + t) E(1).

With draft-ahead, t includes tokens drafted ahead. The draft has room for k - 1 of them, and the others save nothing.

V is the cost of a pass over the tokens that the cloud has not seen. After m local rounds these are k m + 1 committed
tokens and the draft. m is geometric: P(m) = g (1 - g)^m. If the mean number of committed tokens sent with a draft is
known, V is the cost at that mean.

Observed rounds. Traces show all forward passes with their tokens, the scores, the corrections and the tokens of the
output. So they show M and T of any profile and link without an assumption about acceptance:

    T = sum of E over the edge's passes + sum of W over the cloud's passes + scores + corrections, per round.

This covers look-back, whose verifications include earlier local tokens, and tokens that are taken back. It covers
every gate, revise, and drafts from a guess. It is exact where the run would decode alike. With draft-ahead, another
profile or link would change the tokens drafted ahead, which the sum keeps. Another k multiplies M and T by the ratio of
the equations at both k. Under gates risk and token the k changes only what is shown at once. A round is then all that
is drafted between two verdicts, and its mean length is the k of the forecast.

Seconds per token are T / M. Let e = c V, D = k e, L = q = C = 0 and g = 1. Then V M / T is the walltime improvement of
Leviathan et al. 2023 (theorem 3.8). The model adds the link, the queue and the gate.

Break-even. A baseline takes s seconds per token. The loop is as fast if T = M s. T is linear in the RTT with slope g.
A slower step is assumed to slow all passes of the edge by as many seconds. So T is linear in the step too. The slope is
the number of passes per round: k, if no pass has a guess. The loop breaks even at

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
class EdgeWork:
    """Forward passes of the edge, as pairs of tokens fed and number of passes, and the scores that it computed."""

    passes: tuple[tuple[int, float], ...]
    scores: float = 0.0

    def seconds(self, profile: Profile) -> float:
        """Return the seconds that the work takes on the edge of a profile."""
        return sum(number * profile.edge.seconds(fed) for fed, number in self.passes) + self.scores * profile.gate


@dataclass(frozen=True)
class ObservedCall:
    """A verification: the tokens fed in the cloud's pass, and the edge's steps and scores beside it."""

    fed: int
    steps_ahead: int = 0
    scores_ahead: int = 0

    def seconds(self, profile: Profile, link: Link) -> float:
        """Return the seconds until the edge reads the verdict."""
        ahead = self.steps_ahead * profile.edge.step + self.scores_ahead * profile.gate
        return max(_ask_seconds(profile, link, self.fed) + _answer_seconds(profile, link), ahead)


@dataclass(frozen=True)
class ObservedRounds:
    """The work of the rounds of a run; mean per round."""

    k: int  # the k of the workload that was observed
    tokens: float  # output gained
    edge: EdgeWork  # without that beside verifications
    calls: tuple[tuple[ObservedCall, float], ...]  # with their numbers
    corrections: float
    before_call: tuple[EdgeWork, ...]  # work before the first escalation of each generation that has one
    generations: int


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
    repeat_rate: float = 0.0  # h; 0: the edge guesses nothing, and drafts all tokens one by one
    has_own_lengths: bool = False  # the gate ends drafts, so that no other k changes a round
    observed: ObservedRounds | None = None  # None: rounds are derived from the other fields

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
        if k == self.k or self.has_own_lengths:
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
    seen = workload.observed
    if seen is None:
        return _derived_round(profile, link, workload)
    exact = _observed_round(profile, link, seen)
    if workload.k == seen.k:
        return exact
    there, here = (_derived_round(profile, link, other) for other in (workload, workload.with_k(seen.k)))
    return Round(exact.tokens * there.tokens / here.tokens, exact.seconds * there.seconds / here.seconds)


def _observed_round(profile: Profile, link: Link, seen: ObservedRounds) -> Round:
    calls = sum(number * call.seconds(profile, link) for call, number in seen.calls)
    return Round(seen.tokens, seen.edge.seconds(profile) + calls + seen.corrections * profile.correction)


def _derived_round(profile: Profile, link: Link, workload: Workload) -> Round:
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
    correction = profile.correction
    if workload.repeat_rate and accepted_whole < 1:
        discarded = ahead + (k - accepted) / (1 - accepted_whole) - 1  # after the correction, mean
        correction += _guess_seconds(profile.edge, discarded, min(discarded, k - 1), workload.repeat_rate)
    return Round(
        g * (accepted + from_target) + (1 - g) * k,
        draft_seconds + g * (max(wait, ahead * step) + (1 - accepted_whole) * correction),
    )


def _guess_seconds(edge: Costs, discarded: float, used: float, repeat_rate: float) -> float:
    """Return what a guess of discarded tokens adds to the seconds of a draft with 1 + `used` tokens in their place.

    It is below 0 if it saves time.
    """
    new_passes = (1 - repeat_rate) * used * edge.seconds(1 + discarded / 2)
    return edge.seconds(1 + discarded) + new_passes - (1 + used) * edge.step


def _verification_seconds(profile: Profile, link: Link, workload: Workload) -> float:
    """Return W: seconds from sending a draft to its verdict."""
    asking = sum(chance * _ask_seconds(profile, link, fed) for chance, fed in _pass_lengths(workload))
    return asking + _answer_seconds(profile, link)


def _ask_seconds(profile: Profile, link: Link, fed: float) -> float:
    """Return the part of W that depends on the `fed` tokens: the request and the cloud's pass."""
    up = 0.0 if link == NO_LINK else link.up_seconds(wire.verify_size(fed))
    return up + profile.cloud.seconds(fed)


def _answer_seconds(profile: Profile, link: Link) -> float:
    """Return the rest of W: the queue and the answer."""
    return profile.queue + (0.0 if link == NO_LINK else link.down_seconds(wire.VERDICT_BYTES))


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

    With eager prefill the edge waits at its first escalation. Observed rounds show the work that it has done by then,
    beside its own prefill. Else it has spent m + 1 drafts, with m geometric, and each generation is escalated once.
    """
    edge = profile.edge.prefill
    cloud = link.up_seconds(workload.prompt_bytes) + profile.queue + profile.cloud.prefill
    if mode == "edge":
        return profile.features + edge
    if mode == "cloud":
        return profile.features + cloud + link.down_seconds(0)
    if seen := workload.observed:
        done = [work.seconds(profile) + edge if workload.has_eager_prefill else 0.0 for work in seen.before_call]
        return profile.features + edge + sum(max(cloud - seconds, 0.0) for seconds in done) / seen.generations
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
    if workload.has_own_lengths:
        return workload.k
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
    They do not tell if the loop pays: that is a matter of whole captions of equal quality.
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
    is_lossless: bool  # the captions are those of the cloud alone

    @property
    def beats_cloud(self) -> bool | None:
        """True if a whole caption takes less time than with the cloud alone. None: its length is unknown."""
        return self._is_shorter_than(self.caption_cloud)

    @property
    def beats_edge(self) -> bool | None:
        """True if a whole caption takes less time than with the edge alone. None: its length is unknown."""
        return self._is_shorter_than(self.caption_edge)

    def _is_shorter_than(self, seconds: float | None) -> bool | None:
        return None if self.caption is None or seconds is None else self.caption < seconds


def forecast(profile: Profile, link: Link, workload: Workload, has_model: bool = True) -> Forecast:
    """Return the forecast of a workload on the machines of a profile, over a link.

    Without `has_model` nothing takes time at the edge, because drafter lookup runs no model.
    """
    alone, profile = profile, profile if has_model else profile.without_edge()
    token = seconds_per_token(profile, link, workload)
    edge, cloud = alone.edge.step, cloud_seconds_per_token(profile, link)
    best_k = fastest_k(profile, link, workload)
    largest_rtt, slowest_drafter = _break_even(profile, link, workload)
    all_accepted = replace(workload, acceptance_by_position=(1.0,), draft_ahead=0, observed=None)
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
        largest_rtt=largest_rtt if 0 < largest_rtt < math.inf else None,
        slowest_drafter=slowest_drafter if has_model and 0 < slowest_drafter < math.inf else None,
        ceiling_over_edge=edge / ceiling,
        ceiling_over_edge_without_bonus=edge / ceiling_without_bonus,
        ceiling_over_cloud=cloud / ceiling,
        tokens=workload.tokens_per_generation,
        caption=captions.get("speculative"),
        caption_edge=captions.get("edge"),
        caption_cloud=captions.get("cloud"),
        is_lossless=workload.is_lossless,
    )


def _break_even(profile: Profile, link: Link, workload: Workload) -> tuple[float, float]:
    """Return rtt* and e* against the cloud alone. A value of 0 or below, or inf, cannot be reached."""

    def token_at_rtt(rtt: float) -> float:
        return seconds_per_token(profile, replace(link, rtt=rtt), workload)

    def token_at_step(step: float) -> float:
        return seconds_per_token(_with_edge_step(profile, step), link, workload)

    cloud = cloud_seconds_per_token(profile, link)
    solve_rtt = _solve_rising if workload.draft_ahead or link.jitter or link.loss else _solve_line
    solve_step = _solve_rising if workload.draft_ahead else _solve_line
    return solve_rtt(token_at_rtt, cloud), solve_step(token_at_step, cloud)


def _solve_line(function: Callable[[float], float], target: float) -> float:
    """Return x at which the linear function equals `target`, or inf if the function is constant."""
    start = function(0.0)
    slope = function(1.0) - start
    return (target - start) / slope if slope > 0 else math.inf


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
    """Return the profile with a step of `step` seconds at the edge, and with all its passes as much slower."""
    forward = tuple((n, max(seconds + step - profile.edge.step, 0.0)) for n, seconds in profile.edge.forward)
    return replace(profile, edge=Costs(profile.edge.prefill, forward))


def _colocated_speed_up(profile: Profile, workload: Workload, token: float) -> float | None:
    """Return the speed-up over the same loop with both models at the cloud, or None if its draft step is not timed."""
    if profile.draft_at_cloud is None:
        return None
    return seconds_per_token(_with_edge_step(profile, profile.draft_at_cloud), NO_LINK, workload) / token
