"""Checks of what public functions are given: each error names the argument, the rule, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any

from .errors import UsageError, did_you_mean


def came(value: Any) -> str:
    """What came, in words: a number or a text as it is, `None`, otherwise its kind, `a list`."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None, *, why: str = "") -> int:
    """`value` as a whole number from `low` to `high`; True and 2.0 are none. Raises UsageError."""
    limits = f" from {low} to {high}" if high is not None else f" of {low} or more" if low is not None else ""
    refused = UsageError(f"{name} is a whole number{limits}{why}, got {came(value)}")
    if isinstance(value, bool):
        raise refused
    try:
        number = index(value)
    except (TypeError, RuntimeError):  # a tensor of floats raises either
        raise refused from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise refused
    return number


def real_number(name: str, value: Any) -> float:
    """`value` as a number that is not NaN. Raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise UsageError(f"{name} is a number, got {came(value)}")
    return float(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, one of the words of `choices`. Raises UsageError with the nearest."""
    listed = f"one of {', '.join(choices)}"
    if not isinstance(value, str):
        raise UsageError(f"{name} is {listed}, got {came(value)}")
    if value not in choices:
        raise UsageError(f"unknown {name.replace('_', ' ')} {value!r}{did_you_mean(value, choices)}: {listed}")
    return value
