"""Train the pocket pair from nothing: `python -m edgecloud_sd.pocket train`.

What decides whether so small a pair learns to listen is the scale at the start: linear and convolution weights of
standard deviation 1 / sqrt(fan-in), residual outputs smaller by sqrt(2 x layers), embeddings large enough to matter
(0.5) and audio entering at the same size. The cloud's audio tower first learns the attributes alone, so that the
language model has something to listen to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from edgecloud_sd.data import prompts
from edgecloud_sd.pocket import clips, tokenizer, voices

EMBEDDING_STD = 0.5
ATTRIBUTE_WEIGHT = 0.2
# How often training shows each prompt; the rest of the time the transcription stands before the default one.
PROMPT_SHARES = {"default": 0.7, "detailed": 0.1, "concise": 0.1}


@dataclass(frozen=True)
class Recipe:
    """Size and training of one model. Steps of `tower_steps` train the audio tower alone on the attributes."""

    layers: int
    width: int
    ffn: int
    tower_layers: int
    tower_width: int
    steps: int
    learning_rate: float
    tower_steps: int = 0
    tower_learning_rate: float = 2e-3
    batch: int = 32
    tower_batch: int = 64


RECIPES = {
    "cloud": Recipe(16, 128, 320, 2, 96, steps=350, learning_rate=1e-3, tower_steps=450),
    "edge": Recipe(2, 96, 256, 1, 48, steps=180, learning_rate=2e-3),
}
TRAIN_CLIPS = 5000


@dataclass(frozen=True)
class Example:
    features: Tensor  # [mel bins, frames]
    attributes: Tensor  # [len(voices.NAMES)]
    transcription: str
    captions: dict[str, str]


def examples(which: str, count: int, extractor: Any) -> list[Example]:
    """The first `count` clips of a set, as features and captions."""
    made = []
    for index in tqdm(range(count), desc=f"{which} clips", unit="clip"):
        clip = clips.make_clip(which, index)
        made.append(
            Example(
                prompts.log_mel(clip.samples, extractor),
                torch.tensor([getattr(clip.attributes, name) for name in voices.ATTRIBUTE_NAMES]),
                clip.transcription,
                {language: voices.caption(clip.attributes, language) for language in prompts.LANGUAGES},
            )
        )
    return made


def new_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True)


def new_thinker(recipe: Recipe, tokens: Any) -> Any:
    """A thinker of the recipe's size with weights scaled so that audio and text start at the same size."""
    from transformers import GenerationConfig, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    ids = {name: tokens.convert_tokens_to_ids(name) for name in tokenizer.SPECIAL}
    heads = 4
    rotary = recipe.width // heads // 2
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": recipe.width,
            "intermediate_size": recipe.ffn,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3],
            },
            "eos_token_id": ids[tokenizer.EOS],
            "pad_token_id": ids[tokenizer.PAD],
            "tie_word_embeddings": False,
        },
        audio_config={
            "encoder_layers": recipe.tower_layers,
            "d_model": recipe.tower_width,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 4 * recipe.tower_width,
            "output_dim": recipe.width,
        },
        # the pair never sees: the least vision tower that the class accepts
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": recipe.width,
            "patch_size": 2,
            "fullatt_block_indexes": [0],
        },
        audio_token_index=ids[prompts.AUDIO_TOKEN],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        # ids that no prompt contains, and that the thinker's own generate looks for
        image_token_index=len(tokens),
        video_token_index=len(tokens) + 1,
        vision_start_token_id=len(tokens) + 2,
        vision_end_token_id=len(tokens) + 3,
    )
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)
    thinker.generation_config = GenerationConfig(eos_token_id=ids[tokenizer.EOS], pad_token_id=ids[tokenizer.PAD])
    scale_weights(thinker)
    return thinker


@torch.no_grad()
def scale_weights(thinker: Any) -> None:
    """Draw all weights anew, in the scale that the module's docstring gives."""
    for name, module in thinker.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
                layers = thinker.config.text_config.num_hidden_layers
                if "audio_tower" in name:
                    layers = thinker.config.audio_config.encoder_layers
                std /= math.sqrt(2 * layers)
            if name == "audio_tower.proj":
                std *= EMBEDDING_STD
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
    nn.init.normal_(thinker.lm_head.weight, std=thinker.config.text_config.hidden_size**-0.5)


def hear(thinker: Any, batch: list[Example]) -> tuple[Tensor, list[int]]:
    """The audio tower's output for a batch, clip after clip: [positions, hidden], and each clip's positions."""
    frames = [example.features.shape[1] for example in batch]
    features = torch.cat([example.features for example in batch], dim=1)
    heard = thinker.model.audio_tower(features, feature_lens=torch.tensor(frames)).last_hidden_state
    return heard, [prompts.audio_positions(n) for n in frames]


def attribute_loss(heads: nn.ModuleList, heard: Tensor, positions: list[int], batch: list[Example]) -> Tensor:
    """Mean cross-entropy of the attributes from each clip's mean-pooled audio."""
    pooled = torch.stack([clip.mean(0) for clip in torch.split(heard, positions)])
    targets = torch.stack([example.attributes for example in batch])
    losses = [F.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(heads)]
    return torch.stack(losses).mean()


def caption_loss(
    thinker: Any, tokens: Any, heard: Tensor, positions: list[int], batch: list[Example], rng: Any
) -> Tensor:
    """Next-token cross-entropy of the captions, each after a prompt drawn from `PROMPT_SHARES`."""
    sequences, targets = [], []
    kinds = [*PROMPT_SHARES, "transcription"]
    shares = [*PROMPT_SHARES.values(), 1 - sum(PROMPT_SHARES.values())]
    for example, places in zip(batch, positions, strict=True):
        language = str(rng.choice(prompts.LANGUAGES))
        kind = str(rng.choice(kinds, p=shares))
        said = example.transcription if kind == "transcription" else None
        task = prompts.task_text(language, "default" if said else kind, said)
        prompt = tokens.encode(prompts.chat(task, places))
        answer = tokens.encode(example.captions[language] + tokenizer.EOS)
        sequences.append(torch.tensor(prompt + answer))
        targets.append(torch.tensor([-100] * len(prompt) + answer))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=tokens.pad_token_id)
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    embeddings = thinker.get_input_embeddings()(ids)
    embeddings = embeddings.masked_scatter((ids == thinker.config.audio_token_id)[..., None], heard)
    n = ids.shape[1]
    hidden = thinker.model.language_model(
        inputs_embeds=embeddings, position_ids=torch.arange(n).expand(3, len(batch), n), use_cache=False
    ).last_hidden_state
    wanted = labels[:, 1:] != -100
    return F.cross_entropy(thinker.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])


def train_side(side: str, data: list[Example], tokens: Any, seed: int = 0) -> Any:
    """One trained thinker, float32, from its recipe."""
    recipe = RECIPES[side]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    thinker = new_thinker(recipe, tokens).train()
    heads = nn.ModuleList(nn.Linear(recipe.width, voices.classes(name)) for name in voices.ATTRIBUTE_NAMES)
    tower = [*thinker.model.audio_tower.parameters(), *heads.parameters()]
    language = [*thinker.model.language_model.parameters(), *thinker.lm_head.parameters()]

    def batch_of(size: int) -> list[Example]:
        return [data[i] for i in rng.integers(len(data), size=size)]

    for optimiser in optimise(tower, recipe.tower_steps, recipe.tower_learning_rate, f"{side} tower"):
        batch = batch_of(recipe.tower_batch)
        loss = attribute_loss(heads, *hear(thinker, batch), batch)
        optimiser(loss)
    for optimiser in optimise(tower + language, recipe.steps, recipe.learning_rate, f"{side} captions"):
        batch = batch_of(recipe.batch)
        heard, positions = hear(thinker, batch)
        loss = caption_loss(thinker, tokens, heard, positions, batch, rng)
        if recipe.tower_steps:
            loss = loss + ATTRIBUTE_WEIGHT * attribute_loss(heads, heard, positions, batch)
        optimiser(loss)
    return thinker.eval()


def optimise(parameters: list[nn.Parameter], steps: int, rate: float, name: str) -> Iterator[Any]:
    """AdamW on a one-cycle schedule, gradients clipped at 1: yields, `steps` times, what to call with the loss."""
    if not steps:
        return
    adam = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=rate, total_steps=steps, pct_start=0.08)
    bar = tqdm(total=steps, desc=name, unit="step")

    def step(loss: Tensor) -> None:
        adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.update()

    with bar:
        for _ in range(steps):
            yield step


def train_pair(folder: Path, sides: tuple[str, ...] = tuple(RECIPES)) -> None:
    """Train and save the sides to `folder/edge` and `folder/cloud`, in half precision."""
    extractor = new_extractor()
    tokens = tokenizer.train_tokenizer()
    data = examples("train", TRAIN_CLIPS, extractor)
    for side in sides:
        thinker = train_side(side, data, tokens)
        target = folder / side
        thinker.half().save_pretrained(target)
        tokens.save_pretrained(target)
        extractor.save_pretrained(target)
