"""BERTScore (Zhang et al. 2020): tokens matched by the cosine of their contextual embeddings, by bert-score.

bert-score 0.3.13 loads a model by itself, but with transformers 5 its way gives RoBERTa's first word no space, breaks
on a tokenizer without a longest text, and takes any path with "t5" in it for a T5. So the model is loaded here.
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

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
BERTSCORE_ADVICE = (
    "give a folder with config, weights and tokenizer, or an encoder's name on the hub, such as bert-base-chinese"
)


@dataclass(frozen=True)
class BertScorer:
    """A loaded encoder, on the CPU: GPU memory is for the models that are measured."""

    model: Any  # cut after the layer whose output is compared
    tokenizer: Any

    def score(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[float], list[float], list[float]]:
        """Precision, recall and F1 a clip: no idf weights, not rescaled by a baseline, hence seldom far below 1.

        Precision is the mean over the caption's tokens of the best cosine among the reference's, recall the same the
        other way round. Of several references each of the three takes its own best, as in bert-score. A caption without
        text scores 0; a reference must have text.
        """
        from bert_score.utils import bert_cos_score_idf

        groups = [texts if caption.strip() else [] for caption, texts in zip(captions, references, strict=True)]
        wanted = [text for group in groups for text in group]
        got = [caption for caption, group in zip(captions, groups, strict=True) for _ in group]
        if not got:
            return ([0.0] * len(captions),) * 3
        weights: dict[int | None, float] = defaultdict(lambda: 1.0)
        weights |= {self.tokenizer.sep_token_id: 0.0, self.tokenizer.cls_token_id: 0.0}
        with contextlib.redirect_stderr(io.StringIO()):  # it complains of a text of which its tokenizer leaves nothing
            found = bert_cos_score_idf(self.model, wanted, got, self.tokenizer, weights, device="cpu").tolist()
        rows = iter(found)
        best = [
            # float32 may round a cosine of 1 up
            [min(1.0, max(column)) for column in zip(*islice(rows, len(group)), strict=True)] or [0.0] * 3
            for group in groups
        ]
        precision, recall, f1 = ([each[i] for each in best] for i in range(3))
        return precision, recall, f1


@functools.lru_cache(maxsize=1)
def load_scorer(name: str) -> BertScorer:
    """The encoder of a folder or a name on the hub, loaded once a session.

    The layer is the one that bert-score's authors found best for a model of that name, without owner or folder, and the
    last one for a name they do not list. Raises ValueError, with the model and a fix, for a model that cannot score.
    """
    from safetensors import SafetensorError

    try:
        import bert_score.utils  # noqa: F401
    except ImportError as error:
        raise ValueError(f"BERTScore model {scorer_label(name)!r}: bert-score is not installed ({error})") from error
    try:
        with _quiet():
            scorer = _load(name)
            scorer.score(["a"], [["a"]])  # what does not fit together shows here, not after the first cell
    except (
        *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError),
        SafetensorError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(name, scorer_label(name))
        raise ValueError(
            f"BERTScore model {scorer_label(name)!r} cannot be loaded: {reason}; {BERTSCORE_ADVICE}"
        ) from error
    return scorer


def scorer_label(name: str) -> str:
    """The name of a model for results: a folder's last component, a name on the hub as it is."""
    if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
        return Path(name).resolve().name
    return name


def _load(name: str) -> BertScorer:
    from bert_score.utils import model2layers
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise ValueError("no such folder")
    config = AutoConfig.from_pretrained(name)
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"a {config.model_type} is not an encoder of text")
    published = {key.rsplit("/")[-1]: layer for key, layer in model2layers.items()}
    last: int = config.num_hidden_layers
    layer = min(published.get(scorer_label(name).rsplit("/")[-1], last), last)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if isinstance(tokenizer, (GPT2Tokenizer, RobertaTokenizer)):  # bert-score asks them for it at each text, in vain
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    if tokenizer.model_max_length > 10**6:  # not stated; two positions of RoBERTa's are never used
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", 512) - 2
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes a tokenizer of no files at all
        raise ValueError("its tokenizer knows no words")
    model, loading = AutoModel.from_pretrained(name, num_hidden_layers=layer, dtype="float32", output_loading_info=True)
    if missing := sorted(key for key in loading["missing_keys"] if "pooler" not in key):  # a pooler has no part in this
        raise ValueError(f"it lacks {len(missing)} weights, {missing[0]} first")
    return BertScorer(model.eval(), tokenizer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report of the weights left out above the layer."""
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
