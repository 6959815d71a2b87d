"""Caption one audio file: `edgecloud-sd caption FILE` streams the text, each token coloured by its origin."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgecloud_sd import config
from edgecloud_sd.connect import connect
from edgecloud_sd.data.dataset import read_audio
from edgecloud_sd.events import Committed, Event, Finished, Output, Trace
from edgecloud_sd.grid import cells
from edgecloud_sd.host.errors import errors_to_exit, warnings_in_one_line
from edgecloud_sd.host.live_text import Piece, escape_controls, rewrite
from edgecloud_sd.host.passwords import SafeArgumentParser
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.timing.clock import Watch, stream
from edgecloud_sd.timing.harness import Harness

GREY = 90  # ANSI
COLOURS = {"local": 32, "accepted": 36, "correction": 31, "bonus": 35, "cloud": 34}  # ANSI
LEGEND = {
    "local": "from the edge, not verified",
    "accepted": "from the edge, accepted by the cloud",
    "correction": "from the cloud, in place of a rejected token",
    "bonus": "from the cloud, after an accepted draft, or where the edge was in doubt",
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
        is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        is_coloured = is_terminal if options.colour == "auto" else options.colour == "always"
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
                    events,
                    lambda tokens: pipeline.text(tokens, strategy.load_mode),
                    is_coloured,
                    harness.watch,
                    terminal_columns if is_terminal and is_coloured else None,
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
        help="give each token the colour of its origin, and show text that is not final in grey; auto does so on a "
        "terminal (default: %(default)s)",
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


class CaptionText:
    """The text of a generation as far as its events go, with the place at which each token ends.

    A token that ends inside a character has no text. The token that completes the character has it.
    """

    def __init__(self, decode: metrics.DecodeText) -> None:
        self.output = Output()
        self._decode = decode
        self._text = ""
        self._ends: list[int] = []

    def see(self, event: Event) -> None:
        """Follow one more event."""
        self.output.see(event)
        tokens = self.output.tokens
        del self._ends[len(tokens) :]
        for n in range(len(self._ends), len(tokens)):
            self._text = self._decode(tokens[: n + 1])
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before if self._text.endswith("\ufffd") else len(self._text))
        if isinstance(event, Finished) and tokens:
            self._text = self._decode(tokens)
            self._ends[-1] = len(self._text)

    def pieces(self, is_coloured: bool, is_live: bool) -> list[Piece]:
        """Return the text by token. Tokens that are not final are grey if it is live, and else are left out."""
        final = self.output.final
        colours = [COLOURS[origin] for origin in self.output.origins[:final]]
        if is_live:
            colours += [GREY] * (len(self._ends) - final)
        texts = (self._text[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False))
        return [
            Piece(escape_controls(text) if is_live else text, colour if is_coloured else None)
            for text, colour in zip(texts, colours, strict=False)
            if text
        ]


def print_caption(
    events: Iterator[Event],
    decode: metrics.DecodeText,
    is_coloured: bool,
    watch: Watch | None = None,
    columns: Callable[[], int] | None = None,
) -> Trace:
    """Print the caption as its tokens are committed, and return its trace, timed by `watch` or from now on.

    `columns` gives the width of a terminal with colours. It shows text that is not final in grey, and takes it back if
    the cloud rejects it. Without `columns` only final text is printed.
    """
    caption, printed, stamped = CaptionText(decode), list[Piece](), []
    for seconds, event in stream(events, watch):
        stamped.append((seconds, event))
        caption.see(event)
        pieces = caption.pieces(is_coloured, is_live=columns is not None)
        if pieces != printed:
            print(rewrite(printed, pieces, columns() if columns else 0), end="", flush=True)
            printed = pieces
    print(flush=True)  # before what stderr shows
    if is_coloured:
        legend = [
            f"\x1b[{COLOURS[origin]}m{origin}\x1b[0m: {LEGEND[origin]}"
            for origin in dict.fromkeys(caption.output.origins)
        ]
        if columns and any(isinstance(event, Committed) and not event.is_final for _, event in stamped):
            legend.append(f"\x1b[{GREY}mgrey\x1b[0m: was not final yet")
        print("  ".join(legend), file=sys.stderr)
    return Trace(tuple(stamped))


def terminal_columns() -> int:
    """Return the width of the terminal, which can change at any time."""
    return shutil.get_terminal_size().columns


def count(number: int, noun: str) -> str:
    """Return the number with its noun in the right form, as in "2 rounds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summary_line(trace: Trace) -> str:
    """Return the tokens by origin, the costs at the cloud and the seconds, in one line."""
    counts = metrics.counts(trace)
    numbers = {origin: getattr(counts, origin) for origin in COLOURS}
    origins = [
        count(number, origin) if origin == "correction" else f"{number} {origin}"
        for origin, number in numbers.items()
        if number
    ]
    parts = [f"{count(counts.tokens, 'token')} ({', '.join(origins)})"]
    if counts.retracted:
        parts.append(f"{counts.retracted} taken back")
    calls = metrics.caption_calls(counts)
    if counts.rounds or calls:
        unanswered = f" ({counts.unanswered_calls} unanswered)" if counts.unanswered_calls else ""
        rounds = f" in {count(counts.rounds, 'round')}" if counts.rounds else ""
        parts.append(f"{count(calls, 'cloud call')}{unanswered}{rounds}")
    if calls:
        parts.append(
            f"cloud: {count(counts.written, 'token')} written, {count(counts.cloud_positions, 'position')} computed, "
            f"{count(counts.covered, 'token')} covered"
        )
    parts.append(f"{trace.seconds:.3f} s")
    if reason := metrics.degraded_reason(trace):
        parts.append(f"degraded, the edge finished alone: {reason}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
