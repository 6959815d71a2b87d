"""Does it pay? The expected time a token of a synchronous draft-then-verify loop, from costs, link and acceptance.

A round drafts k tokens, and a share g of the rounds is escalated. With p_i the chance that the i-th draft token is
accepted (and so all before it), a verify call commits on average

    A + b,  A = sum_i p_i,  b = 1 (the bonus or the correction),

which for p_i = a^i is (1 - a^(k+1)) / (1 - a), equation 1 of Leviathan et al. 2023. A round then commits and takes

    M = g (A + b) + (1 - g) k            tokens
    T = D + g (L + q + V)                seconds

where D = k (e + gate) is the draft, with one wider pass of the edge after a draft accepted whole; V the cloud's forward
pass over what it has not seen, which after m local rounds are k m + 1 tokens and the draft, m geometric; q its queue;
and L = rtt + 8 bytes_up / up + 8 bytes_down / down. T / M is the time a token. It generalises the walltime improvement
of Leviathan et al. 2023 (theorem 3.8: e = c V, L = 0, g = 1) by the link and the gate. The loop breaks even with a
baseline of s seconds a token where T = M s, which is linear in the RTT and in the drafter's step:

    rtt* = rtt + (M s - T) / g        e* = e + (M s - T) / k
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edgecloud_sd import link as links
from edgecloud_sd import metrics
from edgecloud_sd.ledger import intervals, part
from edgecloud_sd.link import Link
from edgecloud_sd.profile import Costs, Profile
from edgecloud_sd.records import Committed, Drafted, Escalated, Trace, Verified

MAX_K = 16  # longest draft that is looked at for the best one
RARE = 1e-12  # chance at which the tail of the local rounds is left out


@dataclass(frozen=True)
class Workload:
    """What is decoded and how the cloud takes it: all that a forecast needs beside costs and link."""

    k: int
    accepted: tuple[float, ...]  # p_i from i = 1; beyond the last, n, each token is as likely: p_i = p_n^(i/n)
    gate_rate: float = 1.0  # share of rounds escalated
    gated: bool = False  # whether the gate reads a statistic of each drafted token
    bonus: bool = True  # whether a draft accepted whole earns the cloud's next token

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
        return replace(self, k=k, gate_rate=1 - (1 - self.gate_rate) ** (k / self.k))


def geometric(k: int, acceptance: float, gate_rate: float = 1.0, bonus: bool = True) -> Workload:
    """The workload in which each token is accepted with the same chance: p_i = acceptance^i."""
    return Workload(k, tuple(acceptance**i for i in range(1, k + 1)), gate_rate, bonus=bonus)


def tokens_per_round(work: Workload) -> float:
    """M of the module's formula. Without the bonus, only a draft that is not accepted whole earns the cloud's token."""
    accepted = sum(work.p(i) for i in range(1, work.k + 1))
    own = 1.0 if work.bonus else 1 - work.p(work.k)
    return work.gate_rate * (accepted + own) + (1 - work.gate_rate) * work.k


def seconds_per_round(profile: Profile, link: Link, work: Workload) -> float:
    """T of the module's formula: s."""
    crossing = _link_seconds(link, work) + profile.queue + _verify_seconds(profile.cloud, work)
    return _draft_seconds(profile, work) + work.gate_rate * crossing


def seconds_per_token(profile: Profile, link: Link, work: Workload) -> float:
    """T / M: s, once both sides are open."""
    return seconds_per_round(profile, link, work) / tokens_per_round(work)


def cloud_seconds_per_token(profile: Profile, link: Link) -> float:
    """s a token of cloud mode: one step, and its bytes; the latency of a stream is paid once, with the opening."""
    return profile.cloud.step + 8 * links.TOKEN_BYTES / link.down


def opening_seconds(profile: Profile, link: Link, mode: str, open_bytes: int = 0) -> float:
    """s from the request to the start of decoding: features, both prefills, what opens the cloud."""
    seconds = profile.features
    if mode != "cloud":
        seconds += profile.edge.prefill
    if mode != "edge":
        seconds += link.up_seconds(open_bytes) + profile.queue + profile.cloud.prefill
    return seconds + (link.rtt / 2 if mode == "cloud" else 0.0)


def _draft_seconds(profile: Profile, work: Workload) -> float:
    each = profile.edge.step + (profile.gate if work.gated else 0.0)
    wider = profile.edge.seconds(2) - profile.edge.step  # the last draft token and the bonus, fed together
    return work.k * each + (work.gate_rate * work.p(work.k) * wider if work.bonus else 0.0)


def _fed(work: Workload) -> Iterable[tuple[float, int]]:
    """(chance, tokens) that a verify call feeds to the cloud."""
    chance = work.gate_rate
    for m in itertools.count():
        yield chance, work.k * (m + 1) + 1
        chance *= 1 - work.gate_rate
        if chance < RARE:
            return


def _verify_seconds(cloud: Costs, work: Workload) -> float:
    return sum(chance * cloud.seconds(n) for chance, n in _fed(work))


def _byte_seconds(link: Link, work: Workload) -> float:
    up = sum(chance * links.verify_bytes(n) for chance, n in _fed(work))
    return 8 * up / link.up + 8 * links.VERDICT_BYTES / link.down


def _link_seconds(link: Link, work: Workload) -> float:
    return 0.0 if link == links.NONE else link.rtt + _byte_seconds(link, work)


@dataclass(frozen=True)
class Forecast:
    """What to expect of one way to decode. Seconds, and speed-ups in seconds a token (above 1: the loop is faster)."""

    k: int
    rtt: float
    token: float  # s a token of the loop
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
    edge_step: float
    ceiling_over_edge: float  # every draft accepted, no link, this k
    ceiling_over_edge_without_bonus: float
    ceiling_over_cloud: float

    @property
    def pays(self) -> bool:
        """Whether the loop is faster than the cloud alone, which writes captions at least as good."""
        return self.over_cloud > 1

    @property
    def sentence(self) -> str:
        """The answer, in one plain sentence."""
        took = f"at k={self.k} a token takes {_ms(self.token)}, the cloud alone {_ms(self.cloud)}"
        edge = f"{self.over_edge:.2f}x as fast as the edge alone"
        if self.over_colocated is not None and self.rtt:
            edge += f" and {self.over_colocated:.2f}x as fast as the same loop all at the cloud"
        guessed = " if acceptance goes on as seen" if self.best_k > self.seen_k else ""
        best = f"k={self.best_k} ({self.best_over_cloud:.2f}x{guessed})"
        if self.pays:
            limits = []
            if self.largest_rtt is not None:
                limits.append(f"a round trip of {_ms(self.largest_rtt)} (now {_ms(self.rtt)})")
            if self.slowest_drafter is not None:
                limits.append(f"a drafter of {_ms(self.slowest_drafter)} a step (now {_ms(self.edge_step)})")
            better = ", and no other k is better" if self.best_k == self.k else f", at its best {best}"
            return (
                f"Pays: {self.over_cloud:.2f}x as fast as the cloud alone ({took}){better}; {edge}; it pays up to "
                f"{' or '.join(limits)}."
            )
        wants = []
        if self.best_over_cloud > 1:
            wants.append(best)
        if self.largest_rtt is not None:
            wants.append(f"a round trip below {_ms(self.largest_rtt)} (now {_ms(self.rtt)})")
        if self.slowest_drafter is not None:
            wants.append(f"a drafter below {_ms(self.slowest_drafter)} a step (now {_ms(self.edge_step)})")
        change = (
            f"to pay it needs {' or '.join(wants)}"
            if wants
            else "neither a better link alone nor a faster drafter alone would change that"
        )
        return (
            f"Does not pay: {self.over_cloud:.2f}x as fast as the cloud alone ({took}), {edge}; even with every "
            f"draft accepted and no round trip it cannot exceed {self.ceiling_over_edge:.2f}x the edge alone "
            f"({self.ceiling_over_edge_without_bonus:.2f}x without the bonus token) and {self.ceiling_over_cloud:.2f}x "
            f"the cloud alone; {change}."
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def forecast(profile: Profile, link: Link, work: Workload) -> Forecast:
    """Everything the oracle has to say of `work` on these machines over this link."""
    cloud = cloud_seconds_per_token(profile, link)
    edge = profile.edge.step
    token = seconds_per_token(profile, link, work)
    over_cloud = {k: cloud / seconds_per_token(profile, link, work.at(k)) for k in range(1, MAX_K + 1)}
    best_k = max(over_cloud, key=lambda k: (over_cloud[k], -k))
    slack = tokens_per_round(work) * cloud - seconds_per_round(profile, link, work)  # s a round may take longer
    rtt, drafter = link.rtt + slack / work.gate_rate, edge + slack / work.k
    colocated = None
    if profile.draft_at_cloud is not None:
        beside = replace(profile, edge=Costs(0.0, ((1, profile.draft_at_cloud),)))
        colocated = seconds_per_token(beside, links.NONE, work) / token
    perfect = Workload(work.k, (1.0,), gated=work.gated)
    ceiling = seconds_per_token(profile, links.NONE, perfect)
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
        best_over_cloud=over_cloud[best_k],
        seen_k=len(work.accepted),
        largest_rtt=rtt if rtt > 0 else None,
        slowest_drafter=drafter if drafter > 0 else None,
        edge_step=edge,
        ceiling_over_edge=edge / ceiling,
        ceiling_over_edge_without_bonus=edge / seconds_per_token(profile, links.NONE, replace(perfect, bonus=False)),
        ceiling_over_cloud=cloud / ceiling,
    )


def workload(traces: Sequence[Trace], k: int, gated: bool = False) -> Workload | None:
    """What speculative captions with drafts of up to `k` were; None where nothing was verified."""
    accepted = metrics.acceptance_by_position(traces)
    rate = sum((metrics.counts(trace) for trace in traces), metrics.Counts()).cloud_call_rate
    return Workload(k, tuple(accepted), rate, gated) if accepted and rate else None


def observed(traces: Iterable[Trace], name: str = "observed") -> Profile | None:
    """The profile that captions of one run show, whatever clock timed them; None unless both sides decoded in it.

    A draft's seconds are shared among its tokens. Where no caption was the cloud's alone, its step is continued from
    the verify passes. A pass over more tokens is taken to cost no less than one over fewer.
    """
    spent: dict[tuple[str, int], float] = defaultdict(float)  # s by part, and by tokens of a cloud's pass
    calls: dict[tuple[str, int], int] = defaultdict(int)

    def note(part: str, seconds: float, n: int = 1, count: int = 1) -> None:
        spent[part, n] += seconds
        calls[part, n] += count

    for trace in traces:
        fed = 0
        for event, seconds in intervals(trace):
            if isinstance(event, Drafted):
                note("draft", seconds, count=len(event.draft.tokens))
                note("gate", 0.0, count=len(event.draft.scores))
            elif isinstance(event, Escalated):
                fed = event.sent + len(event.draft.tokens)
            elif isinstance(event, Verified):
                note("forward", seconds, fed)
            elif isinstance(event, Committed) and event.origin == "cloud":
                note("forward", seconds)
            else:
                note(part(event), seconds)
        for span in trace.spans:
            note(span.part, span.end - span.start, count=int(span.part != "gate"))

    def each(part: str, n: int = 1) -> float:
        return spent[part, n] / calls[part, n] if calls[part, n] else 0.0

    passes = sorted(n for part, n in calls if part == "forward")
    if not calls["draft", 1] or not passes:
        return None
    heights = itertools.accumulate((each("forward", n) for n in passes), max)
    return Profile(
        name,
        edge=Costs(each("edge_prefill"), ((1, each("draft")),)),
        cloud=Costs(each("cloud_prefill"), tuple(zip(passes, heights, strict=True))),
        features=each("features"),
        gate=each("gate"),
        queue=each("cloud_queue"),
    )
