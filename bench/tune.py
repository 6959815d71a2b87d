"""Find settings for a pair on clips that it has not seen: `python -m bench.tune`.

`--pareto` decodes held-out clips in many ways, and shows how much of the quality gap between edge and cloud each way
closes, at which cost. Times are those of the virtual clock.

`--calibrate` decodes clips that are in no other set, and writes what each level of gate risk or token costs. A run
chooses the level by that file: `--calibration FILE` with `--own`, `--cloud-calls` or `--cloud-budget`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.gate_calibration import calibrate_gate, find_strategy, preview_choices
from bench.pareto import run_pareto
from edgecloud_sd import config
from edgecloud_sd.acceptance import Synthetic
from edgecloud_sd.config import Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.forecast.calibration import load_calibration
from edgecloud_sd.grid import strategies
from edgecloud_sd.host.errors import errors_to_exit, warnings_in_one_line
from edgecloud_sd.host.files import NoLock, hold_file
from edgecloud_sd.host.passwords import SafeArgumentParser
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.strategy import Strategy

# The options of the suite that choose the pair, the clips and the virtual clock, with the defaults that differ here
RUN_OPTIONS = (
    "pair", "edge-model", "cloud-model", "edge-device", "edge-dtype", "cloud-device", "cloud-dtype",
    "threads", "profile", "link", "dataset-path", "on-bad-clip", "caption-type", "with-transcription", "language",
    "prompt-type", "prompt-file", "score-normalisation", "max-new-tokens",
)  # fmt: skip
RUN_DEFAULTS = {"profile": "laptop-gpu", "link": "5g", "language": ",".join(LANGUAGES)}
# The options of the suite that name ways to decode: their grid is added to the picture
GRID_OPTIONS = tuple(
    option.name
    for option in config.OPTIONS
    if option.group == "decoding" and option.name not in ("mode", "max-new-tokens")
)
# shown above the options of decoding
DECODING_NOTE = "--pareto adds the grid of these options, if any is given; --calibrate needs a single strategy"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit with one line for input that cannot be used, and for any other expected failure."""
    options = tune_parser().parse_args(hyphenate(arguments))
    with errors_to_exit():
        settings = resolve_settings(options)
        output = find_output(options)
        if options.calibrate:
            strategy = find_strategy(settings)
            with hold_output(output), open_pair(settings) as pipeline:
                files = calibrate_gate(pipeline, settings, strategy, options.calibrate, output)
        else:
            given = given_strategies(options, settings)
            with hold_output(output), open_pair(settings) as pipeline:
                files = run_pareto(pipeline, settings, options.clips, output, given)
        for path in files:
            print(f"wrote {path}")
            if options.calibrate:
                print(*preview_choices(load_calibration(path)), sep="\n")


def tune_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Options, groups and help texts are those of the suite."""
    parser = SafeArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_argument_group("task").add_mutually_exclusive_group(required=True)
    task.add_argument("--pareto", action="store_true", help="write the table and the picture of quality against costs")
    task.add_argument(
        "--calibrate",
        metavar="N",
        type=_parse_clips,
        help="write what each level of the gate costs on N clips a language",
    )
    parser.add_argument(
        "--clips", metavar="N", type=_parse_clips, default=40, help="held-out clips a language (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the page with the picture, whose numbers are written to FILE.json (default: results/pareto.html), or the "
        "calibration (default: results/calibration.yaml)",
    )
    groups = {name: parser.add_argument_group(name) for name in config.GROUPS}
    groups["decoding"].description = DECODING_NOTE
    for option in config.OPTIONS:
        if option.name in (*RUN_OPTIONS, *GRID_OPTIONS):
            default = RUN_DEFAULTS.get(option.name, option.default_text)
            help_text = f"{option.meaning} (default: {default})".replace("%", "%%")
            groups[option.group].add_argument(
                f"--{option.name}", metavar=option.name.upper().replace("-", "_"), help=help_text
            )
    return parser


def resolve_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of the command line on the virtual clock. Raise ConfigError for any that cannot be used."""
    given = {name: getattr(options, name.replace("-", "_")) for name in (*RUN_OPTIONS, *GRID_OPTIONS)}
    defaults = {name: text for name, text in RUN_DEFAULTS.items() if given[name] is None}
    settings = config.resolve(given | defaults | {"mode": "speculative", "clock": "virtual"})
    if len(settings.link) > 1:
        raise config.ConfigError(f"--link: give one link, not {len(settings.link)}: a picture has the times of one")
    if settings.profile == config.MEASURE:
        raise config.ConfigError("--profile: 'measure' is for pytest --benchmark-only: give the file that it writes")
    return settings


def find_output(options: argparse.Namespace) -> Path:
    """Return the file that the task writes. Raise ConfigError for one whose name has another ending."""
    name, endings = ("calibration.yaml", (".yaml", ".yml")) if options.calibrate else ("pareto.html", (".html", ".htm"))
    path: Path = options.output or Path("results", name)
    if path.suffix.lower() not in endings:
        raise config.ConfigError(f"--output: {str(path)!r} does not end in {endings[0]}")
    return path


def given_strategies(options: argparse.Namespace, settings: Settings) -> list[Strategy]:
    """Return the grid of the decoding options on the command line, or nothing if it has none of them.

    Raise ConfigError for a rule that is for dry runs.
    """
    if all(getattr(options, name.replace("-", "_")) is None for name in GRID_OPTIONS):
        return []
    given = strategies(settings)
    for strategy in given:
        if isinstance(strategy.rule, Synthetic):
            raise config.ConfigError(
                f"--rule: {strategy.rule.text} writes no captions to score: give greedy or rank(r)"
            )
    return given


@contextmanager
def hold_output(path: Path) -> Iterator[None]:
    """Hold the output until the block ends, so that one that cannot be written fails before minutes of decoding."""
    with ExitStack() as stack:
        with suppress(NoLock):
            stack.enter_context(hold_file(path))
        yield


@contextmanager
def open_pair(settings: Settings) -> Iterator[Pipeline]:
    """Yield the pair of a run, loaded."""
    with warnings_in_one_line(), connect(settings) as cloud:
        pipeline = Pipeline.from_settings(settings, cloud)
        pipeline.prepare("speculative")
        yield pipeline


def _parse_clips(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 2")
    return int(text)


if __name__ == "__main__":
    main()
