"""Fixtures of the benchmarks, the table after pytest-benchmark's own, and the results files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tqdm import tqdm

from bench import baselines, cases, forecasts, load, rows, tables
from bench.calibrate import measure
from bench.comparison import Document
from bench.resume import Unfinished
from edgecloud_sd import gate
from edgecloud_sd.acceptance import Synthetic
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.config import MEASURE, Settings
from edgecloud_sd.connect import connect
from edgecloud_sd.data import dataset
from edgecloud_sd.data.dataset import Clip
from edgecloud_sd.forecast import model as oracle
from edgecloud_sd.host.limits import LimitsInForce
from edgecloud_sd.measure import metrics, quality, results
from edgecloud_sd.measure.summary import ClipResult, Summary, summarise
from edgecloud_sd.models.pairs import DUMMY
from edgecloud_sd.pipeline import Captioner, Request
from edgecloud_sd.pocket import clips
from edgecloud_sd.timing import profile as profiles
from edgecloud_sd.timing.clock import VirtualClock
from edgecloud_sd.timing.profile import Profile
from edgecloud_sd.verifier import CloudFault


class Done:
    """What a run has to show at its end, by case id."""

    def __init__(self) -> None:
        self.captions: dict[str, tuple[cases.Case, list[ClipResult]]] = {}
        self.summaries: dict[str, Summary] = {}
        self.documents: dict[str, Document] = {}
        self.loads: dict[str, tuple[load.LoadCase, dict[str, float]]] = {}
        self.peers: dict[str, list[dict[str, baselines.TimedCaption]]] = {}
        self.files: list[Path] = []
        self.profile: Profile | None = None  # of the virtual clock


DONE = pytest.StashKey[Done]()
MEASURED_CLIPS = 3  # that --profile measure decodes


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    settings = config.stash[cases.SETTINGS]
    unasked = (collection_path.name == "test_load.py" and not load.list_load_cases(settings)) or (
        collection_path.name == "test_baselines.py" and baselines.is_left_out(settings)
    )
    return True if unasked else None  # rather than a case that is skipped for want of parameters


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
    try:
        yield
    except (ValueError, OSError, CloudFault) as error:
        raise pytest.fail.Exception(f"{error}{hint}", pytrace=False) from None


class DataSet:
    """The clips of a run in one language, read once."""

    def __init__(self, settings: Settings, language: str) -> None:
        path = clips.manifest_path(settings.dataset_path, language)
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
def connection(settings: Settings) -> Iterator[Connection | None]:
    """The server that a run asks for, started before this process is held to any limit."""
    with ExitStack() as stack:
        with problems_in_one_line():
            found = stack.enter_context(connect(settings))
        yield found


@pytest.fixture(scope="session")
def captioner(settings: Settings, connection: Connection | None) -> Captioner:
    """The pair of the run; each side is loaded when a case first needs it."""
    if settings.bertscore_model:  # before anything is captioned: it is needed last
        with problems_in_one_line():
            quality.check_bertscore_model(settings.bertscore_model)
    return Captioner.of(settings, connection)


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


@pytest.fixture(scope="session")
def profile(
    settings: Settings, captioner: Captioner, data: Callable[[str], DataSet], pytestconfig: pytest.Config
) -> Profile | None:
    """The costs of the virtual clock, or None on the real one. `measure` writes this machine's first."""
    if settings.profile == MEASURE:
        chosen = data(settings.language[0])
        file = Path(settings.results_dir) / f"{settings.output_name}-profile.yaml"
        if pytestconfig.getoption("--resume") and file.exists():
            measured = replace(profiles.load_profile(str(file)), name=MEASURE)
        else:
            requests = [chosen.request(clip) for clip in chosen.clips[:MEASURED_CLIPS]]
            measured = measure(captioner, requests, settings.max_new_tokens)
            profiles.save_profile(measured, file)
            pytestconfig.stash.setdefault(DONE, Done()).files.append(file)
        return measured if settings.clock == "virtual" else None
    return profiles.load_profile(settings.profile) if settings.profile else None


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """The limits that a case holds this process to, lifted at its end whatever comes."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def run_clock(request: pytest.FixtureRequest) -> VirtualClock:
    """The timer of pytest-benchmark: goes on by what each caption took, on whatever clock and in whatever run.

    So a row shows virtual seconds for a virtual clock, and the seconds that were saved for a clip that a resumed run
    does not decode again.
    """
    clock = VirtualClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture(scope="session")
def unfinished(
    settings: Settings, captioner: Captioner, profile: Profile | None, request: pytest.FixtureRequest
) -> Callable[[cases.Case], Unfinished]:
    """What a case has finished before, and where to note what it finishes now.

    A run that does not resume begins every case's file at once: were it stopped in its first case, a resumed run would
    take the others from what an older run had left.
    """
    environment = results.environment()
    resume = request.config.getoption("--resume")
    specs = [item.callspec.params for item in request.session.items]  # type: ignore[attr-defined]
    to_begin = [] if resume else [params["case"] for params in specs if "case" in params]

    def saved(case: cases.Case) -> Unfinished:
        experiment = tables.describe_case(case, captioner, settings, profile)
        header = {"experiment": experiment, "environment": environment}
        return Unfinished(tables.results_file(settings, case), header, resume)

    def find(case: cases.Case) -> Unfinished:
        while to_begin:
            saved(to_begin.pop()).begin()
        return saved(case)

    return find


class Progress:
    """A bar with clips and the running OTPS on a terminal; nothing elsewhere."""

    def __init__(self, total: int, name: str, capture: Any) -> None:
        self._capture = capture
        self._tokens, self._seconds = 0, 0.0
        with self._quiet():
            self._bar = tqdm(total=total, desc=name, unit="clip", leave=False, disable=capture is None)

    def advance(self, caption: ClipResult | None = None) -> None:
        if caption and caption.after_first:
            tokens, seconds = caption.after_first
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        otps = metrics.otps(self._tokens + 1, 0.0, self._seconds)
        with self._quiet():
            self._bar.set_postfix_str("" if otps is None else f"OTPS {otps:.1f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        with self._quiet():
            self._bar.close()

    def _quiet(self) -> AbstractContextManager[None]:
        return self._capture.global_and_fixture_disabled() if self._capture else nullcontext()


@pytest.fixture
def progress(pytestconfig: pytest.Config) -> Iterator[Callable[[int, str], Progress]]:
    """Starts a bar for so many clips under a name."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    terminal = reporter is not None and reporter.isatty and sys.__stderr__ is not None and sys.__stderr__.isatty()
    bars: list[Progress] = []

    def start(total: int, name: str) -> Progress:
        bars.append(Progress(total, name, pytestconfig.pluginmanager.getplugin("capturemanager") if terminal else None))
        return bars[-1]

    yield start
    for bar in bars:
        bar.close()


@pytest.fixture
def report(
    pytestconfig: pytest.Config, settings: Settings, captioner: Captioner, profile: Profile | None
) -> Callable[[cases.Case, list[ClipResult], DataSet, LimitsInForce], dict[str, object]]:
    """Sums up a case for the tables, writes its results file, and returns what the file holds."""

    def add(case: cases.Case, captions: list[ClipResult], data: DataSet, held: LimitsInForce) -> dict[str, object]:
        meaningless = None
        if settings.weights == DUMMY:
            meaningless = "weights are random, so captions mean nothing"
        elif isinstance(case.cell.rule, Synthetic):
            meaningless = f"rule {case.cell.rule.text} keeps tokens by chance, so captions mean nothing"
        summary, scores = summarise(captions, case.language, settings.bertscore_model, meaningless)
        experiment = tables.describe_case(case, captioner, settings, profile)
        document = results.results_document(experiment, captions, summary, scores, held, data.skipped)
        file = tables.results_file(settings, case)
        results.write_results(file, document)
        done = pytestconfig.stash.setdefault(DONE, Done())
        done.captions[case.id] = (case, captions)
        done.summaries[case.id] = summary
        done.documents[case.id] = document
        done.profile = profile
        done.files.append(file)
        # the traces stay in the results file: in pytest-benchmark's they would make a hundred megabytes of a large run
        for clip in document["detailed_results"]:
            del clip["trace"]
        return document

    return add


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """A row a metric beside each captioning row, and the oracle's answers."""
    output_json["benchmarks"] += [row for each in output_json["benchmarks"] for row in rows.metric_rows(each)]
    found = answers(config.stash.get(DONE, Done()), config.stash[cases.SETTINGS])
    output_json["verdicts"] = {name: forecasts.forecast_to_json(each) for name, each in found.items()}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(DONE, None)
    if done is None:
        return
    if done.summaries:
        terminalreporter.section("captions")
        terminalreporter.write_line(tables.render_summaries(done.summaries))
        terminalreporter.section("where the time goes")
        terminalreporter.write_line(tables.render_breakdowns(done.summaries))
        speedups = tables.render_speedups(done.documents)
        if speedups:
            terminalreporter.section("does it pay?")
            terminalreporter.write_line(speedups)
        settings = config.stash[cases.SETTINGS]
        for name, answer in answers(done, settings).items():
            terminalreporter.write_line(f"{name}: {forecasts.forecast_sentence(answer)}")
    if done.loads:
        terminalreporter.section("many edges on one cloud")
        terminalreporter.write_line(load.render_load(done.loads))
    if done.peers:
        terminalreporter.section("beside transformers' generate")
        terminalreporter.write_line(baselines.render_baselines(done.peers))
    for file in done.files:
        terminalreporter.write_line(f"wrote {file}")


def answers(done: Done, settings: Settings) -> dict[str, oracle.Forecast | str]:
    """What the oracle says of each speculative cell."""
    cells = {
        name: forecasts.Decoded(
            case.cell.mode,
            None if case.cell.stop else case.cell.k,
            gate.statistics_per_token(case.cell.gate, case.cell.stop),
            case.cell.link,
            case.cell.open == "eager",
            case.cell.ahead,
            case.cell.is_lossless,
            [each.trace for each in captions],
        )
        for name, (case, captions) in done.captions.items()
    }
    together = settings.edge_device == settings.cloud_device and settings.clock == "real" and not settings.cloud_url
    return forecasts.forecast_cells(cells, done.profile, together)
