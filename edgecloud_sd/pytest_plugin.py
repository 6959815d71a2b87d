"""A pytest plugin that lets options of the suite name paths outside the checkout.

pytest chooses its root folder before it knows the options of plugins and of a conftest.py. It then takes every existing
path among the arguments for a folder of tests. So `--dataset-path /elsewhere/manifest.json` moves the root to
`/elsewhere`, and pytest never reads the conftest.py of the suite (pytest-dev/pytest#1471, closed as known).
`--dataset-path=/elsewhere/manifest.json` has no such effect. If a run of a checkout has lost its root, this plugin
starts the run again with the second form and an explicit root.

Every pytest run loads this module, in every project of an environment that has edgecloud_sd. It therefore imports the
options only when it needs them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

RUN_OPTIONS = {"--config", "--extra", "--fail-if", "--fail_if", "--require"}  # options of conftest.py that take a value


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Start the run again with `--option=value` arguments if an option's path has moved the root folder."""
    checkout = early_config.invocation_params.dir
    if early_config.rootpath != checkout and (checkout / "bench" / "configs" / "default.yaml").is_file():
        from edgecloud_sd.config import OPTIONS

        spellings = {f"--{name}" for option in OPTIONS for name in (option.name, option.name.replace("-", "_"))}
        spellings |= RUN_OPTIONS
        joined = join(args, spellings)
        # argparse takes an option that it does not know, and that has a space, for a folder of tests
        others = [arg for arg in joined if arg.partition("=")[0] not in spellings]
        names_no_tests = not parser.parse_known_args(others).file_or_dir
        if names_no_tests:
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
