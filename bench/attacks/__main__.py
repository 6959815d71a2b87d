"""Attack servers of this package, and print what each attack gives: `python -m bench.attacks`.

It attacks only servers that it starts itself on loopback, with the pocket pair, so it takes no URL and no key.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from bench.attacks import connections, crowding, giving_up, gone, signals, turns
from bench.attacks.table import AttackTable, Cell, render_attack_table
from edgecloud_sd.host.descriptors import raise_descriptor_limit
from edgecloud_sd.host.errors import errors_to_exit
from edgecloud_sd.host.terminal import hyphenate

SECTIONS = (
    connections.BEFORE_THE_KEY,
    turns.TURNS,
    gone.GONE,
    crowding.CROWDING,
    giving_up.GIVING_UP,
    signals.LEFT_BEHIND,
)
NAMES = tuple(name for section in SECTIONS for name in section.attacks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit with one line if a server does not start, or for another expected failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=__doc__)
    names = f"attacks to run, with commas between them (default: all): {', '.join(NAMES)}"
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAMES", help=names)
    chosen = parser.parse_args(hyphenate(arguments)).only.split(",")
    for name in chosen:
        if name not in NAMES:
            parser.error(f"--only: {name!r} is not one of {', '.join(NAMES)}")
    with errors_to_exit():
        raise_descriptor_limit()  # this process holds more connections than a server may
        run_attacks(SECTIONS, chosen)


def run_attacks(sections: Sequence[AttackTable], chosen: Sequence[str]) -> None:
    """Run the chosen attacks, and print the table of each section when its attacks are done."""
    with tqdm(total=len(chosen), desc="attacks", unit="attack", disable=None, leave=False) as bar:
        for section in sections:
            names = [name for name in section.attacks if name in chosen]
            rows: dict[str, Sequence[Cell]] = {}
            for name, cells in zip(names, section.measure(names), strict=True) if names else ():
                rows[name] = cells
                bar.update()
            if rows:
                tqdm.write(render_attack_table(section, rows))


if __name__ == "__main__":
    main()
