"""Checks of the values that a record is built with. Each error is one line with the field, the value and the fix."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any


def whole_number(field: str, value: Any, least: int, advice: str = "") -> int:
    """Return a whole number, one of numpy too, as an int.

    Raise TypeError for another type, with bool among them, and ValueError for a number below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{field} must be a whole number{advice}, not {shorten(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{field} must be at least {least}{advice}, not {number}")
    return number


def real_number(field: str, value: Any, advice: str = "") -> float:
    """Return a number, infinite or not, as a float. Raise TypeError for another type, and ValueError for nan."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{field} must be a number{advice}, not {shorten(value)}")
    if math.isnan(value):
        raise ValueError(f"{field} must be a number{advice}, not nan")
    return float(value)


def check_type(field: str, value: object, kind: type | tuple[type, ...], advice: str) -> None:
    """Raise TypeError unless `value` is of a type in `kind`. `advice` says what to write instead."""
    if not isinstance(value, kind):
        names = " or ".join(kind.__name__ for kind in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{field} must be of type {names}, not {shorten(value)}: {advice}")


def shorten(value: object) -> str:
    """Return a value as one short line."""
    return " ".join(reprlib.repr(value).split())
