"""The command `python -m edgecloud_sd.forecast`: the forecast of saved runs on other machines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from edgecloud_sd.forecast.recorded import forecast_from_results
from edgecloud_sd.forecast.sentence import forecast_sentence, format_seconds
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.measure.results import read_results
from edgecloud_sd.timing.link import Link, find_link
from edgecloud_sd.timing.profile import PROFILE_NAMES, Profile, load_profile


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the forecast of each file of the command line, or exit with one line that says why not."""
    parser = argparse.ArgumentParser(
        prog="python -m edgecloud_sd.forecast",
        description="Forecast speculative runs on other machines from their results files, which may be "
        "imported (python -m edgecloud_sd.measure.imported).",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="the results file of a speculative run")
    parser.add_argument(
        "--profile", required=True, help=f"cost profile: {', '.join(PROFILE_NAMES)}, or a YAML file of your own"
    )
    parser.add_argument("--link", default="none", help="link between edge and cloud (default: %(default)s)")
    parser.add_argument("--k", type=int, help="draft length of a run whose file does not have it")
    options = parser.parse_args(hyphenate(arguments))
    with errors_to_exit():
        profile, link = load_profile(options.profile), find_link(options.link)
        for file in options.files:
            print(forecast_file(file, profile, link, options.k))


def forecast_file(file: Path, profile: Profile, link: Link, k: int | None = None) -> str:
    """Return the forecast of the run in a results file as text, with its recorded seconds per token.

    Raise ValueError, with the file's name, for a file that cannot be forecast.
    """
    try:
        document = read_results(file)
    except ValueError as error:
        advice = "give a results file of this version, or import the file (python -m edgecloud_sd.measure.imported)"
        raise ValueError(f"{file}: {error}; {advice}") from error
    try:
        answer = forecast_from_results(document, profile, link, k)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    recorded = document["metrics"]["figures"]["tpot"]
    sentence = f"{file.name}, {profile.name}: {forecast_sentence(answer)}"
    if recorded is None:
        return sentence
    return f"{sentence} Recorded after the first text: {format_seconds(recorded)} per token."


if __name__ == "__main__":
    main()
