"""Engine `vllm` on vLLM itself: the pocket cloud outputs the same tokens as under transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edgecloud_sd.acceptance import GREEDY, Rank
from edgecloud_sd.cloud import vllm_engine
from edgecloud_sd.cloud.vllm_engine import VLLMModel
from edgecloud_sd.decoder import decode
from edgecloud_sd.events import Committed, Prompt, Verdict
from edgecloud_sd.models import pairs
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.stopping import Stopping
from edgecloud_sd.strategy import Strategy
from edgecloud_sd.verifier import LocalVerifier, Verification

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: tox -e vllm brings it along"),
    pytest.mark.filterwarnings("default"),  # vLLM may warn
]

MAX_NEW_TOKENS = 48
CLIPS = [(0, "chinese"), (7, "chinese"), (21, "english"), (38, "english")]
FLAGS = {"max_model_len": 2048, "block_size": 32, "gpu_memory_utilization": 0.1}
SPECIAL = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the pocket cloud in the layout of Qwen/Qwen2.5-Omni-7B, because vLLM reads no other."""
    folder = tmp_path_factory.mktemp("vllm") / "omni"
    shutil.copytree(pairs.PAIRS["pocket"].cloud, folder)
    weights = {f"thinker.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    omni = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(omni), encoding="utf-8")
    names = {name: name.upper() if name in SPECIAL[:3] else name for name in SPECIAL}
    tokens = {"extra_special_tokens": {f"{name}_token": f"<|{text}|>" for name, text in names.items()}}
    extend_json(folder / "tokenizer_config.json", tokens)
    processors = {"processor_class": "Qwen2_5OmniProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    extend_json(folder / "preprocessor_config.json", processors)
    return str(folder)


def extend_json(file: Path, fields: Mapping[str, object]) -> None:
    """Add fields to a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.fixture(scope="module")
def model(checkpoint: str) -> Iterator[VLLMModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        loaded = vllm_engine.load_vllm(checkpoint, "float32", FLAGS)
    yield loaded
    loaded.close()


def make_prompt(pipeline: Pipeline, index: int, language: str) -> Prompt:
    """Return the prompt of an evaluation clip."""
    return pipeline.prompt(Request(clips.make_clip("evaluation", index).samples, language), "cloud")


@dataclass(frozen=True)
class TwoVerifiers:
    """Two verifiers that must return the same verdicts."""

    first: LocalVerifier
    second: vllm_engine.VLLMVerifier

    def open(self, prompt: Prompt) -> TwoVerifications:
        return TwoVerifications(self.first.open(prompt), self.second.open(prompt))


@dataclass(frozen=True)
class TwoVerifications:
    """One prompt on two verifiers."""

    first: Verification
    second: Verification

    def wait(self) -> None:
        self.second.wait()

    def verify(self, base: int, tokens: Sequence[int], draft: Sequence[int]) -> Verdict:
        verdict = self.first.verify(base, tokens, draft)
        for _ in range(2):
            assert self.second.verify(base, tokens, draft) == verdict
        return verdict

    def generate(self, stopping: Stopping, output: Sequence[int] = ()) -> Iterator[int]:
        raise NotImplementedError

    def close(self) -> None:
        self.second.close()


def stopping(pipeline: Pipeline) -> Stopping:
    """Return when an output ends."""
    return Stopping(pipeline.cloud_model.eos, MAX_NEW_TOKENS)


def test_both_engines_have_the_same_special_ids(pipeline: Pipeline, model: VLLMModel) -> None:
    config = pipeline.cloud_model.thinker.config
    assert model.placeholder == config.audio_token_id
    assert model.vocab_size == config.text_config.vocab_size


@pytest.mark.parametrize(("index", "language"), CLIPS)
def test_its_own_outputs_equal_those_of_transformers(
    pipeline: Pipeline, model: VLLMModel, index: int, language: str
) -> None:
    prompt = make_prompt(pipeline, index, language)
    local, verification = (
        v.open(prompt) for v in (LocalVerifier(pipeline.cloud_model, GREEDY), model.verifier(GREEDY))
    )
    expected = list(local.generate(stopping(pipeline)))
    assert list(verification.generate(stopping(pipeline))) == expected
    assert list(verification.generate(stopping(pipeline), expected[:5])) == expected[5:]


@pytest.mark.parametrize("rule", [GREEDY, Rank(2), Rank(20)])
@pytest.mark.parametrize(("k", "index", "language"), [(k, *CLIPS[k % 4]) for k in (3, 4, 5)])
def test_every_verdict_equals_that_of_transformers(
    pipeline: Pipeline, model: VLLMModel, rule: Rank, k: int, index: int, language: str
) -> None:
    prompt = make_prompt(pipeline, index, language)
    cloud = LocalVerifier(pipeline.cloud_model, rule, wants_rest=True)
    strategy = Strategy("speculative", rule=rule, k=k)
    both = TwoVerifiers(cloud, model.verifier(rule, wants_rest=True))
    assert both.open(prompt).verify(0, [prompt.last], []).accepted == 0
    events = list(decode(prompt, strategy, stopping(pipeline), pipeline.edge, both))
    written = [token for event in events if isinstance(event, Committed) for token in event.tokens]
    assert rule != GREEDY or written == list(cloud.open(prompt).generate(stopping(pipeline)))


def test_every_edge_gets_its_own_output(pipeline: Pipeline, model: VLLMModel) -> None:
    prompts = [make_prompt(pipeline, *clip) for clip in CLIPS]
    local = LocalVerifier(pipeline.cloud_model, GREEDY)
    expected = [list(local.open(prompt).generate(stopping(pipeline))) for prompt in prompts]
    verifier = model.verifier(GREEDY)
    with ThreadPoolExecutor(len(prompts)) as threads:
        outputs = threads.map(lambda prompt: list(verifier.open(prompt).generate(stopping(pipeline))), prompts)
    assert list(outputs) == expected


def test_an_unknown_engine_argument_is_refused(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="--engine-option: tensor_parallel is not an engine argument of vLLM"):
        vllm_engine.load_vllm(checkpoint, flags={"tensor_parallel": 2})
