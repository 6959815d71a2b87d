"""Fixtures of the benchmarks, the table after pytest-benchmark's own, and the results files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from tqdm import tqdm

from bench import cases, table
from edgecloud_sd import dataset, results
from edgecloud_sd.captioner import Captioner, Request
from edgecloud_sd.config import Settings
from edgecloud_sd.records import Clip

ROWS = pytest.StashKey[dict[str, results.Summary]]()
FILES = pytest.StashKey[list[Path]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        grid = cases.cases(metafunc.config.stash[cases.SETTINGS])
        metafunc.parametrize("case", grid, ids=[case.id for case in grid])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # a library's warning about your models or GPU is no reason to lose a run
        item.add_marker(pytest.mark.filterwarnings("default"))


@contextmanager
def problems_in_one_line(hint: str = "") -> Iterator[None]:
    """What cannot be used, be it clip, checkpoint or device, is said plainly, not as a traceback."""
    problem = ""
    try:
        yield
    except (ValueError, OSError) as error:
        problem = f"{error}{hint}"
    if problem:  # outside the except clause, whose traceback pytest would show
        pytest.fail(problem, pytrace=False)


class DataSet:
    """The clips of a run in one language, read once."""

    def __init__(self, settings: Settings, language: str) -> None:
        path = dataset.manifest_path(settings.dataset_path, language)
        self.clips, self.skipped = dataset.load_manifest(
            path, language, settings.caption_type, settings.on_bad_clip, settings.max_samples
        )
        self._prompt_type = settings.prompt_type
        self._samples: dict[str, NDArray[np.float32]] = {}

    def request(self, clip: Clip) -> Request:
        if clip.file_id not in self._samples:
            self._samples[clip.file_id] = dataset.load_audio(clip.audio_path)
        return Request(self._samples[clip.file_id], clip.language, self._prompt_type, clip.transcription)


@pytest.fixture(scope="session")
def captioner(settings: Settings) -> Captioner:
    """The pair of the run; each side is loaded when a case first needs it."""
    return Captioner.of(settings)


@pytest.fixture(scope="session")
def cloud_tokens() -> dict[str, tuple[int, ...]]:
    """Cloud mode's own output by language and clip, for the strict cells that run after it."""
    return {}


@pytest.fixture(scope="session")
def data(settings: Settings) -> Callable[[str], DataSet]:
    """The data set of the run in a language."""
    loaded: dict[str, DataSet] = {}

    def load(language: str) -> DataSet:
        if language not in loaded:
            with problems_in_one_line("\n(--on-bad-clip skip leaves bad clips out)"):
                loaded[language] = DataSet(settings, language)
        return loaded[language]

    return load


@pytest.fixture
def progress(pytestconfig: pytest.Config) -> Iterator[Callable[[int, str], Callable[[], None]]]:
    """Makes a bar on a terminal, and nothing elsewhere: call it with clips and name, then call what it returns."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    if not reporter.isatty:
        yield lambda total, name: lambda: None
        return
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    bars: list[tqdm[NoReturn]] = []

    def start(total: int, name: str) -> Callable[[], None]:
        with capture.global_and_fixture_disabled():
            bars.append(tqdm(total=total, desc=name, unit="clip", leave=False))
        return advance

    def advance() -> None:
        with capture.global_and_fixture_disabled():
            bars[-1].update()

    yield start
    with capture.global_and_fixture_disabled():
        for bar in bars:
            bar.close()


@pytest.fixture
def report(
    pytestconfig: pytest.Config, settings: Settings, captioner: Captioner
) -> Callable[[cases.Case, list[results.ClipResult], DataSet], results.Summary]:
    """Sums up a case for the table, and writes its results file."""

    def add(case: cases.Case, done: list[results.ClipResult], data: DataSet) -> results.Summary:
        summary, scores = results.summarise(done, case.language)
        experiment = table.describe(case, captioner.pair, settings)
        file = table.results_file(settings, case)
        results.write(file, results.document(experiment, done, summary, scores, data.skipped))
        pytestconfig.stash.setdefault(ROWS, {})[case.id] = summary
        pytestconfig.stash.setdefault(FILES, []).append(file)
        return summary

    return add


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, {})
    if rows:
        terminalreporter.section("captions")
        terminalreporter.write_line(table.render(rows))
        for file in config.stash[FILES]:
            terminalreporter.write_line(f"wrote {file}")
