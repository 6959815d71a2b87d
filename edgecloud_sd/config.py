"""Every option of the suite, once: its name, its meaning, what it may be; and how files and the command line combine.

Defaults live in `bench/configs/default.yaml`. A file given with `--config` goes over them, the command line over both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path
from typing import Any

from edgecloud_sd import acceptance, gate
from edgecloud_sd.cloud.url import parse_url
from edgecloud_sd.data.dataset import CAPTION_TYPES, ON_BAD_CLIP
from edgecloud_sd.data.prompts import LANGUAGES, PROMPT_TYPES
from edgecloud_sd.decoder import MODES
from edgecloud_sd.models import devices, pairs
from edgecloud_sd.models.devices import AUTO, DTYPES_OR_AUTO, parse_cloud_dtype, resolve_device
from edgecloud_sd.models.pairs import PAIRS
from edgecloud_sd.prefill import PREFILL_TIMES
from edgecloud_sd.timing import link, profile

CLOCKS = ("real", "virtual")
YES_NO = ("yes", "no")
MEASURE = "measure"  # the profile of this machine
ON_CLOUD_FAULT = ("wait", "edge", "error")


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the option, the bad value and what it may be."""


@dataclass(frozen=True)
class Option:
    """One option. `read` turns the text of one value into the value, or raises ValueError saying what it may be."""

    name: str
    help: str
    read: Callable[[str], Any]
    many: bool
    optional: bool
    split: Callable[[str], list[str]]

    def parse(self, value: Any) -> Any:
        """The value of this option from a command line's text or a YAML file's scalar or list."""
        if value is None or (isinstance(value, str) and not value.strip()):
            if self.optional:
                return None
            raise ConfigError(f"--{self.name}: needs a value")
        if not self.many:
            return self._one(value)
        parts = self.split(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        values = tuple(dict.fromkeys(self._one(part) for part in parts))
        if not values:
            raise ConfigError(f"--{self.name}: needs at least one value")
        return values

    def _one(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict | bool):
            raise ConfigError(f"--{self.name}: takes one value, not {value!r} (quote what YAML reads as true or false)")
        text = str(value).strip()
        try:
            return self.read(text)
        except ConfigError:  # its message is complete, and leaves out a password
            raise
        except ValueError as error:
            raise ConfigError(f"--{self.name}: {text!r} {error}") from None


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"is not one of {', '.join(known)}")
        return text

    return read


def _count(text: str, least: int = 1, also: str = "") -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise ValueError(f"is not {also}a whole number of at least {least}")
    return int(text)


def _draft_length(text: str) -> int | None:
    return None if text == AUTO else _count(text, also=f"{AUTO} or ")


def _draft_stop(text: str) -> str:
    gate.parse_draft_stop(text, gate.ALWAYS)
    return text


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError("is not a number of nats (inf and numbers below 0 are allowed)")
    return value


def _rule(text: str) -> str:
    try:
        acceptance.parse_rule(text)
    except ValueError:
        known = ", ".join(acceptance.RULE_NAMES)
        raise ValueError(
            f"is not one of {known}, with r of at least 1 and {acceptance.MAX_SYNTHETIC_RATES} p of 0 to 1 at most"
        ) from None
    return text


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[\w][\w.+-]*", text):
        raise ValueError("is not a plain file name (letters, digits, and . _ + - after the first)")
    return text


def _seconds(text: str) -> float:
    return _above_zero(text, "a number of seconds")


def _gigabytes(text: str) -> float:
    return _above_zero(text, "a number of GB (10^9 bytes)")


def _above_zero(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"is not {what} above 0")
    return value


def _link(text: str) -> str:
    link.parse_link(text)
    return text


def _url(text: str) -> str:
    if text != AUTO:
        try:
            parse_url(text)
        except ValueError as error:
            raise ConfigError(f"--cloud-url: {error} (or auto)") from None
    return text.rstrip("/")


def _commas(text: str) -> list[str]:
    return text.split(",")


def _option(
    help: str,
    read: Callable[[str], Any] = str,
    *,
    many: bool = False,
    optional: bool = False,
    split: Callable[[str], list[str]] = _commas,
) -> Any:
    metadata = {"help": help, "read": read, "many": many, "optional": optional, "split": split}
    return dataclass_field(metadata=metadata)


def _choice(help: str, known: tuple[str, ...], many: bool = False) -> Any:
    return _option(f"{help}: {', '.join(known)}", _one_of(known), many=many)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run was asked to do. Tuples make a grid."""

    mode: tuple[str, ...] = _choice("who decodes", MODES, many=True)
    gate: tuple[str, ...] = _choice("which drafts go to the cloud", gate.GATE_NAMES, many=True)
    entropy_threshold: tuple[float, ...] = _option(
        "nats above which gate entropy escalates a draft; 0 is always, inf is never", _nats, many=True
    )
    k: tuple[int | None, ...] = _option(
        "draft tokens a round, at most (more where they were drafted ahead); auto finds the fastest as it goes, "
        "from what the rounds so far have taken and what the cloud has kept",
        _draft_length,
        many=True,
    )
    draft_stop: tuple[str, ...] = _option(
        "end a draft early, with a token that is unsure: entropy (where the gate would escalate it), entropy=x (above "
        "x nats), margin=x (its two likeliest tokens less than x apart) or none",
        _draft_stop,
        many=True,
    )
    draft_ahead: tuple[int, ...] = _option(
        "tokens that the edge drafts on while a verdict is on its way, at most, as if all before were accepted and the "
        "first were the bonus; 0: it waits",
        partial(_count, least=0),
        many=True,
    )
    rule: tuple[str, ...] = _option(
        "what the cloud keeps of a draft: greedy (its own tokens), rank (see --rank) or rank(r); or, for dry runs of "
        "hardware with random weights, synthetic(p), each token with chance p, or synthetic(p/p/...) by its place in "
        "the draft",
        _rule,
        many=True,
    )
    rank: tuple[int, ...] = _option("rule rank keeps a token among the cloud's r most likely", _count, many=True)
    pair: str = _choice("the two checkpoints", tuple(PAIRS))
    edge_model: str | None = _option("edge checkpoint instead of the pair's: a folder or a hub name", optional=True)
    cloud_model: str | None = _option("cloud checkpoint instead of the pair's: a folder or a hub name", optional=True)
    weights: str = _choice(
        "of both models: real, or dummy, which are random: for how fast and how large, from a configuration alone",
        pairs.WEIGHTS,
    )
    edge_device: str = _option("torch device of the edge: cpu, cuda, cuda:1")
    edge_dtype: str = _choice(
        "number format of the edge; int8 and int4 are of its text model's weights alone, on a CPU",
        (*devices.DTYPES, *devices.QUANTISED_DTYPES),
    )
    cloud_device: str = _option("torch device of the cloud; auto is a GPU where there is one")
    cloud_dtype: str = _option(
        f"number format of the cloud; auto is float16 on a GPU and float32 elsewhere: {', '.join(DTYPES_OR_AUTO)}",
        parse_cloud_dtype,
    )
    cloud_url: str | None = _option(
        "the cloud is a server elsewhere, at this URL; auto starts one on loopback for the run and stops it",
        _url,
        optional=True,
    )
    cloud_key_file: str | None = _option("file with the key that the server at --cloud-url asks for", optional=True)
    cloud_timeout: float = _option("s that one request to a server may take", _seconds)
    on_cloud_fault: str = _choice(
        "a request that fails is tried again for a minute (wait), or for 2 s, after which the edge finishes the "
        "caption, marked degraded (edge), or ends the run (error)",
        ON_CLOUD_FAULT,
    )
    open: tuple[str, ...] = _choice(
        "when a prompt is sent to the cloud: beside the edge's own prefill, or with the first escalated draft",
        PREFILL_TIMES,
        many=True,
    )
    max_cpu_cores: int | None = _option(
        "hold this process, the edge, to so many CPU cores; the cloud then needs --cloud-url", _count, optional=True
    )
    max_memory_gb: float | None = _option(
        "hold the memory of this process to so many GB (10^9 bytes) of private data", _gigabytes, optional=True
    )
    threads: int | None = _option(
        "CPU threads of torch; none is one for models under 50 M parameters and torch's own choice for larger",
        _count,
        optional=True,
    )
    clock: str = _choice(
        "time captions for real, or let the same tokens take the time that a profile gives to each call", CLOCKS
    )
    profile: str | None = _option(
        f"costs for the virtual clock: {', '.join(profile.PROFILE_NAMES)}, a YAML file, or measure, which first "
        "writes the one of this machine to the results folder",
        optional=True,
    )
    link: tuple[str, ...] = _option(
        f"emulated between edge and cloud: {', '.join(link.LINKS)}, or one like {link.CUSTOM_LINK_EXAMPLE}",
        _link,
        many=True,
        split=link.split_links,
    )
    shadow: str = _choice(
        "ask the cloud afterwards, off the clock, about the tokens it was not asked: tells what the gate missed", YES_NO
    )
    bertscore_model: str | None = _option(
        "model of BERTScore: a name on the hub or a folder; none leaves BERTScore out", optional=True
    )
    dataset_path: str = _option("pocket, a manifest file, or a folder with manifest.json")
    max_samples: int | None = _option("caption the first so many clips only", _count, optional=True)
    on_bad_clip: str = _choice("stop at a clip that cannot be used, or leave it out and list it", ON_BAD_CLIP)
    caption_type: str = _choice(
        "score against <language>_caption and give audio alone, or against caption and give the transcription too",
        CAPTION_TYPES,
    )
    language: tuple[str, ...] = _choice("language of the captions", LANGUAGES, many=True)
    prompt_type: str = _choice("wording of the task", PROMPT_TYPES)
    max_new_tokens: int = _option("longest caption, in tokens", _count)
    output_name: str = _option("name of the results file, without .json", _file_name)
    results_dir: str = _option("folder of the results files")

    @property
    def profile_name(self) -> str:
        """How ids name the profile: its own name, or its file's without folder and ending."""
        return Path(self.profile or "").stem


OPTIONS = tuple(Option(field.name.replace("_", "-"), **field.metadata) for field in fields(Settings))


def defaults_file() -> Path:
    """`bench/configs/default.yaml`: in the checkout, or the copy that an installed package carries."""
    packaged = Path(__file__).with_name("default.yaml")
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "bench" / "configs" / "default.yaml"


def show_default(default: Any) -> str:
    """A default as help texts write it."""
    return ",".join(map(str, default)) if isinstance(default, list) else "none" if default is None else str(default)


def resolve(command_line: Mapping[str, str | None], file: Path | None = None) -> Settings:
    """Settings from the defaults, then `file`, then `command_line` (option name -> text, None where not given)."""
    merged = read_file(defaults_file())
    if file is not None:
        merged |= read_file(file)
    merged |= {name: text for name, text in command_line.items() if text is not None}
    missing = [option.name for option in OPTIONS if option.name not in merged]
    if missing:
        raise ConfigError(f"{defaults_file()}: has no default for --{', --'.join(missing)}")
    settings = Settings(**{option.name.replace("-", "_"): option.parse(merged[option.name]) for option in OPTIONS})
    _check(settings)
    if settings.cloud_url in (None, AUTO):
        device, dtype = resolve_device(settings.cloud_device, settings.cloud_dtype)
        settings = replace(settings, cloud_device=device, cloud_dtype=dtype)
    return settings


def _check(settings: Settings) -> None:
    """ConfigError for values that are good each but make no sense together."""
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
    held = [name for name in ("max_cpu_cores", "max_memory_gb") if getattr(settings, name) is not None]
    if held and settings.mode != ("edge",) and not settings.cloud_url:
        raise ConfigError(
            f"--{held[0].replace('_', '-')}: would hold the cloud as well, in the same process; add --cloud-url auto"
        )
    if "entropy" in settings.draft_stop and "entropy" not in settings.gate:
        raise ConfigError(
            f"--draft-stop: entropy stops at the threshold of gate entropy, and --gate is {', '.join(settings.gate)}: "
            "give entropy=x"
        )
    if settings.cloud_key_file and settings.cloud_url in (None, AUTO):
        raise ConfigError("--cloud-key-file: is for a server at --cloud-url http://...")
    if settings.profile not in (None, MEASURE):
        try:
            profile.load_profile(settings.profile)
        except profile.ProfileError as error:
            raise ConfigError(f"--profile: {error}") from None


def read_file(path: Path) -> dict[str, Any]:
    """The options of a YAML file by hyphenated name. ConfigError for anything that is not a map of known options."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date or number that is none, or bytes that are no text
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must map options to values, not be a {type(loaded).__name__}")
    options = {str(name).replace("_", "-"): value for name, value in loaded.items()}
    if len(options) < len(loaded):
        raise ConfigError(f"{path}: names an option twice, spelt with - and with _")
    known = [option.name for option in OPTIONS]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"{path}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    for option in OPTIONS:  # so that a bad value is blamed on the file that holds it
        if option.name in options:
            try:
                option.parse(options[option.name])
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    return options
