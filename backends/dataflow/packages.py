"""Packages that hardware alone needs, and that an installation without its extra lacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...dialects.errors import MxloomError


def needed(module: str, why: str) -> Any:
    """The module; raises MxloomError, saying what it is for and how to install it, where its package is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MxloomError(f'{why} {package}, which is not installed: pip install "mxloom[hardware]"') from None
