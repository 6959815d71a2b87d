"""Every option once: its name, default, meaning and allowed values. Files and the command line combine here.

The fields of `Settings` are the options. `bench/configs/default.yaml` is a copy of their defaults that a test compares.
A file given with `--config` overrides the defaults, and the command line overrides both.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from dataclasses import field as dataclass_field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edgecloud_sd import acceptance, gate
from edgecloud_sd.cloud.retry import PATIENCE, REQUEST_TIMEOUT
from edgecloud_sd.cloud.url import parse_url
from edgecloud_sd.data.dataset import CAPTION_TYPES, ON_BAD_CLIP
from edgecloud_sd.data.prompts import LANGUAGES, PROMPT_TYPES
from edgecloud_sd.data.published_settings import PublishedSettings, is_published_group, translate_settings
from edgecloud_sd.data.task_texts import TaskTexts, read_task_texts
from edgecloud_sd.data.texts import BadText, check_characters, parse_yaml, read_utf8
from edgecloud_sd.forecast.budgets import LEVEL_RANGES, Budget
from edgecloud_sd.forecast.calibration import (
    Calibration,
    CalibrationError,
    GateChoice,
    choose_budget,
    choose_own,
    load_calibration,
)
from edgecloud_sd.host import limits
from edgecloud_sd.host.passwords import hide_passwords
from edgecloud_sd.lookup import DRAFTERS
from edgecloud_sd.measure.normalisation import DEFAULT_NORMALISATION, NORMALISATIONS
from edgecloud_sd.models import devices, pairs
from edgecloud_sd.models.devices import AUTO, DTYPES_OR_AUTO
from edgecloud_sd.prefill import PREFILL_TIMES
from edgecloud_sd.revise import REVISE_NAMES
from edgecloud_sd.stopping import MAX_NEW_TOKENS
from edgecloud_sd.strategy import ADAPTIVE_K, MODES, REVISE_LOSSLESS, WITHOUT_MODEL, Strategy
from edgecloud_sd.timing import link, profile

CLOCKS = ("real", "virtual")
YES_NO = ("yes", "no")
MEASURE = "measure"  # the profile of this machine
RUN_MODES = (*MODES, "lossless", "revise", "revise-lossless")
BUDGETS = {"cloud_calls": "calls", "cloud_budget": "written_share"}  # option: its kind of `Budget`
GROUPS = ("decoding", "budget", "models", "cloud", "limits", "clock and link", "data", "results")


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the option, the bad value and the allowed ones, no password."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_passwords(message))


@dataclass(frozen=True)
class Option:
    """One option of the command line.

    `read` turns the text of one value into the value, or raises ValueError with the allowed ones. `choices` are the
    allowed values if there are few.
    """

    name: str
    default: Any
    group: str
    help: str
    read: Callable[[str], Any]
    choices: tuple[str, ...]
    many: bool
    optional: bool
    split: Callable[[str], list[str]]

    def parse(self, value: Any) -> Any:
        """Return the value of a command line's text, or of a YAML file's scalar or list. Raise ConfigError."""
        if value is None or (isinstance(value, str) and not value.strip()):
            if self.optional:
                return None
            raise ConfigError(f"--{self.name}: needs a value")
        if not self.many:
            return self._parse_one(value)
        parts = self.split(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        values = tuple(dict.fromkeys(self._parse_one(part) for part in parts))
        if not values:
            raise ConfigError(f"--{self.name}: needs at least one value")
        return values

    def _parse_one(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise ConfigError(f"--{self.name}: takes one value, not {value!r}")
        text = str(value).strip()
        try:
            check_characters(text, f"--{self.name}")  # the results file could not name it
        except BadText as error:
            raise ConfigError(str(error)) from None
        try:
            return self.read(text)
        except ConfigError:  # its message is complete, and leaves out a password
            raise
        except ValueError as error:
            raise ConfigError(f"--{self.name}: {text!r} {error}") from None

    @property
    def default_text(self) -> str:
        """The default as help texts and tables show it."""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return ",".join(
            "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values
        )

    @property
    def meaning(self) -> str:
        """The help with its choices, unless it names all of them."""
        if all(re.search(rf"\b{re.escape(choice)}\b", self.help) for choice in self.choices):
            return self.help
        return f"{self.help} ({', '.join(self.choices)})"

    @property
    def help_text(self) -> str:
        """The help with its choices and its default."""
        grid = "; a comma-separated list makes a grid" if self.many else ""
        return f"{self.meaning}{grid} (default: {self.default_text})"


def _read_choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"is not one of {', '.join(choices)}")
    return text


def _read_count(text: str, least: int = 1, also: str = "") -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < least:
        raise ValueError(f"is not {also}a whole number of at least {least}")
    return int(text)


def _read_k(text: str) -> int | None:
    return None if text == ADAPTIVE_K else _read_count(text, also=f"{ADAPTIVE_K} or ")


def _read_draft_stop(text: str) -> str:
    gate.parse_draft_stop(text, gate.ALWAYS)
    return text


def _read_float(text: str) -> float:
    """Return the number that a text writes in plain digits, and NaN for any other text."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def _read_nats(text: str) -> float:
    value = _read_float(text)
    if math.isnan(value):
        raise ValueError("is not a number of nats (inf and numbers below 0 are allowed)")
    return value


def _read_rule(text: str) -> str:
    try:
        acceptance.parse_rule(text)
    except ValueError:
        known = ", ".join(acceptance.RULE_NAMES)
        raise ValueError(
            f"is not one of {known}, with r of at least 1 and {acceptance.MAX_SYNTHETIC_RATES} p of 0 to 1 at most"
        ) from None
    return text


def _read_file_name(text: str) -> str:
    if not re.fullmatch(r"[\w][\w.+-]*", text):
        raise ValueError("is not a plain file name (letters, digits, and . _ + - after the first)")
    return text


def _read_positive(text: str, unit: str) -> float:
    value = _read_float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"is not {unit} above 0")
    return value


def _read_fraction(text: str, unit: str) -> float:
    value = _read_float(text)
    if not 0 < value <= 1:
        raise ValueError(f"is not a {unit} above 0, at most 1")
    return value


def _read_chance(text: str) -> float:
    value = _read_float(text)
    if not 0 < value < 1:
        raise ValueError("is not a chance above 0 and below 1")
    return value


def _read_send_level(text: str) -> float:
    value = _read_float(text)
    if not -math.inf < value <= 1:
        raise ValueError("is not a risk of at most 1 (below 0 sends always)")
    return value


def _read_link(text: str) -> str:
    link.parse_link(text)
    return text


def _read_url(text: str) -> str:
    if text != AUTO:
        try:
            parse_url(text)
        except ValueError as error:
            raise ConfigError(f"--cloud-url: {error} (or auto)") from None
    return text.rstrip("/")


def _split_commas(text: str) -> list[str]:
    return text.split(",")


def _option(
    group: str,
    default: Any,
    help: str,
    read: Callable[[str], Any] | None = None,
    *,
    choices: tuple[str, ...] = (),
    many: bool = False,
    optional: bool = False,
    split: Callable[[str], list[str]] = _split_commas,
) -> Any:
    """Return a field of `Settings`. An optional one may be left empty; `many` values make a grid."""
    read = read or (partial(_read_choice, choices=choices) if choices else str)
    metadata = {"group": group, "help": help, "read": read, "choices": choices, "many": many, "optional": optional}
    return dataclass_field(
        default=(default,) if many and not isinstance(default, tuple) else default, metadata=metadata | {"split": split}
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a run. Tuples make a grid."""

    mode: tuple[str, ...] = _option(
        "decoding",
        RUN_MODES,
        "who decodes; three names stand for mode speculative with rule greedy, whatever --gate and --rule are: "
        "lossless has gate always; revise has gate risk, and --revise context unless that names another way; "
        "revise-lossless is the same but always sends",
        choices=RUN_MODES,
        many=True,
    )
    gate: tuple[str, ...] = _option(
        "decoding",
        "entropy",
        "when the edge asks the cloud: for a draft with an uncertain token (entropy, margin, logprob), for that token "
        "alone (token), by the risk of all tokens since the last verdict (risk), always, or never",
        choices=gate.GATE_NAMES,
        many=True,
    )
    entropy_threshold: tuple[float, ...] = _option(
        "decoding",
        1.5,
        "gate entropy escalates a draft if the entropy of a token exceeds this many nats; 0 is always, inf is never",
        _read_nats,
        many=True,
    )
    threshold: tuple[float, ...] = _option(
        "decoding",
        0.9,
        "gates margin, logprob and token ask the cloud if the statistic of a token is beyond this: an entropy above so "
        "many nats (token), a difference of the two highest probabilities below it (margin), or -ln p of the most "
        "likely token above it (logprob)",
        partial(_read_positive, unit="a number"),
        many=True,
    )
    risk_limit: tuple[float, ...] = _option(
        "decoding",
        REVISE_LOSSLESS.gate.threshold,
        "gate risk asks the cloud at once if the risk of the tokens since its last verdict exceeds this; 1 waits for "
        "the end of the caption",
        partial(_read_fraction, unit="risk"),
        many=True,
    )
    send_above: tuple[float, ...] = _option(
        "decoding",
        0.5,
        "the send level: gate risk sends a caption at its end if the risk since the last verdict exceeds this; below 0 "
        "it always sends",
        _read_send_level,
        many=True,
    )
    opinion_risk: tuple[float, ...] = _option(
        "decoding",
        REVISE_LOSSLESS.gate.opinion_risk,
        "risk, under gate risk, of a token that is taken from the cloud's opinions",
        partial(_read_fraction, unit="risk"),
        many=True,
    )
    revise: tuple[str, ...] = _option(
        "decoding",
        Strategy.revise,
        "how the edge redrafts after a correction: alone (none), or with the cloud's opinions on its old draft; "
        "it takes an opinion if its own token is that of the old draft (repeat), also if the two tokens before are "
        "(context), or also like repeat after equal tokens elsewhere in the old draft, for captions in which places "
        "shift (aligned)",
        choices=REVISE_NAMES,
        many=True,
    )
    look_back: tuple[str, ...] = _option(
        "decoding",
        "no",
        "send the local tokens since the last verdict as draft, so that the cloud can take them back; gate risk always "
        "does",
        choices=YES_NO,
        many=True,
    )
    drafter: tuple[str, ...] = _option(
        "decoding",
        Strategy.drafter,
        "the source of drafts: the edge's model; lookup of what followed the same tokens in the prompt and in earlier "
        "captions of the run, without a model (gate always); or both (model+lookup): the model checks what lookup "
        "guesses in one pass, with equal tokens; in place of lookup, modes edge, revise and revise-lossless use model",
        choices=DRAFTERS,
        many=True,
    )
    k: tuple[int | None, ...] = _option(
        "decoding",
        Strategy.k,
        "draft tokens per round, at most (more if drafted ahead, under a lossless strategy); "
        f"{ADAPTIVE_K} finds the fastest length from the times and verdicts so far",
        _read_k,
        many=True,
    )
    draft_stop: tuple[str, ...] = _option(
        "decoding",
        "none",
        "end a draft early with an unsure token: entropy (at the threshold of gate entropy), entropy=x (above x nats), "
        "margin=x (the two most likely tokens differ by less than x) or none",
        _read_draft_stop,
        many=True,
    )
    draft_ahead: tuple[int, ...] = _option(
        "decoding",
        Strategy.draft_ahead,
        "tokens that the edge drafts during a verification, at most, as if the whole draft were accepted; 0 waits",
        partial(_read_count, least=0),
        many=True,
    )
    rule: tuple[str, ...] = _option(
        "decoding",
        "rank",
        "which draft tokens the cloud accepts: greedy (its own tokens), rank (see --rank), rank(r), or synthetic(p) "
        "for dry runs with random weights: each token with chance p, or synthetic(p/p/...) by its place in the draft",
        _read_rule,
        many=True,
    )
    rank: tuple[int, ...] = _option(
        "decoding",
        acceptance.PUBLISHED_RANK,
        "rule rank accepts a token among the cloud's r most likely",
        _read_count,
        many=True,
    )
    open: tuple[str, ...] = _option(
        "decoding",
        Strategy.prefill,
        "when the cloud prefills a prompt: beside the edge's prefill, or at the first escalated draft",
        choices=PREFILL_TIMES,
        many=True,
    )
    max_new_tokens: int = _option("decoding", MAX_NEW_TOKENS, "tokens of a caption, at most", _read_count)
    own: float | None = _option(
        "budget",
        None,
        "chance, such as 0.9, with which a caption is the cloud's own, token for token; chooses the send level of gate "
        "risk by --calibration",
        _read_chance,
        optional=True,
    )
    cloud_calls: float | None = _option(
        "budget",
        None,
        "cloud calls per caption, in the mean; chooses the level of gate risk or token by --calibration, or by "
        "feedback after each caption",
        partial(_read_positive, unit="a number"),
        optional=True,
    )
    cloud_budget: float | None = _option(
        "budget",
        None,
        "share of the tokens that the cloud may write, instead of --cloud-calls",
        partial(_read_fraction, unit="share"),
        optional=True,
    )
    calibration: str | None = _option(
        "budget", None, "file of python -m bench.tune --calibrate for this pair, language and strategy", optional=True
    )
    audit: float | None = _option(
        "budget",
        None,
        "share of the captions that are verified afterwards, off the clock, if the cloud has not verified them whole: "
        "shows if the run keeps the promise of --own",
        partial(_read_fraction, unit="share"),
        optional=True,
    )
    pair: str = _option("models", "pocket", "the two checkpoints", choices=tuple(pairs.PAIRS))
    edge_model: str | None = _option(
        "models", None, "edge checkpoint instead of the pair's: a folder or a name on the hub", optional=True
    )
    cloud_model: str | None = _option(
        "models", None, "cloud checkpoint instead of the pair's: a folder or a name on the hub", optional=True
    )
    weights: str = _option(
        "models",
        pairs.REAL,
        "weights of both models; dummy weights are random, and show speed and size from a configuration alone",
        choices=pairs.WEIGHTS,
    )
    edge_device: str = _option("models", "cpu", "torch device of the edge: cpu, cuda, cuda:1")
    edge_dtype: str = _option(
        "models",
        "float32",
        "number format of the edge; int8 and int4 hold the weights of its text model on a CPU",
        choices=(*devices.DTYPES, *devices.QUANTISED_DTYPES),
    )
    cloud_device: str = _option("models", "cpu", "torch device of the cloud; auto takes a GPU if there is one")
    cloud_dtype: str = _option(
        "models",
        "float32",
        f"number format of the cloud: {', '.join(DTYPES_OR_AUTO)}; auto is float16 on a GPU and float32 elsewhere",
        devices.parse_cloud_dtype,
    )
    cloud_url: str | None = _option(
        "cloud",
        None,
        "URL of a server that is the cloud; auto starts one on loopback for the run and stops it",
        _read_url,
        optional=True,
    )
    cloud_key_file: str | None = _option(
        "cloud", None, "file with the key that the server at --cloud-url asks for", optional=True
    )
    cloud_timeout: float = _option(
        "cloud",
        REQUEST_TIMEOUT,
        "seconds that one request to a server, or one token of a stream, may take at most",
        partial(_read_positive, unit="a number of seconds"),
    )
    on_cloud_fault: str = _option(
        "cloud",
        "wait",
        "a call of the cloud that fails or hangs is given up after 60 s, attempts included, and ends the run (wait); "
        "after 2 s, and the edge finishes the caption, marked degraded (edge); or at the first failure, after "
        "--cloud-timeout at most, and ends the run (error)",
        choices=tuple(PATIENCE),
    )
    max_cpu_cores: int | None = _option(
        "limits",
        None,
        "CPU cores of this process, the edge, at most; the cloud then needs --cloud-url",
        _read_count,
        optional=True,
    )
    max_memory_gb: float | None = _option(
        "limits",
        None,
        "private memory of this process in GB (10^9 bytes), at most; the cloud then needs --cloud-url",
        partial(_read_positive, unit="a number of GB (10^9 bytes)"),
        optional=True,
    )
    memory_limit: str = _option(
        "limits",
        limits.ENFORCE,
        "let allocations beyond --max-memory-gb fail, or monitor it as the guide does: warn, and record the excess",
        choices=limits.MEMORY_LIMITS,
    )
    threads: int | None = _option(
        "limits",
        None,
        "CPU threads of torch; none takes one for models under 50 M parameters and torch's own choice for larger ones",
        _read_count,
        optional=True,
    )
    clock: str = _option(
        "clock and link",
        "real",
        "time captions for real, or let each call take the time that a profile gives it",
        choices=CLOCKS,
    )
    profile: str | None = _option(
        "clock and link",
        None,
        f"costs for the virtual clock: {', '.join(profile.PROFILE_NAMES)}, a YAML file, or measure, which first writes "
        "the profile of this machine to the results folder",
        optional=True,
    )
    link: tuple[str, ...] = _option(
        "clock and link",
        "none",
        f"emulated between edge and cloud: {', '.join(link.LINKS)}, or one like {link.CUSTOM_LINK_EXAMPLE}",
        _read_link,
        many=True,
        split=link.split_links,
    )
    dataset_type: str = _option(
        "data",
        "unified",
        "format of the manifest; it has one value, which the published guide names",
        choices=("unified",),
    )
    dataset_path: str = _option(
        "data",
        "pocket",
        "pocket (the clips that ship), a manifest file, or a folder with manifest.json or .jsonl, or with "
        "manifest_<language>.json",
    )
    max_samples: int | None = _option(
        "data", None, "number of clips, from the first on; none takes all", _read_count, optional=True
    )
    on_bad_clip: str = _option(
        "data", "error", "stop at a clip that cannot be used, or leave it out and list it", choices=ON_BAD_CLIP
    )
    caption_type: str = _option(
        "data",
        CAPTION_TYPES[0],
        "references to score against: the manifest's field caption (original) or <language>_caption (audio_only)",
        choices=CAPTION_TYPES,
    )
    with_transcription: str = _option(
        "data", "no", "put the spoken words of the manifest, if a clip has them, between audio and task", choices=YES_NO
    )
    language: tuple[str, ...] = _option("data", "chinese", "language of the captions", choices=LANGUAGES, many=True)
    prompt_type: str = _option("data", "default", "wording of the task", choices=PROMPT_TYPES)
    prompt_file: str | None = _option(
        "data",
        None,
        "your own wording of the task: a text for every language, or a file .json, .yaml or .yml that maps "
        "languages to texts; the text follows the audio in the user's turn",
        optional=True,
    )
    shadow: str = _option(
        "results",
        "yes",
        "ask the cloud afterwards, off the clock, about local tokens: shows which corrections the gate missed",
        choices=YES_NO,
    )
    bertscore_model: str | None = _option(
        "results", None, "model of BERTScore: a name on the hub or a folder; none leaves BERTScore out", optional=True
    )
    score_normalisation: str = _option(
        "results",
        DEFAULT_NORMALISATION,
        "change captions and references alike before scoring: nfc composes characters and gives punctuation its "
        "ordinary width, nfkc does so for letters and digits too",
        choices=tuple(NORMALISATIONS),
    )
    output_name: str = _option("results", "captioning", "name of the results file, without .json", _read_file_name)
    results_dir: str = _option("results", "results", "folder of the results files")

    @property
    def process_limits(self) -> limits.Limits:
        """The limits of this process that the run asks for."""
        return limits.Limits(self.max_cpu_cores, self.max_memory_gb, self.memory_limit)

    @property
    def run_pair(self) -> pairs.Pair:
        """The two checkpoints of the run: those of `--pair`, or those that replace them."""
        return pairs.find_pair(self.pair, self.edge_model, self.cloud_model, self.weights)

    @cached_property
    def own_tasks(self) -> TaskTexts | None:
        """The texts of `--prompt-file`, read once; None without it. Raise ValueError for a file that cannot be used."""
        return read_task_texts(Path(self.prompt_file)) if self.prompt_file else None

    def own_task(self, language: str) -> str | None:
        """Return the text of `--prompt-file` for a language, or None without that option."""
        return self.own_tasks.text(language) if self.own_tasks else None

    @property
    def budget(self) -> Budget | None:
        """The budget of `--cloud-calls` or `--cloud-budget`, or None without one."""
        limits = {kind: getattr(self, name) for name, kind in BUDGETS.items()}
        return next((Budget(kind, limit) for kind, limit in limits.items() if limit is not None), None)

    @cached_property
    def calibrated(self) -> Calibration | None:
        """The calibration of the run, read once; None without one. Raise CalibrationError for a bad file."""
        return load_calibration(Path(self.calibration)) if self.calibration else None

    @cached_property
    def gate_choice(self) -> GateChoice | None:
        """The level of the gate by the calibration, or None without one. Raise CalibrationError if it gives none."""
        if self.calibrated is None:
            return None
        if self.own:
            return choose_own(self.calibrated, self.own)
        return choose_budget(self.calibrated, self.budget) if self.budget else None

    @property
    def profile_name(self) -> str:
        """The name of the profile in case ids: its own, or that of its file without folder and ending."""
        return Path(self.profile or "").stem


OPTIONS = tuple(Option(field.name.replace("_", "-"), field.default, **field.metadata) for field in fields(Settings))


def resolve(command_line: Mapping[str, str | None], file: Path | None = None) -> Settings:
    """Return the settings of the defaults, then of `file`, then of `command_line`.

    `command_line` maps option names to text, or to None for an option that is not given. Raise ConfigError for an
    option or a file that cannot be used.
    """
    values: dict[str, Any] = {option.name: option.default for option in OPTIONS}
    texts = read_file(file) if file is not None else {}
    if command_line.get("pair") is not None:  # the models of a file are a pair too
        texts = {name: text for name, text in texts.items() if name not in ("edge-model", "cloud-model")}
    texts |= {name: text for name, text in command_line.items() if text is not None}
    values |= {option.name: option.parse(texts[option.name]) for option in OPTIONS if option.name in texts}
    settings = Settings(**{name.replace("-", "_"): value for name, value in values.items()})
    _check(settings)
    if settings.cloud_url in (None, AUTO):
        device, dtype = devices.resolve_device(settings.cloud_device, settings.cloud_dtype)
        settings = replace(settings, cloud_device=device, cloud_dtype=dtype)
    return settings


def _check(settings: Settings) -> None:
    """Raise ConfigError for values that do not fit together."""
    _check_clock(settings)
    _check_task_texts(settings)
    _check_margins(settings)
    _check_budget(settings)
    _check_lookup(settings)
    limited = [name for name in ("max_cpu_cores", "max_memory_gb") if getattr(settings, name) is not None]
    if limited and settings.mode != ("edge",) and not settings.cloud_url:
        raise ConfigError(
            f"--{limited[0].replace('_', '-')}: would limit the cloud too, in the same process; add --cloud-url auto"
        )
    if settings.memory_limit == limits.MONITOR and settings.max_memory_gb is None:
        raise ConfigError("--memory-limit: monitor needs a limit: give --max-memory-gb")
    if "entropy" in settings.draft_stop and "entropy" not in settings.gate:
        raise ConfigError(
            f"--draft-stop: entropy stops at the threshold of gate entropy, and --gate is {', '.join(settings.gate)}: "
            "give entropy=x"
        )
    if settings.cloud_key_file and settings.cloud_url in (None, AUTO):
        raise ConfigError("--cloud-key-file: is for a server at --cloud-url http://...")


def _check_margins(settings: Settings) -> None:
    """Raise ConfigError for a threshold that is no difference of two probabilities, under a gate that reads one."""
    margins = [name for name in settings.gate if name in ("margin", "token(margin)")]
    if margins and "speculative" in settings.mode and max(settings.threshold) > 1:
        raise ConfigError(
            f"--threshold: {max(settings.threshold):g} is no difference of two probabilities, which --gate "
            f"{margins[0]} reads: give a number above 0, at most 1"
        )


def _check_budget(settings: Settings) -> None:
    """Raise ConfigError for a budget, promise or calibration that does not fit the gate or the other options."""
    given = [name for name in ("own", *BUDGETS) if getattr(settings, name) is not None]
    options = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1:
        raise ConfigError(f"{options[0]}: give it alone, without {options[1]}")
    if given:
        _check_level(settings, options[0])
    if given == ["own"]:
        _check_own(settings)
    if settings.calibration and not given:
        raise ConfigError("--calibration: chooses nothing alone: add --own, --cloud-calls or --cloud-budget")
    if settings.calibration:
        _check_calibration(settings)
    elif given and "speculative" in settings.mode and None in settings.k:
        raise ConfigError(f"--k: {ADAPTIVE_K} needs a level that stays: give a number, or add --calibration")


def _check_level(settings: Settings, option: str) -> None:
    """Raise ConfigError unless the run has one gate, whose level the option can choose."""
    gates = (settings.gate if "speculative" in settings.mode else ()) + (("risk",) if "revise" in settings.mode else ())
    fitting = ("risk",) if settings.own else tuple(LEVEL_RANGES)
    if len(set(gates)) != 1 or gates[0] not in fitting:
        raise ConfigError(
            f"{option}: needs one gate of {', '.join(fitting)}, and --mode {','.join(settings.mode)} has "
            f"{', '.join(dict.fromkeys(gates)) or 'none'}: give --mode revise, or --mode speculative --gate risk"
        )
    level = "send_above" if gates[0] == "risk" else "threshold"
    is_default = getattr(settings, level) == getattr(Settings, level)
    if len(getattr(settings, level)) > 1 or (settings.calibration and not is_default):
        raise ConfigError(f"--{level.replace('_', '-')}: {option} chooses it: leave one of them out")


def _check_own(settings: Settings) -> None:
    """Raise ConfigError for a promise without a calibration, or under a rule that accepts more than the cloud's own."""
    if not settings.calibration:
        raise ConfigError("--own: needs --calibration: python -m bench.tune --calibrate writes its file")
    rules = itertools.product(settings.rule, settings.rank) if "speculative" in settings.mode else ()
    for text, rank in rules:
        if not acceptance.parse_rule(text, rank).is_lossless:
            raise ConfigError(f"--own: needs --rule greedy, and --rule is {text}: it accepts more than the cloud's own")


def _check_calibration(settings: Settings) -> None:
    """Raise ConfigError for a calibration that gives no level, or is for another language."""
    try:
        _ = settings.gate_choice
    except CalibrationError as error:
        raise ConfigError(f"--calibration: {error}") from None
    if settings.calibrated and settings.language != (settings.calibrated.conditions.language,):
        language = settings.calibrated.conditions.language
        raise ConfigError(
            f"--calibration: {settings.calibrated.name} is for {language}, and --language is "
            f"{', '.join(settings.language)}: give each language a run and a file of its own"
        )


def _check_lookup(settings: Settings) -> None:
    """Raise ConfigError for values that drafter lookup cannot use. Mode lossless replaces the gate."""
    if "lookup" not in settings.drafter or not {"speculative", "lossless"} & {*settings.mode}:
        return
    for name, usual in WITHOUT_MODEL.items():
        for value in getattr(settings, name):
            if value != usual and (name != "gate" or "speculative" in settings.mode):
                advice = " or --mode lossless" if name == "gate" else ""
                raise ConfigError(
                    f"--{name.replace('_', '-')}: {value} needs the edge's model, which --drafter lookup does not run: "
                    f"give {usual}{advice}"
                )


def _check_task_texts(settings: Settings) -> None:
    """Raise ConfigError for a prompt file that cannot be used in a language of the run, or beside a prompt type."""
    try:
        for language in settings.language:
            settings.own_task(language)
    except ValueError as error:
        raise ConfigError(f"--prompt-file: {error}") from None
    if settings.prompt_file and settings.prompt_type != Settings.prompt_type:
        raise ConfigError(f"--prompt-type: {settings.prompt_type!r} has no meaning with --prompt-file: leave one out")


def _check_clock(settings: Settings) -> None:
    """Raise ConfigError if the clock, the profile and the cloud do not fit together."""
    known = ", ".join((*profile.PROFILE_NAMES, MEASURE))
    if settings.clock == "virtual" and settings.profile is None:
        raise ConfigError(f"--clock: virtual needs --profile: {known} or a YAML file")
    if settings.clock == "real" and settings.profile not in (None, MEASURE):
        raise ConfigError(f"--profile: {settings.profile!r} is for the virtual clock; add --clock virtual")
    if settings.clock == "virtual":
        for name in ("cloud_url", "max_cpu_cores", "max_memory_gb"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: is for the real clock; leave out --clock virtual")
    if settings.profile == MEASURE and settings.cloud_url:
        raise ConfigError("--profile: measure times both sides in this process; leave out --cloud-url")
    if settings.profile not in (None, MEASURE):
        try:
            profile.load_profile(settings.profile)
        except profile.ProfileError as error:
            raise ConfigError(f"--profile: {error}") from None


def read_file(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file by hyphenated name. Raise ConfigError for anything but known options.

    The file may also have the nested settings of the published project (`published_settings`).
    """
    loaded, published = _load_file(path)
    options = [(str(name).replace("_", "-"), value) for name, value in loaded.items()] + [*published.options.items()]
    names = [name for name, _ in options]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{path}: names an option twice, in two spellings: {repeated[0]}")
    known = [option.name for option in OPTIONS]
    if unknown := [name for name in (*names, *published.unknown) if name not in known]:
        raise ConfigError(f"{path}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    values = dict(options)
    for option in OPTIONS:  # so that the message names the file of a bad value
        if option.name in values:
            try:
                option.parse(values[option.name])
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    return values


def note_unused_settings(path: Path) -> str:
    """Return one line on the published settings in a file that mean nothing here, or an empty text."""
    note = _load_file(path)[1].note
    return f"{path}: these settings have no meaning here: {note}" if note else ""


def _load_file(path: Path) -> tuple[dict[str, Any], PublishedSettings]:
    """Return the options of a YAML file as they are spelt, and the settings of the published project in it."""
    try:
        loaded = parse_yaml(read_utf8(path, "YAML"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except BadText as error:
        raise ConfigError(str(error)) from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must map options to values, not be a {type(loaded).__name__}")
    groups = {name: value for name, value in loaded.items() if is_published_group(str(name))}
    return {name: value for name, value in loaded.items() if name not in groups}, translate_settings(groups)
