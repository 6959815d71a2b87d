"""Passwords in URLs, which no message may show: the one rule for messages, logs and files."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

AT_SIGN = "(?:@|%40|[\uff20\ufe6b])"  # also as an escape, and as the signs that a URL reads as one
USER = re.compile(rf"(?i)(\w:/{{1,2}})\S*{AT_SIGN}")
PARAMETER = re.compile(
    r"(?i)([?&;][\w.-]*(?:passw|pwd|token|secret|signature|credential|auth|api[_-]?key|access[_-]?key)[\w.-]*=)[^\s&;#'\"]+"
)
HIDDEN = "***"


def hide_passwords(text: str) -> str:
    """Return a text with `***` for the user, the password and the secret parameters of each URL in it."""
    return PARAMETER.sub(rf"\g<1>{HIDDEN}", USER.sub(rf"\g<1>{HIDDEN}@", text))


class SafeArgumentParser(argparse.ArgumentParser):
    """A parser whose errors show no password."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        super().error(hide_passwords(message))
