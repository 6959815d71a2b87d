"""The limit on the open files of this process."""

from __future__ import annotations

from edgecloud_sd.host.descriptors import raise_descriptor_limit
from tests.support.descriptors import soft_limit


def test_the_soft_limit_on_open_files_is_raised_to_the_hard_one() -> None:
    with soft_limit(512) as hard:
        assert raise_descriptor_limit() == hard
