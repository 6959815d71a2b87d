"""The metrics of traces: one pure function for each, with its formula in its docstring.

An undefined metric is None, never 0. N is the number of generated ids. A rate over several clips is a ratio of sums,
not a mean of ratios.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgecloud_sd.events import (
    BREAKER_OPEN,
    BREAKER_OPENED,
    Ahead,
    Committed,
    Confirmed,
    Degraded,
    Drafted,
    Escalated,
    Opened,
    Output,
    Prepared,
    Retracted,
    Trace,
    Verified,
)

DecodeText = Callable[[Sequence[int]], str]  # token ids to text


def ttft(trace: Trace, decode: DecodeText) -> float | None:
    """Return seconds from the request to the first visible text, or None if the caption never had text.

    A verification may take this text back (see `ttft_final`). An incomplete UTF-8 character and white space do not
    count as text.
    """
    return next((seconds for seconds, output in _moments(trace) if _is_visible(decode(output.tokens))), None)


def ttft_final(trace: Trace, decode: DecodeText) -> float | None:
    """Return seconds from the request to the first visible text that nothing can take back, or None without text.

    It equals `ttft` if no token was shown before its verdict.
    """
    moments = ((seconds, output.tokens[: output.final]) for seconds, output in _moments(trace))
    return next((seconds for seconds, tokens in moments if _is_visible(decode(tokens))), None)


def _is_visible(text: str) -> bool:
    return bool(text.replace("\ufffd", "").strip())


def _moments(trace: Trace) -> Iterator[tuple[float, Output]]:
    """Yield the seconds since the request and the output, each time the text may change or become final.

    The accepted tokens of a round and the target's token after them are shown together.
    """
    output = Output()
    following = (event for _, event in trace.events[1:])
    for (seconds, event), later in itertools.zip_longest(trace.events, following):
        output.see(event)
        joins = isinstance(later, Committed) and isinstance(event, Committed) and event.origin == "accepted"
        if isinstance(event, Committed | Confirmed | Retracted) and not joins:
            yield seconds, output


def e2e(trace: Trace) -> float | None:
    """Return seconds from the request to the last token, or None if no token was committed.

    The last token counts when it is final, and not before the last change of the text.
    """
    return max((seconds for seconds, _ in _moments(trace)), default=None)


def tpot(n: int, first: float | None, last: float | None) -> float | None:
    """Return seconds per token after the first: (last - first) / (N - 1), or None if undefined.

    `first` is the TTFT and `last` the E2E latency, in seconds: the time of tokens that are taken back counts, and the
    tokens do not. The ratio is undefined for N < 2, and if all tokens became visible and final at one moment.
    """
    return (last - first) / (n - 1) if first is not None and last is not None and n >= 2 and last > first else None


def otps(n: int, first: float | None, last: float | None) -> float | None:
    """Return tokens per second after the first: (N - 1) / (last - first), or None where `tpot` is None."""
    seconds_per_token = tpot(n, first, last)
    return 1 / seconds_per_token if seconds_per_token else None


def e2e_tps(n: int, last: float | None) -> float | None:
    """Return tokens per second over the whole request: N / e2e, or None if no token was committed."""
    return n / last if last else None


def chunks(trace: Trace) -> list[tuple[float, int]]:
    """Return (seconds since the request, tokens) for each moment at which tokens became visible.

    A chunk is all that one round commits, or one token of the stream in cloud mode. A token that is taken back later
    counts as if it had never been shown: what stands in its place counts when that is shown.
    """
    moments = [(seconds, len(output.tokens)) for seconds, output in _moments(trace)]
    stay = list(itertools.accumulate(reversed([n for _, n in moments]), min))[::-1]  # tokens that are there for good
    return [
        (seconds, end - start)
        for (seconds, _), start, end in zip(moments, [0, *stay], stay, strict=False)
        if end > start
    ]


def after_first_chunk(trace: Trace) -> tuple[int, float] | None:
    """Return (tokens, seconds) after the first chunk, or None if there are fewer than two chunks.

    The seconds end where `e2e` does. Their ratio is the speed of decoding alone. `tpot` is lower, because the tokens
    that arrive with the first one take no time there.
    """
    moments, last = chunks(trace), e2e(trace)
    return (sum(n for _, n in moments[1:]), last - moments[0][0]) if last is not None and len(moments) > 1 else None


def itl_per_chunk(trace: Trace) -> list[float]:
    """Return the seconds between consecutive chunks: t_j - t_(j-1). No text that is taken back ends a gap."""
    return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(chunks(trace))]


def itl_per_token(trace: Trace) -> list[float]:
    """Return the seconds between consecutive chunks per token of the later one: (t_j - t_(j-1)) / n_j."""
    return [gap / n for gap, (_, n) in zip(itl_per_chunk(trace), chunks(trace)[1:], strict=True)]


def prefill_seconds(trace: Trace, side: str) -> float | None:
    """Return seconds from the event before `Opened` of `side` to that event, or None if `side` was not opened.

    They cover the audio encoder and the prefill; for the cloud only as far as the edge waited for it.
    """
    before = 0.0
    for seconds, event in trace.events:
        if isinstance(event, Opened) and event.side == side:
            return seconds - before
        before = seconds
    return None


def feature_seconds(trace: Trace) -> float | None:
    """Return seconds from the request to `Prepared`, or None without that event. Reading the audio file is excluded."""
    return next((seconds for seconds, event in trace.events if isinstance(event, Prepared)), None)


@dataclass(frozen=True)
class Counts:
    """The numbers of tokens, rounds and cloud calls of one caption, or their sums over several captions.

    tokens = local + accepted + correction + bonus + cloud, and drafted = local + accepted + discarded. A local token
    that a later verdict confirms counts as accepted, and one that it takes back as discarded. A guess of the bonus
    that is right counts as a bonus token only. A wrong guess counts as drafted and discarded. A cloud call that fails
    for good is unanswered.
    """

    tokens: int = 0
    local: int = 0
    accepted: int = 0
    correction: int = 0
    bonus: int = 0
    cloud: int = 0
    rounds: int = 0
    cloud_calls: int = 0
    unanswered_calls: int = 0  # the part of `cloud_calls` that no verdict answered
    drafted: int = 0
    verified: int = 0
    ahead: int = 0  # tokens drafted ahead of a verdict, guesses of the bonus included
    ahead_wasted: int = 0  # the part of `ahead` that was thrown away
    retracted: int = 0  # the part of the discarded tokens that was shown as local, and then taken back
    edge_passes: int = 0  # forward passes of the edge after its prefill
    cloud_positions: int = 0  # tokens fed to the cloud: to answered verifications, and N in mode cloud

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def discarded(self) -> int:
        """Draft tokens that were thrown away: drafted - local - accepted."""
        return self.drafted - self.local - self.accepted

    @property
    def written(self) -> int:
        """Tokens that the cloud wrote: correction + bonus + cloud."""
        return self.correction + self.bonus + self.cloud

    @property
    def covered(self) -> int:
        """Tokens that the cloud accepted or wrote: accepted + correction + bonus + cloud."""
        return self.accepted + self.written

    @property
    def answered_calls(self) -> int:
        """Cloud calls that a verdict answered."""
        return self.cloud_calls - self.unanswered_calls

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted draft tokens / verified draft tokens. Local tokens and corrections are in neither."""
        return _ratio(self.accepted, self.verified)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens committed per answered cloud call: (accepted + correction + bonus) / answered calls."""
        return _ratio(self.accepted + self.correction + self.bonus, self.answered_calls)

    @property
    def correction_rate(self) -> float | None:
        """Corrections / answered cloud calls."""
        return _ratio(self.correction, self.answered_calls)

    @property
    def cloud_call_rate(self) -> float | None:
        """Escalated rounds / rounds. An unanswered call counts: the gate asked for it."""
        return _ratio(self.cloud_calls, self.rounds)

    @property
    def cloud_calls_per_token(self) -> float | None:
        """Cloud calls, answered or not / N, or None if the mode has no rounds."""
        return _ratio(self.cloud_calls, self.tokens) if self.rounds else None

    @property
    def edge_passes_per_token(self) -> float | None:
        """Forward passes of the edge / N, or None if the mode has no rounds."""
        return _ratio(self.edge_passes, self.tokens) if self.rounds else None

    @property
    def written_share(self) -> float | None:
        """Share of tokens that the cloud wrote: (correction + bonus + cloud) / N."""
        return _ratio(self.written, self.tokens)

    @property
    def cloud_positions_per_token(self) -> float | None:
        """Positions that the cloud computed after its prefill / N: context tokens and draft tokens alike."""
        return _ratio(self.cloud_positions, self.tokens)

    @property
    def local_share(self) -> float | None:
        """Local tokens / N."""
        return _ratio(self.local, self.tokens)

    @property
    def covered_share(self) -> float | None:
        """Share of tokens that the cloud accepted or wrote: (accepted + correction + bonus + cloud) / N."""
        return _ratio(self.covered, self.tokens)

    @property
    def waste(self) -> float | None:
        """Discarded draft tokens / draft tokens."""
        return _ratio(self.discarded, self.drafted)

    @property
    def waste_ahead(self) -> float | None:
        """Share thrown away of the tokens drafted ahead of a verdict: ahead_wasted / ahead."""
        return _ratio(self.ahead_wasted, self.ahead)


def counts(trace: Trace) -> Counts:
    """Return the numbers of tokens, rounds and cloud calls of one caption."""
    origins: Counter[str] = Counter(trace.output.origins)
    sums: Counter[str] = Counter()
    sent = 0
    useful = sum(event.right(guess) for event, guess in _guesses(trace))  # tokens drafted ahead that a round used
    for _, event in trace.events:
        if isinstance(event, Retracted):
            sums["retracted"] += event.count
        elif isinstance(event, Drafted):
            sums["rounds"] += 1
            sums["drafted"] += len(event.draft.tokens)
            useful += event.ahead
        elif isinstance(event, Ahead):
            sums["ahead"] += event.made
        elif isinstance(event, Escalated):
            sums["cloud_calls"] += 1
            sums["unanswered_calls"] += 1
            sent = event.sent
        elif isinstance(event, Verified):
            sums["unanswered_calls"] -= 1
            sums["verified"] += len(event.draft.tokens)
            sums["cloud_positions"] += sent + len(event.draft.tokens)
    sums["drafted"] += sums["ahead"] - useful
    sums["cloud_positions"] += origins["cloud"]
    edge_passes = sum(span.part == "draft" for span in trace.spans)
    return Counts(
        tokens=origins.total(), ahead_wasted=sums["ahead"] - useful, edge_passes=edge_passes, **origins, **sums
    )


def caption_calls(caption: Counts) -> int:
    """Return the cloud calls of one caption. Mode cloud has no rounds, and its one request counts as a call."""
    return 1 if caption.cloud else caption.cloud_calls


def acceptance_by_position(traces: Sequence[Trace]) -> list[float]:
    """Return, for each draft position i, accepted / verified draft tokens at i over all traces."""
    verified: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for trace in traces:
        for _, event in trace.events:
            if isinstance(event, Verified):
                verified.update(range(len(event.draft.tokens)))
                accepted.update(range(event.verdict.accepted))
    return [accepted[i] / verified[i] for i in range(len(verified))]


def accepted_lengths(traces: Iterable[Trace]) -> list[int]:
    """Return, for each number of draft tokens from 0 on, the number of verifications that accepted so many."""
    lengths = Counter(
        event.verdict.accepted for trace in traces for _, event in trace.events if isinstance(event, Verified)
    )
    return [lengths[length] for length in range(max(lengths, default=-1) + 1)]


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile, interpolated between the values on both sides (Hyndman and Fan 1996, definition 7).

    Return None for fewer than 100 / (100 - percent) values, among which no value is expected beyond the percentile.
    """
    if len(values) * (100 - percent) < 100:
        return None
    return float(np.percentile(values, percent))


def bonus_guess_rate(traces: Iterable[Trace]) -> float | None:
    """Return right guesses of the bonus / guesses whose draft was accepted whole, or None without such a guess."""
    right = accepted_whole = 0
    for event, guess in itertools.chain.from_iterable(map(_guesses, traces)):
        if guess is not None:
            accepted_whole += event.is_accepted_whole
            right += event.right(guess)
    return _ratio(right, accepted_whole)


def _guesses(trace: Trace) -> Iterator[tuple[Verified, int | None]]:
    """Yield each verification with the edge's guess of its bonus, or None if the edge guessed nothing."""
    guess: int | None = None
    for _, event in trace.events:
        if isinstance(event, Ahead):
            guess = event.guess
        elif isinstance(event, Verified):
            yield event, guess
            guess = None


def wire_bytes(trace: Trace) -> tuple[int, int] | None:
    """Return the bytes (up, down) of one caption's messages, or None if no link was crossed."""
    sizes: Counter[str] = Counter()
    for span in trace.spans:
        sizes[span.part] += span.size
    return (sizes["uplink"], sizes["downlink"]) if "uplink" in sizes else None


def failed_attempts(trace: Trace) -> int:
    """Return the number of failed attempts on the cloud."""
    return sum(span.part == "faults" for span in trace.spans)


def breaker_openings(trace: Trace) -> int:
    """Return how often a failure of this caption opened the breaker of the cloud."""
    return sum(span.part == BREAKER_OPENED for span in trace.spans)


def met_open_breaker(trace: Trace) -> bool:
    """Return whether the breaker of the cloud was open for this caption, so that the cloud was not tried."""
    return any(span.part == BREAKER_OPEN for span in trace.spans)


def degraded_reason(trace: Trace) -> str | None:
    """Return the reason why the edge finished the caption alone, or None if it did not."""
    return next((event.reason for _, event in trace.events if isinstance(event, Degraded)), None)


@dataclass(frozen=True)
class Hindsight:
    """The result of verifying one caption's local tokens afterwards, off the clock (`shadow.shadow_verify`).

    `missed` counts the local tokens that the acceptance rule rejects. `drafts` has a triple for each decision of the
    gate: its score (None if it reads none), whether the cloud answered, and whether the cloud changes the text. The
    decision is on one draft, or with look-back on all tokens since the last verdict.
    """

    missed: int
    drafts: tuple[tuple[float | None, bool, bool], ...]


def useless_escalations(traces: Sequence[Trace]) -> float | None:
    """Return answered cloud calls that changed no text of the edge / answered cloud calls, or None without one.

    Such a call accepts the whole draft. Under gate token the cloud also writes the token that the edge doubted.
    """
    verified = [event for trace in traces for _, event in trace.events if isinstance(event, Verified)]
    return _ratio(sum(not event.changes_text for event in verified), len(verified))


def missed_corrections(hindsights: Sequence[Hindsight], local: int) -> float | None:
    """Return local tokens that the cloud would have replaced / local tokens, or None without shadow verification."""
    return _ratio(sum(hindsight.missed for hindsight in hindsights), local) if hindsights else None


def auroc(hindsights: Sequence[Hindsight]) -> float | None:
    """Return the chance that a changed draft has a higher gate score than an accepted one, with ties as one half.

    P(s_rejected > s_accepted) + P(s_rejected = s_accepted) / 2 over all pairs (Mann-Whitney). The value is None without
    scores, and if all drafts were rejected or all were accepted.
    """
    scored = [
        (score, is_rejected)
        for hindsight in hindsights
        for score, _, is_rejected in hindsight.drafts
        if score is not None
    ]
    rejected = np.array([score for score, is_rejected in scored if is_rejected])
    accepted = np.array([score for score, is_rejected in scored if not is_rejected])
    if not len(rejected) or not len(accepted):
        return None
    return float((rejected[:, None] > accepted).mean() + (rejected[:, None] == accepted).mean() / 2)


def gap_closed(ours: float | None, edge: float | None, cloud: float | None, noise: float = 0.0) -> float | None:
    """Return the share of a quality gap that is closed: (Q_ours - Q_edge) / (Q_cloud - Q_edge).

    The share is None if a quality is None, or if the gap is not larger than `noise`.
    """
    if ours is None or edge is None or cloud is None or abs(cloud - edge) <= noise:
        return None
    return (ours - edge) / (cloud - edge)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
