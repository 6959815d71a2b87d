"""The command `python -m edgecloud_sd.pocket`, which writes the clips, trains the pair and evaluates it."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.models.pairs import POCKET_WEIGHTS, Pair
from edgecloud_sd.pocket import clips

MIN_CLIPS = 4  # two per language, so that each clip can be captioned from another clip's audio


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit with one line for an error."""
    parser = _build_parser()
    options = parser.parse_args(hyphenate(arguments))
    if options.command == "evaluate" and options.clips < MIN_CLIPS:
        parser.error(f"--clips must be at least {MIN_CLIPS}, not {options.clips}")
    is_free = options.command == "train" and options.free
    if is_free and options.folder.resolve().is_relative_to(POCKET_WEIGHTS.resolve()):
        parser.error(f"--folder {options.folder} is that of the shipped pair: name another one for --free")
    with errors_to_exit():
        if options.command == "clips":
            print(clips.evaluation_set(options.folder))
        elif options.command == "train":
            from edgecloud_sd.pocket import train

            if is_free:
                train.train_free_pair(options.folder)
            else:
                options.folder.mkdir(parents=True, exist_ok=True)  # fails here, and not after the training
                train.train_pair(options.folder)
        else:
            from edgecloud_sd.pipeline import Pipeline
            from edgecloud_sd.pocket import evaluate as evaluation

            pair = Pair("pocket", str(options.folder / "edge"), str(options.folder / "cloud"))
            print(evaluation.evaluate(Pipeline(pair), options.set, options.clips))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edgecloud_sd.pocket", description="Write, train and evaluate the pocket pair and its clips."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser(
        "clips",
        help="write the evaluation clips and print their folder",
        description="Write the evaluation clips (wav files and manifests) and print their folder.",
    )
    write.add_argument("--folder", type=Path, help="folder to write to (default: the user's cache folder)")
    train = commands.add_parser(
        "train",
        help="train both models",
        description="Train both models from random weights. This takes about 15 minutes on 2 slow cores. A free pair "
        "starts from the shipped weights and takes about 10.",
    )
    train.add_argument("--folder", type=Path, default=POCKET_WEIGHTS, help="folder to save to (default: %(default)s)")
    train.add_argument(
        "--free",
        action="store_true",
        help="train a pair with two wordings a class and several orders of the parts, and write held-out clips with "
        "such captions to FOLDER/clips; --folder must be new or empty",
    )
    evaluate = commands.add_parser(
        "evaluate",
        help="print the quality and the speed of the pair",
        description="Print the quality and the speed of the pair on clips outside its training.",
    )
    evaluate.add_argument(
        "--folder", type=Path, default=POCKET_WEIGHTS, help="folder of the pair (default: %(default)s)"
    )
    evaluate.add_argument(
        "--clips", type=int, default=2 * clips.EVALUATION_CLIPS, help="number of clips (default: %(default)s)"
    )
    evaluate.add_argument(
        "--set", choices=("evaluation", "held-out"), default="evaluation", help="set of clips (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
