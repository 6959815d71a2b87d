"""BERTScore (Zhang et al. 2020): tokens are matched by the cosine of their contextual embeddings.

bert-score computes the cosines, but this module loads the model. With transformers 5, the loader of bert-score 0.3.13
has three faults. It drops the space before RoBERTa's first word, it fails if the tokenizer states no maximum length,
and it takes every path that contains "t5" for a T5.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgecloud_sd.models import hub

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
BERTSCORE_ADVICE = (
    "give a folder with config, weights and tokenizer, or an encoder's name on the hub, such as bert-base-chinese"
)


@dataclass(frozen=True)
class BertScorer:
    """A loaded encoder on the CPU, which leaves the GPU's memory to the models that are measured."""

    model: Any  # without the layers above the one whose output is compared
    tokenizer: Any

    def score(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[float], list[float], list[float]]:
        """Return the precisions, recalls and F1 scores of the clips, one value per clip in each list.

        Precision is the mean, over the tokens of the caption, of the best cosine with a token of the reference. Recall
        is the same with the two texts exchanged. If a clip has several references, each of the three values is its best
        one, as in bert-score. A caption without text scores 0.

        The tokens have equal weights (no idf), and no baseline rescales the scores, so values far below 1 are rare.
        """
        from bert_score.utils import bert_cos_score_idf

        groups = [texts if caption.strip() else [] for caption, texts in zip(captions, references, strict=True)]
        targets = [text for group in groups for text in group]
        candidates = [caption for caption, group in zip(captions, groups, strict=True) for _ in group]
        if not candidates:
            return ([0.0] * len(captions),) * 3
        weights: dict[int | None, float] = defaultdict(lambda: 1.0)
        weights |= {self.tokenizer.sep_token_id: 0.0, self.tokenizer.cls_token_id: 0.0}
        with contextlib.redirect_stderr(io.StringIO()):  # bert-score warns about a text without tokens
            scores = bert_cos_score_idf(self.model, targets, candidates, self.tokenizer, weights, device="cpu")
        rows = iter(scores.tolist())  # (precision, recall, F1) of each pair of caption and reference
        best = [
            # float32 may round a cosine of 1 up
            [min(1.0, max(column)) for column in zip(*islice(rows, len(group)), strict=True)] or [0.0] * 3
            for group in groups
        ]
        precision, recall, f1 = ([values[i] for values in best] for i in range(3))
        return precision, recall, f1


@functools.lru_cache(maxsize=1)
def load_scorer(name: str) -> BertScorer:
    """Return the encoder of a folder or a name on the hub, loaded once per process.

    The compared layer is the one that bert-score lists for the model's name, without owner or folder. A name
    that is not listed gets the last layer. Raise ValueError, with the model and a fix, for a model that cannot score.
    """
    from safetensors import SafetensorError

    try:
        import bert_score.utils  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"BERTScore model {scorer_label(name)!r}: bert-score is not installed ({error}); "
            "install the extra edgecloud_sd[bertscore]"
        ) from error
    try:
        with _quiet():
            hub.prepare_hub(name)
            scorer = _load(name)
            scorer.score(["a"], [["a"]])  # a model that loads but cannot score fails here, not after the first cell
    except (
        *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError),
        SafetensorError,
    ) as error:
        reason = hub.explain_hub_error(error) or (str(error).splitlines() or [type(error).__name__])[0]
        reason = reason.replace(name, scorer_label(name))
        raise ValueError(
            f"BERTScore model {scorer_label(name)!r} cannot be loaded: {reason}; {BERTSCORE_ADVICE}"
        ) from error
    return scorer


def scorer_label(name: str) -> str:
    """Return the model's name for the results: the last component of a folder, or the whole name on the hub."""
    if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
        return Path(name).resolve().name
    return name


def _load(name: str) -> BertScorer:
    from bert_score.utils import model2layers
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise ValueError("no such folder, and no name on the hub")
    config = AutoConfig.from_pretrained(name)
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"a {config.model_type} is not an encoder of text")
    published = {key.rsplit("/")[-1]: layer for key, layer in model2layers.items()}
    last: int = config.num_hidden_layers
    layer = min(published.get(scorer_label(name).rsplit("/")[-1], last), last)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if isinstance(
        tokenizer, (GPT2Tokenizer, RobertaTokenizer)
    ):  # bert-score sets the option too late to have an effect
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    if tokenizer.model_max_length > 10**6:  # not stated; RoBERTa never uses two of its positions
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", 512) - 2
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 builds a tokenizer even without files
        raise ValueError("its tokenizer knows no words")
    model, loading = AutoModel.from_pretrained(name, num_hidden_layers=layer, dtype="float32", output_loading_info=True)
    if missing := sorted(key for key in loading["missing_keys"] if "pooler" not in key):  # the pooler is unused
        raise ValueError(f"its file lacks {len(missing)} weights, such as {missing[0]}")
    return BertScorer(model.eval(), tokenizer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bar, and the warning about the weights of the layers that are left out."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
