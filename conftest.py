"""The options of the suite, and the folder that plain `pytest` collects: tests/, or bench/ with --benchmark-only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark import plugin as pytest_benchmark

from bench.cases import SETTINGS
from bench.rows import row_metric
from edgecloud_sd import config as options
from edgecloud_sd.config import GROUPS, Option, Settings
from edgecloud_sd.host.terminal import escape_unencodable

REQUIREMENTS = ("gpu",)  # markers that --require accepts


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the run itself, then those of `Settings` in one group of the help text per subject."""
    run = parser.getgroup("edgecloud_sd run", "edgecloud_sd: run")
    run.addoption(
        "--config",
        metavar="FILE",
        help="YAML file of options; it overrides the defaults, and the command line overrides it",
    )
    run.addoption("--resume", action="store_true", help="continue a stopped run: finished clips are not decoded again")
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
    is_benchmark = config.getoption("--benchmark-only")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / ("bench" if is_benchmark else "tests"))]
    # in front, because the last filter that matches wins: the lines of pytest.ini stay exceptions
    config.getini("filterwarnings").insert(0, "default" if is_benchmark else "error")


def pytest_report_header(config: pytest.Config) -> str:
    """Name the settings of --config that mean nothing here."""
    file = config.getoption("--config")
    return options.note_unused_settings(Path(file)) if file else ""


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` on a machine without one, or fail it under `--require gpu`."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            reason = "needs an NVIDIA GPU"
            pytest.fail(reason) if "gpu" in item.config.getoption("--require") else pytest.skip(reason)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """Return the settings from the defaults, the file of --config and the command line."""
    return pytestconfig.stash[SETTINGS]


def _add_option(group: pytest.OptionGroup, option: Option) -> None:
    """Add one option, spelt with hyphens and with underscores."""
    spellings = dict.fromkeys([f"--{option.name}", f"--{option.name.replace('-', '_')}"])
    metavar = "LIST" if option.many else "VALUE"
    text = option.help_text.replace("%", "%%")
    group.addoption(*spellings, dest=_destination(option.name), metavar=metavar, help=text)


def _destination(name: str) -> str:
    return f"edgecloud_{name.replace('-', '_')}"
