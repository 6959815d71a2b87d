"""Records that are built directly: bad values are refused in one line that names the field, the value and the fix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgecloud_sd import gate, probs
from edgecloud_sd.acceptance import Rank, Synthetic, parse_rule
from edgecloud_sd.gate import ALWAYS, DraftStop, Gate, entropy_gate, parse_draft_stop, parse_gate
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy

SAMPLES = np.zeros(16_000, np.float32)
NO_NUMBERS: tuple[Any, ...] = (True, np.True_, 1.5, 1.0, math.nan, "3", [3], np.array([3, 4]), torch.tensor(1.0))


def strategy(**fields: Any) -> Callable[[], object]:
    return lambda: Strategy(**fields)


def stopping(eos: Any, new: Any) -> Callable[[], object]:
    return lambda: Stopping(eos, new)


def request(samples: Any, **fields: Any) -> Callable[[], object]:
    return lambda: Request(samples, **fields)


BAD: list[tuple[Callable[[], object], str]] = [
    *((strategy(k=value), "k must be a whole number, or None to find it while decoding, not ") for value in NO_NUMBERS),
    *((strategy(draft_ahead=value), "draft_ahead must be a whole number, not ") for value in NO_NUMBERS),
    *((stopping({1}, value), "max_new_tokens must be a whole number, not ") for value in NO_NUMBERS),
    *((lambda value=value: Rank(value), "rank must be a whole number, not ") for value in NO_NUMBERS),
    *((lambda value=value: Pipeline(threads=value), "threads must be a whole number, or None") for value in NO_NUMBERS),
    (strategy(k=0), "k must be at least 1, or None to find it while decoding, not 0"),
    (strategy(k=-(10**30)), "k must be at least 1"),
    (strategy(mode=["edge"]), r"unknown mode \['edge'\]: choose one of edge, cloud, speculative"),
    (strategy(mode=None), "unknown mode None"),
    (strategy(gate="never"), r"gate must be of type Gate, not 'never': write parse_gate\('never'\)"),
    (strategy(gate=None), "gate must be of type Gate, not None"),
    (strategy(rule="greedy"), r"rule must be of type Rank or Synthetic, not 'greedy': write parse_rule\('greedy'\)"),
    (strategy(draft_stop="margin=0.3"), "draft_stop must be of type DraftStop, not 'margin=0.3': write parse_draft_st"),
    (strategy(prefill=["lazy"]), r"prefill must be one of eager, lazy, not \['lazy'\]"),
    (stopping(5, 3), "eos must be of type Iterable, not 5: give a set of token ids"),
    (stopping({1.5}, 3), "eos must be a whole number, not 1.5"),
    (stopping({-1}, 3), "eos must be at least 0, not -1"),
    (stopping({1}, 0), "max_new_tokens must be at least 1, not 0"),
    (lambda: Gate("entropy", 0.0), "gate 'entropy' without a score cannot have threshold 0: use parse_gate"),
    (lambda: Gate("entropy", math.nan, probs.entropy), "threshold must be a number, not nan"),
    (lambda: Gate("entropy", 0.0, probs.entropy), "gate 'entropy' with a score cannot have threshold 0"),
    (lambda: Gate("entropy", math.inf, probs.entropy), "cannot have threshold inf"),
    (
        lambda: parse_gate("margin", 1.5),
        r"'margin' with a score cannot have threshold 1.5: use .* above 0 and at most 1",
    ),
    (lambda: Gate("always", math.inf), "gate 'always' without a score cannot have threshold inf"),
    (lambda: Gate("never", math.inf, probs.entropy), "gate 'never' with a score cannot"),
    (lambda: Gate("entropy", "1.5", probs.entropy), "threshold must be a number, not '1.5'"),  # type: ignore[arg-type]
    (lambda: entropy_gate(True), "the entropy threshold must be a number of nats, not True"),
    (lambda: DraftStop("margin", 0.3, probs.entropy), "draft stop 'margin' cannot have threshold 0.3: use parse_draft"),
    (lambda: DraftStop("margin", -0.3), "draft stop 'margin' cannot"),
    (lambda: DraftStop("entropy", math.nan), "threshold must be a number, not nan"),
    (lambda: DraftStop("top", 1.0), "draft stop 'top' cannot"),
    (lambda: parse_draft_stop(0.5, ALWAYS), "draft_stop must be of type str, not 0.5"),  # type: ignore[arg-type]
    (lambda: parse_rule(None), "rule must be of type str, not None: give one of greedy"),  # type: ignore[arg-type]
    (lambda: Rank(0), "rank must be at least 1, not 0"),
    (lambda: Synthetic("0.5"), "the rates of synthetic must be of type tuple or list, not '0.5'"),  # type: ignore[arg-type]
    (lambda: Synthetic(0.5), "the rates of synthetic must be of type tuple or list, not 0.5"),  # type: ignore[arg-type]
    (lambda: Synthetic((True,)), "a rate of synthetic must be a number from 0 to 1, not True"),
    (lambda: Synthetic((math.nan,)), "a rate of synthetic must be a number from 0 to 1, not nan"),
    (request(np.zeros(9, np.int16)), r"samples must be an array of floats, not int16: Request.of\(samples\) converts"),
    (request([0.0] * 9), "samples must be an array of floats, not list"),
    (request("speech.wav"), "samples must be an array of floats, not str"),
    (request(np.zeros((9, 2), np.float32)), r"samples must be mono and not empty, not of shape \(9, 2\)"),
    (request(SAMPLES[:0]), r"samples must be mono and not empty, not of shape \(0,\)"),
    (request(np.array([0.0, np.nan], np.float32)), "samples hold values that are not finite in float32"),
    (request(np.array([2e38, -np.inf])), "samples hold values that are not finite in float32"),
    (request(np.array([1e300])), "samples hold values that are not finite in float32"),
    (request(SAMPLES, language=["english"]), r"language must be of type str, not \['english'\]: choose one of chinese"),
    (request(SAMPLES, prompt_type=None), "prompt_type must be of type str, not None: choose one of"),
    (request(SAMPLES, transcription=5), "transcription must be of type str, not 5"),
    (request(SAMPLES, task=5), "task must be of type str, not 5"),
    (request(SAMPLES, task="\ud800"), r"task: has U\+D800, half of a character"),
    (lambda: Pipeline(threads=0), "threads must be at least 1, or None to choose by the size of the models, not 0"),
    (lambda: Pipeline(threads=-1), "threads must be at least 1"),
    (lambda: Pipeline.load(None), r"pair must be of type Pair, not None: write Pipeline.load\(name\)"),  # type: ignore[arg-type]
    (lambda: Pipeline("pocket"), "pair must be of type Pair, not 'pocket'"),  # type: ignore[arg-type]
    (lambda: Pipeline.load("pocket", threads=True), "threads must be a whole number"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_a_bad_value_is_refused_in_one_line(build: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        build()
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "edge"}, r'strategy must be of type Strategy, not \'edge\': write Strategy\("edge"\)'),
        ({"strategy": None}, "strategy must be of type Strategy, not None"),
        *(({"max_new_tokens": value}, "max_new_tokens must be a whole number") for value in NO_NUMBERS),
        ({"transcription": b"words"}, "transcription must be of type str"),
    ],
)
def test_a_bad_argument_of_a_caption_is_refused(pipeline: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pipeline.caption(SAMPLES, **arguments)


def test_a_request_is_no_file_and_a_link_is_no_name(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"link must be of type Link, not '4g': write find_link\('4g'\)"):
        pipeline.trace(Request(SAMPLES), Strategy("edge"), link="4g")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"request must be of type Request, not 'speech.wav': write Request.of\(file\)"):
        pipeline.trace("speech.wav", Strategy("edge"))  # type: ignore[arg-type]


H1 = entropy_gate(1.5)


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(k=np.int64(4), draft_ahead=np.uint8(2), rule=Rank(np.int32(3))),
        Strategy(gate=entropy_gate(np.float32(1.1)), rule=Synthetic([np.float64(0.5), 1, -0.0])),  # type: ignore[arg-type]
        Strategy(gate=entropy_gate(2), k=None),
        Strategy(gate=entropy_gate(5e-324), rule=Synthetic((1e-300, 0.1 + 0.2))),
        Strategy(gate=H1, draft_stop=parse_draft_stop("entropy=0.5", ALWAYS)),  # made for another gate
        Strategy(gate=H1, draft_stop=parse_draft_stop("entropy=inf", H1)),
        Strategy(gate=H1, draft_stop=parse_draft_stop("margin=1", H1)),
        replace(Strategy(draft_stop=parse_draft_stop("entropy=0.5", ALWAYS)), gate=H1),
        Strategy(gate=gate.NEVER, rule=Rank(10**20), prefill="lazy"),
    ],
    ids=lambda strategy: strategy.label,
)
def test_all_that_a_strategy_holds_survives_json(strategy: Strategy) -> None:
    again = Strategy.from_json(json.loads(json.dumps(strategy.to_json())))
    assert again == strategy
    assert (again.label, again.scores_per_token, hash(again)) == (
        strategy.label,
        strategy.scores_per_token,
        hash(strategy),
    )


def test_numbers_of_numpy_become_plain_numbers() -> None:
    strategy = Strategy(k=np.int64(4), draft_ahead=np.uint8(2))
    stopping = Stopping([np.int64(3)], np.int32(5))  # type: ignore[arg-type]
    values = (strategy.k, strategy.draft_ahead, stopping.max_new_tokens, *stopping.eos)
    assert [type(value) for value in values] == [int] * 4
    assert Request(SAMPLES.astype(np.float64)).samples.dtype == np.float32
