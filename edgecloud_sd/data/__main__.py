"""The command `python -m edgecloud_sd.data`, which writes and checks manifests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgecloud_sd.data.dataset import CAPTION_TYPES, check_manifest
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.data.secap import import_secap
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.pocket.clips import manifest_path


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit with status 1 and one line for an error."""
    options = _build_parser().parse_args(hyphenate(arguments))
    with errors_to_exit():
        if options.command == "secap":
            target = options.output or options.folder / "manifest.json"
            print(f"{import_secap(options.folder, target)} clips in {target}")
        else:
            is_usable = False
            for language in options.language.split(","):
                manifest = manifest_path(options.dataset, language)
                has_all, lines = check_manifest(manifest, [language], options.caption_type)
                is_usable |= has_all
                print("\n".join(lines))
            if not is_usable:
                sys.exit(1)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgecloud_sd.data", description="Write and check manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    secap = commands.add_parser(
        "secap",
        help="write a manifest for SECap's published layout",
        description="Write a manifest for a folder in SECap's published layout.",
    )
    secap.add_argument("folder", type=Path, help="folder with fid2captions.json, text.txt and wav/")
    secap.add_argument("--output", type=Path, help="manifest to write (default: FOLDER/manifest.json)")
    check = commands.add_parser(
        "check",
        help="read every clip of a manifest and list the clips that cannot be used",
        description="Read every clip of a manifest and list, for each language, the clips that cannot be used. "
        "The exit status is 1 unless some language can use every clip.",
    )
    check.add_argument("dataset", help="a manifest file, a folder with one, or pocket, as in --dataset-path")
    check.add_argument(
        "--language",
        default=",".join(LANGUAGES),
        help="languages to check, with a comma between two (default: %(default)s)",
    )
    check.add_argument(
        "--caption-type",
        choices=CAPTION_TYPES,
        default=CAPTION_TYPES[0],
        help="references to check: the field caption, or <language>_caption (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
