"""`python -m edgecloud_sd.pocket clips | train | evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgecloud_sd.models.pairs import POCKET_WEIGHTS, Pair
from edgecloud_sd.pocket import clips


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m edgecloud_sd.pocket", description="The embedded pair and its clips."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser(
        "clips", help="make the evaluation clips (wav files and manifests) and print their folder"
    )
    write.add_argument("--folder", type=Path, help="where to write them (default: the user's cache folder)")
    train = commands.add_parser("train", help="train both models from nothing (about 15 minutes on 2 slow cores)")
    train.add_argument("--folder", type=Path, default=POCKET_WEIGHTS, help="where to save them (default: %(default)s)")
    evaluate = commands.add_parser("evaluate", help="print what the pair can do on clips it never heard")
    evaluate.add_argument(
        "--folder", type=Path, default=POCKET_WEIGHTS, help="the pair to evaluate (default: %(default)s)"
    )
    evaluate.add_argument(
        "--clips", type=int, default=2 * clips.EVALUATION_CLIPS, help="how many (default: %(default)s)"
    )
    evaluate.add_argument(
        "--set", choices=("evaluation", "held-out"), default="evaluation", help="which clips (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.command == "clips":
        try:
            print(clips.evaluation_set(options.folder))
        except OSError as error:
            sys.exit(f"error: {error}")
    elif options.command == "train":
        from edgecloud_sd.pocket.train import train_pair

        train_pair(options.folder)
    else:
        from edgecloud_sd.pipeline import Captioner
        from edgecloud_sd.pocket import evaluate as evaluation

        if options.clips < 4:
            parser.error(f"--clips must be at least 4, not {options.clips}")
        pair = Pair("pocket", str(options.folder / "edge"), str(options.folder / "cloud"))
        print(evaluation.evaluate(Captioner(pair), options.set, options.clips))


if __name__ == "__main__":
    main()
