"""Names that may stand in Python code, made from names that may not: module paths, keys of dictionaries."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from keyword import iskeyword


def identifier(text: str) -> str:
    """`text` as a Python name: ASCII (Python reads other letters in a normal form), no keyword, never empty."""
    plain = re.sub(r"[^0-9A-Za-z_]", "_", text)
    if not plain.isidentifier():
        plain = f"_{plain}"
    return f"{plain}_" if iskeyword(plain) else plain


def attribute(part: str) -> str:
    """A part of a module's path as an attribute that code can read; a number stays as it is, as in lists of modules."""
    return part if part.isascii() and part.isdigit() else identifier(part)


def unique(name: str, taken: Callable[[str], bool]) -> str:
    """`name`, or the first of `name_1`, `name_2` ... that is not taken."""
    if not taken(name):
        return name
    return next(candidate for number in count(1) if not taken(candidate := f"{name}_{number}"))
