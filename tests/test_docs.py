"""The documents: generated pages are current, links lead somewhere, and every room's README lists its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import docs
from edgecloud_sd.timing import link, profile

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / "edgecloud_sd", ROOT / "bench", ROOT / "tests"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(file for room in ROOMS for file in room.rglob("*.md"))])
READMES = [file for file in DOCUMENTS if file.name == "README.md" and file.parent != ROOT]
UNLISTED = {"README.md", "__init__.py", "__pycache__"}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """Return the names by which a link can lead to the headings of a document, as on GitHub."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", docs.PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    written = (ROOT / "bench" / name).read_text(encoding="utf-8")
    assert written == docs.PAGES[name](), "run python -m bench.docs"


def test_a_bar_in_a_cell_does_not_split_it() -> None:
    assert docs.markdown_table(("a", "b"), [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_relative_link_leads_to_a_file_and_to_a_heading_of_it(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_shows_the_command_of_the_checks() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert "tox" in command
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_the_readme_of_a_room_lists_its_files(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    entries = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in readme.parent.iterdir()]
    assert [entry for entry in sorted(entries) if entry.strip("/") not in UNLISTED and f"`{entry}`" not in text] == []


def test_the_presets_of_links_and_the_profiles_are_documented() -> None:
    text = (ROOT / "edgecloud_sd" / "timing" / "README.md").read_text(encoding="utf-8")
    for preset in [preset for preset in link.LINKS.values() if preset != link.NO_LINK]:
        cells = (
            f"{1e3 * preset.rtt:g} ms",
            f"{preset.up / 1e6:g}",
            f"{preset.down / 1e6:g}",
            f"{1e3 * preset.jitter:g} ms",
        )
        assert f"| `{preset.name}` | {' | '.join(cells)} |" in text
    assert [name for name in profile.PROFILE_NAMES if f"| `{name}` |" not in text] == []
