"""`python -m edgecloud_sd.data`: make and check manifests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgecloud_sd.data.dataset import BadClip, check_manifest
from edgecloud_sd.data.secap import import_secap


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m edgecloud_sd.data", description="Make and check manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    secap = commands.add_parser("secap", help="turn SECap's published layout into a manifest")
    secap.add_argument("folder", type=Path, help="the folder with fid2captions.json, text.txt and wav/")
    secap.add_argument("--output", type=Path, help="where to write it (default: FOLDER/manifest.json)")
    checks = commands.add_parser(
        "check",
        help="read every clip of a manifest and list what is wrong; exit status 1 if some are bad in each language",
    )
    checks.add_argument("manifest", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "secap":
            target = options.output or options.folder / "manifest.json"
            print(f"{import_secap(options.folder, target)} clips in {target}")
        else:
            usable, lines = check_manifest(options.manifest)
            print("\n".join(lines))
            if not usable:
                sys.exit(1)
    except (BadClip, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
