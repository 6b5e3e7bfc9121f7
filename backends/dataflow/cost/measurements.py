"""Raw results of Yosys runs in a file: one JSON object a line, a design, a target and what was counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path

from ....dialects.errors import UsageError
from .model import COUNTS

Measurements = dict[tuple[str, str], dict[str, float]]
"""Counts by (design, target)."""


def own_measurements() -> Path:
    """The results that the coefficients of mxloom come from."""
    return Path(__file__).with_name("measurements.jsonl")


def read_measurements(file: Path, tell: Callable[[str], None] = lambda text: None) -> Measurements:
    """The results that a file holds; of two for one design and target the later.

    A last line that was cut short (a run that was stopped as it wrote) is told and left out. Raises UsageError, with
    file and line, for any other line that is no result.
    """
    found: Measurements = {}
    text = _text(file)
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            design, target, counts = _result(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                tell(f"{file}:{number}: the last line is cut short and left out")
                break
            raise UsageError(f"{file}:{number}: {error}; a line is one result of calibrate-cost, as JSON") from None
        found[design, target] = counts
    return found


def check_appendable(file: Path) -> None:
    """Raise UsageError where no results can be added to a file. Nothing of it changes, and none appears."""
    is_new = not file.exists()
    try:
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"{file}: results cannot be added: {error.strerror or error}") from None
    if is_new:
        file.unlink()


def append_measurements(file: Path, new: Measurements) -> None:
    """Add results behind the last whole line of a file, in place of a line that was cut short."""
    text = _text(file) if file.exists() else ""
    last = text[text.rfind("\n") + 1 :]
    if last:
        try:
            _result(last)
            text += "\n"
        except ValueError:
            text = text[: -len(last)]
        file.write_text(text, encoding="utf-8")
    with file.open("a", encoding="utf-8") as out:
        for (design, target), counts in new.items():
            out.write(json.dumps({"design": design, "target": target, **counts}) + "\n")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no text in UTF-8: results of calibrate-cost are") from None


def _result(line: str) -> tuple[str, str, dict[str, float]]:
    """(design, target, counts). Raises ValueError for a line that is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("design", "target")):
        raise ValueError('no object with a "design" and a "target"')
    design, target = row.pop("design"), row.pop("target")
    if target not in COUNTS:
        raise ValueError(f'"{target}" is no target: {", ".join(COUNTS)} are')
    for name in (*COUNTS[target], *row):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
            came = "nothing" if name not in row else repr(value)
            raise ValueError(f"{name} is a count from 0 on, got {came}")
    return design, target, row
