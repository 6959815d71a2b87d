"""The options of the suite, and the folder that plain `pytest` collects: tests/, or bench/ with --benchmark-only."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark import plugin as pytest_benchmark

from bench.baselines import baseline_cases
from bench.cases import SETTINGS, plain_params
from bench.load import list_load_cases
from bench.regression import FAIL_RULES, RULE_HELP, FailRule, parse_fail_rule
from bench.rows import row_metric
from edgecloud_sd import config as options
from edgecloud_sd.config import GROUPS, Option, Settings
from edgecloud_sd.data.dataset import BadClip
from edgecloud_sd.host.passwords import hide_passwords
from edgecloud_sd.host.terminal import escape_unencodable
from edgecloud_sd.models.hub import CHECKPOINT_NAME
from edgecloud_sd.pocket.clips import POCKET, manifest_path
from edgecloud_sd.strategy import Strategy

REQUIREMENTS = ("gpu",)  # markers that --require accepts
EXTRAS = {"load": list_load_cases, "baselines": baseline_cases}  # bench/test_<name>.py, and its cases in a run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the run itself, then those of `Settings` in one group of the help text per subject."""
    run = parser.getgroup("edgecloud_sd run", "edgecloud_sd: run")
    run.addoption(
        "--config",
        metavar="FILE",
        help="YAML file of options; it overrides the defaults, and the command line overrides it",
    )
    run.addoption(
        "--extra",
        type=_read_extras,
        metavar="LIST",
        default=(),
        help=f"benchmarks beside the captions: {', '.join(EXTRAS)} (default: none; naming their file runs them too)",
    )
    run.addoption("--resume", action="store_true", help="continue a stopped run: finished clips are not decoded again")
    run.addoption("--fail-if", "--fail_if", metavar="METRIC:LIMIT", action="append", default=[], help=RULE_HELP)
    run.addoption(
        "--require", choices=REQUIREMENTS, action="append", default=[], help="fail the tests with this marker, not skip"
    )
    groups = {name: parser.getgroup(f"edgecloud_sd {name}", f"edgecloud_sd: {name}") for name in GROUPS}
    for option in options.OPTIONS:
        _add_option(groups[option.group], option)


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the options, and choose the folder to collect if the command line names none.

    A warning fails a test. It fails no benchmark, because a library may deprecate a name at any time.
    """
    escape_unencodable()
    if config.getoption("benchmark_histogram", None):
        refuse_missing_packages("--benchmark-histogram", "pygal", "pygaljs")
    given = {option.name: config.getoption(_destination(option.name)) for option in options.OPTIONS}
    file = config.getoption("--config")
    try:
        config.stash[SETTINGS] = options.resolve(given, Path(file) if file else None)
    except options.ConfigError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[FAIL_RULES] = _read_fail_rules(config)
    is_benchmark = config.getoption("--benchmark-only")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / ("bench" if is_benchmark else "tests"))]
    if _collects_benchmarks(config):
        try:
            _check_benchmarks(config, config.stash[SETTINGS])
        except pytest.UsageError as error:
            raise pytest.UsageError(hide_passwords(str(error))) from None
    # in front, because the last filter that matches wins: the lines of pytest.ini stay exceptions
    config.getini("filterwarnings").insert(0, "default" if is_benchmark else "error")


def pytest_report_header(config: pytest.Config) -> str:
    """Name the settings of --config that mean nothing here."""
    file = config.getoption("--config")
    return options.note_unused_settings(Path(file)) if file else ""


def _read_fail_rules(config: pytest.Config) -> list[FailRule]:
    try:
        rules = [parse_fail_rule(text) for text in config.getoption("--fail-if")]
    except ValueError as error:
        raise pytest.UsageError(f"--fail-if: {error}") from None
    if rules and not config.getoption("benchmark_compare", None):
        raise pytest.UsageError("--fail-if: needs an earlier run; name one with --benchmark-compare=NUMBER")
    return rules


def refuse_missing_packages(option: str, *packages: str) -> None:
    """Raise UsageError if an option needs packages that are not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise pytest.UsageError(
            f"{option}: needs {' and '.join(missing)}, which is not installed: pip install {' '.join(packages)}"
        )


def pytest_benchmark_scale_unit(
    config: Any, unit: str, benchmarks: list[dict[str, Any]], best: Any, worst: Any, sort: str
) -> tuple[str, float]:
    """Leave rows of metrics in their own unit; scale other rows as pytest-benchmark does.

    `pytest-benchmark compare` calls this hook too.
    """
    if any(row_metric(benchmark["name"]) for benchmark in benchmarks):
        return "", 1.0
    scale: tuple[str, float] = pytest_benchmark.pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort)
    return scale


def pytest_benchmark_group_stats(
    config: Any, benchmarks: Iterable[dict[str, Any]], group_by: str
) -> list[tuple[str | None, list[dict[str, Any]]]]:
    """Group benchmarks as pytest-benchmark does, without rows of metrics unless nothing else is selected.

    `pytest-benchmark compare` calls this hook too, and a saved run has some thirty metrics per benchmark.
    """
    rows = list(benchmarks)
    shown = [row for row in rows if not row_metric(row["name"])] or rows
    if hidden := len(rows) - len(shown):
        print(f"(rows of metrics that are not shown: {hidden}; -k bleu4 shows one metric, -k ]: all)")
    try:
        groups: list[tuple[str | None, list[dict[str, Any]]]] = pytest_benchmark.pytest_benchmark_group_stats(
            config, shown, group_by
        )
    except KeyError as error:
        known = ", ".join(sorted(set.intersection(*(set(row["params"] or ()) for row in shown))))
        raise SystemExit(f"--group-by {group_by}: not all benchmarks have {error}; they have {known}") from None
    return groups


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` on a machine without one, or fail it under `--require gpu`."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            reason = "needs an NVIDIA GPU"
            pytest.fail(reason) if "gpu" in item.config.getoption("--require") else pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """End with one line if pytest-benchmark cannot write its file, as on a full disk."""
    try:
        return (yield)
    except OSError as error:
        if not _collects_benchmarks(session.config):
            raise
        reason = f"the saved benchmark cannot be written ({error}); the results files of all cells are kept"
        raise pytest.exit.Exception(reason, returncode=pytest.ExitCode.TESTS_FAILED) from None


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """Return the settings from the defaults, the file of --config and the command line."""
    return pytestconfig.stash[SETTINGS]


def _collects_benchmarks(config: pytest.Config) -> bool:
    """Return whether the arguments of the run name the folder of the benchmarks, a part of it or a folder above it."""
    bench = config.rootpath / "bench"
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    return any(path.is_relative_to(bench) or bench.is_relative_to(path) for path in map(Path.resolve, paths))


def _check_benchmarks(config: pytest.Config, settings: Settings) -> None:
    """Raise UsageError for a run in which every benchmark would fail for the same reason."""
    is_distributed = config.getoption("dist", "no") != "no"
    is_disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    if (is_distributed or is_disabled) and not config.getoption("benchmark_skip"):
        option = "-n" if is_distributed else "--benchmark-disable"
        raise pytest.UsageError(f"{option}: a benchmark is timed and runs alone; leave it out, or name other tests")
    names = plain_params(settings, Strategy("edge"), settings.language[0])
    for grouping in config.getoption("benchmark_group_by").split(","):
        kind, _, name = grouping.partition("param:")
        if name and not kind and name not in names:
            raise pytest.UsageError(f"--benchmark-group-by: no benchmark has {name!r}; they have {', '.join(names)}")
    for extra in config.getoption("--extra"):
        if not EXTRAS[extra](settings):
            needs = " ".join((EXTRAS[extra].__doc__ or "").split("\n\n")[1].split())
            raise pytest.UsageError(f"--extra: {extra} is not possible here. {needs}")
    if settings.dataset_path != POCKET:
        try:
            for language in settings.language:
                manifest_path(settings.dataset_path, language)
        except BadClip as error:
            raise pytest.UsageError(f"--dataset-path: {error}") from None
    if settings.cloud_key_file and not Path(settings.cloud_key_file).is_file():
        raise pytest.UsageError(f"--cloud-key-file: {settings.cloud_key_file}: no such file")
    for name in ("edge_model", "cloud_model", "bertscore_model"):
        path = getattr(settings, name)
        if path and not Path(path).is_dir() and not _is_hub_name(path, needs_owner=name != "bertscore_model"):
            raise pytest.UsageError(
                f"--{name.replace('_', '-')}: {path}: no such folder; a name on the hub is like owner/name"
            )


def _is_hub_name(text: str, needs_owner: bool) -> bool:
    """Return whether a text may be a name on the hub. One that begins with `.` or an existing folder is a path."""
    parent = Path(text).parent
    is_path = text.startswith((".", "~")) or (parent != Path() and parent.is_dir())
    return not is_path and bool(CHECKPOINT_NAME.fullmatch(text) or (not needs_owner and "/" not in text))


def _read_extras(text: str) -> tuple[str, ...]:
    extras = tuple(text.split(","))
    for extra in extras:
        if extra not in EXTRAS:
            raise pytest.UsageError(f"--extra: {extra!r} is not one of {', '.join(EXTRAS)}")
    return extras


def _add_option(group: pytest.OptionGroup, option: Option) -> None:
    """Add one option, spelt with hyphens and with underscores."""
    spellings = dict.fromkeys([f"--{option.name}", f"--{option.name.replace('-', '_')}"])
    metavar = "LIST" if option.many else "VALUE"
    text = option.help_text.replace("%", "%%")
    group.addoption(*spellings, dest=_destination(option.name), metavar=metavar, help=text)


def _destination(name: str) -> str:
    return f"edgecloud_{name.replace('-', '_')}"
