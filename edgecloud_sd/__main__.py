"""Caption one audio file: `edgecloud-sd caption FILE` streams the text, each token coloured by its origin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgecloud_sd import config
from edgecloud_sd.connect import connect
from edgecloud_sd.data.dataset import read_audio
from edgecloud_sd.events import Committed, Event, Trace
from edgecloud_sd.grid import cells
from edgecloud_sd.host.errors import errors_to_exit, warnings_in_one_line
from edgecloud_sd.host.passwords import SafeArgumentParser
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.timing.clock import Watch, stream
from edgecloud_sd.timing.harness import Harness

COLOURS = {"local": 32, "accepted": 36, "correction": 31, "bonus": 35, "cloud": 34}  # ANSI
LEGEND = {
    "local": "from the edge, not verified",
    "accepted": "from the edge, accepted by the cloud",
    "correction": "from the cloud, in place of a rejected token",
    "bonus": "from the cloud, after an accepted draft",
    "cloud": "from the cloud alone",
}
# The options of the suite that apply to one file. A list of values is refused.
CAPTION_OPTIONS = (
    "gate", "entropy-threshold", "threshold", "risk-limit", "send-above", "opinion-risk", "revise", "look-back",
    "drafter", "k", "draft-stop", "draft-ahead", "rule", "rank", "own", "cloud-calls", "cloud-budget", "calibration",
    "pair", "edge-model", "cloud-model",
    "weights", "edge-device", "edge-dtype", "cloud-device", "cloud-dtype", "cloud-url", "cloud-key-file",
    "cloud-timeout", "on-cloud-fault", "open",
    "max-cpu-cores", "max-memory-gb", "memory-limit", "threads", "link", "language", "prompt-type", "prompt-file",
    "max-new-tokens",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit with one line for input that cannot be used, and for any other expected failure."""
    options = caption_parser().parse_args(hyphenate(arguments))
    given = {name: getattr(options, name.replace("-", "_")) for name in CAPTION_OPTIONS}
    with errors_to_exit():
        settings = config.resolve(given | {"mode": options.mode or "speculative", "shadow": "no"})
        refuse_lists(settings)
        if settings.budget and not settings.calibration:
            raise config.ConfigError("--calibration: a budget for one caption needs it, because no feedback can follow")
        strategy, link = cells(settings)[0]
        audio = read_audio(options.file)
        request = Request(
            audio.samples,
            language=settings.language[0],
            prompt_type=settings.prompt_type,
            transcription=options.transcription,
            task=settings.own_task(settings.language[0]),
        )
        for doubt in audio.doubts:
            print(f"warning: {doubt}", file=sys.stderr)
        is_coloured = sys.stdout.isatty() if options.colour == "auto" else options.colour == "always"
        with warnings_in_one_line(), connect(settings) as cloud:
            pipeline = Pipeline.from_settings(settings, cloud)
            # inside, the explanation of an error can name the limit
            with pipeline.limited(settings.process_limits), errors_to_exit():
                if settings.calibrated:
                    asked = replace(settings, with_transcription="yes" if options.transcription else "no")
                    settings.calibrated.check(pipeline.conditions(asked, strategy, request.language))
                harness = Harness(link=link)
                events = pipeline.events(request, strategy, settings.max_new_tokens, harness)
                trace = print_caption(
                    events, lambda tokens: pipeline.text(tokens, strategy.load_mode), is_coloured, harness.watch
                )
        print(summary_line(trace), file=sys.stderr)


def caption_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Options, groups and help texts are those of the suite."""
    parser = SafeArgumentParser(prog="edgecloud-sd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    caption = commands.add_parser("caption", help="caption one audio file, streaming")
    caption.add_argument(
        "file", type=Path, help="wav, FLAC, MP3, Ogg, AIFF, AU or CAF, with any sampling rate and channels"
    )
    caption.add_argument("--transcription", help="the spoken words, for a prompt that may use them")
    caption.add_argument(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        help="give each token the colour of its origin; auto does so on a terminal (default: %(default)s)",
    )
    groups = {name: caption.add_argument_group(name) for name in config.GROUPS}
    for option in config.OPTIONS:
        if option.name in ("mode", *CAPTION_OPTIONS):
            default = "speculative" if option.name == "mode" else option.default_text.split(",")[0]
            metavar = f"{{{','.join(option.choices)}}}" if option.choices else option.name.upper().replace("-", "_")
            help_text = f"{option.help} (default: {default})".replace("%", "%%")
            groups[option.group].add_argument(f"--{option.name}", metavar=metavar, help=help_text)
    return parser


def refuse_lists(settings: config.Settings) -> None:
    """Raise ConfigError for an option with several values: a list makes a grid, and a caption is not a grid."""
    for option in config.OPTIONS:
        value = getattr(settings, option.name.replace("-", "_"))
        if option.many and len(value) > 1:
            raise config.ConfigError(f"--{option.name}: give one value for a caption, not {len(value)}")


def print_caption(
    events: Iterator[Event], decode: metrics.DecodeText, is_coloured: bool, watch: Watch | None = None
) -> Trace:
    """Print the caption as its tokens are committed, and return its trace, timed by `watch` or from now on."""
    tokens: list[int] = []
    printed = text = ""
    stamped = []
    for seconds, event in stream(events, watch):
        stamped.append((seconds, event))
        if not isinstance(event, Committed):
            continue
        for token in event.tokens:
            tokens.append(token)
            text = decode(tokens)
            if text.endswith("\ufffd"):
                continue  # the rest of this character comes with the next token
            new, printed = text[len(printed) :], text
            if new:
                print(f"\x1b[{COLOURS[event.origin]}m{new}\x1b[0m" if is_coloured else new, end="", flush=True)
    print(text[len(printed) :])
    if is_coloured:
        origins = dict.fromkeys(event.origin for _, event in stamped if isinstance(event, Committed))
        legend = [f"\x1b[{COLOURS[origin]}m{origin}\x1b[0m: {LEGEND[origin]}" for origin in origins]
        print("  ".join(legend), file=sys.stderr)
    return Trace(tuple(stamped))


def count(number: int, noun: str) -> str:
    """Return the number with its noun in the right form, as in "2 rounds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summary_line(trace: Trace) -> str:
    """Return the tokens by origin, the cloud calls and the seconds, in one line."""
    counts = metrics.counts(trace)
    numbers = {origin: getattr(counts, origin) for origin in COLOURS}
    parts = [
        count(number, origin) if origin == "correction" else f"{number} {origin}"
        for origin, number in numbers.items()
        if number
    ]
    unanswered = f" ({counts.unanswered_calls} unanswered)" if counts.unanswered_calls else ""
    calls = f", {count(counts.cloud_calls, 'cloud call')}{unanswered} in {count(counts.rounds, 'round')}"
    calls = calls if counts.rounds else ""
    reason = metrics.degraded_reason(trace)
    degraded = f", degraded, the edge finished alone: {reason}" if reason else ""
    return f"{count(counts.tokens, 'token')} ({', '.join(parts)}){calls}, {trace.seconds:.3f} s{degraded}"


if __name__ == "__main__":
    main()
