"""The lines of --verbose, and the sentence for a cell that verified nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.clip_text import describe_clip, describe_late_scores, explain_no_escalation
from edgecloud_sd import gate
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.events import (
    Committed,
    Degraded,
    Draft,
    Drafted,
    Escalated,
    Event,
    Finished,
    Opened,
    Prepared,
    Trace,
    Verdict,
    Verified,
)
from edgecloud_sd.gate import Gate
from edgecloud_sd.host.utilization import Utilization
from edgecloud_sd.measure import quality
from edgecloud_sd.measure.summary import ClipResult, clip_result
from edgecloud_sd.strategy import Strategy

UNSURE = Drafted(Draft((2, 3), (0.5, 1.25)))
ASKED = Escalated(UNSURE.draft, 0)


def result_of(*events: Event) -> ClipResult:
    stamped = [(0.1 * number, event) for number, event in enumerate((Prepared(5), Opened("edge"), *events))]
    used = Utilization(1.0, 0.5, 90.0, 100.0, None, None, {"gpu_percent": "none"})
    clip = Clip("one", Path("one.wav"), "chinese", ("她很高兴。", "她\n笑了"))
    return clip_result(clip, Trace(tuple(stamped)), used, lambda ids: "她很\n高兴"[: len(ids)])


LOCAL = result_of(
    UNSURE, Committed((2, 3), "local"), Drafted(Draft((4,), (0.75,))), Committed((4,), "local"), Finished("eos")
)


WIDE = result_of(Drafted(Draft((2,), (-0.5,))), Committed((2,), "local"), Finished("eos"))
RISKY = result_of(
    Drafted(Draft((2,), (0.5,))), Committed((2,), "local", False), Drafted(Draft((4,), (0.5,))),
    Committed((4,), "local"), Finished("eos"),
)  # fmt: skip


def test_verbose_shows_reference_caption_scores_times_and_counts_of_a_clip() -> None:
    lines = describe_clip(LOCAL, "1 of 2", "nfkc")
    scored = quality.score([LOCAL.caption], [LOCAL.clip.references], "chinese", normalisation="nfkc").per_clip
    assert lines == [
        "one (1 of 2)",
        "  reference: 她很高兴。",
        "  reference: 她 笑了",
        "  caption:   她很",
        f"  scores:    BLEU-1 {scored['bleu1'][0]:.3f}, BLEU-2 {scored['bleu2'][0]:.3f}, "
        f"BLEU-3 {scored['bleu3'][0]:.3f}, BLEU-4 {scored['bleu4'][0]:.3f}, ROUGE-L {scored['rouge_l'][0]:.3f}",
        "  times:     TTFT 300.0 ms, OTPS 10.0, total 600.0 ms, CPU 50 %, RAM 100 MB",
        "  counts:    3 tokens (3 local), 0 cloud calls in 2 rounds, 0.600 s",
    ]
    assert "  scores:    random weights" in describe_clip(LOCAL, "1 of 2", "nfkc", "random weights")


def test_the_scores_of_the_whole_cell_follow_and_those_that_are_null_are_left_out() -> None:
    clips = [{"file_id": "a", "scores": {"cider": 5.0, "meteor": None}}, {"file_id": "b", "scores": {"cider": None}}]
    assert describe_late_scores(clips) == ["a: CIDEr 5.000"]


@pytest.mark.parametrize(
    ("rule", "result", "reason"),
    [
        (gate.entropy_gate(4), LOCAL, "no draft's entropy exceeded 4 nats; the largest was 1.25"),
        (gate.parse_gate("token", 4), LOCAL, "no draft's entropy exceeded 4 nats; the largest was 1.25"),
        (gate.parse_gate("logprob", 4), LOCAL, "no draft's surprisal exceeded 4 nats; the largest was 1.25"),
        (gate.parse_gate("margin", 0.25), WIDE, "no draft's margin was below 0.25; the smallest was 0.5"),
        (gate.risk_gate(1, 0.9), RISKY, "no caption's risk exceeded 0.9; the largest was 0.75"),
        (gate.NEVER, LOCAL, "the gate never asks the cloud"),
        (gate.ALWAYS, result_of(UNSURE, ASKED, Degraded("no answer"), Committed((2, 3), "local"), Finished("eos")),
         "the cloud failed (no answer)"),
        (gate.entropy_gate(1), result_of(UNSURE, ASKED, Verified(UNSURE.draft, Verdict(2, 4)), Finished("eos")), None),
    ],
)  # fmt: skip
def test_a_cell_that_sent_nothing_says_why(rule: Gate, result: ClipResult, reason: str | None) -> None:
    assert explain_no_escalation(Strategy("speculative", rule, k=3), [result]) == reason
    assert explain_no_escalation(Strategy("edge"), [result]) is None
