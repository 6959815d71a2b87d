"""Every option of the suite, and what `pytest` alone collects: tests, or with --benchmark-only the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark import plugin as pytest_benchmark

from bench.cases import SETTINGS
from bench.rows import row_metric
from edgecloud_sd import config as settings_room

REQUIREMENTS = ("gpu",)  # markers whose skip --require turns into a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("edgecloud_sd", "edge-cloud speculative decoding (defaults: bench/configs/default.yaml)")
    group.addoption(
        "--config", metavar="FILE", help="YAML file of options, over the defaults and under the command line"
    )
    defaults = settings_room.read_file(settings_room.defaults_file())
    for option in settings_room.OPTIONS:
        default = settings_room.show_default(defaults[option.name])
        many = "; a comma-separated list makes a grid" if option.many else ""
        names = dict.fromkeys([f"--{option.name}", f"--{option.name.replace('-', '_')}"])
        help = f"{option.help}{many} (default: {default})".replace("%", "%%")
        group.addoption(*names, dest=_dest(option.name), metavar="LIST" if option.many else "VALUE", help=help)
    group.addoption(
        "--resume", action="store_true", help="go on with a run that was stopped: clips it finished are not done again"
    )
    group.addoption(
        "--require", choices=REQUIREMENTS, action="append", default=[], help="fail, not skip, tests that need this"
    )


def pytest_configure(config: pytest.Config) -> None:
    given = {option.name: config.getoption(_dest(option.name)) for option in settings_room.OPTIONS}
    file = config.getoption("--config")
    try:
        config.stash[SETTINGS] = settings_room.resolve(given, Path(file) if file else None)
    except settings_room.ConfigError as error:
        raise pytest.UsageError(str(error)) from None
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        folder = "bench" if config.getoption("--benchmark-only") else "tests"
        config.args = [str(config.rootpath / folder)]


def pytest_benchmark_scale_unit(
    config: Any, unit: str, benchmarks: list[dict[str, Any]], best: Any, worst: Any, sort: str
) -> tuple[str, float]:
    """Rows of metrics are shown as they are; the rest as pytest-benchmark does. Its own command calls this too."""
    if any(row_metric(each["name"]) for each in benchmarks):
        return "", 1.0
    scale: tuple[str, float] = pytest_benchmark.pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort)
    return scale


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            reason = "needs an NVIDIA GPU"
            pytest.fail(reason) if "gpu" in item.config.getoption("--require") else pytest.skip(reason)


def _dest(name: str) -> str:
    return f"edgecloud_{name.replace('-', '_')}"


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> settings_room.Settings:
    """What the command line, the file and the defaults ask for."""
    return pytestconfig.stash[SETTINGS]
