"""Recorded captions replayed as if they were drafted from earlier ones alone: `python -m bench.lookup_replay FILE`.

No model runs, because a caption that was recorded tells which drafts its model would have accepted. A unit is a
character of a Chinese caption, and a word or punctuation mark of an English one, because files do not have the tokens.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from edgecloud_sd.data.dataset import BadClip
from edgecloud_sd.data.published import RecordedRun, read_recorded_runs
from edgecloud_sd.forecast.model import MAX_K, Workload, cloud_seconds_per_token, forecast, seconds_per_token
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate
from edgecloud_sd.lookup import CaptionHistory, Lookup
from edgecloud_sd.measure.imported import find_language
from edgecloud_sd.strategy import MODES
from edgecloud_sd.timing.link import LINKS, NO_LINK, Link
from edgecloud_sd.timing.profile import PROFILE_NAMES, Profile, load_profile

END = 0  # stands for the EOS token, which no file has
UNIT_PATTERNS = {"chinese": r"\S", "english": r"\w+(?:['’-]\w+)*|[^\w\s]"}
UNIT_NAMES = {"chinese": "characters", "english": "words"}


@dataclass(frozen=True)
class HistoryReplay:
    """The drafts for the second half of the captions of a run. A call verifies one draft, which may be empty.

    `accepted[i]` is the number of calls that accept more than i units. Each call also writes one unit of the verifying
    model. The end of a caption counts as a unit, and never as an accepted one.
    """

    mode: str
    language: str
    captions: int
    units: int
    calls: int
    drafted: int
    accepted: tuple[int, ...]

    @property
    def accepted_per_call(self) -> float:
        """Accepted units per call; ratio of sums."""
        return sum(self.accepted) / self.calls

    @property
    def units_per_call(self) -> float:
        """Units that a call writes, the verifying model's one included; ratio of sums."""
        return self.units / self.calls

    @property
    def workload(self) -> Workload:
        """The calls as input of the forecast."""
        chances = tuple(count / self.calls for count in self.accepted)
        return Workload(len(chances), chances, sent_with_draft=1.0)


def split_units(texts: Sequence[str], language: str) -> list[list[int]]:
    """Return the units of each text as ids from 1, with `END` after the last."""
    ids: dict[str, int] = {}
    units = [re.findall(UNIT_PATTERNS[language], text) for text in texts]
    return [[*(ids.setdefault(unit, len(ids) + 1) for unit in text), END] for text in units]


def replay(run: RecordedRun, length: int) -> HistoryReplay:
    """Return what drafts of up to `length` units from a history alone would have earned on a run.

    The history learns every caption, in the order of the file. Raise BadClip for a run of one caption.
    """
    if len(run.clips) < 2:
        raise BadClip(f"{run.name}: has one caption, and a history needs captions before it; give a file with more")
    texts = [clip.caption for clip in run.clips]
    language = run.setting("language") or find_language(texts)
    captions = split_units(texts, language)
    half = len(captions) // 2
    history = CaptionHistory()
    lookup = Lookup(history, {END})
    rounds: list[tuple[int, int]] = []
    for place, caption in enumerate(tqdm(captions, desc=run.name, unit="caption", disable=None, leave=False)):
        rounds += replay_caption(lookup, caption, length) if place >= half else []
        history.add(caption)
    return HistoryReplay(
        run.mode,
        language,
        len(captions) - half,
        sum(map(len, captions[half:])),
        len(rounds),
        sum(drafted for drafted, _ in rounds),
        tuple(sum(accepted > place for _, accepted in rounds) for place in range(length)),
    )


def replay_caption(lookup: Lookup, caption: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Return (drafted, accepted) of each call that writes a caption. Each adds the accepted units and one more."""
    rounds = []
    written = 0
    while written < len(caption):
        draft = lookup.propose([0, *caption[:written]], length)
        pairs = list(zip(draft, caption[written:-1], strict=False))
        accepted = next((place for place, (drafted, right) in enumerate(pairs) if drafted != right), len(pairs))
        rounds.append((len(draft), accepted))
        written += accepted + 1
    return rounds


def render_replays(replays: Sequence[HistoryReplay]) -> str:
    """Return a table of what the drafts earned, with a row per run."""
    rows = [
        [
            item.mode,
            UNIT_NAMES[item.language],
            item.captions,
            f"{item.units / item.captions:.1f}",
            f"{item.calls / item.captions:.1f}",
            f"{item.drafted / item.calls:.2f}",
            f"{item.accepted_per_call:.2f}",
            f"{item.units_per_call:.2f}",
        ]
        for item in replays
    ]
    headings = ["captions of", "units", "captions", "units a caption", "calls a caption"]
    headings += ["drafted a call", "accepted a call", "written a call"]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def largest_lookup_rtt(profile: Profile, item: HistoryReplay) -> float | None:
    """Return the round trip in seconds at which lookup takes as long as the cloud alone, or None if it always loses."""
    return forecast(profile, NO_LINK, item.workload, has_model=False).largest_rtt


def perfect_draft_seconds(profile: Profile, link: Link) -> float:
    """Return seconds per unit of a draft model whose drafts are all accepted, at the best k up to `MAX_K`."""
    workloads = (Workload(k, (1.0,) * k, sent_with_draft=1.0) for k in range(1, MAX_K + 1))
    return min(seconds_per_token(profile, link, workload) for workload in workloads)


def render_costs(profile: Profile, replays: Sequence[HistoryReplay]) -> str:
    """Return a table of the milliseconds per unit after prefill, by link. The cloud verifies all drafts."""
    verified = [item for item in replays if item.mode != "edge"]
    rows = [
        [
            link.name,
            *(
                f"{1000 * seconds:.0f}"
                for seconds in (
                    cloud_seconds_per_token(profile, link),
                    perfect_draft_seconds(profile, link),
                    *(seconds_per_token(profile.without_edge(), link, item.workload) for item in verified),
                )
            ),
        ]
        for link in LINKS.values()
    ]
    headings = ["ms a unit, by link", "cloud alone", "model drafts, all accepted"]
    headings += [f"lookup, {item.mode} captions" for item in verified]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def cost_sentences(profile: Profile, replays: Sequence[HistoryReplay]) -> list[str]:
    """Return lines that say if drafting by a model and lookup pay at the costs of a profile."""
    edge, cloud = profile.edge.step, profile.cloud.step
    pays = perfect_draft_seconds(profile, NO_LINK) < cloud
    lines = [
        f"profile {profile.name}: a draft token of the edge takes {1000 * edge:.0f} ms, a step of the cloud "
        f"{1000 * cloud:.1f} ms, and the edge's prefill, which lookup does without, {profile.edge.prefill:g} s",
        "drafting by the edge may pay against the cloud alone, if enough is accepted"
        if pays
        else "drafting by the edge never pays against the cloud alone, even if every draft token is accepted",
    ]
    for item in replays:
        if item.mode == "edge":
            guessed = profile.edge.seconds(item.drafted / item.calls + 1) / item.units_per_call
            lines.append(
                f"edge: {1000 * guessed:.0f} ms a unit if it checks guesses, {1000 * edge:.0f} ms if it does not"
            )
        else:
            rtt = largest_lookup_rtt(profile, item)
            links = f"on round trips below {1000 * rtt:.0f} ms" if rtt else "on no link"
            lines.append(f"{item.mode}: lookup pays against the cloud alone {links}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a file. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.lookup_replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", metavar="FILE", type=Path, help="recorded runs .jsonl, or a published results file")
    parser.add_argument("--mode", choices=MODES, help="the mode of a file that does not say which one it is of")
    parser.add_argument("--length", type=int, default=8, help="units of a draft, at most (default: %(default)s)")
    parser.add_argument(
        "--profile",
        default="published",
        help=f"the costs: {', '.join(PROFILE_NAMES)} or a YAML file (default: %(default)s)",
    )
    options = parser.parse_args(hyphenate(arguments))
    if options.length < 1:
        parser.error(f"--length: {options.length} is not a whole number of at least 1")
    with errors_to_exit():
        profile = load_profile(options.profile)
        replays = [replay(run, options.length) for run in read_recorded_runs(options.file, options.mode)]
        print(render_replays(replays), render_costs(profile, replays), sep="\n\n")
        print("", *cost_sentences(profile, replays), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
