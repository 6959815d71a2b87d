"""A pytest plugin that lets options of the suite name paths outside the checkout.

pytest chooses its root folder before it knows the options of plugins and of a conftest.py. It then takes every existing
path among the arguments for a folder of tests. So `--dataset-path /elsewhere/manifest.json` moves the root to
`/elsewhere`, and pytest never reads the conftest.py of the suite (pytest-dev/pytest#1471, closed as known).
`--dataset-path=/elsewhere/manifest.json` has no such effect. If a run of a checkout has lost its root, this plugin
starts the run again with the second form and an explicit root.

Every pytest run loads this module, in every project of an environment that has edgecloud_sd. It therefore imports
nothing of the suite.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

FLAGS = {"--resume"}  # options of the suite without a value


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Start the run again with `--option=value` arguments if an option's path has moved the root folder."""
    checkout = early_config.invocation_params.dir
    if early_config.rootpath != checkout and (checkout / "bench" / "configs" / "default.yaml").is_file():
        # options of the suite or mistyped ones: no plugin has them
        unknown = {arg for arg in parser.parse_known_and_unknown_args(list(args))[1] if arg.startswith("--")}
        joined = join(args, unknown - FLAGS)
        if unknown or not parser.parse_known_args(joined).file_or_dir:
            root = [f"--rootdir={checkout}", f"--config-file={checkout / 'pytest.ini'}"]
            raise SystemExit(pytest.main([*root, *joined]))
    return (yield)


def join(args: Sequence[str], names: set[str]) -> list[str]:
    """Return the arguments with each option in `names` joined to its value: `--k 3` becomes `--k=3`."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] in names and not arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined
