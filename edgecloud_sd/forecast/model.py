"""Does it pay? The expected time a token of a synchronous draft-then-verify loop, from costs, link and acceptance.

A round drafts k tokens, and a share g of the rounds is escalated. With p_i the chance that the i-th draft token is
accepted (and so all before it), a verify call commits on average

    A + b,  A = sum_i p_i,  b = 1 (the bonus or the correction),

which for p_i = a^i is (1 - a^(k+1)) / (1 - a), equation 1 of Leviathan et al. 2023. A round then commits and takes

    M = g (A + b) + (1 - g) k            tokens
    T = D + g (L + q + V)                seconds

where D = k (e + gate) is the draft, with one wider pass of the edge after a draft accepted whole; V the cloud's forward
pass over what it has not seen, which after m local rounds are k m + 1 tokens and the draft (m is geometric, unless the
mean of what was sent is known); q its queue; and L = rtt + 8 bytes_up / up + 8 bytes_down / down. T / M is the time a
token. It generalises the walltime improvement of Leviathan et al. 2023 (theorem 3.8: e = c V, L = 0, g = 1) by the link
and the gate. The loop breaks even with a baseline of s seconds a token where T = M s, which is linear in the RTT and in
the drafter's step:

    rtt* = rtt + (M s - T) / g        e* = e + (M s - T) / k

An edge that drafts up to n tokens ahead while a verdict is on its way, W = L + q + V, makes m = min(n, ceil(W / e)) of
them and sees the verdict after max(W, m e). Where the draft is accepted whole and its guess of the bonus is right, with
chance c, the other m - 1 begin the next draft, of max(k, m - 1) tokens (where the output depends on how drafts are cut,
of k; the rest begins the draft after it, and counts among the n). With x_j the chance of that in the j-th such round in
a row, rounds of the j-th kind are as many as w_j = x_0 x_1 ... x_(j-1) has it, and M and T are the means of all kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from edgecloud_sd import wire
from edgecloud_sd.timing import link as links
from edgecloud_sd.timing.link import Link
from edgecloud_sd.timing.profile import Costs, Profile

MAX_K = 16  # longest draft that is looked at for the best one
RARE = 1e-12  # chance at which the tail of the local rounds is left out


@dataclass(frozen=True)
class Workload:
    """What is decoded and how the cloud takes it: all that a forecast needs beside costs and link."""

    k: int
    accepted: tuple[float, ...]  # p_i from i = 1; beyond the last, n, each token is as likely: p_i = p_n^(i/n)
    gate_rate: float = 1.0  # share of rounds escalated
    gated: int = 0  # statistics that gate and draft stop read of each drafted token
    bonus: bool = True  # whether a draft accepted whole earns the cloud's next token
    sent: float | None = None  # committed tokens sent with an escalated draft, mean; None: as m geometric has it
    tokens: float | None = None  # N of a caption, where whole captions are to be forecast
    open_bytes: int = 0  # of the request that opens a prompt at the cloud, over a link
    eager: bool = True  # whether the cloud is opened beside the edge
    ahead: int = 0  # tokens drafted while a verdict is on its way, at most; 0: the edge waits
    is_lossless: bool = True  # whether what was drafted ahead makes a draft longer than k
    guess: float = 0.0  # chance that the first of them is the bonus of a draft that is accepted whole

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        if not 0 < self.gate_rate <= 1:
            raise ValueError(f"the gate rate must be above 0 and at most 1, not {self.gate_rate}")
        if not self.accepted or not all(0 <= p <= 1 for p in self.accepted):
            raise ValueError(f"acceptance by position must be chances, at least one, not {self.accepted}")

    def p(self, i: int) -> float:
        """Chance that the i-th draft token, counted from 1, is accepted."""
        known = self.accepted
        return known[i - 1] if i <= len(known) else known[-1] ** (i / len(known))

    def at(self, k: int) -> Workload:
        """The same with drafts of `k`: if each drafted token exceeds the gate's threshold independently."""
        if k == self.k:
            return self
        local = math.log1p(-self.gate_rate) if self.gate_rate < 1 else -math.inf
        rate = -math.expm1(k / self.k * local)  # 1 - (1 - g)^(k / k'), however small g is
        sent = self.sent
        if sent is not None and self.gate_rate < 1:  # as far from what m geometric has as at this k
            sent = 1 + (sent - 1) * (k * (1 - rate) / rate) / (self.k * (1 - self.gate_rate) / self.gate_rate)
        made = object.__new__(Workload)  # `replace` takes most of the time of finding the fastest k, each round anew
        vars(made).update(vars(self), k=k, gate_rate=rate, sent=sent)
        return made


@dataclass(frozen=True)
class Round:
    """What a round is on average, once both sides are open: M and T of the module's formula."""

    tokens: float
    seconds: float


def per_round(profile: Profile, link: Link, work: Workload) -> Round:
    """M and T of the module's formula: the mean of its kinds of rounds."""
    if not work.ahead:
        return _round(profile, work, _crossing(profile, link, work))
    kinds = _kinds(profile, link, work)
    total = sum(weight for weight, _ in kinds)
    return Round(
        sum(weight * each.tokens for weight, each in kinds) / total,
        sum(weight * each.seconds for weight, each in kinds) / total,
    )


def seconds_per_token(profile: Profile, link: Link, work: Workload) -> float:
    """T / M: s, once both sides are open."""
    mean = per_round(profile, link, work)
    return mean.seconds / mean.tokens


def _kinds(profile: Profile, link: Link, work: Workload) -> list[tuple[float, Round]]:
    """(how many of a kind, the round), by what of the drafts is there when it begins: it grows until it stays as it is.

    After a round that is not escalated nothing is taken to be there.
    """
    step = _step(profile, work)
    kinds: list[tuple[float, Round]] = []
    weight, there = 1.0, 0
    while True:
        kind = work.at(max(work.k, there)) if work.is_lossless else work
        left = max(there - kind.k, 0)
        crossing = _crossing(profile, link, kind)
        made = min(work.ahead - left, math.ceil(crossing / step)) if step else work.ahead - left
        each = _round(profile, kind, crossing, min(there, kind.k), made)
        follows = max(left + made - 1, 0)
        chance = kind.gate_rate * kind.p(kind.k) * work.guess if left + made else 0.0
        if follows > there and weight > RARE:
            kinds.append((weight, each))
            weight, there = weight * chance, follows
        elif chance < 1:
            return [*kinds, (weight / (1 - chance), each)]
        else:
            return [(1.0, each)]


def _round(profile: Profile, work: Workload, crossing: float, there: int = 0, made: int = 0) -> Round:
    """One kind of round, `there` tokens of whose draft had been made before, with `made` more beside the verdict.

    Without the bonus, only a draft that is not accepted whole earns the cloud's token.
    """
    accepted = sum(work.accepted[: work.k]) + sum(work.p(i) for i in range(len(work.accepted) + 1, work.k + 1))
    own = 1.0 if work.bonus else 1 - work.p(work.k)
    step = _step(profile, work)
    draft = (work.k - there) * step
    if work.bonus and not made:  # the last draft token and the bonus are fed together, if the first was not before
        draft += work.gate_rate * work.p(work.k) * (profile.edge.seconds(2) - profile.edge.step)
    return Round(
        work.gate_rate * (accepted + own) + (1 - work.gate_rate) * work.k,
        draft + work.gate_rate * max(crossing, made * step),
    )


def _crossing(profile: Profile, link: Link, work: Workload) -> float:
    """W of the module's formula: s from sending a draft to its verdict."""
    return _link_seconds(link, work) + profile.queue + _verify_seconds(profile.cloud, work)


def cloud_seconds_per_token(profile: Profile, link: Link) -> float:
    """s a token of cloud mode: one step, and its bytes; the latency of a stream is paid once, with the opening."""
    return profile.cloud.step + 8 * wire.LINE_BYTES / link.down


def opening_seconds(profile: Profile, link: Link, mode: str, work: Workload) -> float:
    """s from the request to the start of decoding: features, prefills, and what of opening the cloud is waited for.

    What is opened beside the edge is waited for at the first escalation: after m local rounds, m geometric, the edge
    has spent its prefill and m + 1 drafts.
    """
    edge, cloud = profile.edge.prefill, link.up_seconds(work.open_bytes) + profile.queue + profile.cloud.prefill
    if mode == "edge":
        return profile.features + edge
    if mode == "cloud":
        return profile.features + cloud + link.down_seconds(0)
    if not work.eager:
        return profile.features + edge + cloud
    chance, waited, left = work.gate_rate, 0.0, cloud - edge
    while (left := left - work.k * _step(profile, work)) > 0 and chance > RARE:
        waited += chance * left
        chance *= 1 - work.gate_rate
    return profile.features + edge + waited


def _step(profile: Profile, work: Workload) -> float:
    return profile.edge.step + work.gated * profile.gate


def _fed(work: Workload) -> Iterable[tuple[float, float]]:
    """(chance, tokens) that a verify call feeds to the cloud."""
    if work.sent is not None:
        yield 1.0, work.sent + work.k
        return
    chance = work.gate_rate
    for m in itertools.count():
        yield chance, work.k * (m + 1) + 1
        chance *= 1 - work.gate_rate
        if chance < RARE:
            return


def _verify_seconds(cloud: Costs, work: Workload) -> float:
    return sum(chance * cloud.seconds(n) for chance, n in _fed(work))


def _link_seconds(link: Link, work: Workload) -> float:
    if link == links.NO_LINK:
        return 0.0
    up = sum(chance * link.up_seconds(wire.verify_size(n)) for chance, n in _fed(work))
    return up + link.down_seconds(wire.VERDICT_BYTES)


@dataclass(frozen=True)
class Forecast:
    """What to expect of one way to decode. Seconds, and speed-ups in seconds a token (above 1: the loop is faster)."""

    k: int
    rtt: float
    token: float  # s a token of the loop, once both sides are open
    edge: float  # s a token of the edge alone
    cloud: float  # s a token of the cloud alone, streamed
    over_edge: float
    over_cloud: float
    over_colocated: float | None  # the same loop without a link, its drafter beside the cloud; None where not timed
    best_k: int  # of 1 to MAX_K
    best_over_cloud: float  # at the best k
    seen_k: int  # beyond which acceptance was not seen, but continued
    largest_rtt: float | None  # s at which it breaks even with the cloud alone; None: at no RTT
    slowest_drafter: float | None  # s a step at which it does; None: with no drafter, however fast
    ceiling_over_edge: float  # every draft accepted, no link, this k and gate rate
    ceiling_over_edge_without_bonus: float
    ceiling_over_cloud: float
    tokens: float | None  # of a caption; None where the workload does not say
    caption: float | None  # s, openings included
    caption_edge: float | None  # s of the edge alone
    caption_cloud: float | None  # s of the cloud alone

    @property
    def pays(self) -> bool:
        """Whether a token comes faster than from the cloud alone, which writes captions at least as good."""
        return self.over_cloud > 1

    @property
    def sentence(self) -> str:
        """The answer, in one plain sentence."""
        took = f"at k={self.k} a token takes {_ms(self.token)}, the cloud alone {_ms(self.cloud)}"
        others = f"{self.over_edge:.2f}x as fast as the edge alone"
        if self.over_colocated is not None and self.rtt:
            others += f", {self.over_colocated:.2f}x as fast as the same loop all at the cloud"
        guessed = " if acceptance goes on as seen" if self.best_k > self.seen_k else ""
        best = f"k={self.best_k} ({self.best_over_cloud:.2f}x{guessed})"
        rtt = None if self.largest_rtt is None else f"{_ms(self.largest_rtt)} (now {_ms(self.rtt)})"
        drafter = None if self.slowest_drafter is None else f"{_ms(self.slowest_drafter)} a step (now {_ms(self.edge)})"
        verdict = f"{self.over_cloud:.2f}x as fast as the cloud alone ({took}{self._caption})"
        if self.pays:
            better = "no other k is better" if self.best_k == self.k else f"at its best {best}"
            return (
                f"{self._head}: {verdict}, {better}; {others}; it pays up to a round trip of {rtt} or a drafter of "
                f"{drafter}."
            )
        wants = [best] if self.best_over_cloud > 1 else []
        wants += [f"a round trip below {rtt}"] if rtt else []
        wants += [f"a drafter below {drafter}"] if drafter else []
        change = f"needs {' or '.join(wants)}" if wants else "would take more than a better link or drafter alone"
        return (
            f"{self._head}: {verdict}, {others}; even with every draft accepted and no round trip it cannot exceed "
            f"{self.ceiling_over_edge:.2f}x the edge alone ({self.ceiling_over_edge_without_bonus:.2f}x without the "
            f"bonus token) and {self.ceiling_over_cloud:.2f}x the cloud alone at this k; to pay it {change}."
        )

    @property
    def _head(self) -> str:
        if not self.pays:
            return "Does not pay"
        slower = self.caption is not None and self.caption_cloud is not None and self.caption > self.caption_cloud
        return "Pays once both sides are open, but not for captions this short" if slower else "Pays"

    @property
    def _caption(self) -> str:
        if self.caption is None or self.caption_cloud is None:
            return ""
        took = f"{self.tokens:.0f} tokens takes {_ms(self.caption)}, the cloud's {_ms(self.caption_cloud)}"
        return f"; with its opening a caption of {took}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _drafting_at(profile: Profile, step: float) -> Profile:
    """The same with a drafter of `step` s a token."""
    return replace(profile, edge=Costs(profile.edge.prefill, ((1, step),)))


def _reaches(target: float, rises: Callable[[float], float]) -> float:
    """Where a function that rises to beyond `target` reaches it, by bisection; 0 where it begins above."""
    low, high = 0.0, target
    while rises(high) < target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < target else (low, middle)
    return low


def fastest_k(
    profile: Profile, link: Link, work: Workload, among: Iterable[int] = range(1, MAX_K + 1), free: float = 0.0
) -> int:
    """The k at which a token takes the least time; the smallest of equals.

    `free`: s of drafting that this one round does not cost, as beside an opening. Then each of its tokens is worth what
    one takes in the rounds after it.
    """
    rounds = {k: per_round(profile, link, work.at(k)) for k in among}
    each = {k: one.seconds / one.tokens for k, one in rounds.items()}
    best = min(each, key=lambda k: (each[k], k))
    if not free:
        return best
    step = _step(profile, work)
    left = {k: one.seconds - min(free, k * step) - one.tokens * each[best] for k, one in rounds.items()}
    return min(left, key=lambda k: (left[k], k))


def forecast(profile: Profile, link: Link, work: Workload) -> Forecast:
    """Everything the oracle has to say of `work` on these machines over this link."""
    cloud = cloud_seconds_per_token(profile, link)
    edge = profile.edge.step
    token = seconds_per_token(profile, link, work)
    best_k = fastest_k(profile, link, work)
    mean = per_round(profile, link, work)
    slack = mean.tokens * cloud - mean.seconds  # s a round may take longer
    rtt, drafter = link.rtt + slack / work.gate_rate, edge + slack / work.k
    if work.ahead:  # no straight line
        rtt = _reaches(cloud, lambda x: seconds_per_token(profile, replace(link, rtt=x), work))
        drafter = _reaches(cloud, lambda x: seconds_per_token(_drafting_at(profile, x), link, work))
    colocated = None
    if profile.draft_at_cloud is not None:
        beside = _drafting_at(profile, profile.draft_at_cloud)
        colocated = seconds_per_token(beside, links.NO_LINK, work) / token
    perfect = replace(work, accepted=(1.0,), ahead=0)
    ceiling = seconds_per_token(profile, links.NO_LINK, perfect)

    def caption(mode: str, each: float) -> float | None:
        if work.tokens is None:
            return None
        return opening_seconds(profile, link, mode, work) + work.tokens * each

    return Forecast(
        k=work.k,
        rtt=link.rtt,
        token=token,
        edge=edge,
        cloud=cloud,
        over_edge=edge / token,
        over_cloud=cloud / token,
        over_colocated=colocated,
        best_k=best_k,
        best_over_cloud=cloud / seconds_per_token(profile, link, work.at(best_k)),
        seen_k=len(work.accepted),
        largest_rtt=rtt if rtt > 0 else None,
        slowest_drafter=drafter if drafter > 0 else None,
        ceiling_over_edge=edge / ceiling,
        ceiling_over_edge_without_bonus=edge / seconds_per_token(profile, links.NO_LINK, replace(perfect, bonus=False)),
        ceiling_over_cloud=cloud / ceiling,
        tokens=work.tokens,
        caption=caption("speculative", token),
        caption_edge=caption("edge", edge),
        caption_cloud=caption("cloud", cloud),
    )
