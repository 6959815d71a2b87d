"""Passwords in URLs, which no message may show: the one rule for messages, logs and files."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

AT_SIGN = re.compile("@|%40|[\uff20\ufe6b]")  # also as an escape, and as the signs that a URL reads as one
SCHEME_END = re.compile(r"\w:/{1,2}")
SECRETS = r"passw|pwd|token|secret|signature|credential|auth|api[_-]?key|access[_-]?key"
PARAMETER = re.compile(rf"(?i)([?&;][\w.-]{{0,99}}(?:{SECRETS})[\w.-]{{0,99}}=)[^\s&;#'\"]+")
HIDDEN = "***"


def hide_passwords(text: str) -> str:
    """Return a text with `***` for the user, the password and the secret parameters of each URL in it.

    The time grows with the length alone, because the text may come from any server.
    """
    return PARAMETER.sub(rf"\g<1>{HIDDEN}", re.sub(r"\S+", _hide_user, text))


def _hide_user(word: re.Match[str]) -> str:
    """Return a word with `***` for all between the first end of a scheme and the last at sign after it."""
    scheme = SCHEME_END.search(word[0])
    signs = list(AT_SIGN.finditer(word[0], scheme.end())) if scheme else []
    return f"{word[0][: scheme.end()]}{HIDDEN}@{word[0][signs[-1].end() :]}" if scheme and signs else word[0]


class SafeArgumentParser(argparse.ArgumentParser):
    """A parser whose errors show no password."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        super().error(hide_passwords(message))
