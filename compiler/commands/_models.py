"""A model named on the command line: a folder that `mxloom compile` wrote, or a model as it came."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..compiled import Compiled


def opened(path: str) -> Compiled:
    """The artefact in the folder `path`, or the model at `path` with every tensor wide."""
    from ..artefact import is_artefact, load
    from ..driver import compile

    return load(path) if is_artefact(Path(path)) else compile(path)
