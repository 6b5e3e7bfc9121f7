"""Whether a folder can be written: asked before the work, by the command and by saving alike."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..dialects.errors import UsageError, shortened
from .artefact_files import is_artefact


def check_target(
    directory: str | Path, replaces: Callable[[Path], bool] = is_artefact, what: str = "mxloom artefact"
) -> Path:
    """The path of a folder that can be made, or of one that can be replaced (`replaces`, told as `what`), there.

    Refused with UsageError: no name, links, files, folders of others, names that the file system does not take, and
    places where nothing can be written, which is found out by making a folder there and removing it at once.
    """
    if not str(directory) or "\0" in str(directory):
        raise UsageError(f"{str(directory)!r} is no folder's name")
    target = Path(directory)
    parent, missing = _nearest(target)
    _check_names(target, parent, missing)
    if target.is_symlink():
        raise UsageError(f"{target}: is a link; name a folder itself")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is there and is no folder; name another place")
    if not missing and not replaces(target) and any(target.iterdir()):
        raise UsageError(f"{target}: holds files that are no {what}; nothing was overwritten. Name a new folder")
    try:
        Path(tempfile.mkdtemp(prefix=".mxloom-", dir=parent)).rmdir()
    except OSError as error:
        raise UsageError(f"{target}: nothing can be written in {parent} ({error.strerror})") from error
    return target


def _nearest(target: Path) -> tuple[Path, tuple[str, ...]]:
    """The nearest folder above `target` that is there, and the names below it that are not, the last one's included."""
    missing: list[str] = []
    place = target.absolute()
    try:
        while not place.exists():
            missing.append(place.name)
            place = place.parent
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise UsageError(f"{shortened(str(target))}: cannot be a folder ({error.strerror})") from error
    if missing and not place.is_dir():
        raise UsageError(f"{target}: {place} is there and is no folder")
    return (place if missing else place.parent), tuple(missing)


def _check_names(target: Path, parent: Path, missing: tuple[str, ...]) -> None:
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in missing:
        if len(os.fsencode(name)) > longest:
            raise UsageError(f"{shortened(str(target))}: a name there takes more than {longest} bytes")
