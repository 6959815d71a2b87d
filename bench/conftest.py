"""Fixtures of the benchmarks, and the hooks that add metrics to saved files and tables to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from bench import cases, rows, tables
from bench.budget import budget_lines, budget_parts, shared_clip_notes
from bench.cost_profile import measure_profile
from bench.forecasts import forecast_to_json
from bench.regression import FAIL_RULES, find_regressions
from bench.resume import SavedClips, comparable_limits, keep_other_results
from bench.session import (
    OUTCOMES,
    DataSet,
    Outcomes,
    Progress,
    errors_in_one_line,
    is_cloud_fault,
    outcomes,
    past_capture,
)
from edgecloud_sd.cloud.local import Cloud
from edgecloud_sd.config import MEASURE, Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.host.files import FileHeld, NoLock, hold_file
from edgecloud_sd.host.limits import LimitsInForce, read_limits
from edgecloud_sd.host.paths import hide_folders
from edgecloud_sd.measure import quality, results
from edgecloud_sd.measure.summary import ClipResult, summarise
from edgecloud_sd.pipeline import Pipeline
from edgecloud_sd.timing import profile as profiles
from edgecloud_sd.timing.clock import VirtualClock
from edgecloud_sd.timing.profile import Profile

MEASURED_CLIPS = 3  # clips that --profile measure decodes


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the benchmarks that need --extra. pytest does not ask about a file that the command line names."""
    extra = collection_path.stem.removeprefix("test_")
    return True if extra in ("load", "baselines") and extra not in config.getoption("--extra") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark of each case of the grid."""
    if "case" in metafunc.fixturenames:
        grid = cases.cases(metafunc.config.stash[cases.SETTINGS])
        metafunc.parametrize("case", grid, ids=[case.id for case in grid])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hold the files that the run will write, so that a second run with the same ones is refused before it decodes."""
    config = session.config
    settings = config.stash[cases.SETTINGS]
    if config.option.collectonly or not session.items:
        return
    locks = ExitStack()
    config.add_cleanup(locks.close)
    files = [tables.results_file(settings, case) for case in _selected_cases(session)]
    files += [tables.profile_file(settings)] if settings.profile == MEASURE else []
    for file in files:
        try:
            locks.enter_context(hold_file(file))
        except FileHeld as error:
            raise pytest.UsageError(f"{error}: wait for it, or choose another --output-name") from None
        except NoLock as error:
            outcomes(config).notes.append(f"{error}: let no second run write it")
        except OSError as error:
            raise pytest.UsageError(f"--results-dir: {file.parent}: cannot be written ({error.strerror})") from None


def _selected_cases(session: pytest.Session) -> list[cases.Case]:
    params = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return [param["case"] for param in params if "case" in param]


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Stop if no benchmark can run: all share what one of them cannot set up, or the cloud that has failed.

    The end of the run names each benchmark that was skipped.
    """
    if call.excinfo is None:
        return
    if call.excinfo.errisinstance(pytest.skip.Exception):
        outcomes(item.config).notes.append(f"{item.name}: did not run: {call.excinfo.value}")
    elif call.when == "setup":
        item.session.shouldfail = "the benchmarks share what failed"
    elif item.config.stash[cases.SETTINGS].on_cloud_fault != "edge" and is_cloud_fault(call.excinfo.value):
        item.session.shouldfail = "the cloud failed, and no benchmark waits for it again: --resume goes on"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fail with one line for an expected failure of a fixture."""
    with errors_in_one_line():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None]:
    """Fail with one line for an expected failure of a benchmark.

    A benchmark that failed or was stopped stays out of pytest-benchmark's tables and files, whose rows are whole cells.
    Its limits are lifted, because a report needs memory.
    """
    try:
        with errors_in_one_line():
            return (yield)
    except BaseException:
        if isinstance(process_limits := item.funcargs.get("process_limits"), ExitStack):
            process_limits.close()
        started = item.config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        started[:] = [stats for stats in started if stats.fullname != item.nodeid]
        raise


@pytest.fixture(scope="session")
def cloud(settings: Settings) -> Iterator[Cloud]:
    """Connect to the cloud of the run. A server starts before this process is held to any limit."""
    with ExitStack() as stack:
        with errors_in_one_line():
            cloud = stack.enter_context(connect(settings))
        yield cloud


@pytest.fixture(scope="session")
def pipeline(settings: Settings, cloud: Cloud) -> Pipeline:
    """Return the pipeline of the run. Each model loads when a case first needs it."""
    if settings.bertscore_model:  # a missing model must show before anything is captioned, not at the end
        with errors_in_one_line():
            quality.check_bertscore_model(settings.bertscore_model)
    return Pipeline.from_settings(settings, cloud)


@pytest.fixture(scope="session")
def cloud_tokens() -> dict[str, tuple[int, ...]]:
    """Keep the tokens of lossless captions by language and clip. Every lossless case must write the same."""
    return {}


@pytest.fixture(scope="session")
def data(settings: Settings, pytestconfig: pytest.Config) -> Callable[[str], DataSet]:
    """Return a function from a language to the data set of the run."""
    loaded: dict[str, DataSet] = {}

    def data_set(language: str) -> DataSet:
        if language not in loaded:
            with errors_in_one_line("\n(--on-bad-clip skip leaves bad clips out)"):
                loaded[language] = DataSet(settings, language)
            doubts = [f"warning: {doubt}" for clip in loaded[language].clips for doubt in clip.doubts]
            session = outcomes(pytestconfig)
            session.notes += [note for note in dict.fromkeys(doubts) if note not in session.notes]
        return loaded[language]

    return data_set


@pytest.fixture(scope="session")
def profile(
    settings: Settings, pipeline: Pipeline, data: Callable[[str], DataSet], pytestconfig: pytest.Config
) -> Profile | None:
    """Return the profile of the virtual clock, or None on the real one. `measure` times this machine first."""
    if settings.profile != MEASURE:
        return profiles.load_profile(settings.profile) if settings.profile else None
    file = tables.profile_file(settings)
    if pytestconfig.getoption("--resume") and file.exists():
        measured = replace(profiles.load_profile(str(file)), name=MEASURE)
    else:
        clips = data(settings.language[0])
        requests = [clips.request(clip) for clip in clips.clips[:MEASURED_CLIPS]]
        measured = measure_profile(pipeline, requests, settings.max_new_tokens)
        profiles.save_profile(measured, file)
        outcomes(pytestconfig).files.append(file)
    return measured if settings.clock == "virtual" else None


@pytest.fixture
def process_limits() -> Iterator[ExitStack]:
    """Hold this process to the limits of a case. They are lifted at its end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def run_clock(request: pytest.FixtureRequest) -> VirtualClock:
    """Return the timer of pytest-benchmark. It advances by the seconds of each caption, whatever clock or run timed it.

    A row therefore shows virtual seconds under a virtual clock, and saved seconds for a clip of a resumed run.
    """
    clock = VirtualClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture(scope="session")
def saved_clips(
    settings: Settings,
    pipeline: Pipeline,
    profile: Profile | None,
    data: Callable[[str], DataSet],
    request: pytest.FixtureRequest,
) -> Callable[[cases.Case], SavedClips]:
    """Return a function from a case to its finished clips, and to the file that keeps them.

    A run that does not resume starts the file of every case at once. A later --resume of it then takes nothing from
    the files of an older run.
    """
    environment = results.environment()
    session = outcomes(request.config)
    resume = request.config.getoption("--resume")
    to_start = [] if resume else _selected_cases(request.session)

    def open_saved(case: cases.Case, is_now: bool) -> SavedClips:
        digest = data(case.language).digest
        experiment = tables.describe_case(case, pipeline, settings, profile, digest)  # sets the threads of the case
        in_force = comparable_limits(asdict(read_limits())) if is_now else None
        header = {"experiment": experiment, "environment": environment, "in_force": in_force}
        saved = SavedClips(tables.results_file(settings, case), header, resume)
        if not resume:
            saved.start()
        return saved

    def find(case: cases.Case) -> SavedClips:
        while to_start:
            open_saved(to_start.pop(), is_now=False)
        session.saved = open_saved(case, is_now=True)
        session.notes += session.saved.notes
        return session.saved

    return find


@pytest.fixture
def progress(pytestconfig: pytest.Config) -> Iterator[Callable[[int, str], Progress]]:
    """Return a function that shows a bar for a number of clips under a name."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with past_capture(capture):  # a captured stderr is a file
        is_terminal = reporter is not None and reporter.isatty and sys.stderr.isatty()
    bars: list[Progress] = []

    def start(total: int, name: str) -> Progress:
        if is_terminal:
            with past_capture(capture):
                reporter.ensure_newline()  # the bar would overwrite the name of the test
        bars.append(Progress(total, name, capture if is_terminal else None))
        return bars[-1]

    yield start
    for bar in bars:
        bar.close()


@pytest.fixture
def show_lines(pytestconfig: pytest.Config) -> Callable[[Callable[[], list[str]]], None]:
    """Return a function that makes and prints lines under --verbose: above the bar, and past the capture of output."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def show(make_lines: Callable[[], list[str]]) -> None:
        if reporter is None or reporter.verbosity < 1:
            return
        with past_capture(capture), tqdm.external_write_mode():
            reporter.ensure_newline()
            for line in make_lines():
                reporter.write_line(line)
            reporter.flush()

    return show


@pytest.fixture
def report(
    pytestconfig: pytest.Config, settings: Settings, pipeline: Pipeline, profile: Profile | None
) -> Callable[[cases.Case, list[ClipResult], DataSet, LimitsInForce], dict[str, Any]]:
    """Return a function that summarizes a case for the tables, writes its results file and returns the document."""

    def add(case: cases.Case, captions: list[ClipResult], data: DataSet, in_force: LimitsInForce) -> dict[str, Any]:
        meaningless = tables.why_meaningless(settings, case)
        summary, scores = summarise(
            captions, case.language, settings.bertscore_model, meaningless, settings.score_normalisation
        )
        experiment = tables.describe_case(case, pipeline, settings, profile, data.digest)
        budget = budget_parts(settings, case.strategy, captions)
        document = results.results_document(experiment, captions, summary, scores, in_force, data.skipped, budget)
        file = tables.results_file(settings, case)
        session = outcomes(pytestconfig)
        session.notes += [
            *budget_lines(budget, case.id),
            *shared_clip_notes(settings, case.strategy, [clip.file_id for clip in data.clips]),
        ]
        session.notes += keep_other_results(file, experiment)
        results.write_results(file, document)
        session.captions[case.id] = (case, captions)
        session.summaries[case.id] = summary
        session.documents[case.id] = document
        session.profile = profile
        session.files.append(file)
        # traces stay in the results file: pytest-benchmark's file would grow by a hundred megabytes in a large run
        for clip in document["detailed_results"]:
            del clip["trace"]
        return document

    return add


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add a row per metric beside each captioning row, and the forecasts. Folders of this machine stay out."""
    output_json["benchmarks"] += [row for saved in output_json["benchmarks"] for row in rows.metric_rows(saved)]
    forecasts = config.stash.get(OUTCOMES, Outcomes()).forecasts(config.stash[cases.SETTINGS])
    output_json["forecasts"] = {name: forecast_to_json(answer) for name, answer in forecasts.items()}
    output_json |= hide_folders(output_json)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a cell is worse than in the run of --benchmark-compare by more than a rule of --fail-if."""
    if not (rules := session.config.stash[FAIL_RULES]):
        return
    run = outcomes(session.config)
    compared = session.config._benchmarksession.compared_mapping.values()  # type: ignore[attr-defined]
    documents = (row["extra_info"].get("results") for benchmarks in compared for row in benchmarks.values())
    earlier = {document["experiment_config"]["case"]: document for document in documents if document}
    run.regressions = list(find_regressions({case: earlier.get(case) for case in run.documents}, run.documents, rules))
    if not run.documents:
        run.regressions = ["no cell ran, so no rule could be checked"]
    if run.regressions and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    """Print the tables of the session after those of pytest-benchmark."""
    session = config.stash.get(OUTCOMES, None)
    if session is None:
        return
    for title, lines in session.sections(config.stash[cases.SETTINGS]):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    if session.regressions:
        terminalreporter.section("--fail-if: worse than in the earlier run, or not to be checked", red=True)
        for line in session.regressions:
            terminalreporter.write_line(line)
    for file in session.files:
        terminalreporter.write_line(f"wrote {file}")
    for note in session.notes:
        terminalreporter.write_line(note)
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.saved:
        terminalreporter.write_line(f"stopped: {session.saved.describe_kept()}")
