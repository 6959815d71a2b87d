"""`python -m edgecloud_sd caption FILE`: stream a caption, each token coloured by where it came from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgecloud_sd import config
from edgecloud_sd.connect import connect
from edgecloud_sd.data.dataset import load_audio
from edgecloud_sd.events import Committed, Event, Trace
from edgecloud_sd.host import limits
from edgecloud_sd.measure import metrics
from edgecloud_sd.pipeline import Captioner, Request, cells
from edgecloud_sd.timing.clock import stream
from edgecloud_sd.verifier import CloudFault

COLOURS = {"local": 32, "accepted": 36, "correction": 31, "bonus": 35, "cloud": 34}  # ANSI
LEGEND = {
    "local": "the edge's, unasked",
    "accepted": "the edge's, kept by the cloud",
    "correction": "the cloud's, instead of the edge's",
    "bonus": "the cloud's, after an accepted draft",
    "cloud": "the cloud's, alone",
}
# Of the suite's options, those that make sense for one file; a list means its first value.
CAPTION_OPTIONS = (
    "gate", "entropy-threshold", "k", "draft-stop", "draft-ahead", "rule", "rank", "pair", "edge-model", "cloud-model",
    "weights", "edge-device", "edge-dtype", "cloud-device", "cloud-dtype", "cloud-url", "cloud-key-file",
    "cloud-timeout", "on-cloud-fault", "open",
    "max-cpu-cores", "max-memory-gb", "threads", "link", "language", "prompt-type", "max-new-tokens",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = caption_parser().parse_args(arguments)
    given = {name: getattr(options, name.replace("-", "_")) for name in CAPTION_OPTIONS}
    try:
        settings = config.resolve(given | {"mode": options.mode})
        cell = cells(settings)[0]
        samples = load_audio(options.file)
        colour = sys.stdout.isatty() if options.colour == "auto" else options.colour == "always"
        held = limits.Limits(settings.max_cpu_cores, settings.max_memory_gb)
        with connect(settings) as connection, limits.apply_limits(held):
            captioner = Captioner.of(settings, connection)
            captioner.load(cell.mode)
            request = Request(samples, settings.language[0], settings.prompt_type, options.transcription)
            events = captioner.events(request, cell, settings.max_new_tokens)
            trace = print_caption(events, captioner.text(cell.mode), colour)
    except (ValueError, OSError, CloudFault) as error:
        sys.exit(f"error: {error}")
    print(summary_line(trace), file=sys.stderr)


def caption_parser() -> argparse.ArgumentParser:
    """The command line; options and help texts are the suite's own."""
    made = argparse.ArgumentParser(prog="python -m edgecloud_sd", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    caption = commands.add_parser("caption", help="caption one audio file, streaming")
    caption.add_argument("file", type=Path, help="wav, FLAC, MP3 or Ogg, any rate, any channels")
    caption.add_argument(
        "--mode", default="speculative", help="who decodes: edge, cloud, speculative (default: %(default)s)"
    )
    defaults = config.read_file(config.defaults_file())
    for option in config.OPTIONS:
        if option.name in CAPTION_OPTIONS:
            default = config.show_default(defaults[option.name])
            help = f"{option.help} (default: {default})".replace("%", "%%")
            caption.add_argument(f"--{option.name}", help=help)
    caption.add_argument("--transcription", help="what is said, where the prompt may use it")
    caption.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="(default: %(default)s)")
    return made


def print_caption(events: Iterator[Event], decode: metrics.DecodeText, colour: bool) -> Trace:
    """Print the caption as it is committed, and return its trace."""
    seen: list[int] = []
    printed = text = ""
    stamped = []
    for seconds, event in stream(events):
        stamped.append((seconds, event))
        if not isinstance(event, Committed):
            continue
        for token in event.tokens:
            seen.append(token)
            text = decode(seen)
            if text.endswith("\ufffd"):
                continue  # the first bytes of a character whose rest is still to come
            new, printed = text[len(printed) :], text
            if new:
                print(f"\x1b[{COLOURS[event.origin]}m{new}\x1b[0m" if colour else new, end="", flush=True)
    print(text[len(printed) :])
    if colour:
        origins = dict.fromkeys(event.origin for _, event in stamped if isinstance(event, Committed))
        print(
            "  ".join(f"\x1b[{COLOURS[origin]}m{origin}\x1b[0m: {LEGEND[origin]}" for origin in origins),
            file=sys.stderr,
        )
    return Trace(tuple(stamped))


def summary_line(trace: Trace) -> str:
    """One line: tokens by origin, cloud calls, seconds."""
    counts = metrics.counts(trace)
    parts = [f"{getattr(counts, origin)} {origin}" for origin in COLOURS if getattr(counts, origin)]
    calls = f", {counts.cloud_calls} cloud calls in {counts.rounds} rounds" if counts.rounds else ""
    reason = metrics.degraded(trace)
    alone = f", degraded, the edge finished alone: {reason}" if reason else ""
    return f"{counts.tokens} tokens ({', '.join(parts)}){calls}, {trace.seconds:.3f} s{alone}"


if __name__ == "__main__":
    main()
