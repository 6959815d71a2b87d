"""A pytest plugin, so that options may name paths anywhere.

pytest settles its root folder before it knows the options of plugins and of a conftest.py, and takes any existing path
among the arguments for a place of tests: `--dataset-path /elsewhere/manifest.json` moves the root there, and the
suite's own conftest.py is never read (pytest-dev/pytest#1471, closed as known). `--dataset-path=/elsewhere/...` does
not. Where that happened to a run of a checkout, this plugin starts it over with the second form and the root named.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    checkout = early_config.invocation_params.dir
    if early_config.rootpath != checkout and (checkout / "bench" / "configs" / "default.yaml").is_file():
        from edgecloud_sd import config

        names = {f"--{spelt}" for o in config.OPTIONS for spelt in (o.name, o.name.replace("-", "_"))} | {"--config"}
        joined = join(args, names)
        if not parser.parse_known_args(joined).file_or_dir:  # no place of tests was named: the checkout is meant
            root = [f"--rootdir={checkout}", f"--config-file={checkout / 'pytest.ini'}"]
            raise SystemExit(pytest.main([*root, *joined]))
    return (yield)


def join(args: Sequence[str], names: set[str]) -> list[str]:
    """The arguments with each of the options `names` and its value in one: `--k 3` becomes `--k=3`."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] in names and not arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined
