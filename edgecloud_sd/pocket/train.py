"""Training of the pocket pair from random weights: `python -m edgecloud_sd.pocket train`.

Such a small pair learns to use the audio only with the right initial scale. Linear and convolution weights have a
standard deviation of 1 / sqrt(fan-in), and residual outputs are smaller by sqrt(2 x layers). Embeddings have a standard
deviation of 0.5, and audio enters at the same scale. The audio tower of the cloud first learns the attributes alone, so
that the language model gets useful audio from its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from edgecloud_sd.data import prompts
from edgecloud_sd.host.files import build_folder
from edgecloud_sd.models.pairs import POCKET_WEIGHTS
from edgecloud_sd.pocket import clips, tokenizer, voices

EMBEDDING_STD = 0.5  # audio enters at the same scale
ATTRIBUTE_WEIGHT = 0.2  # weight of the attribute loss, relative to the caption loss
# The share of training prompts of each type; the rest are default prompts with a transcription.
PROMPT_SHARES = {"default": 0.7, "detailed": 0.1, "concise": 0.1}
IGNORED = -100  # the label that cross_entropy of torch ignores


@dataclass(frozen=True)
class Recipe:
    """The size and the training of one model; `tower_steps` train the audio tower alone, on the attributes."""

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
# A free pair starts from the shipped weights, so that it has only the forms to learn.
FREE_RECIPES = {
    "cloud": replace(RECIPES["cloud"], steps=260, tower_steps=0),
    "edge": replace(RECIPES["edge"], steps=120),
}
FREE_TRAIN_CLIPS = 2400
FREE_CLIPS = 200  # per language, held out


@dataclass(frozen=True)
class Example:
    """The features, attributes and captions of one training clip."""

    features: Tensor  # [mel bins, frames]
    attributes: Tensor  # [len(voices.ATTRIBUTE_NAMES)]
    transcription: str
    captions: dict[str, str]


def make_examples(set_name: str, count: int, extractor: Any, is_free: bool = False) -> list[Example]:
    """Return the first `count` clips of a set as examples, with free captions if `is_free`."""
    examples = []
    for index in tqdm(range(count), desc=f"{set_name} clips", unit="clip"):
        clip = clips.make_clip(set_name, index)
        examples.append(
            Example(
                prompts.log_mel(clip.samples, extractor),
                torch.tensor([getattr(clip.attributes, name) for name in voices.ATTRIBUTE_NAMES]),
                clip.transcription,
                {language: clip.caption(language, is_free) for language in prompts.LANGUAGES},
            )
        )
    return examples


def build_extractor() -> Any:
    """Return the feature extractor, with the mel bins and the length of Qwen2.5-Omni's."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True)


def build_thinker(recipe: Recipe, tokens: Any) -> Any:
    """Return a thinker of the recipe's size with the initial scale of the module's docstring."""
    from transformers import GenerationConfig, Qwen2_5OmniThinkerForConditionalGeneration

    ids = {name: tokens.convert_tokens_to_ids(name) for name in tokenizer.SPECIAL_TOKENS}
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(_build_config(recipe, len(tokens), ids))
    thinker.generation_config = GenerationConfig(eos_token_id=ids[tokenizer.EOS], pad_token_id=ids[tokenizer.PAD])
    scale_weights(thinker)
    return thinker


def _build_config(recipe: Recipe, vocab_size: int, ids: dict[str, int]) -> Any:
    """Return the configuration of a thinker; `ids` are those of the special tokens."""
    from transformers import Qwen2_5OmniThinkerConfig

    heads = 4
    rotary = recipe.width // heads // 2
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": vocab_size,
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
        # unused: the smallest vision tower that the class accepts
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
        # generate() of transformers searches for these ids; no prompt contains them
        image_token_index=vocab_size,
        video_token_index=vocab_size + 1,
        vision_start_token_id=vocab_size + 2,
        vision_end_token_id=vocab_size + 3,
    )


@torch.no_grad()
def copy_shipped_weights(thinker: Any, side: str, tokens: Any) -> None:
    """Copy the shipped weights of `side` to a thinker of the same size, and those of a token by its text."""
    from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration

    folder = POCKET_WEIGHTS / side
    shipped = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    old, new = AutoTokenizer.from_pretrained(folder).get_vocab(), tokens.get_vocab()
    shared = sorted(old.keys() & new.keys())
    for name, weight in thinker.state_dict().items():
        if weight.shape == shipped[name].shape:
            weight.copy_(shipped[name])
        else:
            weight[[new[token] for token in shared]] = shipped[name][[old[token] for token in shared]]


@torch.no_grad()
def scale_weights(thinker: Any) -> None:
    """Draw all weights again, in the scale of the module's docstring."""
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


def encode_audio(thinker: Any, batch: list[Example]) -> tuple[Tensor, list[int]]:
    """Return the audio tower's output [positions, hidden] for a batch, clip after clip, and each clip's positions."""
    frames = [example.features.shape[1] for example in batch]
    features = torch.cat([example.features for example in batch], dim=1)
    audio = thinker.model.audio_tower(features, feature_lens=torch.tensor(frames)).last_hidden_state
    return audio, [prompts.count_audio_positions(n) for n in frames]


def attribute_loss(heads: nn.ModuleList, audio: Tensor, positions: list[int], batch: list[Example]) -> Tensor:
    """Return the mean cross-entropy of the attributes, predicted from the mean of each clip's audio."""
    pooled = torch.stack([clip.mean(0) for clip in torch.split(audio, positions)])
    targets = torch.stack([example.attributes for example in batch])
    losses = [F.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(heads)]
    return torch.stack(losses).mean()


def caption_loss(
    thinker: Any, tokens: Any, audio: Tensor, positions: list[int], batch: list[Example], rng: Any
) -> Tensor:
    """Return the next-token cross-entropy of the captions, each after a prompt drawn from `PROMPT_SHARES`."""
    sequences, targets = [], []
    for example, audio_tokens in zip(batch, positions, strict=True):
        prompt, answer = _draw_prompt_and_answer(example, audio_tokens, tokens, rng)
        sequences.append(torch.tensor(prompt + answer))
        targets.append(torch.tensor([IGNORED] * len(prompt) + answer))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=tokens.pad_token_id)
    labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    embeddings = thinker.get_input_embeddings()(ids)
    embeddings = embeddings.masked_scatter((ids == thinker.config.audio_token_id)[..., None], audio)
    n = ids.shape[1]
    hidden = thinker.model.language_model(
        inputs_embeds=embeddings, position_ids=torch.arange(n).expand(3, len(batch), n), use_cache=False
    ).last_hidden_state
    is_answer = labels[:, 1:] != IGNORED
    return F.cross_entropy(thinker.lm_head(hidden[:, :-1][is_answer]), labels[:, 1:][is_answer])


def _draw_prompt_and_answer(example: Example, audio_tokens: int, tokens: Any, rng: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt with random language and type, and those of its caption."""
    types = [*PROMPT_SHARES, "transcription"]
    shares = [*PROMPT_SHARES.values(), 1 - sum(PROMPT_SHARES.values())]
    language = str(rng.choice(prompts.LANGUAGES))
    prompt_type = str(rng.choice(types, p=shares))
    transcription = example.transcription if prompt_type == "transcription" else None
    task = prompts.format_task(language, "default" if transcription else prompt_type, transcription)
    prompt = list(prompts.encode_chat(tokens, task, audio_tokens))
    return prompt, tokens.encode(example.captions[language] + tokenizer.EOS)


def train_side(
    side: str, recipe: Recipe, data: list[Example], tokens: Any, starts_shipped: bool = False, seed: int = 0
) -> Any:
    """Return one thinker in float32, trained by `recipe` from random or from the shipped weights of `side`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    thinker = build_thinker(recipe, tokens).train()
    if starts_shipped:
        copy_shipped_weights(thinker, side, tokens)
    heads = nn.ModuleList(nn.Linear(recipe.width, voices.count_classes(name)) for name in voices.ATTRIBUTE_NAMES)
    tower = [*thinker.model.audio_tower.parameters(), *heads.parameters()]
    language = [*thinker.model.language_model.parameters(), *thinker.lm_head.parameters()]

    def draw_batch(size: int) -> list[Example]:
        return [data[i] for i in rng.integers(len(data), size=size)]

    for step in iterate_optimiser_steps(tower, recipe.tower_steps, recipe.tower_learning_rate, f"{side} tower"):
        batch = draw_batch(recipe.tower_batch)
        loss = attribute_loss(heads, *encode_audio(thinker, batch), batch)
        step(loss)
    for step in iterate_optimiser_steps(tower + language, recipe.steps, recipe.learning_rate, f"{side} captions"):
        batch = draw_batch(recipe.batch)
        audio, positions = encode_audio(thinker, batch)
        loss = caption_loss(thinker, tokens, audio, positions, batch, rng)
        if recipe.tower_steps:
            loss = loss + ATTRIBUTE_WEIGHT * attribute_loss(heads, audio, positions, batch)
        step(loss)
    return thinker.eval()


def iterate_optimiser_steps(
    parameters: list[nn.Parameter], steps: int, rate: float, name: str
) -> Iterator[Callable[[Tensor], None]]:
    """Yield, `steps` times, a function of the loss that updates the parameters.

    The optimiser is AdamW with a one-cycle schedule, and gradients are clipped at a norm of 1.
    """
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


def train_pair(folder: Path, is_free: bool = False) -> None:
    """Train both sides and save them in half precision to `folder/edge` and `folder/cloud`."""
    extractor = build_extractor()
    tokens = tokenizer.train_tokenizer(is_free)
    data = make_examples("train", FREE_TRAIN_CLIPS if is_free else TRAIN_CLIPS, extractor, is_free)
    recipes = FREE_RECIPES if is_free else RECIPES
    thinkers = {side: train_side(side, recipe, data, tokens, is_free) for side, recipe in recipes.items()}
    for side, thinker in thinkers.items():
        for part in (thinker.half(), tokens, extractor):
            part.save_pretrained(folder / side)


def train_free_pair(folder: Path) -> None:
    """Train a pair with free captions, and write it and `FREE_CLIPS` held-out clips per language to `folder`.

    The clips are in `folder/clips`, in the layout of the evaluation clips. The folder is there whole or not at all.
    Raise FileExistsError if it contains other files.
    """
    clips.check_new_folder(folder)
    with build_folder(folder) as building:
        train_pair(building, is_free=True)
        clips.write_clips(building / "clips", "held-out", FREE_CLIPS, is_free=True)
